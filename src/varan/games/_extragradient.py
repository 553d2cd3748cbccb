"""Extragradient, with two step sizes and two timescales, and gradient descent-ascent.

Extragradient looks ahead with one step and moves with the operator found there:

    half = J(z - a Lam F(z)),   z <- J(z - b Lam F(half)).

Two step sizes `b < a` let it converge for operators that are not monotone (negatively
comonotone ones), and a timescale `Lam = diag(I / tau, I)` that slows the first player
down makes its limits the local minimax points of a saddle function. Descent-ascent
leaves the first half out: it needs an operator with curvature, and circles or diverges
where there is rotation alone. Two oracle calls a step, and one.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..core._solver import Solver, State
from ..core._status import Status
from ._game import as_game
from ._moves import (
    Stepsize,
    check_stepsize,
    check_timescale,
    forward,
    fresh,
    permitted,
    query,
    slow_first,
    stepsize_at,
)


class _Memory(eqx.Module):
    force: PyTree[Array]  # F at the iterate
    count: Int[Array, ""]
    key: Any


class Extragradient(Solver):
    """Extragradient for games and variational inequalities.

    For a monotone operator with Lipschitz constant L, `stepsize < 1 / L` converges. Two
    oracle calls a step; the one that measures the condition is the next step's first.

    Args:
        stepsize: Of the look-ahead: positive, or a schedule, a function of the step's
            number (from 1).
        update_stepsize: Of the move; by default the same. For a `rho`-negatively
            comonotone operator see `comonotone_steps`.
        timescale: `tau >= 1`: the first of two players moves by a `tau`-th. By default
            1, for iterates of any structure.
        key: Makes the oracle calls noisy (`Game.sample`); the condition is then still
            measured exactly, in calls that are not counted.

    Raises:
        ValueError: If a setting is out of its range. Where the game promises a
            Lipschitz constant and a constant `stepsize` is above its reciprocal, the
            run ends `DIVERGED` at once.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import Extragradient, bilinear_game
        >>> game = bilinear_game(jnp.eye(2))
        >>> start = (jnp.ones(2), jnp.ones(2))
        >>> bool(solve(game, Extragradient(0.5), start).converged)
        True

    Source:
        Korpelevich, 1976; two step sizes: Gorbunov, Taylor, Horvath and Gidel, 2023
        (arXiv 2210.13831); two timescales: Chae, Kim and Kim, 2024 (arXiv
        2305.16242).

    Differences:
        With a set or a resolvent, both halves take the resolvent's step.
    """

    stepsize: Stepsize
    update_stepsize: Stepsize | None = None
    timescale: float | Float[Array, ""] | None = None
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        check_stepsize("Extragradient", self.stepsize)
        if self.update_stepsize is not None:
            check_stepsize("Extragradient", self.update_stepsize, "update_stepsize")
        check_timescale("Extragradient", self.timescale)

    def init(self, problem, start):
        game = as_game(problem)
        return _begin(self, game, start, permitted(game, self.stepsize, start))

    def step(self, problem, state):
        game, memory, z = as_game(problem), state.memory, state.x
        key, first, second = fresh(memory.key, 2)
        ahead = stepsize_at(self.stepsize, memory.count, z)
        size = ahead
        if self.update_stepsize is not None:
            size = stepsize_at(self.update_stepsize, memory.count, z)
        force = memory.force if first is None else query(game, first, z)
        half = _move(game, z, ahead, force, self.timescale)
        z = _move(game, z, size, query(game, second, half), self.timescale)
        return _measured(game, z, memory.count + 1, key, 2)


class GradientDescentAscent(Solver):
    """Simultaneous gradient descent-ascent: `z <- J(z - stepsize Lam F(z))`.

    The forward-backward method of monotone inclusions: converges for cocoercive
    operators with `stepsize < 2 / L`, and for `mu`-strongly monotone ones with
    `stepsize < 2 mu / L^2`. One oracle call a step.

    Args:
        stepsize: Positive, or a schedule, a function of the step's number (from 1).
        timescale: See `Extragradient`.
        key: See `Extragradient`.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import Game, GradientDescentAscent
        >>> game = Game.from_saddle(lambda x, y: x * x / 2 + x * y - y * y / 2)
        >>> start = (jnp.array(1.0), jnp.array(1.0))
        >>> bool(solve(game, GradientDescentAscent(0.3), start).converged)
        True

    Source:
        Arrow, Hurwicz and Uzawa, 1958; forward-backward: Lions and Mercier, 1979.
    """

    stepsize: Stepsize
    timescale: float | Float[Array, ""] | None = None
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        check_stepsize("GradientDescentAscent", self.stepsize)
        check_timescale("GradientDescentAscent", self.timescale)

    def init(self, problem, start):
        return _begin(self, as_game(problem), start)

    def step(self, problem, state):
        game, memory, z = as_game(problem), state.memory, state.x
        key, used = fresh(memory.key, 1)
        force = memory.force if used is None else query(game, used, z)
        size = stepsize_at(self.stepsize, memory.count, z)
        z = _move(game, z, size, force, self.timescale)
        return _measured(game, z, memory.count + 1, key, 1)


def _begin(solver, game, start, status: Any = Status.RUNNING):
    calls = 1 if solver.key is None else 0
    one = jnp.asarray(1, jnp.int32)
    return _measured(game, start, one, solver.key, calls, status)


def _measured(game, z, count, key, calls, status: Any = Status.RUNNING):
    force = game.apply(z)
    condition = game.condition_with(z, force)
    # A noisy run never reads the exact value again: kept out of its memory, it costs
    # nothing where nobody reads the condition either.
    memory = _Memory(force if key is None else None, count, key)
    cost = calls * (game.cost if key is None else 1)
    return State(z, condition, memory, evaluations=cost, status=status)


def _move(game, z, size, force, timescale):
    return game.backward(forward(z, size, slow_first(force, timescale)), size)
