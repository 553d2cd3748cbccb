"""The loss on a plane through the weights, in units of the weights' own filters."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core._checks import check_positive
from ._hessian import LossFn
from ._objective import check_counts, checked, objective


class LossSurface(eqx.Module):
    """The loss at `w + a d_0 + b d_1`.

    Args:
        a: Coordinates along the first direction.
        b: Coordinates along the second direction.
        loss: Losses, rows for `a` and columns for `b`.
        directions: The two directions, trees like the parameters.
    """

    a: Float[Array, " points"]
    b: Float[Array, " points"]
    loss: Float[Array, "points points"]
    directions: tuple[PyTree, PyTree]


def loss_surface(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    radius: Float[Array, ""] | float = 1.0,
    points: int = 25,
    mask: PyTree | None = None,
    key: PRNGKeyArray,
) -> LossSurface:
    """The loss on a random plane, each direction scaled filter by filter.

    A direction's part for one unit (a row of a weight matrix, a filter of a
    convolution) has the length of that unit's weights: so pictures of networks that
    differ by rescaled layers are alike, and 1 is a step as long as the weights. Units
    lie along the first axis, as in Equinox (out, in, ...), but along the last in arrays
    that are named "kernel", as in Flax (in, out) and (height, width, in, out). Arrays
    of other layouts are scaled along their first axis, too: transpose them in the loss
    if the picture is to be filter by filter.
    `points^2` evaluations of the loss. A picture of two random directions is no
    measure: what is flat in it may be steep in others.

    Args:
        loss_fn: `(params, batch) -> scalar`.
        params: Any pytree; arrays with one axis or none (shifts, scales) stay as they
            are.
        batch: What the loss is evaluated on.
        radius: The plane reaches from minus this to plus this, positive.
        points: In each direction, at least 2; with an odd number the middle is the
            loss at the weights.
        mask: A tree of booleans (or boolean arrays) like the parameters, or a prefix
            of it, or a function from the parameters to one: what the directions move.
        key: Random key of the directions.

    Returns:
        A `LossSurface`.

    Raises:
        ValueError: If a setting is out of range, parameters have no floating arrays,
            the batch is empty, the loss is no scalar, or the mask does not fit or
            selects nothing. A loss that is not finite is drawn as it is.
        TypeError: If `points` is no integer, or the mask not boolean.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import loss_surface
        >>> surface = loss_surface(
        ...     lambda w, b: jnp.sum(w**2), jnp.eye(3), None, points=3,
        ...     key=jax.random.key(0))
        >>> surface.loss.shape, round(float(surface.loss[1, 1]), 3)
        ((3, 3), 3.0)

    Source: H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein, 2018, "Visualizing the
        loss landscape of neural nets", arXiv:1712.09913, section 4.
    """
    check_positive("loss_surface", "radius", radius)
    check_counts("loss_surface", points=points)
    if points < 2:
        raise ValueError(f"loss_surface: `points` must be at least 2 (got {points}).")
    params, mask = checked("loss_surface", params, batch, mask)
    return _surface(loss_fn, params, batch, jnp.asarray(radius), mask, key, points)


@eqx.filter_jit
def _surface(loss_fn, params, batch, radius, mask, key, points):
    flat = objective("loss_surface", loss_fn, params, batch, mask)
    weights = flat.unravel(flat.point)

    def direction(key):
        noise = jax.random.normal(key, flat.point.shape, flat.point.dtype)
        drawn = jtu.tree_map_with_path(_like_filters, flat.unravel(noise), weights)
        return flat.selected * ravel_pytree(drawn)[0]

    first, second = map(direction, jax.random.split(key))
    steps = radius.astype(first.dtype) * jnp.linspace(-1, 1, points, dtype=first.dtype)

    def row(a):
        return jax.lax.map(
            lambda b: flat.value(flat.point + a * first + b * second), steps
        )

    loss = jax.lax.map(row, steps)
    both = (flat.unravel(first), flat.unravel(second))
    return LossSurface(steps, steps, loss, both)


def _like_filters(path, noise, weights):
    """Noise with the norms of the filters; none where there are no filters."""
    if weights.ndim < 2:
        return jnp.zeros_like(weights)
    of_flax = bool(path) and jtu.keystr(path[-1:], simple=True) == "kernel"
    units = weights.ndim - 1 if of_flax else 0
    axes = tuple(axis for axis in range(weights.ndim) if axis != units)
    size, drawn = (
        jnp.sqrt(jnp.sum(leaf**2, axes, keepdims=True)) for leaf in (weights, noise)
    )
    return noise * (size / drawn)
