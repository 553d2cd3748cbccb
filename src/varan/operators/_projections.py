"""Euclidean projections in closed form.

The projection of `x` on a closed convex set is the set's nearest point. It is
idempotent and firmly non-expansive, and its derivative, where it exists, is symmetric
with eigenvalues in [0, 1].

Source: N. Parikh and S. Boyd, Proximal Algorithms, Foundations and Trends in
Optimization 1 (2014), section 6.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..core._checks import (
    check_finite,
    check_nonnegative,
    check_shape,
    is_traced,
)


def project_box(
    x: PyTree[Array],
    lower: PyTree | float,
    upper: PyTree | float,
) -> PyTree[Array]:
    """Projects on `{x : lower <= x <= upper}`, entry by entry.

    Args:
        x: A pytree of arrays.
        lower: Scalar, or a pytree like `x`; `-inf` where there is no bound.
        upper: As `lower`; `inf` where there is no bound.

    Returns:
        A pytree like `x`. Where traced bounds cross, NaN.

    Raises:
        ValueError: if `lower` exceeds `upper` somewhere (the box is empty).

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_box
        >>> [float(v) for v in project_box(jnp.array([-1.0, 0.5, 7.0]), 0.0, 1.0)]
        [0.0, 0.5, 1.0]

    Source: Parikh and Boyd (2014), section 6.2.4.
    """
    structure = jax.tree.structure(x)

    def spread(bound):
        if jax.tree.structure(bound) == structure:
            return bound
        return jax.tree.map(lambda _: bound, x)

    def leaf(v, low, high):
        low, high = jnp.asarray(low, v.dtype), jnp.asarray(high, v.dtype)
        empty = low > high
        if not is_traced(empty) and bool(jnp.any(empty)):
            raise ValueError(
                "project_box: `lower` must not exceed `upper` (it does in "
                f"{int(jnp.sum(empty))} entries). The box is empty."
            )
        return jnp.where(empty, jnp.nan, jnp.minimum(jnp.maximum(v, low), high))

    return jax.tree.map(leaf, x, spread(lower), spread(upper))


def project_hypercube(
    x: PyTree[Array], side: Float[Array, ""] | float = 1.0
) -> PyTree[Array]:
    """Projects on `{x : 0 <= x <= side}`, entry by entry.

    Args:
        x: A pytree of arrays.
        side: Nonnegative scalar.

    Returns:
        A pytree like `x`. Where a traced `side` is negative, NaN.

    Raises:
        ValueError: if `side` is negative (the box is empty).

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_hypercube
        >>> [float(v) for v in project_hypercube(jnp.array([-1.0, 0.5, 7.0]))]
        [0.0, 0.5, 1.0]

    Source: Parikh and Boyd (2014), section 6.2.4.
    """
    check_nonnegative("project_hypercube", "side", side)
    return project_box(x, 0.0, jax.tree.map(lambda v: jnp.asarray(side, v.dtype), x))


def project_nonnegative(x: PyTree[Array]) -> PyTree[Array]:
    """Projects on the non-negative orthant: negative entries become zero.

    Args:
        x: A pytree of arrays.

    Returns:
        A pytree like `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_nonnegative
        >>> [float(v) for v in project_nonnegative(jnp.array([-1.0, 2.0]))]
        [0.0, 2.0]

    Source: Parikh and Boyd (2014), section 6.2.4.
    """
    return jax.tree.map(jax.nn.relu, x)


def project_hyperplane(
    x: Float[Array, " n"], normal: Float[Array, " n"], offset: Float[Array, ""] | float
) -> Float[Array, " n"]:
    """Projects on `{x : normal . x = offset}`.

    Args:
        x: A vector.
        normal: A vector of the same length, not zero.
        offset: Scalar.

    Returns:
        A vector like `x`; NaN for a traced `normal` of zeros.

    Raises:
        ValueError: if the shapes differ or `normal` is zero or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_hyperplane
        >>> x = project_hyperplane(jnp.array([1.0, 1.0]), jnp.array([1.0, 1.0]), 0.0)
        >>> [float(v) for v in x]
        [0.0, 0.0]

    Source: Parikh and Boyd (2014), section 6.2.2.
    """
    excess = _excess("project_hyperplane", x, normal, offset)
    return x - excess / (normal @ normal) * normal


def project_halfspace(
    x: Float[Array, " n"], normal: Float[Array, " n"], offset: Float[Array, ""] | float
) -> Float[Array, " n"]:
    """Projects on `{x : normal . x <= offset}`.

    Args:
        x: A vector.
        normal: A vector of the same length, not zero.
        offset: Scalar.

    Returns:
        A vector like `x`; NaN for a traced `normal` of zeros.

    Raises:
        ValueError: if the shapes differ or `normal` is zero or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_halfspace
        >>> x = project_halfspace(jnp.array([3.0, 1.0]), jnp.array([1.0, 0.0]), 2.0)
        >>> [float(v) for v in x]
        [2.0, 1.0]

    Source: Parikh and Boyd (2014), section 6.2.3.
    """
    excess = _excess("project_halfspace", x, normal, offset)
    return x - jax.nn.relu(excess) / (normal @ normal) * normal


def _excess(owner, x, normal, offset):
    check_shape(owner, "x", x, (None,))
    check_shape(owner, "normal", normal, jnp.shape(x))
    check_finite(owner, "normal", normal)
    if not is_traced(normal) and not np.any(np.asarray(normal)):
        raise ValueError(f"{owner}: `normal` must not be zero.")
    return normal @ x - jnp.asarray(offset, x.dtype)


def project_affine(
    x: Float[Array, " n"], A: Float[Array, "m n"], b: Float[Array, " m"]
) -> Float[Array, " n"]:
    """Projects on `{x : A x = b}`.

    `x - A^+ (A x - b)` with the pseudo-inverse from a singular value decomposition,
    O(m n min(m, n)); dependent rows are fine as long as they are consistent. Where
    the rank changes, the derivative with respect to `A` does not exist.

    Args:
        x: A vector.
        A: A matrix with as many columns as `x` has entries.
        b: One number for each row of `A`.

    Returns:
        A vector like `x`; NaN for traced data without a solution.

    Raises:
        ValueError: if the shapes do not fit, the data are not finite, or `A x = b`
            has no solution.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_affine
        >>> x = project_affine(jnp.ones(2), jnp.array([[1.0, 1.0]]), jnp.zeros(1))
        >>> bool(jnp.allclose(x, 0.0, atol=1e-6))
        True

    Source: Parikh and Boyd (2014), section 6.2.2.
    """
    check_shape("project_affine", "x", x, (None,))
    check_shape("project_affine", "A", A, (None, x.shape[0]))
    check_shape("project_affine", "b", b, (A.shape[0],))
    check_finite("project_affine", "A", A)
    check_finite("project_affine", "b", b)
    y = x - jnp.linalg.pinv(A) @ (A @ x - b)
    # Rounding leaves at most about n eps times the size of the terms.
    size = jnp.linalg.norm(A) * (jnp.linalg.norm(x) + jnp.linalg.norm(y))
    allowed = 1e3 * jnp.finfo(x.dtype).eps * (size + jnp.linalg.norm(b))
    empty = jnp.linalg.norm(A @ y - b) > allowed
    if not is_traced(empty) and bool(empty):
        raise ValueError(
            "project_affine: `A x = b` must have a solution (the best misses by "
            f"{float(jnp.linalg.norm(A @ y - b)):.3g}). The set is empty."
        )
    return jnp.where(empty, jnp.nan, y)
