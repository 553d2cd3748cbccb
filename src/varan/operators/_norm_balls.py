"""Projections on the balls and spheres of the l1, l2 and maximum norms.

Each treats all leaves of a pytree as one vector. A sphere is not convex: where several
of its points are nearest, one of them is returned, and where all are (the centre of
the Euclidean sphere), the call is refused.

Source: N. Parikh and S. Boyd, Proximal Algorithms, Foundations and Trends in
Optimization 1 (2014), sections 6.2.4 and 6.5; for the l1 ball J. Duchi, S.
Shalev-Shwartz, Y. Singer and T. Chandra, Efficient projections onto the l1-ball for
learning in high dimensions (ICML 2008).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..core._checks import check_nonempty, check_positive, is_traced
from ..core._trees import tree_norm
from ._simplex import simplex_cut


def project_l2_ball(
    x: PyTree[Array],
    radius: Float[Array, ""] | float = 1.0,
    center: PyTree[Array] | None = None,
) -> PyTree[Array]:
    """Projects on `{x : ||x - center|| <= radius}`, with the norm over all leaves.

    Args:
        x: A pytree of arrays.
        radius: Positive scalar.
        center: A pytree like `x`; zero by default.

    Returns:
        A pytree like `x`; `x` itself, exactly, when it lies in the ball.

    Raises:
        ValueError: if `radius` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_l2_ball
        >>> [round(float(v), 3) for v in project_l2_ball(jnp.array([3.0, 4.0]))]
        [0.6, 0.8]

    Source: Parikh and Boyd (2014), section 6.5.1.
    """
    check_positive("project_l2_ball", "radius", radius)
    offset = x if center is None else jax.tree.map(jnp.subtract, x, center)
    norm = tree_norm(offset)
    radius = _valid(radius, norm.dtype)
    outside = ~(norm <= radius)
    scale = radius / jnp.where(outside, norm, 1)

    def leaf(v, d):
        return jnp.where(outside, v + (scale.astype(v.dtype) - 1) * d, v)

    return jax.tree.map(leaf, x, offset)


def project_l2_sphere(
    x: PyTree[Array], radius: Float[Array, ""] | float = 1.0
) -> PyTree[Array]:
    """Projects on `{x : ||x|| = radius}`, with the norm over all leaves.

    Args:
        x: A pytree of arrays, not all zero.
        radius: Positive scalar.

    Returns:
        A pytree like `x`; NaN for a traced `x` of zeros, to which every point of the
        sphere is nearest.

    Raises:
        ValueError: if `radius` is not positive or `x` is zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_l2_sphere
        >>> [round(float(v), 3) for v in project_l2_sphere(jnp.array([0.3, 0.4]))]
        [0.6, 0.8]

    Source: Parikh and Boyd (2014), section 6.5.1.
    """
    check_positive("project_l2_sphere", "radius", radius)
    norm = tree_norm(x)
    if not is_traced(norm) and not float(norm) != 0:
        raise ValueError(
            "project_l2_sphere: `x` must not be zero (every point of the sphere is "
            "nearest to the centre). Start elsewhere."
        )
    scale = _valid(radius, norm.dtype) / jnp.where(norm != 0, norm, jnp.nan)
    return jax.tree.map(lambda v: scale.astype(v.dtype) * v, x)


def project_l1_ball(
    x: PyTree[Array], radius: Float[Array, ""] | float = 1.0
) -> PyTree[Array]:
    """Projects on `{x : ||x||_1 <= radius}`, with the norm over all leaves.

    Soft thresholding at the level that the simplex's projection of `|x|` finds, in a
    few passes over the entries.

    Args:
        x: A pytree of arrays.
        radius: Positive scalar.

    Returns:
        A pytree like `x`; `x` itself, exactly, when it lies in the ball.

    Raises:
        ValueError: if `radius` is not positive or `x` has no entries.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_l1_ball
        >>> [float(v) for v in project_l1_ball(jnp.array([1.5, -1.0, 0.25]))]
        [0.75, -0.25, 0.0]

    Source: Duchi, Shalev-Shwartz, Singer and Chandra (2008), figure 1.
    """
    check_positive("project_l1_ball", "radius", radius)
    flat, unravel = ravel_pytree(x)
    check_nonempty("project_l1_ball", "x", flat)
    radius = _valid(radius, flat.dtype)
    size = jnp.abs(flat)
    inside = jnp.sum(size) <= radius
    level = jnp.where(inside, 0, simplex_cut(size, radius))
    # The bound of what is cut off, not its sign: its derivative is right, and a point
    # inside stays exactly where it is.
    return unravel(flat - jnp.clip(flat, -level, level))


def project_l1_sphere(
    x: PyTree[Array], radius: Float[Array, ""] | float = 1.0
) -> PyTree[Array]:
    """Projects on `{x : ||x||_1 = radius}`, with the norm over all leaves.

    Args:
        x: A pytree of arrays.
        radius: Positive scalar.

    Returns:
        A pytree like `x`. An entry of zero, whose sign is free, counts as positive.

    Raises:
        ValueError: if `radius` is not positive or `x` has no entries.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_l1_sphere
        >>> [float(v) for v in project_l1_sphere(jnp.array([0.25, -0.25]))]
        [0.5, -0.5]

    Source: Duchi, Shalev-Shwartz, Singer and Chandra (2008), figure 1.
    """
    check_positive("project_l1_sphere", "radius", radius)
    flat, unravel = ravel_pytree(x)
    check_nonempty("project_l1_sphere", "x", flat)
    sign = jnp.where(flat < 0, -1, 1).astype(flat.dtype)
    size = sign * flat
    return unravel(sign * jax.nn.relu(size - simplex_cut(size, radius)))


def project_linf_ball(
    x: PyTree[Array], radius: Float[Array, ""] | float = 1.0
) -> PyTree[Array]:
    """Projects on `{x : |x_i| <= radius for all i}`.

    Args:
        x: A pytree of arrays.
        radius: Positive scalar.

    Returns:
        A pytree like `x`.

    Raises:
        ValueError: if `radius` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_linf_ball
        >>> [float(v) for v in project_linf_ball(jnp.array([3.0, -0.5, -2.0]))]
        [1.0, -0.5, -1.0]

    Source: Parikh and Boyd (2014), section 6.2.4.
    """
    check_positive("project_linf_ball", "radius", radius)

    def leaf(v):
        bound = _valid(radius, v.dtype)
        return jnp.minimum(jnp.maximum(v, -bound), bound)

    return jax.tree.map(leaf, x)


def project_linf_sphere(
    x: PyTree[Array], radius: Float[Array, ""] | float = 1.0
) -> PyTree[Array]:
    """Projects on `{x : max |x_i| = radius}`, the maximum over all leaves.

    Outside, entries are clipped; inside, the largest entry moves to the sphere.

    Args:
        x: A pytree of arrays.
        radius: Positive scalar.

    Returns:
        A pytree like `x`. Inside, the first of several largest entries moves, and
        upwards when it is zero.

    Raises:
        ValueError: if `radius` is not positive or `x` has no entries.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_linf_sphere
        >>> [float(v) for v in project_linf_sphere(jnp.array([0.25, -0.5]))]
        [0.25, -1.0]

    Source: Parikh and Boyd (2014), section 6.2.4, for the outside.
    """
    check_positive("project_linf_sphere", "radius", radius)
    flat, unravel = ravel_pytree(x)
    check_nonempty("project_linf_sphere", "x", flat)
    bound = _valid(radius, flat.dtype)
    size = jnp.abs(flat)
    largest = jnp.arange(flat.size) == jnp.argmax(size)
    moves = largest & (jnp.max(size) < bound)
    clipped = jnp.minimum(jnp.maximum(flat, -bound), bound)
    return unravel(jnp.where(moves, jnp.where(flat < 0, -bound, bound), clipped))


def _valid(radius, dtype):
    """The radius as an array; NaN where a traced one bounds no ball."""
    radius = jnp.asarray(radius, dtype)
    return jnp.where(radius > 0, radius, jnp.nan)
