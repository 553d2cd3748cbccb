"""Extragradient's three surrogates with one oracle call a step.

Each replaces the operator at the iterate by one that is known already:

    past          half = J(z - a V),      z <- J(z - a V'),        V' = F(half)
    reflected     half = 2 z - z_before,  z <- J(z - a V')
    optimistic    half = J(z - a V),      z <- half + a V - a V'

with `V` the value of the step before. Without constraints and with a constant stepsize
all three make the same points. What they report is `half`, where the oracle was called:
so the condition costs nothing more.

Source: Y.-G. Hsieh, F. Iutzeler, J. Malick and P. Mertikopoulos (2019), On the
convergence of single-call stochastic extra-gradient methods, NeurIPS 2019, arXiv
1908.08465.
"""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from ..core._solver import Solver, State
from ._game import as_game
from ._moves import (
    Stepsize,
    check_stepsize,
    forward,
    fresh,
    permitted,
    query,
    stepsize_at,
)


class _Memory(eqx.Module):
    base: PyTree[Array]  # z, the point that moves
    known: PyTree[Array]  # V, the last oracle value; for reflection the last base
    count: Int[Array, ""]
    key: Any


class _SingleCall(Solver):
    """What the three share; they differ in `_ahead`, `_base` and what they remember."""

    stepsize: Stepsize
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        check_stepsize(type(self).__name__, self.stepsize)

    @abc.abstractmethod
    def _ahead(self, game, memory, size):
        """The point where the oracle is called."""

    @abc.abstractmethod
    def _base(self, game, memory, half, value, size):
        """The point that moves, after the call."""

    def _remember(self, base, value):
        """What the next look-ahead needs beside the point that moves."""
        del base
        return value

    def init(self, problem, start):
        game = as_game(problem)
        key, used = fresh(self.key, 1)
        value = query(game, used, start)
        known = self._remember(start, value)
        memory = _Memory(start, known, jnp.asarray(1, jnp.int32), key)
        status = permitted(game, self.stepsize, start)
        return _measured(game, start, value, memory, status)

    def step(self, problem, state):
        game, memory = as_game(problem), state.memory
        key, used = fresh(memory.key, 1)
        size = stepsize_at(self.stepsize, memory.count, state.x)
        half = self._ahead(game, memory, size)
        value = query(game, used, half)
        base = self._base(game, memory, half, value, size)
        known = self._remember(memory.base, value)
        memory = _Memory(base, known, memory.count + 1, key)
        return _measured(game, half, value, memory, state.status)


class PastExtragradient(_SingleCall):
    """Past extragradient (Popov's method): the last look-ahead serves twice.

    Monotone and L-Lipschitz operators: converges for `stepsize < 1 / (2 L)`. With noise
    and `InverseTime` steps the distance to the solution of a strongly monotone problem
    falls like `1 / step`, and so does it near a solution with a positive definite
    Jacobian. One oracle call and two projections a step.

    Args:
        stepsize: Positive, or a schedule, a function of the step's number (from 1).
        key: Makes the oracle calls noisy (`Game.sample`); the condition is then
            measured by exact calls that are not counted.

    Raises:
        ValueError: If `stepsize` is not positive. Where the game promises a Lipschitz
            constant and a constant `stepsize` is above its reciprocal, the run ends
            `DIVERGED` at once.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import PastExtragradient, bilinear_game
        >>> start = (jnp.ones(2), jnp.ones(2))
        >>> game = bilinear_game(jnp.eye(2))
        >>> bool(solve(game, PastExtragradient(0.4), start).converged)
        True

    Source:
        Popov, 1980; Hsieh, Iutzeler, Malick and Mertikopoulos, 2019 (arXiv
        1908.08465).

    Differences:
        Begins with `V = F(start)` and both points at the start.
    """

    def _ahead(self, game, memory, size):
        return game.backward(forward(memory.base, size, memory.known), size)

    def _base(self, game, memory, half, value, size):
        return game.backward(forward(memory.base, size, value), size)


class ReflectedGradient(_SingleCall):
    """Projected reflected gradient (Malitsky): looks ahead along the last move.

    Monotone and L-Lipschitz operators: converges for `stepsize < (sqrt(2) - 1) / L`.
    One oracle call and one projection a step. The oracle is called outside of the set
    too: an operator that is undefined there gives NaN, and the run ends `DIVERGED`.

    Args:
        stepsize: See `PastExtragradient`.
        key: See `PastExtragradient`.

    Raises:
        ValueError: As `PastExtragradient`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import ReflectedGradient, bilinear_game
        >>> start = (jnp.ones(2), jnp.ones(2))
        >>> game = bilinear_game(jnp.eye(2))
        >>> bool(solve(game, ReflectedGradient(0.4), start).converged)
        True

    Source:
        Malitsky, 2015; Hsieh, Iutzeler, Malick and Mertikopoulos, 2019 (arXiv
        1908.08465).

    Differences:
        Reports the reflected point, which may lie outside of the set by as much as the
        last step is long.
    """

    def _ahead(self, game, memory, size):
        return jtu.tree_map(lambda z, old: 2 * z - old, memory.base, memory.known)

    def _base(self, game, memory, half, value, size):
        return game.backward(forward(memory.base, size, value), size)

    def _remember(self, base, value):
        return base


class OptimisticGradient(_SingleCall):
    """Optimistic gradient: corrects the last guess instead of projecting again.

    Monotone and L-Lipschitz operators: converges for `stepsize < 1 / (2 L)`. One oracle
    call and one projection a step. Without constraints it is
    `half <- half - 2 a V' + a V`, the update of `optax.optimistic_gradient_descent`.

    Args:
        stepsize: See `PastExtragradient`; for negatively comonotone operators see
            `comonotone_steps`.
        key: See `PastExtragradient`.

    Raises:
        ValueError: As `PastExtragradient`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import OptimisticGradient, bilinear_game
        >>> start = (jnp.ones(2), jnp.ones(2))
        >>> game = bilinear_game(jnp.eye(2))
        >>> bool(solve(game, OptimisticGradient(0.4), start).converged)
        True

    Source:
        Daskalakis, Ilyas, Syrgkanis and Zeng, 2018 (arXiv 1711.00141); with constraints
        Hsieh, Iutzeler, Malick and Mertikopoulos, 2019 (arXiv 1908.08465;
        Tseng's correction of the past step).
    """

    def _ahead(self, game, memory, size):
        return game.backward(forward(memory.base, size, memory.known), size)

    def _base(self, game, memory, half, value, size):
        return jtu.tree_map(
            lambda h, old, new: h + size * old - size * new, half, memory.known, value
        )


def _measured(game, half, value, memory, status):
    exact, cost = value, game.cost
    if memory.key is not None:
        exact, cost = game.apply(half), 1
    condition = game.condition_with(half, exact)
    return State(half, condition, memory, evaluations=cost, status=status)
