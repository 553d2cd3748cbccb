"""Race: hypergradients by implicit differentiation, ours against jaxopt and optimistix.

All contestants get the same inner solution and the same condition, and differentiate a
validation loss with respect to one log-penalty a feature: what is timed is the implied
linear solve and the pullbacks around it. Each library solves the symmetric positive
definite system by conjugate gradients to 1e-12 where it is told to ("cg"), and by its
own choice otherwise; jaxopt's own choice is conjugate gradients on the normal
equations. optimistix differentiates only its own solvers: it gets Newton's method with
no step allowed.

Run it in an environment with varan, jaxopt 0.8.5 and optimistix:

    python benchmarks/implicit_race.py [--problems ridge] [--sizes 100 400 1000]
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import jaxopt
import lineax as lx
import numpy as np
import optimistix as optx
from jaxopt import linear_solve

from varan.core import custom_root, optimality
from varan.lab.race import race

TOLERANCE = 1e-12
DEFINITE = frozenset({"positive_semidefinite"})


def ridge(w, theta, X, y):
    return jnp.mean((X @ w - y) ** 2) / 2 + jnp.exp(theta) @ w**2 / 2


def logistic(w, theta, X, y):
    return jnp.mean(jax.nn.softplus(-y * (X @ w))) + jnp.exp(theta) @ w**2 / 2


OBJECTIVES = {"ridge": ridge, "logistic": logistic}


def given(start, theta, X, y):
    """The solver of this race: the solution is known."""
    return start


def varan_solver(gradient, linear_solver):
    return custom_root(gradient, tags=DEFINITE, linear_solver=linear_solver)(given)


def jaxopt_solver(gradient, solve):
    settings = {} if solve is None else {"solve": solve}
    return jaxopt.implicit_diff.custom_root(gradient, **settings)(given)


def optimistix_solver(gradient, linear_solver):
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


def contestants(gradient):
    cg = lx.CG(TOLERANCE, TOLERANCE)

    def jaxopt_cg(matvec, b):
        return linear_solve.solve_cg(matvec, b, tol=TOLERANCE, maxiter=10_000)

    def jaxopt_normal(matvec, b):
        return linear_solve.solve_normal_cg(matvec, b, tol=TOLERANCE, maxiter=10_000)

    return {
        "varan": varan_solver(gradient, None),
        "varan cg": varan_solver(gradient, cg),
        "jaxopt cg": jaxopt_solver(gradient, jaxopt_cg),
        "jaxopt": jaxopt_solver(gradient, jaxopt_normal),
        "optimistix cg": optimistix_solver(gradient, cg),
        "optimistix": optimistix_solver(gradient, lx.AutoLinearSolver(well_posed=None)),
    }


def instance(name, size):
    random = np.random.default_rng(size)
    X = jnp.asarray(random.standard_normal((4 * size, size)))
    signal = X @ jnp.asarray(random.standard_normal(size)) / np.sqrt(size)
    y = signal + jnp.asarray(random.standard_normal(4 * size))
    objective = OBJECTIVES[name]
    y = jnp.sign(y) if name == "logistic" else y
    train, validation = (X[: 2 * size], y[: 2 * size]), (X[2 * size :], y[2 * size :])
    theta = jnp.asarray(random.uniform(-3.0, 0.0, size))
    gradient = optimality.stationary(objective)

    @jax.jit
    def newton(w):
        hessian = jax.jacfwd(gradient)(w, theta, *train)
        return w - jnp.linalg.solve(hessian, gradient(w, theta, *train))

    w = jnp.zeros(size)
    for _ in range(10):
        w = newton(w)
    return gradient, w, theta, train, validation


def measure(name, size, repeats):
    gradient, w, theta, train, validation = instance(name, size)

    def hypergradient(solver):
        def loss(theta, w, train, validation):
            w = solver(w, theta, *train)
            # The same plain loss for both problems: only the inner one is raced.
            return jnp.mean((validation[0] @ w - validation[1]) ** 2)

        return jax.grad(loss)

    arguments = (theta, w, train, validation)
    calls, seconds = {}, {}
    for contestant, solver in contestants(gradient).items():
        begin = time.perf_counter()
        compiled = jax.jit(hypergradient(solver)).lower(*arguments).compile()
        seconds[contestant] = time.perf_counter() - begin
        calls[contestant] = functools.partial(compiled, *arguments)
    result = race(calls, repeats=repeats, warmup=2, reference="jaxopt cg")
    wanted = exact(gradient, w, arguments)
    print(f"\n{name}, {size} parameters, {2 * size} samples")
    print(result.table())
    record = result.to_dict() | {"problem": name, "size": size}
    for contestant, value in result.answers.items():
        error = float(jnp.linalg.norm(value - wanted) / jnp.linalg.norm(wanted))
        compile_s = seconds[contestant]
        print(f"  {contestant}: error {error:.1e}, compiled in {compile_s:.2f} s")
        record["contestants"][contestant] |= {"error": error, "compile_s": compile_s}
    return record


def exact(gradient, w, arguments):
    """The hypergradient by a dense solve, written out."""
    theta, _, train, (X_val, y_val) = arguments
    hessian = jax.jacfwd(gradient)(w, theta, *train)
    slope = 2 * X_val.T @ (X_val @ w - y_val) / len(y_val)
    return -jnp.exp(theta) * w * jnp.linalg.solve(hessian, slope)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 400, 1000])
    parser.add_argument(
        "--problems", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES)
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="write all times to this file")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    packages = ("jax", "jaxopt", "optimistix", "lineax")
    versions = {package: version(package) for package in packages}
    print(platform.processor() or platform.machine(), versions)
    records = [
        measure(name, size, options.repeats)
        for name in options.problems
        for size in options.sizes
    ]
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"versions": versions, "races": records}, file, indent=1)


if __name__ == "__main__":
    main()
