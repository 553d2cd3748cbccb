"""Sparse alternatives of the softmax: sparsemax and the entmax family.

All maximise `<p, scores> - Omega(p)` over the simplex, with Tsallis' negative entropy
`Omega(p) = (sum p^alpha - 1) / (alpha (alpha - 1))`: the softmax at `alpha = 1`, the
Euclidean projection (sparsemax) at 2, and in between answers with exact zeros that are
smoother than sparsemax's. The answer is a threshold,

    p = max(0, (alpha - 1) scores - t)^(1 / (alpha - 1)),    sum p = 1,

found without sorting: Newton's method on the norm of order `1 / (alpha - 1)` of the
right side, convex in `t` for `alpha <= 2`, climbs from below and never overshoots; at 2
it ends after finitely many steps, else quadratically. Above 2 it is bisection.

Cost: one pass over the entries a step; seen are 3 to 12 steps (bisection: as many as
the dtype has bits). Derivatives: `dp = g * (ds - <g, ds> / sum(g))` with
`g = p^(2 - alpha)` on the support; forward, reverse and of every order.

Source: B. Peters, V. Niculae and A. F. T. Martins, Sparse Sequence-to-Sequence Models,
ACL 2019, arXiv 1905.05702; A. F. T. Martins and R. Astudillo, From Softmax to
Sparsemax, ICML 2016, arXiv 1602.02068.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core._checks import check_nonempty, check_shape, is_traced


def sparsemax(scores: Float[Array, " n"]) -> Float[Array, " n"]:
    """The Euclidean projection on the simplex, as an activation: sparse probabilities.

    Args:
        scores: A vector; use `vmap` for batches. Entries of `-inf` are left out.

    Returns:
        Probabilities, zero where a score is more than one below the largest (and
        earlier when many are large). NaN for NaN, `inf`, or `-inf` everywhere.

    Raises:
        ValueError: if `scores` is not a non-empty vector.
        TypeError: if it is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.fenchel_young import sparsemax
        >>> [float(p) for p in sparsemax(jnp.array([1.5, 1.0, -3.0]))]
        [0.75, 0.25, 0.0]

    Source: Martins and Astudillo (2016), arXiv 1602.02068.

    Differences: by Newton's method instead of sorting. As a projection, with any sum,
        it is `varan.operators.project_simplex`; here scores of `-inf` are left out.
    """
    return entmax(scores, 2.0)


def entmax(
    scores: Float[Array, " n"], alpha: Float[Array, ""] | float = 1.5
) -> Float[Array, " n"]:
    """Sparse probabilities between the softmax (`alpha = 1`) and sparsemax (2).

    Args:
        scores: A vector; use `vmap` for batches. Entries of `-inf` are left out.
        alpha: At least 1. A Python number compiles to the fastest code; an array may
            vary without compiling again and is differentiated (at values above 1).

    Returns:
        Probabilities, zero where a score is `1 / (alpha - 1)` or more below the
        largest. NaN for NaN, `inf`, or `-inf` everywhere, and for a traced `alpha`
        that is not above 1.

    Raises:
        ValueError: if `scores` is not a non-empty vector or `alpha` is out of range.
        TypeError: if `scores` is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.fenchel_young import entmax
        >>> p = entmax(jnp.array([2.0, 1.0, -1.0]))
        >>> [round(float(v), 3) for v in p]
        [0.831, 0.169, 0.0]

    Source: Peters et al. (2019), arXiv 1905.05702; the derivative with respect to
        `alpha`: G. Correia, V. Niculae and A. F. T. Martins, Adaptively Sparse
        Transformers, EMNLP 2019, arXiv 1909.00015, proposition 1.

    Differences: one Newton method for every `alpha` up to 2 instead of sorting at 1.5
        and 2 and bisection elsewhere.
    """
    scores = check_scores("entmax", scores)
    alpha, static = check_alpha("entmax", alpha, scores.dtype)
    if static == 1:
        return jax.nn.softmax(scores)
    return _entmax(scores, alpha, static)


def check_scores(owner, scores):
    """Scores as an array, or why not."""
    scores = jnp.asarray(scores)
    check_shape(owner, "scores", scores, (None,))
    check_nonempty(owner, "scores", scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"{owner}: `scores` must be floating (got {scores.dtype}).")
    return scores


def check_alpha(owner, alpha, dtype):
    """`alpha` as an array, and as a Python number or `None` where it is an array."""
    static = float(alpha) if isinstance(alpha, (int, float)) else None
    if not is_traced(alpha):
        value = np.asarray(alpha)
        enough = value > 1 if static is None else value >= 1
        if value.ndim or not (enough and np.isfinite(value)):
            least = "above" if static is None else "at least"
            raise ValueError(
                f"{owner}: `alpha` must be a finite number {least} 1 (got {alpha})."
            )
    alpha = jnp.asarray(alpha, dtype)
    return (alpha if static else jnp.where(alpha > 1, alpha, jnp.nan)), static


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _entmax(scores, alpha, static):
    order = 1 / ((alpha if static is None else static) - 1)
    z = (scores - jnp.max(scores)) / order
    p = _power(jax.nn.relu(z - threshold(z, order)), order)
    return p / jnp.sum(p)


@partial(_entmax.defjvp, symbolic_zeros=True)
def _entmax_jvp(static, primals, tangents):
    scores, alpha = primals
    d_scores, d_alpha = tangents
    p = _entmax(scores, alpha, static)
    power = alpha if static is None else static
    g = _power(p, 2 - power)
    share = g / jnp.sum(g)
    moved = jnp.zeros_like(p)
    if not isinstance(d_scores, jax.custom_derivatives.SymbolicZero):
        moved = moved + g * (d_scores - jnp.sum(share * d_scores))
    if static is None and not isinstance(d_alpha, jax.custom_derivatives.SymbolicZero):
        entropy = jax.scipy.special.entr(jnp.where(p > 0, p, 1))
        rise = (p - share) / (alpha - 1) + entropy - share * jnp.sum(entropy)
        moved = moved + d_alpha * rise / (alpha - 1)
    return p, moved


def threshold(z, order):
    """The `t` with `sum(max(z - t, 0)^order) = 1`; the largest of `z` is zero."""
    eps = jnp.finfo(z.dtype).eps
    newton = order >= 1
    # The largest entry alone, or for a convex power all entries at their mean
    # (Jensen), reach a sum of one at these points or later.
    share = jnp.asarray(float(z.size) ** (-1 / order), z.dtype)
    low = jnp.full((), -1.0, z.dtype)
    low = jnp.where(newton, jnp.maximum(low, jnp.mean(z) - share), low)

    def go(carry):
        _, _, _, left, steps = carry
        return (left > 2 * eps) & (steps < 100)

    def step(carry):
        low, high, t, _, steps = carry
        u = jax.nn.relu(z - t)
        slopes = _power(u, order - 1)
        slope, total = jnp.sum(slopes), jnp.sum(u * slopes)
        climbed = t + (total - _power(total, 1 - 1 / order)) / slope
        low, high = jnp.where(total >= 1, t, low), jnp.where(total >= 1, high, t)
        t_next = jnp.where(newton, climbed, (low + high) / 2)
        left = jnp.where(newton, climbed - t, high - low)
        return low, high, t_next, left, steps + 1

    start = (low, -share, low, jnp.ones((), z.dtype), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(go, step, start)[2]


def _power(u, exponent):
    """`u^exponent` for `u >= 0`; zero at zero, also of its derivatives."""
    positive = u > 0
    safe = jnp.where(positive, u, 1)
    if isinstance(exponent, float):  # the common cases without a transcendental
        if exponent == 0:
            return jnp.where(positive, jnp.ones_like(u), jnp.zeros_like(u))
        if exponent == 0.5:
            return jnp.where(positive, jnp.sqrt(safe), 0)
        if exponent in (1, 2):
            return u if exponent == 1 else u * u
    return jnp.where(positive, safe**exponent, 0)
