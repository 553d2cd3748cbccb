"""Weights of players: the margin that they give, the best ones, and the band of two.

Player i's gradient has curvature `mu_i` in the own block and moves by at most `L_ij` a
unit of player j's block. In the norm that weighs block i with `w_i` the operator is
strongly monotone with

    alpha(w) = lambda_min(D^-1/2 C D^-1/2),  C_ii = w_i mu_i,
    C_ij = -(w_i L_ij + w_j L_ji) / 2,  D = diag(w),

and Lipschitz with `beta(w)`, the norm of the matrix `sqrt(w_i / w_j) L_ij`. The best
margin is a Perron root: of `N = diag(mu) - L` without its diagonal, at the ratio of the
left to the right eigenvector. In `log w` the margin is concave and `beta` log-convex,
so that `alpha / beta^2`, on which the longest step depends, has no local maxima either.

Source: V. Sharma (2025), Small-Gain Nash: Certified Contraction to Nash Equilibria in
Differentiable Games, arXiv 2512.06791. The closed form of the best weights is ours.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Array, Float

from ..core._checks import check_choice, check_finite, check_positive

Objective = Literal["margin", "stepsize"]
Vector = Float[Array, " n"] | Float[np.ndarray, " n"]
Matrix = Float[Array, "n n"] | Float[np.ndarray, "n n"]

# Couplings below this part of the curvatures count as this much while weights are
# chosen: a player whom nobody influences would get a weight of zero.
_FLOOR = 1e-8


def small_gain_margin(
    curvature: Vector,
    coupling: Matrix,
    weights: Vector,
) -> tuple[float, float]:
    """The modulus of strong monotonicity and the Lipschitz constant for given weights.

    Args:
        curvature: `mu_i`, lower bounds of the players' own curvature, shape (n,).
        coupling: `L_ij >= 0`, upper bounds of `||d v_i / d z_j||`, shape (n, n); the
            diagonal bounds the own blocks.
        weights: `w_i`, positive, shape (n,); their common scale does not matter.

    Returns:
        `alpha`, which certifies nothing unless positive, and `beta`.

    Raises:
        ValueError: If a shape or sign is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import small_gain_margin
        >>> coupling, w = jnp.array([[1.0, 10.0], [0.05, 1.0]]), jnp.array([0.005, 1.0])
        >>> alpha, beta = small_gain_margin(jnp.ones(2), coupling, w)
        >>> round(alpha, 4), round(beta, 4), round(2 * alpha / beta**2, 3)
        (0.2929, 1.7071, 0.201)

    Source:
        Sharma, 2025 (arXiv 2512.06791), the small-gain condition.
    """
    mu, L = check_bounds("small_gain_margin", curvature, coupling)
    w = np.asarray(weights, np.float64)
    if w.shape != mu.shape:
        raise ValueError(
            f"small_gain_margin: `weights` must have shape {mu.shape} (got {w.shape})."
        )
    check_positive("small_gain_margin", "weights", w)
    alpha, _, beta, _ = _margin(mu, L, np.log(w) / 2)
    return alpha, beta


def small_gain_weights(
    curvature: Vector,
    coupling: Matrix,
    objective: Objective = "margin",
) -> np.ndarray:
    """The best weights, in closed form for the margin.

    Some weights certify contraction if and only if `diag(mu) - L` (off the diagonal) is
    a non-singular M-matrix. Costs two eigenvalue decompositions of size n; the longest
    step takes a few dozen more.

    Args:
        curvature: See `small_gain_margin`.
        coupling: See `small_gain_margin`.
        objective: `"margin"`: the fastest flow; `"stepsize"`: the longest certified
            Euler step, `alpha / beta^2`.

    Returns:
        Weights in float64, with a geometric mean of one.

    Raises:
        ValueError: If a shape or sign is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import small_gain_weights
        >>> coupling = jnp.array([[2.0, 10.0], [0.1, 2.0]])
        >>> w = small_gain_weights(jnp.array([2.0, 2.0]), coupling)
        >>> round(float(w[0] / w[1]), 4)
        0.01

    Source:
        Sharma, 2025 (arXiv 2512.06791) maximises the margin over the weights.

    Differences:
        The Perron vectors replace a numerical search.
    """
    mu, L = check_bounds("small_gain_weights", curvature, coupling)
    check_choice("small_gain_weights", "objective", objective, ("margin", "stepsize"))
    u = _perron(mu, L)
    if objective == "stepsize" and _margin(mu, L, u)[0] > 0:
        u = _longest_step(mu, L, u)
    u = u - np.mean(u)
    return np.exp(2 * u)


def small_gain_band(curvature: Vector, coupling: Matrix) -> tuple[float, float] | None:
    """The ratios `w_1 / w_2` that certify a game of two players.

    Args:
        curvature: See `small_gain_margin`, shape (2,).
        coupling: See `small_gain_margin`, shape (2, 2).

    Returns:
        The ends, both excluded; `None` where `L_12 L_21 >= mu_1 mu_2`, or a curvature
        is not positive: no ratio certifies then.

    Raises:
        ValueError: If a shape or sign is wrong, or there are not two players.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import small_gain_band
        >>> low, high = small_gain_band(
        ...     jnp.ones(2), jnp.array([[1.0, 10.0], [0.05, 1.0]])
        ... )
        >>> round(low, 6), round(high, 5)
        (0.000858, 0.02914)

    Source:
        Sharma, 2025 (arXiv 2512.06791), the timescale band.
    """
    mu, L = check_bounds("small_gain_band", curvature, coupling)
    if mu.shape != (2,):
        raise ValueError(
            f"small_gain_band: `curvature` must have shape (2,) (got {mu.shape})."
        )
    own, gain = mu[0] * mu[1], L[0, 1] * L[1, 0]
    if not (np.all(mu > 0) and gain < own):
        return None
    # The two ends of the quadratic, each in the form without cancellation.
    large = 2 * own - gain + 2 * np.sqrt(own * (own - gain))
    low = L[1, 0] ** 2 / large
    high = large / L[0, 1] ** 2 if L[0, 1] > 0 else np.inf
    return float(low), float(high)


def check_bounds(owner: str, curvature, coupling) -> tuple[np.ndarray, np.ndarray]:
    """The bounds in double precision, refused where they make no sense."""
    mu, L = np.asarray(curvature, np.float64), np.asarray(coupling, np.float64)
    if mu.ndim != 1 or mu.size == 0 or L.shape != (mu.size, mu.size):
        raise ValueError(
            f"{owner}: `curvature` and `coupling` must have shapes (n,) and (n, n) "
            f"(got {mu.shape} and {L.shape})."
        )
    check_finite(owner, "curvature", mu)
    check_finite(owner, "coupling", L)
    if np.any(L < 0):
        raise ValueError(f"{owner}: `coupling` must not be negative (got {L.min()}).")
    if np.any(np.diag(L) < mu * (1 - 1e-6)):
        raise ValueError(
            f"{owner}: the diagonal of `coupling` bounds the players' own blocks and "
            f"must be at least `curvature` (got {np.diag(L)} and {mu})."
        )
    return mu, L


def _margin(mu, L, u):
    """`alpha`, its gradient, `beta`, its gradient over `beta`, with `w = exp(2u)`."""
    B = np.exp(u[:, None] - u[None, :]) * L
    E = B - np.diag(np.diag(B))
    values, vectors = np.linalg.eigh(np.diag(mu) - (E + E.T) / 2)
    x = vectors[:, 0]
    p, s, qt = np.linalg.svd(B)
    slope = x * (E.T @ x) - x * (E @ x)
    return float(values[0]), slope, float(s[0]), p[:, 0] ** 2 - qt[0] ** 2


def _perron(mu, L):
    """Half the logarithm of the weights with the largest margin."""
    scale = np.maximum(np.abs(mu), np.max(np.abs(mu), initial=0.0) * _FLOOR)
    scale = np.where(scale > 0, scale, 1.0)
    floor = _FLOOR * np.sqrt(scale[:, None] * scale[None, :])
    off = np.maximum(L, floor) * (1 - np.eye(len(mu)))
    u = np.zeros(len(mu))
    # The first round balances; eigenvectors of a balanced matrix have entries of one
    # size, so that small ones are not lost in rounding.
    for _ in range(3):
        N = np.diag(mu) - np.exp(u[:, None] - u[None, :]) * off
        right, left = _least_vector(N), _least_vector(N.T)
        u = u + (np.log(left) - np.log(right)) / 2
    return u


def _least_vector(N):
    values, vectors = np.linalg.eig(N)
    vector = np.abs(np.real(vectors[:, np.argmin(np.real(values))]))
    return np.maximum(vector, np.finfo(np.float64).eps * np.max(vector))


def _longest_step(mu, L, u):
    """Maximises `log alpha - 2 log beta`, concave where `alpha` is positive."""
    from scipy.optimize import minimize

    def loss(free):
        alpha, slope, beta, turn = _margin(mu, L, np.append(free, 0.0))
        if alpha <= 0:
            return np.inf, np.zeros_like(free)
        return 2 * np.log(beta) - np.log(alpha), (2 * turn - slope / alpha)[:-1]

    start = (u - u[-1])[:-1]
    found = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    return np.append(found.x if found.fun <= loss(start)[0] else start, 0.0)
