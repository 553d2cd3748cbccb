"""The gradient flow of a game by the classical Runge-Kutta method.

The flow `z' = -F(z)` contracts wherever `F` is strongly monotone in some norm; Euler's
steps are gradient descent-ascent and must be short where there is rotation. Four
calls of the operator give a step of fourth order, which follows rotations longer.
"""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PyTree

from ..core._solver import Solver, State
from ._game import as_game
from ._moves import Stepsize, check_stepsize, forward, stepsize_at


class _Memory(eqx.Module):
    force: PyTree[Array]  # F at the iterate
    count: Int[Array, ""]


class RungeKutta(Solver):
    """The classical fourth-order step on the flow `z' = -F(z)`, for games without sets.

    Four oracle calls a step. `small_gain_certificate` says which steps contract.

    Args:
        stepsize: Positive, or a schedule, a function of the step's number (from 1).

    Raises:
        ValueError: If the stepsize is not positive, or the game has a set or resolvent:
            a projected Runge-Kutta step does not come to rest at a solution.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import RungeKutta, rotation_game
        >>> game = rotation_game(1.0, 1.5)  # almost rotation alone
        >>> bool(solve(game, RungeKutta(2.0), jnp.ones(2)).converged)
        True

    Source:
        Kutta, 1901; for games: Sharma, 2025 (arXiv 2512.06791).
    """

    stepsize: Stepsize

    def __check_init__(self):
        check_stepsize("RungeKutta", self.stepsize)

    def init(self, problem, start):
        game = as_game(problem)
        if game.constrained:
            raise ValueError(
                "RungeKutta: `problem` must be a game without `project` and "
                "`resolvent` (got one with). Use GradientDescentAscent or "
                "Extragradient."
            )
        return _measured(game, start, jnp.asarray(1, jnp.int32), 1)

    def step(self, problem, state):
        game, memory, z = as_game(problem), state.memory, state.x
        h = stepsize_at(self.stepsize, memory.count, z)
        first = memory.force
        second = game.apply(forward(z, h / 2, first))
        third = game.apply(forward(z, h / 2, second))
        fourth = game.apply(forward(z, h, third))
        mean = jtu.tree_map(
            lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, first, second, third, fourth
        )
        return _measured(game, forward(z, h, mean), memory.count + 1, 4)


def _measured(game, z, count, calls):
    force = game.apply(z)
    return State(
        z,
        game.condition_with(z, force),
        _Memory(force, count),
        evaluations=calls * game.cost,
    )
