"""One penalty of a logistic regression: ours and sparho, to 1 % of the best penalty.

The penalty minimises the loss on held-out samples, from a start where it is 1. sparho
has HOAG with an adaptive step, and plain gradient steps; both solve the lower level by
what their user brings, here Newton's method in NumPy to the accuracy asked for. Ours
solve it themselves, by accelerated gradient steps: MAID with proved constants, HOAG
with a fixed step. Every contestant has the cheapest of the settings tried that arrives
in all heats: for sparho rounds and accuracies (of the plain steps their rate), for ours
the first step and accuracy and the tolerance at which they stop; ten to twelve each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from varan import solve
from varan.bilevel import HOAG, MAID, BilevelProblem, Smoothness
from varan.claims import Contestant, Heat
from varan.data import breast_cancer, digit_images, split, standardise

TOLERANCE = 0.01
OURS_MAID = {
    "stepsize": 10.0,
    "epsilon": 0.1,
    "delta": 0.1,
    "shrink": 0.5,
    "convex": True,
}
OURS_HOAG = {"stepsize": 30.0, "epsilon": 1e-3}
OURS_TOL = 1e-4
SPARHO_HOAG = {"n_iter": 30, "inner_tol": 1e-3}
SPARHO_PLAIN = {"n_iter": 20, "lr": 30.0, "tol": 1e-5}


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a table and number of training samples."""
    for table, samples in settings["tasks"]:
        instance = _Instance(table, samples)
        yield Heat(
            name=f"{table}, {samples} training samples",
            contestants=_contestants(instance),
            error=instance.error,
            tolerance=TOLERANCE,
            measure="distance to the best penalty, relative",
        )


class _Instance:
    """Training and held-out samples of one table, as many of each."""

    def __init__(self, table: str, samples: int):
        self.table, self.samples = table, samples

    @cache  # noqa: B019 (an instance lives as long as its race)
    def data(self) -> tuple[np.ndarray, ...]:
        """Inputs and labels of the training part, of the held-out part."""
        inputs, labels = breast_cancer() if self.table != "digits" else _odd_digits()
        train, held, _ = split((inputs, labels), [self.samples, self.samples], 0)
        X, V = standardise(train[0], held[0])
        return X, train[1], V, held[1]

    @cache  # noqa: B019
    def best(self) -> float:
        """The logarithm of the best penalty, to eight digits."""
        from scipy.optimize import minimize_scalar

        X, y, V, z = self.data()

        def loss(log_penalty):
            w = _newton(X, y, np.exp(log_penalty), 1e-12)
            return np.mean(np.logaddexp(0, -z * (V @ w)))

        options = {"xatol": 1e-8}
        found = minimize_scalar(
            loss, bounds=(-12.0, 3.0), method="bounded", options=options
        )
        return float(found.x)

    def error(self, log_penalty: Any) -> float:
        return abs(float(np.expm1(float(log_penalty) - self.best())))


def _odd_digits():
    images, labels = digit_images()
    return images.reshape(len(images), -1), 2.0 * (labels % 2) - 1


def _contestants(instance: _Instance) -> list[Contestant]:
    sparho = {"package": "sparho", "hint": "pip install sparho"}
    return [
        Contestant("ours, MAID", partial(_ours, instance, MAID, OURS_MAID)),
        Contestant("ours, HOAG", partial(_ours, instance, HOAG, OURS_HOAG)),
        Contestant("sparho, hoag_search", partial(_hoag, instance), **sparho),
        Contestant("sparho, grad_search", partial(_plain, instance), **sparho),
    ]


def _loss(w, data):
    return jnp.mean(jax.nn.softplus(-data[1] * (data[0] @ w)))


def _above(x, w, train, held):
    return _loss(w, held)


def _below(x, w, train, held):
    return _loss(w, train) + jnp.exp(x) * jnp.sum(w**2) / 2


def _constants(curvature, upper, third, x):
    penalty = jnp.exp(x)
    return Smoothness(penalty, curvature + penalty, upper, hessian=third, cross=penalty)


def _ours(instance, method, settings):
    X, y, V, z = (jnp.asarray(v) for v in instance.data())
    problem = BilevelProblem(_above, _below, (X, y), (V, z))
    curvature, upper = (np.linalg.norm(v, 2) ** 2 / (4 * len(v)) for v in (X, V))
    # The logistic loss has third derivatives up to 0.0963.
    third = 0.0963 * np.mean(np.linalg.norm(X, axis=1) ** 3)
    constants = Partial(_constants, curvature, upper, third)
    solver = method(constants, **settings)
    start = problem.point(jnp.zeros(()), jnp.zeros(X.shape[1]))

    def run():
        end = solve(problem, solver, start, tol=OURS_TOL, differentiate="none")
        return jax.block_until_ready(end.x.x)

    return run


def _newton(X, y, penalty, tol):
    """The regression's weights: Newton's method until the gradient is below `tol`."""
    w = np.zeros(X.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(y * (X @ w)))
        gradient = -(X.T @ (y * p)) / len(y) + penalty * w
        if np.linalg.norm(gradient) < tol:
            break
        hessian = (X.T * (p * (1 - p))) @ X / len(y) + penalty * np.eye(w.size)
        w = w - np.linalg.solve(hessian, gradient)
    return w


def _task(instance):
    """sparho's problem, criterion and solver; it sums losses, where ours averages."""
    import sparho  # pyright: ignore[reportMissingImports]
    from sparho.adapters import as_solver  # pyright: ignore[reportMissingImports]

    X, y, V, z = instance.data()
    n = len(y)
    problem = sparho.Problem(
        sparho.LogisticLoss(),
        sparho.ElasticNet(rho=0.0),
        np.concatenate([X, V]),
        np.concatenate([y, z]),
    )
    criterion = sparho.HeldOutLogistic(np.arange(n), np.arange(n, 2 * n))
    every = np.arange(X.shape[1], dtype=np.int32)

    def weights(problem, penalty, *, tol=1e-8):
        w = _newton(problem.design, problem.target, penalty / problem.n_samples, tol)
        return sparho.SolverResult(w, every, 0.0, 0)

    return problem, criterion, as_solver(weights), float(n)


def _hoag(instance):
    import sparho  # pyright: ignore[reportMissingImports]

    return _search(instance, sparho.hoag_search, SPARHO_HOAG)


def _plain(instance):
    import sparho  # pyright: ignore[reportMissingImports]

    return _search(instance, sparho.grad_search, SPARHO_PLAIN)


def _search(instance, search, settings):
    problem, criterion, solver, n = _task(instance)

    def run():
        found = search(problem, n, solver=solver, criterion=criterion, **settings)
        return np.log(found.best_hyperparam / n)

    return run
