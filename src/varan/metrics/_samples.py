"""Distances between two samples of points."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import (
    check_choice,
    check_nonempty,
    check_positive,
    check_shape,
)


def mmd(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    *,
    kernel: Literal["gaussian", "energy"] = "gaussian",
    bandwidth: float | Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """The squared maximum mean discrepancy of two samples, without bias.

    `mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j)`. Its
    expectation is the squared distance of the two distributions' kernel means: 0 for
    equal ones, so that the estimate may be negative. O((n + m)^2 d).

    Args:
        x: A sample, two points at least.
        y: Another sample, two points at least.
        kernel: `"gaussian"`: `exp(-|a - b|^2 / (2 bandwidth^2))`, bounded by 1;
            `"energy"`: `-|a - b|`, which gives the squared energy distance, free of a
            bandwidth, in units of the points.
        bandwidth: Of the Gaussian kernel, positive; default: the median distance
            between different points of the two samples together.

    Returns:
        The estimate; NaN if an entry is.

    Raises:
        ValueError: On samples of fewer than two points or another dimension, an
            unknown kernel, or a bandwidth that is not positive or not used.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.metrics import mmd
        >>> x = jnp.array([[0.0], [1.0]])
        >>> round(float(mmd(x, x + 2, kernel="energy")), 3)
        2.0

    Source: A. Gretton, K. Borgwardt, M. Rasch, B. Schoelkopf, A. Smola, 2012, "A
        kernel two-sample test", JMLR 13, lemma 6; G. Szekely, M. Rizzo, 2013, "Energy
        statistics".
    """
    check_choice("mmd", "kernel", kernel, ("gaussian", "energy"))
    _check_pair("mmd", x, y, 2)
    if kernel == "energy" and bandwidth is not None:
        raise ValueError(
            "mmd: `bandwidth` must be left out for the energy kernel (got "
            f"{bandwidth}): it has none."
        )
    if bandwidth is not None:
        check_positive("mmd", "bandwidth", bandwidth)
    n, m = x.shape[0], y.shape[0]
    squares = _squared_distances(jnp.concatenate([x, y]))
    if kernel == "energy":
        values = -_root(squares)
    else:
        if bandwidth is None:
            bandwidth = _median_distance(squares)
        width = jnp.asarray(bandwidth, x.dtype)
        values = jnp.exp(-squares / (2 * width**2))
    # Each diagonal entry is the kernel of a point with itself: no pair.
    within_x = (jnp.sum(values[:n, :n]) - jnp.trace(values[:n, :n])) / (n * (n - 1))
    within_y = (jnp.sum(values[n:, n:]) - jnp.trace(values[n:, n:])) / (m * (m - 1))
    return within_x + within_y - 2 * jnp.mean(values[:n, n:])


def sliced_wasserstein(
    key: PRNGKeyArray,
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    *,
    directions: int = 100,
    p: float = 2.0,
) -> Float[Array, ""]:
    """The sliced Wasserstein distance of order `p` between two samples.

    The points are projected on random directions; on each line the transport is
    monotone, so that sorting solves it exactly, for samples of different sizes too.
    The p-th powers are averaged over the directions. O(directions (n + m) log(n + m)).

    Args:
        key: Randomness of the directions.
        x: A sample, at least one point.
        y: Another sample, at least one point.
        directions: How many, at least 1; the error falls with their square root.
        p: Order, at least 1.

    Returns:
        The distance, in units of the points; in one dimension it is exact.

    Raises:
        ValueError: On empty samples or another dimension, no directions, `p` below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.metrics import sliced_wasserstein
        >>> x = jnp.array([[0.0], [1.0]])
        >>> round(float(sliced_wasserstein(jax.random.key(0), x, x + 3)), 3)
        3.0

    Source: N. Bonneel, J. Rabin, G. Peyre, H. Pfister, 2015, "Sliced and Radon
        Wasserstein barycenters of measures", definition 1 with samples of directions.
    """
    _check_pair("sliced_wasserstein", x, y, 1)
    if directions < 1 or p < 1:
        raise ValueError(
            "sliced_wasserstein: `directions` and `p` must be at least 1 (got "
            f"{directions} and {p})."
        )
    theta = jax.random.normal(key, (directions, x.shape[1]), x.dtype)
    theta = theta / jnp.linalg.norm(theta, axis=1, keepdims=True)
    powers = _line_transport(jnp.sort(theta @ x.T), jnp.sort(theta @ y.T), p)
    return jnp.mean(powers) ** (1 / p)


def _line_transport(a, b, p):
    """`W_p^p` of sorted rows: both quantile functions are steps, merged."""
    n, m = a.shape[1], b.shape[1]
    if n == m:
        return jnp.mean(jnp.abs(a - b) ** p, 1)
    # In units of 1 / (n m) the steps' ends are integers: no rounding moves them.
    ends = jnp.sort(
        jnp.concatenate([m * jnp.arange(1, n + 1), n * jnp.arange(1, m + 1)])
    )
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    mass = (ends - starts).astype(a.dtype) / (n * m)
    gaps = a[:, jnp.minimum(starts // m, n - 1)] - b[:, jnp.minimum(starts // n, m - 1)]
    return (jnp.abs(gaps) ** p) @ mass


def _squared_distances(points):
    # From differences, not from inner products: those cancel for close points.
    def row(point):
        return jnp.sum((points - point[None]) ** 2, 1)

    return jax.lax.map(row, points, batch_size=min(64, points.shape[0]))


def _root(squares):
    """Square roots with derivative 0 at 0, where points coincide."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def _median_distance(squares):
    size = squares.shape[0]
    pairs = squares[jnp.triu_indices(size, 1)]
    return jax.lax.stop_gradient(jnp.median(_root(pairs)))


def _check_pair(owner, x, y, least):
    for name, sample in (("x", x), ("y", y)):
        check_shape(owner, name, sample, (None, x.shape[1] if x.ndim == 2 else None))
        check_nonempty(owner, name, sample)
        if sample.shape[0] < least:
            raise ValueError(
                f"{owner}: `{name}` must hold {least} points at least (got "
                f"{sample.shape[0]})."
            )
