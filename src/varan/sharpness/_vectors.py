"""Parameter trees as one vector, with norms that survive half precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree


def norm_dtype(tree: PyTree[Array]) -> jnp.dtype:
    """What norms and products are summed in: float32 or what is wider."""
    # Not `promote_types`, which strict promotion refuses.
    double = any(leaf.dtype == jnp.float64 for leaf in jtu.tree_leaves(tree))
    return jnp.dtype("float64" if double else "float32")


def inner(left: PyTree[Array], right: PyTree[Array]) -> Float[Array, ""]:
    """Inner product over all leaves."""
    dtype = norm_dtype(left)
    # Not `vdot`: this fuses with what made the leaves.
    products = jtu.tree_map(
        lambda a, b: jnp.sum(a.astype(dtype) * b.astype(dtype)), left, right
    )
    return jtu.tree_reduce(jnp.add, products, jnp.zeros((), dtype))


def relative_to_peak(
    tree: PyTree[Array],
) -> tuple[PyTree[Array], Float[Array, ""]]:
    """The tree in units of a power of two near its largest entry, and that power.

    Such units are exact: they change no bit of a norm that is no extreme one. Those
    whose own reciprocal would be lost are not taken.
    """
    dtype = norm_dtype(tree)
    peak = jnp.zeros((), dtype)
    for leaf in jtu.tree_leaves(jax.lax.stop_gradient(tree)):
        peak = jnp.maximum(peak, jnp.max(jnp.abs(leaf), initial=0).astype(dtype))
    limits = jnp.finfo(dtype)
    widest = 2.0 ** (limits.maxexp - 28)
    power = jax.lax.reduce_precision(peak, limits.nexp, 0)
    # Zero becomes the smallest unit here, and infinity the largest.
    unit = jnp.clip(power, 1 / widest, widest)
    return _times(tree, 1 / unit), unit


def norm(tree: PyTree[Array]) -> Float[Array, ""]:
    """Euclidean norm over all leaves; its squares neither overflow nor underflow."""
    relative, size = relative_to_peak(tree)
    return size * _length(relative)


def cosine(left: PyTree[Array], right: PyTree[Array]) -> Float[Array, ""]:
    """Cosine of the angle between two trees; 1 where one of them is zero."""
    (left, _), (right, _) = relative_to_peak(left), relative_to_peak(right)
    lengths = _length(left) * _length(right)
    nonzero = lengths != 0
    return jnp.where(nonzero, inner(left, right) / jnp.where(nonzero, lengths, 1), 1)


def scaled(tree: PyTree[Array], factor: Float[Array, ""] | float) -> PyTree[Array]:
    """Each leaf times a number, rounded once to the leaf's precision."""
    return _rounded(_times(tree, factor), tree)


def moved(params: PyTree[Array], step: PyTree[Array]) -> PyTree[Array]:
    """The sum of two trees, in the precision of the first."""
    return jtu.tree_map(lambda p, s: p + s.astype(p.dtype), params, step)


def change(params: PyTree[Array], step: PyTree[Array]) -> PyTree[Array]:
    """What of a step is left in the rounded sum with the weights, in float32 at least.

    In half precision a small step may leave nothing.
    """
    dtype = norm_dtype(params)

    def one(weight, part):
        reached = (weight + part.astype(weight.dtype)).astype(dtype)
        if weight.dtype != dtype:
            # Under jit XLA may leave the rounding out: it counts as excess precision.
            kept = jnp.finfo(weight.dtype)
            reached = jax.lax.reduce_precision(reached, kept.nexp, kept.nmant)
        return jnp.where(part == 0, 0, reached - weight.astype(dtype))

    return jtu.tree_map(one, params, step)


def minus(left: PyTree[Array], right: PyTree[Array]) -> PyTree[Array]:
    """The difference of two trees."""
    return jtu.tree_map(jnp.subtract, left, right)


def of_length(tree: PyTree[Array], length: Float[Array, ""] | float) -> PyTree[Array]:
    """The tree scaled to a norm; zero stays zero instead of becoming NaN."""
    relative, _ = relative_to_peak(tree)
    now = _length(relative)
    nonzero = now != 0
    factor = jnp.where(nonzero, length / jnp.where(nonzero, now, 1.0), 0.0)
    return _rounded(_times(relative, factor), tree)


def orthogonal(tree: PyTree[Array], axis: PyTree[Array]) -> PyTree[Array]:
    """The part of a tree orthogonal to another; all of it where that is zero."""
    relative, _ = relative_to_peak(axis)
    square = inner(relative, relative)
    nonzero = square != 0
    share = inner(tree, relative) / jnp.where(nonzero, square, 1)
    along = _times(relative, jnp.where(nonzero, share, 0))
    return minus(tree, _rounded(along, axis))


def _length(tree):
    return jnp.sqrt(inner(tree, tree))


def _times(tree, factor):
    dtype = norm_dtype(tree)
    factor = jnp.asarray(factor, dtype)
    return jtu.tree_map(lambda leaf: factor * leaf.astype(dtype), tree)


def _rounded(tree, like):
    return jtu.tree_map(lambda leaf, other: leaf.astype(other.dtype), tree, like)
