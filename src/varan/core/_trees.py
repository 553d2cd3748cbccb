"""Small operations on pytrees that the core's files share."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree


def tree_norm(tree: PyTree[Array]) -> Float[Array, ""]:
    """Euclidean norm over all leaves, safe to differentiate at zero."""
    total = tree_square(tree)
    positive = total > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), total)


def tree_square(tree: PyTree[Array]) -> Float[Array, ""]:
    """Sum of the squares of all entries."""
    return jnp.asarray(sum(jnp.sum(leaf * leaf) for leaf in jtu.tree_leaves(tree)))


def floats_as_arrays(tree: PyTree) -> PyTree:
    """Python floats become (weakly typed) arrays: new values compile nothing new."""
    return jtu.tree_map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, tree
    )


def stop_gradient(tree: PyTree) -> PyTree:
    """Drops the tangent of every floating array; other leaves stay as they are."""
    return jtu.tree_map(
        lambda leaf: (
            jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf
        ),
        tree,
    )
