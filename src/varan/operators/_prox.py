"""Proximal operators in closed form, and any projection as one.

The proximal operator of a convex `f` with step `t` maps `x` to
`argmin_u f(u) + ||u - x||^2 / (2 t)`: one implicit gradient step. It is firmly
non-expansive, and Moreau's identity `x = prox_{t f}(x) + t prox_{f*/t}(x/t)` ties it to
the conjugate's. All cost a pass or two over the entries and act on pytrees.

Source: N. Parikh and S. Boyd, Proximal Algorithms, Foundations and Trends in
Optimization 1 (2014), sections 2.1 to 2.5 and 6.5.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..core._checks import check_nonnegative
from ..core._trees import tree_norm


def prox_none(
    x: PyTree[Array], stepsize: Float[Array, ""] | float = 1.0
) -> PyTree[Array]:
    """The proximal operator of zero: `x` itself.

    Args:
        x: A pytree of arrays.
        stepsize: Of no effect; taken as all proximal operators take it.

    Returns:
        `x`.

    Example:
        >>> from varan.operators import prox_none
        >>> prox_none(2.0)
        2.0

    Source: Parikh and Boyd (2014), section 2.1.
    """
    del stepsize
    return x


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
        cut = _like(stepsize, v) * _like(l1, v)
        shrink = 1 + _like(stepsize, v) * _like(l2, v)
        # v - clip(v) rather than sign(v) * max(|v| - cut, 0): the derivative with
        # respect to `cut` is right, and NaN stays NaN.
        return (v - jnp.clip(v, -cut, cut)) / shrink

    return jax.tree.map(leaf, x)


def prox_nonnegative_l1(
    x: PyTree[Array],
    weight: Array | float = 1.0,
    stepsize: Float[Array, ""] | float = 1.0,
) -> PyTree[Array]:
    """The proximal operator of `weight * sum(x)` on the non-negative orthant.

    Args:
        x: A pytree of arrays.
        weight: The penalty's weight, nonnegative; a scalar, or an array that
            broadcasts to every leaf.
        stepsize: Nonnegative scalar.

    Returns:
        A pytree like `x`: entries lowered by `stepsize * weight`, at zero at least.

    Raises:
        ValueError: if `weight` or `stepsize` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import prox_nonnegative_l1
        >>> [float(v) for v in prox_nonnegative_l1(jnp.array([3.0, 0.5, -2.0]))]
        [2.0, 0.0, 0.0]

    Source: Parikh and Boyd (2014), sections 2.2 and 6.5.2.
    """
    for name, value in (("weight", weight), ("stepsize", stepsize)):
        check_nonnegative("prox_nonnegative_l1", name, value)

    def leaf(v):
        return jax.nn.relu(v - _like(stepsize, v) * _like(weight, v))

    return jax.tree.map(leaf, x)


def prox_nonnegative_ridge(
    x: PyTree[Array],
    weight: Array | float = 1.0,
    stepsize: Float[Array, ""] | float = 1.0,
) -> PyTree[Array]:
    """The proximal operator of `weight * ||x||^2 / 2` on the non-negative orthant.

    Args:
        x: A pytree of arrays.
        weight: The penalty's weight, nonnegative; a scalar, or an array that
            broadcasts to every leaf.
        stepsize: Nonnegative scalar.

    Returns:
        A pytree like `x`: `relu(x) / (1 + stepsize * weight)`.

    Raises:
        ValueError: if `weight` or `stepsize` is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import prox_nonnegative_ridge
        >>> [float(v) for v in prox_nonnegative_ridge(jnp.array([3.0, -1.0]))]
        [1.5, 0.0]

    Source: Parikh and Boyd (2014), sections 2.2 and 6.1.1.
    """
    for name, value in (("weight", weight), ("stepsize", stepsize)):
        check_nonnegative("prox_nonnegative_ridge", name, value)
    return jax.tree.map(jax.nn.relu, prox_ridge(x, weight, stepsize))


def prox_group_lasso(
    x: PyTree[Array],
    weight: Float[Array, ""] | float = 1.0,
    stepsize: Float[Array, ""] | float = 1.0,
) -> PyTree[Array]:
    """Block soft thresholding: the proximal operator of `weight * ||x||`.

    Shortens `x` by `stepsize * weight`, to zero at most. All leaves form one group;
    `vmap` over the groups of equal size, or map over a list of groups.

    Args:
        x: A pytree of arrays.
        weight: The penalty's weight, nonnegative scalar.
        stepsize: Nonnegative scalar.

    Returns:
        A pytree like `x`.

    Raises:
        ValueError: if `weight` or `stepsize` is negative or NaN.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from varan.operators import prox_group_lasso
        >>> groups = jnp.array([[3.0, 4.0], [0.3, 0.4]])
        >>> short = jax.vmap(prox_group_lasso)(groups)
        >>> [[round(float(v), 2) for v in group] for group in short]
        [[2.4, 3.2], [0.0, 0.0]]

    Source: Parikh and Boyd (2014), section 6.5.4.
    """
    for name, value in (("weight", weight), ("stepsize", stepsize)):
        check_nonnegative("prox_group_lasso", name, value)
    norm = tree_norm(x)
    level = jnp.asarray(weight, norm.dtype) * jnp.asarray(stepsize, norm.dtype)
    shortened = ~(norm <= level)
    # Nothing is divided by a norm of zero; a level of zero leaves `x` exactly.
    keep = jnp.where(shortened, 1 - level / jnp.where(shortened, norm, 1), 0)
    return jax.tree.map(lambda v: keep.astype(v.dtype) * v, x)


def prox_from_projection(project: Callable) -> Callable:
    """The proximal operator of a set's indicator function: its projection.

    Args:
        project: A projection, called as `project(x, *data)`.

    Returns:
        A function of `(x, stepsize=1.0, *data)` that ignores the step.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_simplex, prox_from_projection
        >>> prox = prox_from_projection(project_simplex)
        >>> [float(v) for v in prox(jnp.array([1.5, 1.0, -3.0]), 0.1)]
        [0.75, 0.25, 0.0]

    Source: Parikh and Boyd (2014), section 1.2.
    """

    def prox(x, stepsize=1.0, *data):
        del stepsize
        return project(x, *data)

    return prox


def _like(value, leaf):
    return jnp.asarray(value, leaf.dtype)
