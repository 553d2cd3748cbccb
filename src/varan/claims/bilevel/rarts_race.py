"""Searches of a linear architecture: ours and gradhpo, to within 5 % of the answer.

The lower level is `|y - A x|^2 / 2`, whose least value is 0 for every `x`, so that the
relaxation of RARTS tends to the bilevel answer, here to within its bias of 1/20; one
training step of length 1 solves it, so that looking one step ahead is exact. gradhpo
has that method as its greedy optimiser with one unrolled step. All know the constants:
each takes the fewest rounds that reach 5 % at every size, in steps of five for the
look-ahead and of fifty for RARTS. gradhpo runs as its users run it, one compiled step a
round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varan.bilevel import DARTS, RARTS, BilevelProblem, trajectory
from varan.claims import Contestant, Heat

WEIGHT, RIDGE, TOLERANCE = 40.0, 0.1, 0.05
# Of the reduced problem's curvature 1.1 (ours and gradhpo's look-ahead).
LOOK_AHEAD = {"stepsize": 0.9, "rounds": 10}
RELAXED = {"stepsize": 0.02, "lower_stepsize": 0.012, "rounds": 650}


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a size."""
    for size in settings["sizes"]:
        instance = _Instance(size)
        yield Heat(
            name=f"{size} architecture numbers, {size} weights",
            contestants=[
                Contestant("ours, DARTS of order 2", partial(_darts, instance)),
                Contestant("ours, RARTS", partial(_rarts, instance)),
                Contestant(
                    "gradhpo, greedy",
                    partial(_gradhpo, instance),
                    package="gradhpo",
                    hint="pip install gradhpo",
                ),
            ],
            error=instance.error,
            tolerance=TOLERANCE,
            measure="relative distance to the bilevel answer",
            notes=[
                "DARTS and gradhpo's greedy optimiser are the same method; RARTS "
                "solves the same problem without second derivatives."
            ],
        )


class _Instance:
    """A map with singular values between 0.5 and 1, and a target."""

    def __init__(self, size: int):
        self.size = size

    @cache  # noqa: B019 (an instance lives as long as its race)
    def data(self) -> tuple[jax.Array, jax.Array]:
        random = np.random.default_rng(self.size)
        left, right = (
            np.linalg.qr(random.standard_normal((self.size, self.size)))[0]
            for _ in range(2)
        )
        matrix = left * np.linspace(0.5, 1.0, self.size) @ right
        return jnp.asarray(matrix), jnp.asarray(random.standard_normal(self.size))

    @cache  # noqa: B019
    def exact(self) -> jax.Array:
        matrix, target = self.data()
        gram = matrix.T @ matrix + RIDGE * jnp.eye(self.size)
        return jnp.linalg.solve(gram, matrix.T @ target)

    def error(self, answer: jax.Array) -> float:
        exact = self.exact()
        return float(jnp.linalg.norm(answer - exact) / jnp.linalg.norm(exact))


def _upper(x, y, matrix, target):
    return jnp.sum((y - target) ** 2) / 2 + RIDGE * jnp.sum(x * x) / 2


def _lower(x, y, matrix, target):
    return jnp.sum((y - matrix @ x) ** 2) / 2


def _darts(instance):
    method = DARTS(LOOK_AHEAD["stepsize"], 1.0, 1.0, order=2)
    return _ours(instance, method, LOOK_AHEAD["rounds"])


def _rarts(instance):
    method = RARTS(RELAXED["stepsize"], RELAXED["lower_stepsize"], WEIGHT, WEIGHT)
    return _ours(instance, method, RELAXED["rounds"])


def _ours(instance, method, rounds):
    problem = BilevelProblem(_upper, _lower, *instance.data())
    start = problem.point(jnp.zeros(instance.size), jnp.zeros(instance.size))

    def run():
        last, _ = trajectory(
            problem, method, start, _nothing, steps=rounds, every=rounds
        )
        return last.x

    return run


def _nothing(problem, iterate):
    del problem, iterate
    return jnp.zeros(())


def _gradhpo(instance):
    import optax
    from gradhpo.algorithms.greedy import GreedyOptimizer  # pyright: ignore[reportMissingImports]

    matrix, target = instance.data()
    optimiser = GreedyOptimizer(
        inner_optimizer=optax.sgd(1.0),
        outer_optimizer=optax.sgd(LOOK_AHEAD["stepsize"]),
        unroll_steps=1,
    )

    def train_loss(params, hyper, batch):
        return _lower(hyper, params, *batch)

    def valid_loss(params, hyper, batch):
        return _upper(hyper, params, *batch)

    def run():
        zeros = jnp.zeros(instance.size)
        state = optimiser.init(zeros, zeros)
        for _ in range(LOOK_AHEAD["rounds"]):
            batch = (matrix, target)
            state = optimiser.step(state, batch, batch, train_loss, valid_loss)
        return state.hyperparams

    return run
