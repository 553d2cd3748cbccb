"""Implicit differentiation of any solver function, as decorators."""

from __future__ import annotations

import functools
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ._certificate import Certificate
from ._checks import check_positive
from ._implicit import implicit_root
from ._trees import floats_as_arrays, stop_gradient, tree_norm


class ImplicitFunction:
    """A solver function whose derivative is that of the condition it satisfies.

    Made by `custom_root` and `custom_fixed_point`; called like the solver function
    itself. The solver is never differentiated: outside `jit` it may be any Python
    function of concrete arrays (a SciPy routine, say).
    """

    def __init__(self, condition, solver, has_aux, tol, settings):
        functools.update_wrapper(self, solver)
        self._name = getattr(solver, "__name__", "solver")
        self._condition = condition
        self._solver = solver
        self._has_aux = has_aux
        self._tol = tol
        self._settings = settings

    def __call__(self, start, *params):
        params = floats_as_arrays(params)
        answer = self._solver(stop_gradient(start), *stop_gradient(params))
        x, aux = answer if self._has_aux else (answer, None)
        x = jtu.tree_map(jnp.asarray, x)
        self._check_structure(x, params)
        x = implicit_root(
            lambda x: self._condition(x, *params),
            x,
            reliable=self._is_solution(x, stop_gradient(params)),
            **self._settings,
        )
        return (x, aux) if self._has_aux else x

    def certificate(self, x, *params, tol=None, strong_convexity=None) -> Certificate:
        """How far `x` is from satisfying the condition at `params`.

        Args:
            x: An answer.
            *params: The parameters it belongs to.
            tol: The tolerance to hold it to.
            strong_convexity: A lower bound `alpha > 0` of the condition's strong
                monotonicity, where one is known. Then `residual / alpha` bounds the
                distance to the solution, and that is the certificate.

        Returns:
            A `Certificate`: the residual, or the proven distance.
        """
        if strong_convexity is not None:
            check_positive("certificate", "strong_convexity", strong_convexity)
        residual = tree_norm(self._condition(x, *params))
        if strong_convexity is None:
            return Certificate(
                "residual",
                residual,
                tol=tol,
                proof=True,
                statement="value is the norm of the optimality condition at x",
            )
        return Certificate(
            "distance",
            residual / strong_convexity,
            tol=tol,
            proof=True,
            statement="|x - x*| <= value, by strong monotonicity of the condition",
            details={"residual": residual},
        )

    def _is_solution(self, x, params):
        if self._tol is None:
            return True
        return tree_norm(self._condition(x, *params)) <= self._tol

    def _check_structure(self, x, params):
        out = eqx.filter_eval_shape(self._condition, x, *params)
        sizes = [sum(leaf.size for leaf in jtu.tree_leaves(tree)) for tree in (out, x)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{self._name}: the condition must have as many entries as the "
                f"answer (got {sizes[0]} for {sizes[1]})."
            )


def custom_root(
    condition: Callable,
    *,
    has_aux: bool = False,
    tags: frozenset[str] = frozenset(),
    unique: bool = True,
    linear_solver=None,
    tol: float | None = None,
) -> Callable[[Callable], ImplicitFunction]:
    """Decorates a solver function with implicit differentiation of a root.

    Args:
        condition: Function of `(x, *params)` that is zero at the solver's answer.
        has_aux: The solver returns `(x, aux)`; `aux` is not differentiated.
        tags: What is known of the condition's Jacobian in x: a subset of
            `{"symmetric", "positive_semidefinite"}`.
        unique: See `varan.Problem.unique`.
        linear_solver: A lineax solver to use instead of the automatic choice.
        tol: Where the norm of the condition at the answer exceeds this (or is NaN),
            the answer is no solution and its derivatives are NaN. Costs one evaluation
            of the condition. Default: the answer is trusted.

    Returns:
        A decorator of functions `solver(start, *params)`. The decorated function
        differentiates with respect to `params` in forward and reverse mode and to
        any order; its method `certificate` measures an answer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import custom_root
        >>> def gradient(w, X, y, lam):
        ...     return X.T @ (X @ w - y) + lam * w
        >>> @custom_root(gradient, tags=frozenset({"positive_semidefinite"}))
        ... def ridge(start, X, y, lam):
        ...     return jnp.linalg.solve(X.T @ X + lam * jnp.eye(2), X.T @ y)
        >>> X, y = jnp.eye(2), jnp.array([1.0, 2.0])
        >>> jax.jacobian(ridge, argnums=3)(None, X, y, 1.0).round(2)
        Array([-0.25, -0.5 ], dtype=float32)

    Source:
        Blondel et al., 2022, "Efficient and Modular Implicit Differentiation"
        (arXiv 2105.15183).
    """
    settings = {"tags": tags, "unique": unique, "linear_solver": linear_solver}
    return lambda solver: ImplicitFunction(condition, solver, has_aux, tol, settings)


def custom_fixed_point(
    function: Callable,
    *,
    has_aux: bool = False,
    unique: bool = True,
    linear_solver=None,
    tol: float | None = None,
) -> Callable[[Callable], ImplicitFunction]:
    """Decorates a solver function with implicit differentiation of a fixed point.

    Args:
        function: Function of `(x, *params)` whose fixed point the solver returns.
        has_aux: The solver returns `(x, aux)`; `aux` is not differentiated.
        unique: See `varan.Problem.unique`.
        linear_solver: A lineax solver to use instead of the automatic choice.
        tol: Where the norm of the condition at the answer exceeds this (or is NaN),
            the answer is no solution and its derivatives are NaN. Costs one evaluation
            of the condition. Default: the answer is trusted.

    Returns:
        A decorator, as `custom_root` returns.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import custom_fixed_point
        >>> @custom_fixed_point(lambda x, c: 0.5 * x + c)
        ... def solver(start, c):
        ...     return 2.0 * c
        >>> float(jax.grad(solver, argnums=1)(0.0, 1.0))
        2.0

    Source:
        Blondel et al., 2022, "Efficient and Modular Implicit Differentiation"
        (arXiv 2105.15183).
    """

    def condition(x, *params):
        return jtu.tree_map(jnp.subtract, function(x, *params), x)

    settings = {"unique": unique, "linear_solver": linear_solver}
    return lambda solver: ImplicitFunction(condition, solver, has_aux, tol, settings)
