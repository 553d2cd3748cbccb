"""Values whose gradient is known: the envelope theorem as a differentiation rule."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree


@jax.custom_jvp
def envelope(
    value: Float[Array, ""], gradient: PyTree[Array], point: PyTree[Array]
) -> Float[Array, ""]:
    """`value`, whose derivative with respect to `point` is `gradient`.

    The derivative of a maximum is its maximiser, which need not be differentiated for
    it. Dropping its tangent with `stop_gradient` would also drop the second
    derivative; here `gradient` keeps its own derivatives, so every order is right.

    `value` must not depend on `point` differentiably: that part is `gradient`'s.
    """
    del gradient, point
    return value


@envelope.defjvp
def _envelope_jvp(primals, tangents):
    value, gradient, point = primals
    moved, _, direction = tangents
    return envelope(value, gradient, point), moved + tree_inner(gradient, direction)


def tree_inner(a: PyTree[Array], b: PyTree[Array]) -> Float[Array, ""]:
    """Inner product over all leaves."""
    products = jtu.tree_map(lambda u, v: jnp.sum(u * v), a, b)
    return jnp.asarray(sum(jtu.tree_leaves(products)))
