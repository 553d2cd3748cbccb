"""Projections on the simplex, its sparse part, and a hyperplane's cut of a box.

All three shift the point along one direction until a sum is right, and clip. The shift
is the root of a monotone piecewise linear function. Newton's method on such a function
stops after finitely many steps, at the exact root; each step is one pass over the
entries, a handful are needed, and a batch takes them together. No sorting.

Source: C. Michelot, A finite algorithm for finding the projection of a point onto the
canonical simplex of R^n, Journal of Optimization Theory and Applications 50 (1986).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..core._checks import check_nonempty, check_positive, check_shape, is_traced

# Bisection halves the bracket to the last bit within so many steps; Newton's method
# needs a few. The limit only ends the loop on NaN.
_MAX_STEPS = 200


def project_simplex(
    x: Float[Array, " n"], total: Float[Array, ""] | float = 1.0
) -> Float[Array, " n"]:
    """Projects on `{x >= 0, sum(x) = total}`.

    Shifts all entries by one number and cuts at zero; Newton's method finds the
    number exactly, in a few passes of O(n).

    Args:
        x: A vector; use `vmap` for batches.
        total: What the entries sum to, positive.

    Returns:
        A vector like `x`.

    Raises:
        ValueError: if `x` is not a non-empty vector or `total` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_simplex
        >>> [float(v) for v in project_simplex(jnp.array([1.5, 1.0, -3.0]))]
        [0.75, 0.25, 0.0]

    Source: Michelot (1986).
    """
    check_shape("project_simplex", "x", x, (None,))
    check_nonempty("project_simplex", "x", x)
    check_positive("project_simplex", "total", total)
    return jax.nn.relu(x - simplex_cut(x, total))


def project_sparse_simplex(
    x: Float[Array, " n"], nonzeros: int, total: Float[Array, ""] | float = 1.0
) -> Float[Array, " n"]:
    """Projects on the vectors of the simplex with at most so many nonzero entries.

    Keeps the largest entries and projects them on the simplex. The set is not convex:
    where entries tie for the last place, the first of them is kept.

    Args:
        x: A vector; use `vmap` for batches.
        nonzeros: How many entries may be positive, from 1 to n.
        total: What the entries sum to, positive.

    Returns:
        A vector like `x`.

    Raises:
        ValueError: if `x` is not a non-empty vector, `nonzeros` is not within 1 and n,
            or `total` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_sparse_simplex
        >>> x = project_sparse_simplex(jnp.array([0.5, 1.0, 0.75]), 2)
        >>> [float(v) for v in x]
        [0.0, 0.625, 0.375]

    Source: A. Kyrillidis, S. Becker, V. Cevher and C. Koch, Sparse projections onto
        the simplex (2013), arXiv 1206.1529, algorithm 1.
    """
    check_shape("project_sparse_simplex", "x", x, (None,))
    if not 1 <= nonzeros <= x.shape[0]:
        raise ValueError(
            f"project_sparse_simplex: `nonzeros` must be within 1 and the "
            f"length of `x`, {x.shape[0]} (got {nonzeros})."
        )
    check_positive("project_sparse_simplex", "total", total)
    largest, places = lax.top_k(x, nonzeros)
    kept = jax.nn.relu(largest - simplex_cut(largest, total))
    sparse = jnp.zeros_like(x).at[places].set(kept, unique_indices=True)
    # An entry that is NaN may be none of the largest.
    return jnp.where(jnp.isnan(jnp.sum(x)), jnp.nan, sparse)


def simplex_cut(x, total):
    """The number `t` with `sum(relu(x - t)) = total`, differentiable.

    The sum is convex and decreasing in `t`, so Newton's method climbs to the root from
    the left, losing entries on its way; once it loses none, it is there. (Rounding may
    bring an entry back: that ends the climb too, which could go round for ever.)
    """
    total = jnp.asarray(total, x.dtype)
    total = jnp.where(total > 0, total, jnp.nan)
    # Cuts relative to the largest entry keep the sums small.
    top = lax.stop_gradient(jnp.max(x))
    shifted, size = lax.stop_gradient((x - top, total))

    def above(cut):
        return shifted > cut

    def climb(carry):
        cut, count, _ = carry
        kept = above(cut)
        fewer = jnp.sum(kept, dtype=jnp.int32)
        excess = jnp.sum(jnp.where(kept, shifted, 0)) - size
        return excess / fewer.astype(x.dtype), fewer, count

    most = jnp.full((), x.shape[0] + 1, jnp.int32)
    cut, *_ = lax.while_loop(lambda c: c[1] < c[2], climb, (-size, most, most + 1))
    kept = above(cut)
    excess = jnp.sum(jnp.where(kept, x - top, 0)) - total
    return top + excess / jnp.sum(kept, dtype=x.dtype)


def project_box_section(
    x: Float[Array, " n"],
    lower: Float[Array, " n"] | float,
    upper: Float[Array, " n"] | float,
    normal: Float[Array, " n"],
    offset: Float[Array, ""] | float,
) -> Float[Array, " n"]:
    """Projects on `{x : lower <= x <= upper, normal . x = offset}`.

    The answer is `clip(x + t normal, lower, upper)` for one number `t`, found by
    Newton's method within a shrinking bracket; exact, a few passes of O(n).

    Args:
        x: A vector; use `vmap` for batches.
        lower: Scalar or vector; `-inf` where there is no bound.
        upper: Scalar or vector; `inf` where there is no bound.
        normal: A vector of either sign.
        offset: What `normal . x` shall be.

    Returns:
        A vector like `x`; NaN for traced data whose section is empty.

    Raises:
        ValueError: if the shapes differ or the section is empty.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_box_section
        >>> x, ones = jnp.array([1.0, 0.25, -1.0]), jnp.ones(3)
        >>> [float(v) for v in project_box_section(x, 0.0, 0.5, ones, 1.0)]
        [0.5, 0.5, 0.0]

    Source: P. M. Pardalos and N. Kovoor, An algorithm for a singly constrained class
        of quadratic programs subject to upper and lower bounds, Mathematical
        Programming 46 (1990).
    """
    owner = "project_box_section"
    check_shape(owner, "x", x, (None,))
    check_nonempty(owner, "x", x)
    check_shape(owner, "normal", normal, jnp.shape(x))
    for name, bound in (("lower", lower), ("upper", upper)):
        if jnp.ndim(bound):
            check_shape(owner, name, bound, jnp.shape(x))
    lower = jnp.broadcast_to(jnp.asarray(lower, x.dtype), x.shape)
    upper = jnp.broadcast_to(jnp.asarray(upper, x.dtype), x.shape)
    offset = jnp.asarray(offset, x.dtype)
    empty = _is_empty(lower, upper, normal, offset)
    if not is_traced(empty) and bool(empty):
        raise ValueError(
            f"{owner}: `normal . x = offset` must meet the box `lower <= x <= upper` "
            "(it does not, or the data are NaN). The section is empty."
        )
    frozen = lax.stop_gradient((x, lower, upper, normal, offset))
    shift = _section_shift(*frozen)
    moved = frozen[0] + shift * frozen[3]
    free = (moved > frozen[1]) & (moved < frozen[2])
    clipped = jnp.where(moved <= frozen[1], lower, upper)
    # The shift once more in terms of the free entries: exact, and differentiable.
    fixed = jnp.sum(jnp.where(free, 0, normal * jnp.where(free, 0, clipped)))
    slope = jnp.sum(jnp.where(free, normal**2, 0))
    gap = offset - fixed - jnp.sum(jnp.where(free, normal * x, 0))
    exact = gap / jnp.where(slope > 0, slope, 1)
    answer = jnp.where(free, x + exact * normal, clipped)
    return jnp.where(empty | jnp.isnan(shift), jnp.nan, answer)


def _is_empty(lower, upper, normal, offset):
    at_lower = jnp.where(normal == 0, 0, normal * lower)
    at_upper = jnp.where(normal == 0, 0, normal * upper)
    least = jnp.sum(jnp.minimum(at_lower, at_upper))
    most = jnp.sum(jnp.maximum(at_lower, at_upper))
    size = jnp.sum(jnp.where(jnp.isfinite(at_lower), jnp.abs(at_lower), 0))
    size = size + jnp.sum(jnp.where(jnp.isfinite(at_upper), jnp.abs(at_upper), 0))
    slack = 8 * jnp.finfo(offset.dtype).eps * (size + jnp.abs(offset))
    meets = (least <= offset + slack) & (most >= offset - slack)
    return ~(meets & jnp.all(lower <= upper))


def _section_shift(x, lower, upper, normal, offset):
    """The root `t` of `normal . clip(x + t normal, lower, upper) = offset`."""
    tilted = normal != 0
    kinks = jnp.concatenate([lower - x, upper - x]) / jnp.tile(
        jnp.where(tilted, normal, 1), 2
    )
    usable = jnp.isfinite(kinks) & jnp.tile(tilted, 2)
    # Beyond the kinks the function is linear, and Newton's step there is exact.
    first = jnp.min(jnp.where(usable, kinks, jnp.inf))
    last = jnp.max(jnp.where(usable, kinks, -jnp.inf))
    first, last = jnp.where(first <= last, first, 0), jnp.where(first <= last, last, 0)

    def step(carry):
        t, low, high, previous, _, steps = carry
        moved = x + t * normal
        point = jnp.clip(moved, lower, upper)
        excess = normal @ point - offset
        free = (moved > lower) & (moved < upper)
        slope = jnp.sum(jnp.where(free, normal**2, 0))
        low, high = jnp.where(excess <= 0, t, low), jnp.where(excess >= 0, t, high)
        newton = t - excess / slope
        inside = (newton > low) & (newton < high)
        # Newton's steps may creep from kink to kink; halving the bracket may not.
        slow = jnp.abs(excess) > previous / 2
        middle = (jnp.maximum(low, first) + jnp.minimum(high, last)) / 2
        new = jnp.where(
            inside & ~(slow & (low >= first) & (high <= last)), newton, middle
        )
        # Within the sum's rounding the free entries are known, and they alone matter.
        size = jnp.sum(jnp.abs(normal * point)) + jnp.abs(offset)
        done = ~(jnp.abs(excess) > 4 * jnp.finfo(x.dtype).eps * size) | (new == t)
        new = jnp.where(done, t, new)
        return new, low, high, jnp.abs(excess), done, steps + 1

    infinity = jnp.asarray(jnp.inf, x.dtype)
    start = (0 * first, -infinity, infinity, infinity, False, 0)
    t, *_ = lax.while_loop(lambda c: ~c[4] & (c[5] < _MAX_STEPS), step, start)
    return jnp.where(jnp.any(jnp.isnan(x + normal)), jnp.nan, t)
