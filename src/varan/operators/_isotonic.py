"""Isotonic regression: the nearest monotone sequence, in squares or in entropy.

Of two neighbouring stretches that are monotone already, the monotone fit of both
together is `min(left, v)` and `max(right, v)` for one level `v`: the value at which
the entries of the left above it and those of the right below it pool. Stretches of
length 8, 16, ... are merged so, all pairs at once; those of length 8 come from the
minimax formula, without a loop. The classical pooling of adjacent violators visits the
entries one after the other, O(n) but nothing at once; here are log(n / 8) rounds of a
few vectorised passes each, which suits batches and accelerators.

The level is the fixed point of "pool what the level selects": Newton's method on a
monotone piecewise smooth function, within a bracket, exact after a few passes.

The derivative is that of the blocks: each entry of the answer is its block's mean.

Source: R. E. Barlow, D. J. Bartholomew, J. M. Bremner and H. D. Brunk, Statistical
Inference under Order Restrictions (1972), chapter 1; for the relative entropy and the
derivatives M. Blondel, O. Teboul, Q. Berthet and J. Djolonga, Fast differentiable
sorting and ranking (ICML 2020), arXiv 2002.08871, sections 4 and 5.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..core._checks import check_nonempty, check_positive, check_shape
from ._blocks import run_sums, runs

# Bisection reaches neighbouring floats within so many steps; Newton's method needs a
# few. The limit only ends the loop on NaN.
_MAX_STEPS = 100

# A stretch costs the minimax formula its square, and a round of merging a loop.
_SHORT = 8


def isotonic_l2(
    x: Float[Array, " n"],
    weights: Float[Array, " n"] | None = None,
    *,
    increasing: bool = True,
) -> Float[Array, " n"]:
    """The monotone sequence with the least weighted squared distance to `x`.

    Minimises `sum_i weights_i (v_i - x_i)^2` over `v_1 <= ... <= v_n`: the projection
    on the monotone cone. Bounds on the values may be clipped afterwards; the answer
    is then the best within the bounds.

    Args:
        x: A vector; use `vmap` for batches.
        weights: Positive vector like `x`; ones by default.
        increasing: `False` for `v_1 >= ... >= v_n`.

    Returns:
        A vector like `x`.

    Raises:
        ValueError: if `x` is not a non-empty vector, or `weights` has another shape or
            an entry that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import isotonic_l2
        >>> [float(v) for v in isotonic_l2(jnp.array([1.0, 4.0, 2.0, 5.0]))]
        [1.0, 3.0, 3.0, 5.0]

    Source: Barlow, Bartholomew, Bremner and Brunk (1972), section 1.2.
    """
    check_shape("isotonic_l2", "x", x, (None,))
    check_nonempty("isotonic_l2", "x", x)
    if weights is None:
        weights = jnp.ones_like(x)
    check_shape("isotonic_l2", "weights", weights, jnp.shape(x))
    check_positive("isotonic_l2", "weights", weights)
    weights = jnp.asarray(jnp.where(weights > 0, weights, jnp.nan), x.dtype)
    sign = 1 if increasing else -1
    return sign * _fit("l2", sign * x, weights)


def isotonic_kl(
    x: Float[Array, " n"],
    y: Float[Array, " n"] | None = None,
    *,
    increasing: bool = True,
) -> Float[Array, " n"]:
    """The monotone `v` that brings `exp(x - v)` nearest to `exp(y)` in entropy.

    Minimises `sum_i exp(x_i - v_i) + exp(y_i) v_i` over `v_1 <= ... <= v_n`; without
    the order `v` would be `x - y`. On a block of equal values the answer is
    `logsumexp(x) - logsumexp(y)`, and all sums stay logarithms, so that inputs of any
    size are fine. The decreasing fit is the step in soft sorting with entropy.

    Args:
        x: A vector of logarithms; use `vmap` for batches.
        y: Likewise; zeros by default.
        increasing: `False` for `v_1 >= ... >= v_n`.

    Returns:
        A vector like `x`.

    Raises:
        ValueError: if `x` is not a non-empty vector, or `y` has another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import isotonic_kl
        >>> x = jnp.log(jnp.array([1.0, 4.0, 2.0, 5.0]))
        >>> [round(float(v), 4) for v in jnp.exp(isotonic_kl(x))]
        [1.0, 3.0, 3.0, 5.0]

    Source: Blondel, Teboul, Berthet and Djolonga (2020), proposition 4.
    """
    check_shape("isotonic_kl", "x", x, (None,))
    check_nonempty("isotonic_kl", "x", x)
    y = jnp.zeros_like(x) if y is None else y
    check_shape("isotonic_kl", "y", y, jnp.shape(x))
    if increasing:
        return _fit("kl", x, y)
    return _fit("kl", x[::-1], y[::-1])[::-1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fit(kind, x, y):
    """The increasing fit; `y` are weights (squares) or logarithms (entropy)."""
    count = x.shape[0]
    padded = 1 << (count - 1).bit_length()
    size = min(_SHORT, padded)
    pad = (0, padded - count)
    x, y = jnp.pad(x, pad), jnp.pad(y, pad)
    shape = (-1, size)
    present = (jnp.arange(padded) < count).reshape(shape)
    values = _short(kind, x.reshape(shape), y.reshape(shape), present)
    while size < count:
        shape = (-1, 2, size)
        values = _merge(kind, values.reshape(shape), x.reshape(shape), y.reshape(shape))
        size *= 2
    # A comparison with NaN selects nothing and would hide it.
    return jnp.where(jnp.isnan(jnp.sum(x + y)), jnp.nan, values.ravel()[:count])


@_fit.defjvp
def _fit_jvp(kind, primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    values = _fit(kind, x, y)
    numbers = runs(values)
    if kind == "l2":
        change = run_sums(y * dx + (x - values) * dy, numbers) / run_sums(y, numbers)
    else:
        # Shares of the block, from logarithms relative to the block's largest.
        change = run_sums(_shares(x, numbers) * dx - _shares(y, numbers) * dy, numbers)
    return values, change


def _shares(x, numbers):
    top = jax.ops.segment_max(
        lax.stop_gradient(x), numbers, x.shape[0], indices_are_sorted=True
    )
    scaled = jnp.exp(x - top[numbers])
    return scaled / run_sums(scaled, numbers)


def _short(kind, x, y, present):
    """The increasing fits of the rows: at i the max over j <= i of the min over k >= i
    of the level at which j..k pool. What is not present pools with nothing."""
    upper = jnp.tri(x.shape[1], dtype=bool).T[None]

    def sums(entries, cumulate, nothing):
        return cumulate(jnp.where(upper, entries[:, None], nothing), axis=2)

    if kind == "l2":
        levels = sums(x * y, lax.cumsum, 0) / sums(y, lax.cumsum, 0)
    else:
        levels = sums(x, lax.cumlogsumexp, -jnp.inf)
        levels = levels - sums(y, lax.cumlogsumexp, -jnp.inf)
    levels = jnp.where(upper & present[:, None], levels, jnp.inf)
    lowest = lax.cummin(levels, axis=2, reverse=True)
    return jnp.max(jnp.where(upper, lowest, -jnp.inf), 1)


def _merge(kind, values, x, y):
    """Merges pairs of increasing stretches, each (pairs, 2, size)."""
    left, right = values[:, 0], values[:, 1]

    def select(level):
        return jnp.stack([left > level[:, None], right < level[:, None]], 1)

    def pool(level):
        chosen = select(level)
        axes = (1, 2)
        if kind == "l2":
            total = jnp.sum(jnp.where(chosen, x * y, 0), axes)
            return total / jnp.sum(jnp.where(chosen, y, 0), axes)
        return _log_sum(x, chosen) - _log_sum(y, chosen)

    def step(carry):
        level, low, high, done, steps = carry
        pooled = pool(level)
        low = jnp.where(pooled > level, level, low)
        high = jnp.where(pooled < level, level, high)
        inside = (pooled > low) & (pooled < high)
        new = jnp.where(inside, pooled, low + (high - low) / 2)
        # At the fixed point, or with neighbouring floats left only.
        done = done | ~(pooled != level) | ~((new > low) & (new < high))
        return jnp.where(done, level, new), low, high, done, steps + 1

    low, high = right[:, 0], left[:, -1]
    apart = ~(high > low)
    level = jnp.where(apart, high, low + (high - low) / 2)
    level, *_ = lax.while_loop(
        lambda c: ~jnp.all(c[3]) & (c[4] < _MAX_STEPS),
        step,
        (level, low, high, apart, 0),
    )
    level = level[:, None]
    return jnp.stack([jnp.minimum(left, level), jnp.maximum(right, level)], 1)


def _log_sum(x, chosen):
    top = jnp.max(jnp.where(chosen, x, -jnp.inf), (1, 2))
    top = jnp.where(jnp.isfinite(top), top, 0)
    scaled = jnp.where(chosen, jnp.exp(x - top[:, None, None]), 0)
    return top + jnp.log(jnp.sum(scaled, (1, 2)))
