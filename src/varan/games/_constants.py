"""Constants of an operator on a region, estimated from its Jacobian at points of it.

Three numbers decide which steps converge: the Lipschitz constant `L`, the modulus `mu`
of strong monotonicity (negative where the operator is not monotone), and `rho` of
negative comonotonicity, `<F(u) - F(v), u - v> >= -rho ||F(u) - F(v)||^2`. For a linear
operator one point gives all three exactly. Else a sample says only that the constants
of the region are no better than these: typed as estimates, never as proofs.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_finite
from ..core._problem import Problem
from ..core._stability import _extreme_ritz, _products, _unit_vector
from ._game import as_game


def estimate_lipschitz(problem: Problem, points: PyTree[Array]) -> Certificate:
    """The largest spectral norm of the operator's Jacobian at sampled points.

    Lanczos on `J'J`, matrix-free: at most 64 products with `J` and `J'` a point.

    Args:
        problem: A `Game`, or any problem taken by its condition.
        points: A pytree like an iterate with a leading axis over the points.

    Returns:
        An estimate: the region's constant is at least `value`, up to Lanczos's error.

    Raises:
        ValueError: If there is no point.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import estimate_lipschitz, rotation_game
        >>> L = estimate_lipschitz(rotation_game(3.0, 1.0), jnp.ones((1, 2)))
        >>> round(float(L.value), 3), L.proof
        (3.0, False)
    """
    values = _over_points("estimate_lipschitz", _norm, problem, points)
    return Certificate(
        "Lipschitz constant",
        jnp.max(values),
        proof=False,
        statement="the operator's Lipschitz constant on the region is about value, "
        "seen at sampled points",
    )


def estimate_monotonicity(problem: Problem, points: PyTree[Array]) -> Certificate:
    """The least eigenvalue of the Jacobian's symmetric part at sampled points.

    Lanczos, matrix-free, at the cost of `estimate_lipschitz`.

    Args:
        problem: A `Game`, or any problem taken by its condition.
        points: A pytree like an iterate with a leading axis over the points.

    Returns:
        An estimate of `mu`: positive for a strongly monotone operator, negative for one
        that is not monotone.

    Raises:
        ValueError: If there is no point.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import estimate_monotonicity, rotation_game
        >>> mu = estimate_monotonicity(rotation_game(1.0, jnp.pi / 3), jnp.ones((1, 2)))
        >>> round(float(mu.value), 3)
        0.5
    """
    values = _over_points("estimate_monotonicity", _least, problem, points)
    return Certificate(
        "strong monotonicity",
        jnp.min(values),
        proof=False,
        statement="<F(u) - F(v), u - v> >= value ||u - v||^2 on the region, about, "
        "seen at sampled points",
    )


def estimate_comonotonicity(problem: Problem, points: PyTree[Array]) -> Certificate:
    """The least `rho` for which the operator is `rho`-negatively comonotone.

    Locally: the largest `-<J v, v> / ||J v||^2`, from a dense singular value
    decomposition (n^3 flops a point); and between every point and the next one, from
    the values themselves. Where a direction that the Jacobian maps to zero is not
    orthogonal to its range, no finite `rho` exists.

    Args:
        problem: A `Game`, or any problem taken by its condition.
        points: A pytree like an iterate with a leading axis over the points, drawn from
            the whole region: a single path shows too little.

    Returns:
        An estimate of `rho`, infinite where there is none, negative for a cocoercive
        operator (with modulus `-rho`); `details` hold both kinds of evidence.

    Raises:
        ValueError: If there is no point.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import estimate_comonotonicity, rotation_game
        >>> game = rotation_game(2.0, 2 * jnp.pi / 3)
        >>> rho = estimate_comonotonicity(game, jnp.ones((1, 2)))
        >>> round(float(rho.value), 3)
        0.25

    Source:
        Gorbunov, Taylor, Horvath and Gidel, 2023 (arXiv 2210.13831), definition 1 and
        its spectral form for linear operators.
    """
    local = jnp.max(_over_points("estimate_comonotonicity", _local, problem, points))
    between = jnp.max(_pairs(as_game(problem), points))
    return Certificate(
        "negative comonotonicity",
        jnp.maximum(local, between),
        proof=False,
        statement="<F(u) - F(v), u - v> >= -value ||F(u) - F(v)||^2 on the region, "
        "about, seen at sampled points",
        details={"local": local, "between": between},
    )


def _norm(function, z):
    product, transpose = _products(function, z)
    square = _extreme_ritz(lambda v: transpose(product(v)), _unit_vector(z))[1]
    return jnp.sqrt(jnp.maximum(square, 0))


def _least(function, z):
    product, transpose = _products(function, z)
    return _extreme_ritz(lambda v: (product(v) + transpose(v)) / 2, _unit_vector(z))[0]


def _local(function, z):
    U, s, Vt = jnp.linalg.svd(jax.jacfwd(function)(z))
    cut = 10 * z.size * float(np.finfo(z.dtype).eps) * s[0]
    used = s > cut
    cross = U.T @ Vt.T
    # In the range's coordinates w = J v the quotient is that of J's pseudo-inverse.
    M = jnp.where(used[None, :], cross / jnp.where(used, s, 1)[None, :], 0)
    M = jnp.where(used[:, None], (M + M.T) / 2, 0)
    M = jnp.where(used[None, :], M, 0)
    # An unused row repeats an actual quotient, so that it adds no extreme of its own.
    M = M + jnp.diag(jnp.where(used, 0, M[0, 0]))
    leak = jnp.where(used[:, None] & ~used[None, :], jnp.abs(cross), 0)
    tiny = float(np.sqrt(np.finfo(z.dtype).eps))
    finite = jnp.max(leak) <= tiny
    value = -jnp.linalg.eigvalsh(M)[0]
    value = jnp.where(finite, value, jnp.inf)
    return jnp.where(jnp.isfinite(cut), value, jnp.nan)


@eqx.filter_jit
def _pairs(game, points):
    def flat(z):
        return ravel_pytree(z)[0], ravel_pytree(game.apply(z))[0]

    z, force = jax.lax.map(flat, points)
    dz, df = jnp.diff(z, axis=0), jnp.diff(force, axis=0)
    square = jnp.sum(df * df, axis=1)
    quotient = -jnp.sum(dz * df, axis=1) / jnp.where(square == 0, 1, square)
    least = jnp.full((1,), -jnp.inf, z.dtype)
    return jnp.concatenate([least, jnp.where(square == 0, -jnp.inf, quotient)])


def _over_points(owner, measure, problem, points):
    leaves = jtu.tree_leaves(points)
    if not leaves or any(jnp.ndim(v) == 0 or v.shape[0] == 0 for v in leaves):
        raise ValueError(
            f"{owner}: `points` must have a leading axis with one point at least (got "
            f"{[jnp.shape(v) for v in leaves]})."
        )
    for leaf in leaves:
        check_finite(owner, "points", leaf)
    return _measure(measure, as_game(problem), points)


@eqx.filter_jit
def _measure(measure, game, points):
    def at(z):
        vector, unravel = ravel_pytree(z)
        return measure(lambda v: ravel_pytree(game.apply(unravel(v)))[0], vector)

    # One point after the other: a batch of Krylov bases may not fit.
    return jax.lax.map(at, points)
