"""Parameter trees as one vector, with norms that survive half precision."""

from __future__ import annotations

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


def norm(tree: PyTree[Array]) -> Float[Array, ""]:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(inner(tree, tree))


def scaled(tree: PyTree[Array], factor: Float[Array, ""] | float) -> PyTree[Array]:
    """Each leaf times a number, rounded once to the leaf's precision."""
    dtype = norm_dtype(tree)
    factor = jnp.asarray(factor, dtype)
    return jtu.tree_map(
        lambda leaf: (factor * leaf.astype(dtype)).astype(leaf.dtype), tree
    )


def moved(params: PyTree[Array], step: PyTree[Array]) -> PyTree[Array]:
    """The sum of two trees, in the precision of the first."""
    return jtu.tree_map(lambda p, s: p + s.astype(p.dtype), params, step)


def minus(left: PyTree[Array], right: PyTree[Array]) -> PyTree[Array]:
    """The difference of two trees."""
    return jtu.tree_map(jnp.subtract, left, right)


def of_length(tree: PyTree[Array], length: Float[Array, ""] | float) -> PyTree[Array]:
    """The tree scaled to a norm; zero stays zero instead of becoming NaN."""
    size = norm(tree)
    nonzero = size != 0
    return scaled(tree, jnp.where(nonzero, length / jnp.where(nonzero, size, 1.0), 0.0))
