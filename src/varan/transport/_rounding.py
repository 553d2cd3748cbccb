"""Rounding a nonnegative matrix to a transport plan: where primal certificates start.

An approximate plan violates its marginals a little, so its cost proves nothing. Rows
and columns that carry too much are scaled down, and the mass that is then missing is
spread as a rank-one matrix: the result has exactly the wanted marginals, and is at
most twice the violated mass away in L1. Four passes over the matrix.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core._checks import check_shape, is_traced


def round_to_polytope(
    plan: Float[Array, "m n"], a: Float[Array, " m"], b: Float[Array, " n"]
) -> Float[Array, "m n"]:
    """The nearest-by transport plan with marginals exactly `a` and `b`.

    Args:
        plan: Nonnegative matrix, about a plan.
        a: Row masses, nonnegative.
        b: Column masses, nonnegative, with the same total.

    Returns:
        A nonnegative matrix with row sums `a` and column sums `b`, up to the
        rounding of the sums; its L1 distance from `plan` is at most
        `2 (|P 1 - a|_1 + |P' 1 - b|_1)`.

    Raises:
        ValueError: If shapes do not fit, or masses or their totals are not as
            required. NaN where a traced mass is not, and where an entry of the plan
            is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import round_to_polytope
        >>> half = jnp.full(2, 0.5)
        >>> plan = round_to_polytope(jnp.array([[0.5, 0.1], [0.0, 0.5]]), half, half)
        >>> plan.sum(0).round(4), plan.sum(1).round(4)
        (Array([0.5, 0.5], dtype=float32), Array([0.5, 0.5], dtype=float32))

    Source:
        Altschuler, Weed, Rigollet, 2017 (arXiv 1705.09634), Algorithm 2.
    """
    owner = "round_to_polytope"
    check_shape(owner, "plan", plan, (None, None))
    check_shape(owner, "a", a, (plan.shape[0],))
    check_shape(owner, "b", b, (plan.shape[1],))
    one, other = jnp.sum(a), jnp.sum(b)
    near = float(np.sqrt(np.finfo(plan.dtype).eps))
    valid = (jnp.abs(one - other) <= near * other) & jnp.all(a >= 0) & jnp.all(b >= 0)
    # A run that did not converge has NaN masses: those go through.
    if not is_traced(valid) and not (bool(valid) or bool(jnp.isnan(one + other))):
        raise ValueError(
            f"{owner}: `a` and `b` must not be negative and have one total (got "
            f"{float(one):.6g} and {float(other):.6g})."
        )
    plan = jnp.where(valid & (plan >= 0), plan, jnp.nan)
    left, right, missing_a, missing_b = rounding(plan, a, b)
    plan = left[:, None] * plan * right[None, :]
    return plan + missing_a[:, None] * (missing_b / total(missing_b))[None, :]


def rounding(plan, a, b):
    """The parts of the rounding: row and column factors, and the missing masses.

    Both missing masses have one total. Four reads of the matrix.
    """
    left = _at_most(a, plan.sum(1))
    right = _at_most(b, left @ plan)
    # Both are nonnegative in exact arithmetic; a rounding below zero would make a
    # negative plan.
    missing_a = jnp.maximum(a - left * (plan @ right), 0)
    missing_b = jnp.maximum(b - right * (left @ plan), 0)
    return left, right, missing_a, missing_b


def total(mass):
    """The total of a mass, 1 for none: safe to divide by."""
    total = jnp.sum(mass)
    return jnp.where(total > 0, total, 1)


def _at_most(wanted, actual):
    """The factor, at most 1, that brings `actual` down to `wanted`."""
    positive = actual > 0
    return jnp.where(
        positive, jnp.minimum(wanted / jnp.where(positive, actual, 1), 1), 1
    ).astype(actual.dtype)
