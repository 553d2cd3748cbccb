"""Past extragradient as an optax transformation, for training without constraints.

A training loop keeps one point and evaluates the gradient there: the look-ahead point
`half`. With the stepsize inside,

    half_{t+1} - half_t = -(a_t + a_{t+1}) V_t + a_t V_{t-1},

which for constant steps is `optax.optimistic_gradient_descent`, and with a schedule is
not: there the last guess must be undone with the step that it was made with.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ._moves import Stepsize, check_stepsize, stepsize_at


class PastExtragradientState(NamedTuple):
    """The last gradient, the step it was used with, and how many updates there were."""

    past: PyTree[Array]
    stepsize: Float[Array, ""]
    updates: Int[Array, ""]


def scale_by_past_extragradient(stepsize: Stepsize) -> optax.GradientTransformation:
    """Single-call extragradient steps for any training loop.

    The stepsize is included: chain it with `optax.scale(-1.0)` to descend. For a game
    feed it each player's own gradient (`Game.apply`). Without constraints past
    extragradient, reflected and optimistic gradient are one method: this one. Costs one
    copy of the parameters.

    Args:
        stepsize: Positive, or a schedule, a function of the update's number (from 1).

    Returns:
        An optax transformation of updates with any tree structure.

    Raises:
        ValueError: If `stepsize` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.games import bilinear_game, scale_by_past_extragradient
        >>> game = bilinear_game(jnp.eye(2))
        >>> method = optax.chain(scale_by_past_extragradient(0.4), optax.scale(-1.0))
        >>> z = (jnp.ones(2), jnp.ones(2))
        >>> state = method.init(z)
        >>> for _ in range(100):
        ...     updates, state = method.update(game.apply(z), state)
        ...     z = optax.apply_updates(z, updates)
        >>> bool(jnp.max(jnp.abs(z[0])) < 1e-3)
        True

    Source:
        Hsieh, Iutzeler, Malick and Mertikopoulos, 2019 (arXiv 1908.08465).

    Differences:
        The first gradient counts as its own past, as in `PastExtragradient`.
    """
    check_stepsize("scale_by_past_extragradient", stepsize)

    def init(params):
        zero = jnp.zeros((), jnp.result_type(*jax.tree.leaves(params)))
        return PastExtragradientState(
            optax.tree.zeros_like(params), zero, jnp.asarray(0, jnp.int32)
        )

    def update(updates, state, params=None):
        del params
        size = stepsize_at(stepsize, state.updates + 1, updates)
        # Zero at first, when there is no guess to undo.
        before = state.stepsize.astype(size.dtype)
        moved = jax.tree.map(
            lambda g, old: (before + size) * g - before * old, updates, state.past
        )
        return moved, PastExtragradientState(updates, size, state.updates + 1)

    return optax.GradientTransformation(init, update)
