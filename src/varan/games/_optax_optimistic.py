"""Adaptive optimistic gradient descent as an optax transformation.

Without constraints the two moves of optimistic mirror descent combine into one update
of the played point, which is all an optax training loop keeps:

    x_{t+1} - x_t = -(eta_t + eta_{t+1}) g_t + eta_t g_{t-1},

with `eta_t = D / sqrt(10 D^2 L^2 + 4 G^2 + sum_{s<t} ||g_s - g_{s-1}||^2)`. For a
constant stepsize this is optimistic gradient descent.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ..core._checks import check_nonnegative, check_positive
from ._geometry import EuclideanBall
from ._online import tree_dtype
from ._regimes import Convex


class OptimisticAdaptiveState(NamedTuple):
    """The last gradient, the squared errors of the guesses so far, and the stepsize."""

    hint: PyTree[Array]
    missed: Float[Array, ""]
    stepsize: Float[Array, ""]


def scale_by_optimistic_adaptive(
    diameter: float, gradient_bound: float, smoothness: float = 0.0
) -> optax.GradientTransformation:
    """Optimistic gradients with the stepsizes of `OptimisticOMD`, unconstrained.

    The stepsize is included: chain it with `optax.scale(-1.0)` to descend, or with a
    further factor of your own.

    Args:
        diameter: `D`, how far the answer may lie from the start and the iterates from
            each other; scales the stepsize.
        gradient_bound: `G`, a bound on the gradients' norm, positive.
        smoothness: `L` of the expected loss, non-negative.

    Returns:
        An optax transformation of updates with any tree structure.

    Raises:
        ValueError: if a constant is out of range.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.games import scale_by_optimistic_adaptive
        >>> optimiser = optax.chain(scale_by_optimistic_adaptive(2.0, 2.0, 1.0),
        ...                         optax.scale(-1.0))
        >>> x = jnp.array([1.0, -1.0])
        >>> state = optimiser.init(x)
        >>> for _ in range(200):
        ...     updates, state = optimiser.update(x, state)
        ...     x = optax.apply_updates(x, updates)
        >>> bool(jnp.linalg.norm(x) < 1e-3)
        True

    Source: S. Chen et al., 2023 (arXiv 2302.04552), convex losses.

    Differences: no projection, so the theory holds only while the iterates stay within
        `diameter` of each other.
    """
    check_positive("scale_by_optimistic_adaptive", "diameter", diameter)
    check_positive("scale_by_optimistic_adaptive", "gradient_bound", gradient_bound)
    check_nonnegative("scale_by_optimistic_adaptive", "smoothness", smoothness)
    # The ball only lends its diameter and norm; nothing is projected.
    regime, space = Convex(gradient_bound, smoothness), EuclideanBall(diameter / 2)

    def init(params):
        zero = jnp.zeros((), tree_dtype(params))
        stepsize = regime.metric(space, zero, zero + 1)
        return OptimisticAdaptiveState(optax.tree.zeros_like(params), zero, stepsize)

    def update(updates, state, params=None):
        missed = regime.learn(space, state.missed, updates, state.hint)
        stepsize = regime.metric(space, missed, missed)
        both = state.stepsize + stepsize
        scaled = jax.tree.map(
            lambda g, hint: both * g - state.stepsize * hint, updates, state.hint
        )
        return scaled, OptimisticAdaptiveState(updates, missed, stepsize)

    return optax.GradientTransformation(init, update)
