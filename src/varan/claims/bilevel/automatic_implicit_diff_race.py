"""Hypergradients by implicit differentiation: ours, jaxopt and optimistix.

All get the same inner solution and the same condition, and differentiate a validation
loss with respect to one log-penalty a feature: what is timed is the implied linear
solve and the pullbacks around it. Each library solves the symmetric positive definite
system by conjugate gradients to 1e-12 where it is told to ("cg"), and by its own choice
otherwise; jaxopt's own choice is conjugate gradients on the normal equations.
optimistix differentiates only its own solvers: it gets Newton's method with no step
allowed. Errors are relative to a dense solve, written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

from varan.claims import Contestant, Heat
from varan.core import custom_root, optimality

CG_TOL = 1e-12
CG_STEPS = 10_000
DEFINITE = frozenset({"positive_semidefinite"})


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a problem and number of parameters."""
    for name in settings["problems"]:
        for size in settings["sizes"]:
            instance = _Instance(name, size)
            yield Heat(
                name=f"{name}, {size} parameters, {2 * size} samples",
                contestants=_contestants(instance),
                error=instance.error,
                tolerance=settings["tol"],
                measure="relative error",
            )


def ridge(w, theta, X, y):
    return jnp.mean((X @ w - y) ** 2) / 2 + jnp.exp(theta) @ w**2 / 2


def logistic(w, theta, X, y):
    return jnp.mean(jax.nn.softplus(-y * (X @ w))) + jnp.exp(theta) @ w**2 / 2


OBJECTIVES = {"ridge": ridge, "logistic": logistic}


class _Instance:
    """A trained model and the data that judge it; made when first asked for."""

    def __init__(self, name: str, size: int):
        self.name, self.size = name, size
        self.gradient = optimality.stationary(OBJECTIVES[name])

    @cache  # noqa: B019 (an instance lives as long as its race)
    def arguments(self) -> tuple:
        """Log-penalties, solution, training data, validation data."""
        random, size = np.random.default_rng(self.size), self.size
        X = random.standard_normal((4 * size, size))
        signal = X @ random.standard_normal(size) / np.sqrt(size)
        y = signal + random.standard_normal(4 * size)
        y = np.sign(y) if self.name == "logistic" else y
        X, y = jnp.asarray(X), jnp.asarray(y)
        train, validation = (
            (X[: 2 * size], y[: 2 * size]),
            (X[2 * size :], y[2 * size :]),
        )
        theta = jnp.asarray(random.uniform(-3.0, 0.0, size))

        @jax.jit
        def newton(w):
            hessian = jax.jacfwd(self.gradient)(w, theta, *train)
            return w - jnp.linalg.solve(hessian, self.gradient(w, theta, *train))

        w = jnp.zeros(size)
        for _ in range(10):
            w = newton(w)
        return theta, w, train, validation

    @cache  # noqa: B019
    def exact(self) -> jax.Array:
        """The hypergradient by a dense solve, written out."""
        theta, w, train, (X, y) = self.arguments()
        hessian = jax.jacfwd(self.gradient)(w, theta, *train)
        slope = 2 * X.T @ (X @ w - y) / len(y)
        return -jnp.exp(theta) * w * jnp.linalg.solve(hessian, slope)

    def error(self, answer: jax.Array) -> float:
        exact = self.exact()
        return float(jnp.linalg.norm(answer - exact) / jnp.linalg.norm(exact))

    def hypergradient(self, solver: Callable) -> Callable[[], jax.Array]:
        def loss(theta, w, train, validation):
            w = solver(w, theta, *train)
            # The same plain loss for both problems: only the inner one is raced.
            return jnp.mean((validation[0] @ w - validation[1]) ** 2)

        return partial(jax.jit(jax.grad(loss)), *self.arguments())


def _given(start, theta, X, y):
    """The solver of this race: the solution is known."""
    return start


def _contestants(instance: _Instance) -> list[Contestant]:
    gradient, cg = instance.gradient, lx.CG(CG_TOL, CG_TOL)

    def ours(linear_solver):
        rule = custom_root(gradient, tags=DEFINITE, linear_solver=linear_solver)
        return instance.hypergradient(rule(_given))

    def jaxopt(solve):
        from jaxopt import implicit_diff, linear_solve

        call = partial(getattr(linear_solve, solve), tol=CG_TOL, maxiter=CG_STEPS)
        rule = implicit_diff.custom_root(gradient, solve=call)
        return instance.hypergradient(rule(_given))

    def optimistix(linear_solver):
        return instance.hypergradient(_optimistix(gradient, linear_solver))

    automatic = lx.AutoLinearSolver(well_posed=None)
    return [
        Contestant("ours", partial(ours, None)),
        Contestant("ours, cg", partial(ours, cg)),
        Contestant("jaxopt, cg", partial(jaxopt, "solve_cg"), package="jaxopt"),
        Contestant("jaxopt", partial(jaxopt, "solve_normal_cg"), package="jaxopt"),
        Contestant("optimistix, cg", partial(optimistix, cg), package="optimistix"),
        Contestant("optimistix", partial(optimistix, automatic), package="optimistix"),
    ]


def _optimistix(gradient: Callable, linear_solver: lx.AbstractLinearSolver) -> Callable:
    import optimistix as optx

    adjoint = optx.ImplicitAdjoint(linear_solver)

    def solver(start, theta, X, y):
        return optx.root_find(
            lambda w, args: gradient(w, *args),
            optx.Newton(rtol=1.0, atol=1.0),
            start,
            args=(theta, X, y),
            adjoint=adjoint,
            max_steps=0,
            throw=False,
            tags=frozenset({lx.positive_semidefinite_tag}),
        ).value

    return solver
