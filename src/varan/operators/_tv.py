"""The proximal operator of the total variation in one dimension, exactly.

With the right end fixed at `b`, the best objective of the first k entries is a convex
piecewise quadratic of `b`. Its derivative, clipped to `[-weight, weight]`, is all that
the next entry needs to know; its kinks live in a queue that loses them at both ends and
gains one there per entry, O(n) in all. Where it was clipped is where the answer jumps:
a pass back reads the answer off. No tolerance, no iteration to convergence.

Source: N. A. Johnson, A dynamic programming algorithm for the fused lasso and
L0-segmentation, Journal of Computational and Graphical Statistics 22 (2013).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..core._checks import check_nonempty, check_nonnegative, check_shape
from ._blocks import run_sums, runs


def prox_tv1d(
    x: Float[Array, " n"],
    weight: Array | float = 1.0,
    stepsize: Float[Array, ""] | float = 1.0,
) -> Float[Array, " n"]:
    """The proximal operator of `weight * sum_i |x_{i+1} - x_i|`: fused lasso denoising.

    Exact, O(n) whatever the weight. The answer is constant on blocks and the block's
    mean but for a pull towards its neighbours; so is the derivative.

    Args:
        x: A signal, (n,); use `vmap` for batches.
        weight: The penalty's weight, nonnegative: a scalar, or (n - 1,) with one for
            each pair of neighbours.
        stepsize: Nonnegative scalar.

    Returns:
        A vector like `x`.

    Raises:
        ValueError: if `x` is not a non-empty vector, or `weight` has another shape, or
            `weight` or `stepsize` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import prox_tv1d
        >>> signal = jnp.array([0.0, 1.0, 0.5, 5.0, 6.0, 4.0])
        >>> [float(v) for v in prox_tv1d(signal, 0.75)]
        [0.75, 0.75, 0.75, 4.75, 4.75, 4.75]

    Source: Johnson (2013), algorithm 1.
    """
    check_shape("prox_tv1d", "x", x, (None,))
    check_nonempty("prox_tv1d", "x", x)
    check_nonnegative("prox_tv1d", "weight", weight)
    check_nonnegative("prox_tv1d", "stepsize", stepsize)
    edges = x.shape[0] - 1
    if jnp.ndim(weight):
        check_shape("prox_tv1d", "weight", weight, (edges,))
    level = jnp.asarray(weight, x.dtype) * jnp.asarray(stepsize, x.dtype)
    return _denoise(x, jnp.broadcast_to(level, (edges,)))


@jax.custom_jvp
def _denoise(x, level):
    # The operator commutes with shifts; a small mean keeps the queue's sums small.
    mean = jnp.mean(x)
    lower, upper = _clips(x - mean, level)

    def back(right, bounds):
        value = jnp.minimum(jnp.maximum(right, bounds[0]), bounds[1])
        return value, value

    last = lower[-1]
    _, rest = lax.scan(back, last, (lower[:-1], upper[:-1]), reverse=True)
    answer = mean + jnp.concatenate([rest, last[None]])
    bad = jnp.isnan(mean) | ~jnp.all(level >= 0)
    return jnp.where(bad, jnp.nan, answer)


@_denoise.defjvp
def _denoise_jvp(primals, tangents):
    (x, level), (dx, dlevel) = primals, tangents
    answer = _denoise(x, level)
    # A block's value is the mean of its entries, each pulled by its jumps.
    pull = jnp.sign(jnp.diff(answer)) * dlevel
    moved = dx + jnp.pad(pull, (0, 1)) - jnp.pad(pull, (1, 0))
    numbers = runs(answer)
    return answer, run_sums(moved, numbers) / run_sums(jnp.ones_like(x), numbers)


class _Queue(NamedTuple):
    """The clipped derivative: lines at both ends, kinks between `first` and `last`."""

    entry: Array
    first: Array
    last: Array
    # Slope and intercept of the leftmost and of the rightmost piece.
    left: tuple[Array, Array]
    right: tuple[Array, Array]
    # Each kink: where, and by how much slope and intercept change there.
    kinks: Array
    lower: Array
    upper: Array


def _clips(x, level):
    """For each entry the range outside which its right neighbour does not pull it."""
    count = x.shape[0]
    # The last entry has no right neighbour: its derivative is clipped to zero.
    level = jnp.concatenate([level, jnp.zeros(1, x.dtype)])
    following = jnp.concatenate([x[1:], jnp.zeros(1, x.dtype)])
    one = jnp.ones((), x.dtype)

    def step(queue):
        bound = level[queue.entry]
        some = queue.first <= queue.last
        a, b = queue.left
        c, d = queue.right
        low, high = queue.kinks[queue.first], queue.kinks[queue.last]
        drop_low = some & (a * low[0] + b < -bound)
        # Rounding must not drop the last kink from both ends.
        drop_high = some & (c * high[0] + d > bound)
        drop_high = drop_high & ~(drop_low & (queue.first == queue.last))
        finish = ~(drop_low | drop_high)
        # Nothing left to drop: the ends of the clipped range are known.
        lower, upper = (-bound - b) / a, (bound - d) / c
        value = following[queue.entry]

        def line(old, dropped, kink, sign, cut):
            slope = jnp.where(dropped, old[0] + sign * kink[1], old[0])
            intercept = jnp.where(dropped, old[1] + sign * kink[2], old[1])
            return jnp.where(finish, one, slope), jnp.where(
                finish, cut - value, intercept
            )

        left = line(queue.left, drop_low, low, 1, -bound)
        right = line(queue.right, drop_high, high, -1, bound)
        first = queue.first + jnp.where(finish, -1, drop_low.astype(jnp.int32))
        last = queue.last + jnp.where(finish, 1, -drop_high.astype(jnp.int32))
        kinks, lowers, uppers = queue.kinks, queue.lower, queue.upper
        # An unfinished step writes to the spare row, so that the buffers are never
        # copied.
        spare = 2 * count + 1
        kinks = kinks.at[jnp.where(finish, first, spare)].set(
            jnp.stack([lower, a, b + bound])
        )
        kinks = kinks.at[jnp.where(finish, last, spare)].set(
            jnp.stack([upper, -c, bound - d])
        )
        place = jnp.where(finish, queue.entry, count)
        lowers, uppers = lowers.at[place].set(lower), uppers.at[place].set(upper)
        entry = queue.entry + finish.astype(jnp.int32)
        return _Queue(entry, first, last, left, right, kinks, lowers, uppers)

    zero = jnp.zeros((), jnp.int32)
    start = _Queue(
        zero,
        zero + count,
        zero + count - 1,
        (one, -x[0]),
        (one, -x[0]),
        jnp.zeros((2 * count + 2, 3), x.dtype),
        jnp.zeros(count + 1, x.dtype),
        jnp.zeros(count + 1, x.dtype),
    )
    queue = lax.while_loop(lambda q: q.entry < count, step, start)
    return queue.lower[:count], queue.upper[:count]
