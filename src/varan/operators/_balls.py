"""Convex quadratics on a ball, and the projection on a ball in another metric.

`min x'Ax/2 - b'x` over `||x|| <= r` has the solution `x(mu) = (A + mu I)^{-1} b` with
one multiplier `mu >= 0`, zero unless the ball binds. In the eigenbasis of `A` the
length of `x(mu)` is an explicit sum, so that one eigenvalue decomposition, O(n^3), and
a scalar equation solve the problem exactly.

The equation is solved in the form `1/||x(mu)|| = 1/r`: its left side is concave and
increasing, so Newton's method started left of the root climbs to it monotonically and
needs no safeguard; about six steps reach the last bit.

Source: J. J. More and D. C. Sorensen, Computing a trust region step, SIAM Journal on
Scientific and Statistical Computing 4 (1983).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..core._checks import check_finite, check_positive, check_shape
from ..core._implicit import implicit_root

# Newton's method on the reciprocal length gains digits quadratically; the limit only
# ends the loop on NaN.
_MAX_NEWTON = 60


def minimise_quadratic_on_ball(
    matrix: Float[Array, "n n"],
    linear: Float[Array, " n"],
    radius: Float[Array, ""] | float = 1.0,
) -> Float[Array, " n"]:
    """Minimises `x'Ax/2 - b'x` over the ball `||x|| <= radius`, exactly.

    Args:
        matrix: `A`, symmetric and positive semidefinite, (n, n). Only its symmetric
            part is read; eigenvalues below zero count as zero.
        linear: `b`, (n,).
        radius: Positive scalar.

    Returns:
        A minimiser, (n,); where a singular `A` leaves several, nearly the shortest.
        NaN for traced data that are not finite.

    Raises:
        ValueError: if shapes do not fit, data are not finite or `radius` is not
            positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import minimise_quadratic_on_ball
        >>> x = minimise_quadratic_on_ball(jnp.eye(2), jnp.array([3.0, 4.0]))
        >>> [round(float(v), 3) for v in x]
        [0.6, 0.8]

    Source: More and Sorensen (1983), section 3.
    """
    owner = "minimise_quadratic_on_ball"
    check_shape(owner, "linear", linear, (None,))
    check_shape(owner, "matrix", matrix, (linear.shape[0], linear.shape[0]))
    check_finite(owner, "matrix", matrix)
    check_finite(owner, "linear", linear)
    check_positive(owner, "radius", radius)
    matrix = (matrix + matrix.T) / 2
    radius = jnp.asarray(radius, linear.dtype)
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(matrix))
    answer = quadratic_on_ball(values, vectors, *lax.stop_gradient((linear, radius)))
    binds = answer[1] > 0

    def condition(point):
        x, mu = point
        excess = (x @ x - radius**2) / 2
        return matrix @ x + mu * x - linear, jnp.where(binds, excess, mu)

    # A singular matrix inside the ball leaves the shortest minimiser's derivative.
    return implicit_root(condition, answer, unique=False)[0]


def project_l2_ball_in_metric(
    x: Float[Array, " n"],
    metric: Float[Array, "n n"],
    radius: Float[Array, ""] | float = 1.0,
    center: Float[Array, " n"] | None = None,
) -> Float[Array, " n"]:
    """The point of a Euclidean ball that is nearest to `x` in the metric `H`.

    Minimises `(y - x)'H(y - x)` over `||y - center|| <= radius`. With `H = I` this is
    `project_l2_ball`.

    Args:
        x: A vector, (n,).
        metric: `H`, symmetric and positive definite, (n, n).
        radius: Positive scalar.
        center: The ball's centre, (n,); zero by default.

    Returns:
        A vector like `x`. NaN for traced data that are not finite.

    Raises:
        ValueError: if shapes do not fit, data are not finite or `radius` is not
            positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_l2_ball_in_metric
        >>> x = jnp.array([2.0, 2.0])
        >>> y = project_l2_ball_in_metric(x, jnp.diag(jnp.array([100.0, 1.0])))
        >>> bool(y[0] > 0.99)
        True

    Source: More and Sorensen (1983), section 3.
    """
    center = jnp.zeros_like(x) if center is None else center
    check_shape("project_l2_ball_in_metric", "center", center, jnp.shape(x))
    offset = x - center
    nearest = minimise_quadratic_on_ball(metric, metric @ offset, radius)
    inside = offset @ offset <= jnp.asarray(radius, x.dtype) ** 2
    return jnp.where(inside, x, center + nearest)


def quadratic_on_ball(values, vectors, linear, radius):
    """The minimiser and its multiplier, from the matrix's eigenvalue decomposition.

    Not meant to be differentiated: the decomposition's derivative breaks down at
    repeated eigenvalues, which the answer does not feel.
    """
    radius = jnp.asarray(radius, linear.dtype)
    # A singular matrix gets a ridge below its rounding error: its minimiser is then
    # nearly the shortest one, and nothing divides by zero.
    precision = jnp.finfo(linear.dtype)
    values = jnp.maximum(values, precision.eps * values[-1] + precision.tiny)
    rotated = vectors.T @ linear

    def newton(carry):
        mu, _, steps = carry
        terms = rotated / (values + mu)
        square = jnp.sum(terms**2)
        slope = jnp.sum(terms**2 / (values + mu))
        gain = (jnp.sqrt(square) / radius - 1) * square / jnp.where(slope > 0, slope, 1)
        return mu + jnp.maximum(gain, 0), mu, steps + 1

    def unfinished(carry):
        mu, previous, steps = carry
        moved = mu - previous > 2 * precision.eps * mu
        return (steps == 0) | (moved & (steps < _MAX_NEWTON))

    binds = jnp.linalg.norm(rotated / values) > radius
    # ||b|| / (largest eigenvalue + mu) <= ||x(mu)||: the root is not left of this.
    left = jnp.linalg.norm(linear) / radius - values[-1]
    start = jnp.where(binds, jnp.maximum(left, 0), 0)
    mu, _, _ = lax.while_loop(unfinished, newton, (start, start, 0))
    mu = jnp.where(binds, mu, 0)
    return vectors @ (rotated / (values + mu)), mu
