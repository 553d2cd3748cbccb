"""Samplers of point clouds: plane shapes, Gaussian mixtures, spheres.

Each takes a key and a number of points, and compiles: a training loop draws a new batch
in every step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def swiss_roll(
    key: PRNGKeyArray, points: int, *, noise: float = 0.1
) -> Float[Array, "points 2"]:
    """A spiral of one and a half turns, radius 0.7 to 2.1.

    Args:
        key: Random key.
        points: Number of points, at least 1.
        noise: Standard deviation of the noise on each coordinate, not negative.

    Returns:
        The points.

    Raises:
        ValueError: If `points` is below 1 or `noise` negative.

    Example:
        >>> import jax
        >>> from varan.data import swiss_roll
        >>> swiss_roll(jax.random.key(0), 5).shape
        (5, 2)
    """
    _check("swiss_roll", points, noise)
    for_place, for_noise = jax.random.split(key)
    place = jax.random.uniform(for_place, (points,))
    angle = 1.5 * jnp.pi * (1 + 2 * place)
    curve = jnp.stack([angle * jnp.cos(angle), angle * jnp.sin(angle)], axis=1)
    return 0.15 * curve + noise * jax.random.normal(for_noise, (points, 2))


def two_moons(
    key: PRNGKeyArray, points: int, *, noise: float = 0.1
) -> Float[Array, "points 2"]:
    """Two interlocking half circles of radius 1.

    Args:
        key: Random key.
        points: Number of points, at least 1.
        noise: Standard deviation of the noise on each coordinate, not negative.

    Returns:
        The points, each on a random one of the two, centred at zero.

    Raises:
        ValueError: If `points` is below 1 or `noise` negative.

    Example:
        >>> import jax
        >>> from varan.data import two_moons
        >>> two_moons(jax.random.key(0), 5).shape
        (5, 2)
    """
    _check("two_moons", points, noise)
    for_angle, for_side, for_noise = jax.random.split(key, 3)
    angle = jnp.pi * jax.random.uniform(for_angle, (points,))
    side = jnp.where(jax.random.bernoulli(for_side, shape=(points,)), 1.0, -1.0)
    x = side * (jnp.cos(angle) - 0.5)
    y = side * (jnp.sin(angle) - 0.25)
    moons = jnp.stack([x, y], axis=1)
    return moons + noise * jax.random.normal(for_noise, (points, 2))


def checkerboard(
    key: PRNGKeyArray, points: int, *, squares: int = 4
) -> Float[Array, "points 2"]:
    """Uniform on the dark squares of a board that covers [-1, 1] x [-1, 1].

    Args:
        key: Random key.
        points: Number of points, at least 1.
        squares: Squares a side, even.

    Returns:
        The points.

    Raises:
        ValueError: If `points` is below 1 or `squares` not even and positive.

    Example:
        >>> import jax
        >>> from varan.data import checkerboard
        >>> checkerboard(jax.random.key(0), 5).shape
        (5, 2)
    """
    _check("checkerboard", points, 0.0)
    if squares < 2 or squares % 2:
        raise ValueError(
            f"checkerboard: `squares` must be even and positive (got {squares})."
        )
    for_row, for_column, for_place = jax.random.split(key, 3)
    row = jax.random.randint(for_row, (points,), 0, squares)
    column = jax.random.randint(for_column, (points,), 0, squares // 2)
    corner = jnp.stack([2 * column + row % 2, row], axis=1)
    place = jax.random.uniform(for_place, (points, 2))
    return (corner.astype(place.dtype) + place) * (2 / squares) - 1


def gaussian_mixture(
    key: PRNGKeyArray,
    points: int,
    means: Float[Array, "k d"],
    *,
    deviation: float | Float[Array, " k"] = 1.0,
    weights: Float[Array, " k"] | None = None,
) -> Float[Array, "points d"]:
    """Points of a mixture of round Gaussians.

    Args:
        key: Random key.
        points: Number of points, at least 1.
        means: Of the components.
        deviation: Standard deviation of every coordinate, one for all or for each.
        weights: Probabilities of the components, positive; default: equal.

    Returns:
        The points, in the dtype of `means`.

    Raises:
        ValueError: If `points` is below 1, or `means` is not (k, d).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.data import gaussian_mixture
        >>> means = jnp.array([[-5.0, 0.0], [5.0, 0.0]])
        >>> cloud = gaussian_mixture(jax.random.key(0), 100, means, deviation=0.1)
        >>> bool((abs(abs(cloud[:, 0]) - 5) < 1).all())
        True
    """
    _check("gaussian_mixture", points, 0.0)
    if jnp.ndim(means) != 2:
        raise ValueError(
            "gaussian_mixture: `means` must have shape (k, d) (got "
            f"{jnp.shape(means)})."
        )
    count, size = means.shape
    for_component, for_noise = jax.random.split(key)
    logits = jnp.zeros(count, means.dtype) if weights is None else jnp.log(weights)
    component = jax.random.categorical(for_component, logits, shape=(points,))
    spread = jnp.broadcast_to(jnp.asarray(deviation, means.dtype), (count,))
    noise = jax.random.normal(for_noise, (points, size), means.dtype)
    return means[component] + spread[component][:, None] * noise


def sphere_points(
    key: PRNGKeyArray,
    points: int,
    dimension: int = 3,
    *,
    centre: Float[Array, " d"] | None = None,
    spread: float | Float[Array, ""] = 1.0,
) -> Float[Array, "points d"]:
    """Points of the unit sphere: uniform, or around a centre.

    Args:
        key: Random key.
        points: Number of points, at least 1.
        dimension: Of the space that the sphere lies in, at least 2.
        centre: A vector; points are then normalised draws of a round Gaussian about
            it. Default: none, and the points are uniform.
        spread: Standard deviation of that Gaussian; without a centre it plays no part.

    Returns:
        Vectors of length 1.

    Raises:
        ValueError: If `points` is below 1, `dimension` below 2, or `centre` has
            another shape.

    Example:
        >>> import jax
        >>> from varan.data import sphere_points
        >>> cloud = sphere_points(jax.random.key(0), 5)
        >>> bool((abs((cloud**2).sum(1) - 1) < 1e-5).all())
        True
    """
    _check("sphere_points", points, 0.0)
    shape = (dimension,) if centre is None else jnp.shape(centre)
    if dimension < 2 or shape != (dimension,):
        raise ValueError(
            "sphere_points: `dimension` must be at least 2 and `centre` a vector of "
            f"that length (got {dimension} and shape {shape})."
        )
    dtype = None if centre is None else centre.dtype
    cloud = jax.random.normal(key, (points, dimension), dtype)
    if centre is not None:
        cloud = centre[None, :] + spread * cloud
    return cloud / jnp.linalg.norm(cloud, axis=1, keepdims=True)


def _check(owner, points, noise):
    if points < 1 or noise < 0:
        raise ValueError(
            f"{owner}: `points` must be at least 1 and `noise` not negative (got "
            f"{points} and {noise})."
        )
