"""Proximal operators of separable penalties, in closed form.

The proximal operator of a convex `f` with step `t` maps `x` to
`argmin_u f(u) + ||u - x||^2 / (2 t)`: one implicit gradient step. It is firmly
non-expansive, and Moreau's identity `x = prox_{t f}(x) + t prox_{f*/t}(x/t)` ties it to
the conjugate's. All cost one pass over the entries and act on every leaf of a pytree.

Source: N. Parikh and S. Boyd, Proximal Algorithms, Foundations and Trends in
Optimization 1 (2014), sections 2.1 to 2.5 and 6.5.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..core._checks import check_nonnegative


def prox_l1(
    x: PyTree[Array],
    weight: Array | float = 1.0,
    stepsize: Float[Array, ""] | float = 1.0,
) -> PyTree[Array]:
    """Soft thresholding: the proximal operator of `weight * ||x||_1`.

    Moves every entry towards zero by `stepsize * weight` and stops there.

    Args:
        x: A pytree of arrays.
        weight: The penalty's weight, nonnegative; a scalar, or an array that
            broadcasts to every leaf.
        stepsize: Nonnegative scalar.

    Returns:
        A pytree like `x`.

    Raises:
        ValueError: if `weight` or `stepsize` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import prox_l1
        >>> [float(v) for v in prox_l1(jnp.array([3.0, -0.5, -2.0]))]
        [2.0, 0.0, -1.0]

    Source: Parikh and Boyd (2014), section 6.5.2.
    """
    return prox_elastic_net(x, weight, 0.0, stepsize)


def prox_ridge(
    x: PyTree[Array],
    weight: Array | float = 1.0,
    stepsize: Float[Array, ""] | float = 1.0,
) -> PyTree[Array]:
    """Shrinkage: the proximal operator of `weight * ||x||^2 / 2`.

    Args:
        x: A pytree of arrays.
        weight: The penalty's weight, nonnegative; a scalar, or an array that
            broadcasts to every leaf.
        stepsize: Nonnegative scalar.

    Returns:
        A pytree like `x`: `x / (1 + stepsize * weight)`.

    Raises:
        ValueError: if `weight` or `stepsize` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import prox_ridge
        >>> [float(v) for v in prox_ridge(jnp.array([3.0, -1.0]))]
        [1.5, -0.5]

    Source: Parikh and Boyd (2014), section 6.1.1.
    """
    return prox_elastic_net(x, 0.0, weight, stepsize)


def prox_elastic_net(
    x: PyTree[Array],
    l1: Array | float = 1.0,
    l2: Array | float = 1.0,
    stepsize: Float[Array, ""] | float = 1.0,
) -> PyTree[Array]:
    """The proximal operator of `l1 * ||x||_1 + l2 * ||x||^2 / 2`.

    Soft thresholding, then shrinkage; the order matters.

    Args:
        x: A pytree of arrays.
        l1: Weight of the absolute values, nonnegative; a scalar, or an array that
            broadcasts to every leaf.
        l2: Weight of the half squares, nonnegative; as `l1`.
        stepsize: Nonnegative scalar.

    Returns:
        A pytree like `x`.

    Raises:
        ValueError: if a weight or `stepsize` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import prox_elastic_net
        >>> [float(v) for v in prox_elastic_net(jnp.array([3.0, -0.5, -2.0]))]
        [1.0, 0.0, -0.5]

    Source: Parikh and Boyd (2014), section 6.5.3.
    """
    for name, value in (("l1", l1), ("l2", l2), ("stepsize", stepsize)):
        check_nonnegative("prox", name, value)

    def leaf(v):
        cut = jnp.asarray(stepsize, v.dtype) * jnp.asarray(l1, v.dtype)
        shrink = 1 + jnp.asarray(stepsize, v.dtype) * jnp.asarray(l2, v.dtype)
        # v - clip(v) rather than sign(v) * max(|v| - cut, 0): the derivative with
        # respect to `cut` is right, and NaN stays NaN.
        return (v - jnp.clip(v, -cut, cut)) / shrink

    return jax.tree.map(leaf, x)
