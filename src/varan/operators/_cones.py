"""Spectral operators and cones: second-order cone, semidefinite cone, nuclear norm.

The semidefinite projection and the nuclear norm's proximal operator apply a scalar
function to eigenvalues or singular values. Their derivatives are written with divided
differences of that function, `(f(a) - f(b)) / (a - b)`, in a form that never divides by
the gap of values that lie on one side of the kink. They are therefore right at repeated
eigenvalues too, where eigenvectors have no derivative. One decomposition, O(n^3).

Source: for the cones N. Parikh and S. Boyd, Proximal Algorithms (2014), sections 6.3.2
and 6.3.3; for the derivatives J. Malick and H. Sendov, Clarke generalized Jacobian of
the projection onto the cone of positive semidefinite matrices, Set-Valued Analysis 14
(2006); for the nuclear norm J.-F. Cai, E. Candes and Z. Shen, A singular value
thresholding algorithm for matrix completion, SIAM Journal on Optimization 20 (2010).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core._checks import check_nonempty, check_nonnegative, check_shape
from ..core._trees import tree_norm


def project_second_order_cone(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """Projects on `{(t, y) : ||y|| <= t}`, the first entry being `t`.

    Args:
        x: A vector: the height `t`, then `y`; use `vmap` for batches.

    Returns:
        A vector like `x`; `x` itself, exactly, when it lies in the cone.

    Raises:
        ValueError: if `x` is not a vector of two entries at least.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_second_order_cone
        >>> x = project_second_order_cone(jnp.array([0.0, 2.0, 0.0]))
        >>> [float(v) for v in x]
        [1.0, 1.0, 0.0]

    Source: Parikh and Boyd (2014), section 6.3.2.
    """
    check_shape("project_second_order_cone", "x", x, (None,))
    if x.shape[0] < 2:
        raise ValueError(
            "project_second_order_cone: `x` must have two entries at least, a height "
            f"and a vector (got {x.shape[0]})."
        )
    height, norm = x[0], tree_norm(x[1:])
    mean = (height + norm) / 2
    positive = norm > 0
    scale = mean / jnp.where(positive, norm, 1)
    between = jnp.concatenate([mean[None], scale * x[1:]])
    answer = jnp.where(norm <= -height, jnp.zeros_like(x), between)
    return jnp.where(norm <= height, x, answer)


def project_positive_semidefinite(x: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Projects on the symmetric matrices without negative eigenvalues.

    Args:
        x: A square matrix; use `vmap` for batches. A matrix that is not symmetric is
            projected as well: its symmetric part decides.

    Returns:
        A symmetric matrix like `x`.

    Raises:
        ValueError: if `x` is not a non-empty square matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_positive_semidefinite
        >>> x = project_positive_semidefinite(jnp.diag(jnp.array([2.0, -1.0])))
        >>> [[round(abs(float(v)), 3) for v in row] for row in x]
        [[2.0, 0.0], [0.0, 0.0]]

    Source: Parikh and Boyd (2014), section 6.3.3.
    """
    check_shape("project_positive_semidefinite", "x", x, (None, None))
    check_shape("project_positive_semidefinite", "x", x, (x.shape[0], x.shape[0]))
    check_nonempty("project_positive_semidefinite", "x", x)
    return _project_symmetric((x + x.T) / 2)


@jax.custom_jvp
def _project_symmetric(x):
    return _positive_part(*jnp.linalg.eigh(x, symmetrize_input=False))


@_project_symmetric.defjvp
def _project_symmetric_jvp(primals, tangents):
    (x,), (direction,) = primals, tangents
    values, vectors = jnp.linalg.eigh(x, symmetrize_input=False)
    weights = _divided_relu(values, values)
    inner = weights * (vectors.T @ direction @ vectors)
    return _positive_part(values, vectors), vectors @ inner @ vectors.T


def _positive_part(values, vectors):
    return (vectors * jax.nn.relu(values)[None, :]) @ vectors.T


def prox_nuclear_norm(
    x: Float[Array, "m n"],
    weight: Float[Array, ""] | float = 1.0,
    stepsize: Float[Array, ""] | float = 1.0,
) -> Float[Array, "m n"]:
    """The proximal operator of `weight` times the sum of the singular values.

    Moves every singular value towards zero by `stepsize * weight` and stops there.

    Args:
        x: A matrix; use `vmap` for batches.
        weight: The penalty's weight, nonnegative scalar.
        stepsize: Nonnegative scalar.

    Returns:
        A matrix like `x`.

    Raises:
        ValueError: if `x` is not a non-empty matrix, or `weight` or `stepsize` is
            negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import prox_nuclear_norm
        >>> x = prox_nuclear_norm(jnp.diag(jnp.array([3.0, 0.5])))
        >>> [[round(abs(float(v)), 3) for v in row] for row in x]
        [[2.0, 0.0], [0.0, 0.0]]

    Source: Cai, Candes and Shen (2010), theorem 2.1.
    """
    check_shape("prox_nuclear_norm", "x", x, (None, None))
    check_nonempty("prox_nuclear_norm", "x", x)
    check_nonnegative("prox_nuclear_norm", "weight", weight)
    check_nonnegative("prox_nuclear_norm", "stepsize", stepsize)
    level = jnp.asarray(weight, x.dtype) * jnp.asarray(stepsize, x.dtype)
    return _threshold(x, level)


@jax.custom_jvp
def _threshold(x, level):
    left, values, right = jnp.linalg.svd(x, full_matrices=False)
    return (left * jax.nn.relu(values - level)[None, :]) @ right


@_threshold.defjvp
def _threshold_jvp(primals, tangents):
    (x, level), (direction, change) = primals, tangents
    left, values, right = jnp.linalg.svd(x, full_matrices=False)
    kept = jax.nn.relu(values - level)
    # In the singular basis the symmetric part of the direction sees the differences
    # (f(a) - f(b)) / (a - b), the skew part (f(a) + f(b)) / (a + b), and what leaves
    # the singular subspaces f(a) / a. Nothing divides by a vanishing number: f is zero
    # below the level.
    inner = left.T @ direction @ right.T
    mirrored = inner.T
    sums = values[:, None] + values[None, :]
    skew = (kept[:, None] + kept[None, :]) / jnp.where(sums > 0, sums, 1)
    even = _divided_relu(values - level, values - level)
    core = (even * (inner + mirrored) + skew * (inner - mirrored)) / 2
    core = core - change * jnp.diag((values > level).astype(x.dtype))
    ratio = kept / jnp.where(values > 0, values, 1)
    tangent = left @ core @ right
    beyond = direction @ right.T - left @ inner
    tangent = tangent + (beyond * ratio[None, :]) @ right
    outside = left.T @ direction - inner @ right
    tangent = tangent + (left * ratio[None, :]) @ outside
    return (left * kept[None, :]) @ right, tangent


def _divided_relu(a, b):
    """`(relu(a_i) - relu(b_j)) / (a_i - b_j)`; relu's derivative where they meet."""
    a, b = a[:, None], b[None, :]
    gap = jnp.abs(a) + jnp.abs(b)
    # The values lie on both sides of zero here, so their gap is a sum.
    across = jnp.maximum(jax.nn.relu(a), jax.nn.relu(b)) / jnp.where(gap > 0, gap, 1)
    return jnp.where((a > 0) & (b > 0), 1, jnp.where((a <= 0) & (b <= 0), 0, across))
