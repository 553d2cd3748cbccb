"""Random-k data: labels of the nearest of randomly labelled leaders."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def random_k(
    key: PRNGKeyArray,
    *,
    points: int = 10_000,
    dimension: int = 16,
    classes: int = 10,
    leaders: int | None = None,
) -> tuple[Float[Array, "points dimension"], Int[Array, " points"]]:
    """Points of the unit cube with the label of their nearest leader.

    Args:
        key: Randomness.
        points: Number of points, at least 1.
        dimension: Entries of a point, at least 1.
        classes: Number of labels; every leader draws one.
        leaders: Number of leaders, uniform in the cube; `5 * dimension` by default.

    Returns:
        The points and their labels.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> import jax
        >>> from varan.data import random_k
        >>> x, y = random_k(jax.random.key(0), points=100, dimension=4, classes=3)
        >>> x.shape, y.shape
        ((100, 4), (100,))

    Source:
        Jordan, Dimakis (2020), arXiv:2003.01219, the synthetic data of the experiments.
    """
    leaders = 5 * dimension if leaders is None else leaders
    for name, size in (
        ("points", points),
        ("dimension", dimension),
        ("classes", classes),
        ("leaders", leaders),
    ):
        if size < 1:
            raise ValueError(f"random_k: `{name}` must be at least 1 (got {size}).")
    return _draw(key, points, dimension, classes, leaders)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw(key, points, dimension, classes, leaders):
    for_points, for_leaders, for_labels = jax.random.split(key, 3)
    x = jax.random.uniform(for_points, (points, dimension))
    centres = jax.random.uniform(for_leaders, (leaders, dimension))
    labels = jax.random.randint(for_labels, (leaders,), 0, classes)
    distances = jnp.sum((x[:, None] - centres[None]) ** 2, -1)
    return x, labels[jnp.argmin(distances, 1)]
