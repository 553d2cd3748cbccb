"""Transport between Gaussian laws, in closed form: what samplers are tested against.

Between `N(mean0, covariance0)` and `N(mean1, covariance1)` the squared Wasserstein
distance, the optimal map, the entropic plan and the flow of the Fokker-Planck equation
of a Gaussian target are all Gaussian and known. Each function costs a few symmetric
eigenvalue decompositions, and differentiates to any order, repeated eigenvalues
included.

Source: G. Peyré and M. Cuturi, Computational optimal transport, 2019 (arXiv
1803.00567), remark 2.31; each function names its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core._checks import (
    check_finite,
    check_nonnegative,
    check_positive,
    check_shape,
    is_traced,
)


def bures_wasserstein(
    mean0: Float[Array, " d"],
    covariance0: Float[Array, "d d"],
    mean1: Float[Array, " d"],
    covariance1: Float[Array, "d d"],
) -> Float[Array, ""]:
    """The squared Wasserstein-2 distance of two Gaussians.

    Args:
        mean0: Of the first.
        covariance0: Symmetric, positive semidefinite.
        mean1: Of the second.
        covariance1: Symmetric, positive semidefinite.

    Returns:
        `min E |X - Y|^2`; its square root is the distance. Derivatives in
        `covariance0` need it to be positive definite.

    Raises:
        ValueError: If the shapes do not fit, or an entry is NaN or infinite.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import bures_wasserstein
        >>> zero, one = jnp.zeros(2), jnp.eye(2)
        >>> round(float(bures_wasserstein(zero, one, zero + 1, 4 * one)), 3)
        4.0

    Source:
        C. Givens and R. Shortt, A class of Wasserstein metrics for probability
        distributions, Michigan Mathematical Journal 31 (1984).
    """
    _check("bures_wasserstein", mean0, covariance0, mean1, covariance1)
    root = matrix_sqrt(covariance0)
    cross = matrix_sqrt(root @ covariance1 @ root)
    apart = jnp.sum((mean0 - mean1) ** 2)
    spread = jnp.trace(covariance0) + jnp.trace(covariance1) - 2 * jnp.trace(cross)
    # What rounding leaves below zero is no distance.
    return apart + jnp.maximum(spread, 0)


def gaussian_map(
    mean0: Float[Array, " d"],
    covariance0: Float[Array, "d d"],
    mean1: Float[Array, " d"],
    covariance1: Float[Array, "d d"],
) -> tuple[Float[Array, "d d"], Float[Array, " d"]]:
    """The optimal map from one Gaussian to another, `x -> matrix @ x + shift`.

    Args:
        mean0: Of the first.
        covariance0: Symmetric, positive definite.
        mean1: Of the second.
        covariance1: Symmetric, positive semidefinite.

    Returns:
        `matrix`, symmetric and positive semidefinite, and `shift`.

    Raises:
        ValueError: If the shapes do not fit, or an entry is NaN or infinite. A
            singular `covariance0` gives NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import gaussian_map
        >>> zero, one = jnp.zeros(2), jnp.eye(2)
        >>> matrix, shift = gaussian_map(zero, one, zero + 1, 4 * one)
        >>> [round(float(v), 3) for v in (matrix[0, 0], matrix[0, 1], shift[0])]
        [2.0, 0.0, 1.0]

    Source:
        Peyré, Cuturi, 2019 (arXiv 1803.00567), equation 2.40.
    """
    _check("gaussian_map", mean0, covariance0, mean1, covariance1)
    root = matrix_sqrt(covariance0)
    inverse = jnp.linalg.inv(root)
    matrix = inverse @ matrix_sqrt(root @ covariance1 @ root) @ inverse
    return matrix, mean1 - matrix @ mean0


def gaussian_entropic_plan(
    mean0: Float[Array, " d"],
    covariance0: Float[Array, "d d"],
    mean1: Float[Array, " d"],
    covariance1: Float[Array, "d d"],
    *,
    epsilon: float | Float[Array, ""],
) -> tuple[Float[Array, " 2d"], Float[Array, "2d 2d"]]:
    """The entropic plan of two Gaussians for half the squared distance.

    Args:
        mean0: Of the first.
        covariance0: Symmetric, positive definite.
        mean1: Of the second.
        covariance1: Symmetric, positive semidefinite.
        epsilon: Weight of the entropy relative to the cost `|x - y|^2 / 2`, positive.

    Returns:
        Mean and covariance of the pair `(X, Y)`, which is Gaussian.

    Raises:
        ValueError: If the shapes do not fit, an entry is NaN or infinite, or
            `epsilon` is not positive. A singular `covariance0` gives NaN or infinity.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import gaussian_entropic_plan
        >>> zero, one = jnp.zeros(1), jnp.eye(1)
        >>> _, joint = gaussian_entropic_plan(zero, one, zero, one, epsilon=1.0)
        >>> round(float(joint[0, 1]), 3)  # (sqrt(5) - 1) / 2
        0.618

    Source:
        Janati, Muzellec, Peyré, Cuturi, 2020 (arXiv 2006.02572), theorem 1; half
        their cost, so that `epsilon` is their `sigma^2`.
    """
    _check("gaussian_entropic_plan", mean0, covariance0, mean1, covariance1)
    check_positive("gaussian_entropic_plan", "epsilon", epsilon)
    one = jnp.eye(covariance0.shape[0], dtype=covariance0.dtype)
    root = matrix_sqrt(covariance0)
    inner = matrix_sqrt(4 * root @ covariance1 @ root + epsilon**2 * one)
    cross = (root @ inner @ jnp.linalg.inv(root) - epsilon * one) / 2
    joint = jnp.block([[covariance0, cross], [cross.T, covariance1]])
    return jnp.concatenate([mean0, mean1]), joint


def ornstein_uhlenbeck(
    mean0: Float[Array, " d"],
    covariance0: Float[Array, "d d"],
    target_mean: Float[Array, " d"],
    target_covariance: Float[Array, "d d"],
    *,
    time: float | Float[Array, ""],
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """The Wasserstein gradient flow of the divergence to a Gaussian target.

    From a Gaussian start the flow of `KL(p | N(target_mean, target_covariance))` stays
    Gaussian; it is the law of `dX = -S^-1 (X - m) dt + sqrt(2) dW`.

    Args:
        mean0: Of the start.
        covariance0: Of the start; need not commute with the target's.
        target_mean: `m`.
        target_covariance: `S`, symmetric, positive definite.
        time: Not negative.

    Returns:
        Mean and covariance at `time`.

    Raises:
        ValueError: If the shapes do not fit, an entry is NaN or infinite, or `time`
            is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import ornstein_uhlenbeck
        >>> zero, one = jnp.zeros(1), jnp.eye(1)
        >>> mean, _ = ornstein_uhlenbeck(zero + 1, one, zero, one, time=jnp.log(2.0))
        >>> round(float(mean[0]), 3)
        0.5

    Source:
        R. Jordan, D. Kinderlehrer and F. Otto, The variational formulation of the
        Fokker-Planck equation, SIAM Journal on Mathematical Analysis 29 (1998).
    """
    owner = "ornstein_uhlenbeck"
    names = ("mean0", "covariance0", "target_mean", "target_covariance")
    _check(owner, mean0, covariance0, target_mean, target_covariance, names=names)
    check_nonnegative(owner, "time", time)
    values, vectors = jnp.linalg.eigh(target_covariance)
    values = jnp.where(values > 0, values, jnp.nan)
    decay = (vectors * jnp.exp(-time / values)[None, :]) @ vectors.T
    arrived = (vectors * (-values * jnp.expm1(-2 * time / values))[None, :]) @ vectors.T
    mean = target_mean + decay @ (mean0 - target_mean)
    return mean, decay @ covariance0 @ decay + arrived


@jax.custom_jvp
def matrix_sqrt(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """The square root of a positive semidefinite matrix; NaN of any other.

    Eigenvalues that are negative by rounding count as zero.

    Its derivative solves `R dR + dR R = dA` and exists where the matrix is definite.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    tiny = float(jnp.finfo(matrix.dtype).eps) ** 0.5 * jnp.max(jnp.abs(values))
    roots = jnp.where(values >= -tiny, jnp.sqrt(jnp.maximum(values, 0)), jnp.nan)
    return (vectors * roots[None, :]) @ vectors.T


@matrix_sqrt.defjvp
def _matrix_sqrt_jvp(primals, tangents):
    root = matrix_sqrt(*primals)
    return root, _lyapunov(root, *tangents)


def _lyapunov(root, right):
    """Solves `root X + X root = right`.

    In the basis of `root` that is a division; unlike the derivative of eigenvectors it
    does not mind repeated eigenvalues.
    """

    def solve(_, right):
        values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(root))
        inner = (vectors.T @ right @ vectors) / (values[:, None] + values[None, :])
        return vectors @ inner @ vectors.T

    return jax.lax.custom_linear_solve(
        lambda x: root @ x + x @ root, right, solve, symmetric=True
    )


_NAMES = ("mean0", "covariance0", "mean1", "covariance1")


def _check(owner, mean0, covariance0, mean1, covariance1, names=_NAMES):
    size = jnp.shape(mean0)[0] if jnp.ndim(mean0) else None
    shapes = ((size,), (size, size), (size,), (size, size))
    arrays = (mean0, covariance0, mean1, covariance1)
    for name, array, shape in zip(names, arrays, shapes, strict=True):
        check_shape(owner, name, array, shape)
        check_finite(owner, name, array)
        if len(shape) == 2 and not is_traced(array):
            _check_covariance(owner, name, array)


def _check_covariance(owner, name, matrix):
    matrix = np.asarray(matrix)
    gap, size = np.max(np.abs(matrix - matrix.T)), np.max(np.abs(matrix))
    if gap > float(jnp.finfo(matrix.dtype).eps) ** 0.5 * size:
        raise ValueError(
            f"{owner}: `{name}` must be symmetric (got entries {gap:.3g} away "
            "from their mirror images). Average it with its transpose."
        )
    least = float(np.linalg.eigvalsh(matrix.astype(float))[0])
    if least < -(float(jnp.finfo(matrix.dtype).eps) ** 0.5) * size:
        raise ValueError(
            f"{owner}: `{name}` must be positive semidefinite (got an eigenvalue of "
            f"{least:.3g})."
        )
