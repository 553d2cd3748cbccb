"""Partitions of the inputs into cells, for bounds that hold cell by cell."""

from __future__ import annotations

import abc
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..core._checks import check_finite, check_nonempty, is_traced


class Cells(eqx.Module):
    """A partition of the space into `count` cells; the last is all that is outside."""

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """How many cells, the outside included."""

    @abc.abstractmethod
    def assign(self, points: Float[Array, "n d"]) -> Int[Array, " n"]:
        """The cell of each point, in 0 .. count - 1."""

    @abc.abstractmethod
    def reach(self, points: Float[Array, "n d"]) -> Float[Array, " n"]:
        """No point of the same cell is farther away than this; infinite outside."""


class BallCells(Cells):
    """Voronoi cells of some centers, each cut off at a radius.

    Args:
        centers: Of shape (k, d).
        radius: How far each cell reaches from its center, of shape (k,).

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import BallCells
        >>> cells = BallCells(jnp.array([[0.0], [4.0]]), jnp.array([1.0, 1.0]))
        >>> points = jnp.array([[0.5], [4.5], [2.5]])
        >>> cells.assign(points).tolist(), cells.reach(points).tolist()
        ([0, 1, 2], [1.5, 1.5, inf])
    """

    centers: Float[Array, "k d"]
    radius: Float[Array, " k"]

    @property
    def count(self) -> int:
        return self.centers.shape[0] + 1

    def assign(self, points):
        nearest, distance = _nearest(points, self.centers)
        inside = distance <= self.radius[nearest]
        return jnp.where(inside, nearest, self.centers.shape[0]).astype(jnp.int32)

    def reach(self, points):
        nearest, distance = _nearest(points, self.centers)
        radius = self.radius[nearest]
        return jnp.where(distance <= radius, distance + radius, jnp.inf)


class GridCells(Cells):
    """Equal boxes that fill a box.

    Args:
        low: The box's lower corner, of shape (d,).
        high: Its upper corner, of shape (d,), above `low` in each coordinate.
        bins: Boxes along each coordinate, at least 1.

    Raises:
        ValueError: If `high` is not above `low` or `bins` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import GridCells
        >>> cells = GridCells(jnp.zeros(2), jnp.ones(2), 2)
        >>> points = jnp.array([[0.1, 0.1], [0.9, 0.1], [1.5, 0.5]])
        >>> cells.assign(points).tolist(), cells.count
        ([0, 2, 4], 5)
    """

    low: Float[Array, " d"]
    high: Float[Array, " d"]
    bins: int = eqx.field(static=True)

    def __check_init__(self):
        if self.bins < 1:
            raise ValueError(f"GridCells: `bins` must be at least 1 (got {self.bins}).")
        if not is_traced(self.low) and not np.all(np.asarray(self.high) > self.low):
            raise ValueError(
                "GridCells: `high` must be above `low` in each coordinate (got "
                f"{np.asarray(self.low)} and {np.asarray(self.high)})."
            )

    @property
    def count(self) -> int:
        return self.bins ** self.low.shape[0] + 1

    def assign(self, points):
        places, inside = self._places(points)
        powers = self.bins ** np.arange(self.low.shape[0])[::-1]
        ids = jnp.sum(places * jnp.asarray(powers, jnp.int32)[None, :], 1)
        return jnp.where(inside, ids, self.count - 1).astype(jnp.int32)

    def reach(self, points):
        places, inside = self._places(points)
        side = (self.high - self.low) / self.bins
        corner = self.low[None, :] + places.astype(points.dtype) * side[None, :]
        farthest = jnp.maximum(points - corner, corner + side[None, :] - points)
        return jnp.where(inside, jnp.linalg.norm(farthest, axis=1), jnp.inf)

    def _places(self, points):
        low, high = self.low[None, :], self.high[None, :]
        inside = jnp.all((points >= low) & (points <= high), axis=1)
        share = (points - low) / (high - low)
        places = jnp.clip(jnp.floor(share * self.bins), 0, self.bins - 1)
        return places.astype(jnp.int32), inside


def kmeans_cells(
    key: PRNGKeyArray, points: Float[Array, "n d"], k: int, *, max_steps: int = 50
) -> BallCells:
    """Cells around the centers that Lloyd's algorithm finds.

    Seeds far apart (k-means++), then alternates means and nearest centers until nothing
    changes. Each cell reaches as far as its farthest point. For a bound on a target
    domain pass points of the source alone: cells that have seen the target sample prove
    nothing. Cost of a step: n k d multiplications.

    Args:
        key: Random key of the seeds.
        points: The points, of shape (n, d).
        k: Number of centers, 1 .. n.
        max_steps: Steps of Lloyd's algorithm at most.

    Returns:
        The cells; their count is k + 1.

    Raises:
        ValueError: If the points are empty or not finite, or `k` is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import kmeans_cells
        >>> points = jnp.array([[0.0], [1.0], [10.0], [11.0]])
        >>> cells = kmeans_cells(jax.random.key(0), points, 2)
        >>> sorted(cells.centers[:, 0].tolist()), cells.radius.tolist()
        ([0.5, 10.5], [0.5, 0.5])

    Source: S. Lloyd (1982), Least Squares Quantization in PCM; D. Arthur and S.
        Vassilvitskii (2007), k-means++.
    """
    check_nonempty("kmeans_cells", "points", points)
    check_finite("kmeans_cells", "points", points)
    if not 1 <= k <= points.shape[0]:
        raise ValueError(
            f"kmeans_cells: `k` must lie in 1 .. {points.shape[0]}, the number of "
            f"points (got {k})."
        )
    return _kmeans(key, jnp.asarray(points), k, max_steps)


@partial(jax.jit, static_argnums=2)
def _kmeans(key, points, k, max_steps):
    n = points.shape[0]

    def square_to(center):
        return jnp.sum((points - center[None, :]) ** 2, 1)

    def seed(square, key):
        center = points[jax.random.categorical(key, jnp.log(square))]
        return jnp.minimum(square, square_to(center)), center

    for_first, for_others = jax.random.split(key)
    first = points[jax.random.randint(for_first, (), 0, n)]
    keys = jax.random.split(for_others, k - 1)
    _, others = jax.lax.scan(seed, square_to(first), keys)
    centers = jnp.concatenate([first[None, :], others])

    def step(carry):
        centers, _, steps = carry
        nearest, _ = _nearest(points, centers)
        member = jax.nn.one_hot(nearest, k, dtype=points.dtype)
        size = jnp.sum(member, 0)
        means = (member.T @ points) / jnp.maximum(size, 1)[:, None]
        # A center without points stays where it is.
        moved = jnp.where(size[:, None] > 0, means, centers)
        return moved, jnp.any(moved != centers), steps + 1

    centers, _, _ = jax.lax.while_loop(
        lambda carry: carry[1] & (carry[2] < max_steps),
        step,
        (centers, jnp.ones((), bool), 0),
    )
    nearest, distance = _nearest(points, centers)
    radius = jax.ops.segment_max(distance, nearest, k)
    return BallCells(centers, jnp.maximum(radius, 0))


def _nearest(points, centers):
    """The nearest center of each point and its distance, without cancellation."""
    square = jnp.sum((points[:, None, :] - centers[None, :, :]) ** 2, -1)
    nearest = jnp.argmin(square, 1).astype(jnp.int32)
    return nearest, jnp.sqrt(jnp.min(square, 1))
