"""Halpern iteration: every step is pulled back to the start, ever more weakly.

    z_{k+1} = lam_k z_0 + (1 - lam_k) J(z_k - a F(z_k)),   lam_k = 1 / (k + 2).

The anchor makes the residual itself fall like `1 / k`, at the last iterate, which no
method without one achieves for all cocoercive operators. The same points in one call a
step; for operators that are only monotone take `Extragradient`, or the inexact version
`VarianceReducedHalpern`.
"""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from ..core._checks import check_positive
from ..core._solver import Solver, State
from ._game import as_game
from ._moves import forward


class _Memory(eqx.Module):
    anchor: PyTree[Array]
    force: PyTree[Array]
    count: Int[Array, ""]


class Halpern(Solver):
    """Anchored forward-backward steps for a cocoercive operator.

    With `F` 1/L-cocoercive and `stepsize <= 2 / L` the residual of step k is at most
    `2 ||z_0 - z*|| / (stepsize (k + 1))` for an unconstrained problem. One oracle call
    a step.

    Args:
        stepsize: Positive; `1 / L` by the variance-reduced version's analysis, at most
            `2 / L`.

    Raises:
        ValueError: If `stepsize` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import Game, Halpern
        >>> game = Game(lambda z: z - 1.0, monotone=True)
        >>> solution = solve(game, Halpern(1.0), jnp.zeros(2), max_steps=50, tol=1e-6)
        >>> bool(solution.residual <= 2 * 2**0.5 / 50)
        True

    Source:
        Halpern, 1967; the rate: Lieder, 2021 (theorem 2.1); Diakonikolas, 2020 (arXiv
        2002.08872).
    """

    stepsize: float | Float[Array, ""]

    def __check_init__(self):
        check_positive("Halpern", "stepsize", self.stepsize)

    def init(self, problem, start):
        return _measured(as_game(problem), start, start, jnp.asarray(0, jnp.int32))

    def step(self, problem, state):
        game, memory = as_game(problem), state.memory
        size = jnp.asarray(self.stepsize, jnp.result_type(*jtu.tree_leaves(state.x)))
        moved = game.backward(forward(state.x, size, memory.force), size)
        z = anchored(memory.anchor, moved, 1 / (memory.count.astype(size.dtype) + 2))
        return _measured(game, z, memory.anchor, memory.count + 1)


def anchored(anchor: PyTree[Array], z: PyTree[Array], weight) -> PyTree[Array]:
    """`weight * anchor + (1 - weight) * z`."""
    return jtu.tree_map(lambda a, v: weight * a + (1 - weight) * v, anchor, z)


def _measured(game, z, anchor, count):
    force = game.apply(z)
    memory = _Memory(anchor, force, count)
    return State(z, game.condition_with(z, force), memory, evaluations=game.cost)
