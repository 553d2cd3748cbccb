"""What the regret of optimistic mirror descent is expected to be at most.

All bounds are for losses drawn round by round from distributions with smooth and convex
expectations `F_t` on a set of diameter `D`, with gradients of norm at most `G`:
`sigma_t^2 = max_x E||grad f_t(x) - grad F_t(x)||^2`, `Sigma_t^2 = max_x
||grad F_t(x) - grad F_{t-1}(x)||^2` with `grad F_0 = 0`.

One estimate serves all: with `V` the sum of `||g_t - g_{t-1}||^2` and `S` that of
`||x_t - x_{t-1}||^2`, four differences and Cauchy-Schwarz give

    E V <= V_0 + 4 L^2 E S,    V_0 = G^2 + 8 sum sigma_t^2 + 4 sum Sigma_t^2,

and the term in `S` is absorbed by the divergence terms of the pathwise inequality in
`_regimes`.

Source: S. Chen, Y.-J. Zhang, W.-W. Tu, P. Zhao and L. Zhang, ICML 2023, arXiv
2302.04552.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Float[Array, ""] | float


def convex_regret_bound(
    diameter: Scalar,
    gradient_bound: Scalar,
    smoothness: Scalar,
    variance: Scalar,
    variation: Scalar,
) -> Scalar:
    """Of `OptimisticOMD(..., "convex")`, against any fixed point.

    `5 sqrt(10) D^2 L + 5 sqrt(5) / 2 D G + 5 sqrt(2) D sqrt(sum sigma_t^2)
    + 5 D sqrt(sum Sigma_t^2)`. The pathwise inequality gives `5/2 D sqrt(delta + 4 G^2
    + V) - sqrt(delta) / (4 D) S`; maximising over `S` leaves `25 D^3 L^2 /
    sqrt(delta)`, and `delta = 10 D^2 L^2` balances it with `5/2 D sqrt(delta)`.

    Args:
        diameter: `D`.
        gradient_bound: `G`.
        smoothness: `L` of the expected losses.
        variance: `sum sigma_t^2`.
        variation: `sum Sigma_t^2`, the first round included.

    Returns:
        The bound on the expected regret.

    Example:
        >>> from varan.games import convex_regret_bound
        >>> float(convex_regret_bound(2.0, 1.0, 0.0, 0.0, 4.0)).__round__(2)
        31.18

    Source: Chen et al., 2023 (arXiv 2302.04552), the theorem for convex and smooth
        functions.
    """
    fixed = 5 * math.sqrt(10) * diameter**2 * smoothness
    fixed += 2.5 * math.sqrt(5) * diameter * gradient_bound
    noise = 5 * math.sqrt(2) * diameter * jnp.sqrt(variance)
    return fixed + noise + 5 * diameter * jnp.sqrt(variation)


def strongly_convex_regret_bound(
    diameter: Scalar,
    gradient_bound: Scalar,
    smoothness: Scalar,
    strength: Scalar,
    variances: Float[Array, " T"],
    variations: Float[Array, " T"],
) -> Scalar:
    """Of `OptimisticOMD(..., "strongly_convex")`, against any fixed point.

    `(2 G^2 + 8 sum_{t>=2} (sigma_t^2 + sigma_{t-1}^2 + Sigma_t^2) / t) / strength
    + 8 L^2 D^2 / strength log(8 L / strength + 2)`. If all terms of the sum are at most
    m and add up to A, it is at most `m (1 + log(A / m))`: the paper's logarithm. The
    last term pays for the learner's motion before round `8 L / strength + 2`, from
    which on the divergence terms do.

    Args:
        diameter: `D`.
        gradient_bound: `G`.
        smoothness: `L` of the expected losses.
        strength: Their modulus of strong convexity.
        variances: `sigma_t^2`, (T,).
        variations: `Sigma_t^2`, (T,).

    Returns:
        The bound on the expected regret.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import strongly_convex_regret_bound
        >>> still = jnp.zeros(1000)
        >>> float(strongly_convex_regret_bound(1.0, 1.0, 0.0, 0.5, still, still))
        4.0

    Source: Chen et al., 2023 (arXiv 2302.04552), the theorem for strongly convex and
        smooth functions; the constants are ours.
    """
    rounds = jnp.arange(2, variances.size + 1).astype(variances.dtype)
    terms = (variances[1:] + variances[:-1] + variations[1:]) / rounds
    motion = 8 * (smoothness * diameter) ** 2 * jnp.log(8 * smoothness / strength + 2)
    return (2 * gradient_bound**2 + 8 * jnp.sum(terms) + motion) / strength


def exp_concave_regret_bound(
    diameter: Scalar,
    gradient_bound: Scalar,
    smoothness: Scalar,
    strength: Scalar,
    dimension: int,
    variance: Scalar,
    variation: Scalar,
) -> Scalar:
    """Of `OptimisticOMD(..., "exp_concave")`, against any fixed point.

    With `beta = min(1 / (4 G D), strength) / 2`: `(1 + beta G^2 / 2) D^2 / 2
    + 16 d / beta (log(1 + beta V_0 / (8 d)) + log(max(1, 32 L^2)))`. Since `beta / 8`
    times the sum of `(g_s - g_{s-1})(g_s - g_{s-1})'` lies below `H_t`, the sum of the
    squared errors in the norm of `H_t^{-1}` is at most `8 d / beta log(1 + beta V / (8
    d))`; the pathwise inequality has it twice, less `S / 4`.

    Args:
        diameter: `D`.
        gradient_bound: `G`.
        smoothness: `L` of the expected losses.
        strength: The `alpha` for which every `exp(-alpha f_t)` is concave.
        dimension: `d`.
        variance: `sum sigma_t^2`.
        variation: `sum Sigma_t^2`, the first round included.

    Returns:
        The bound on the expected regret.

    Example:
        >>> from varan.games import exp_concave_regret_bound
        >>> bound = exp_concave_regret_bound(2.0, 1.0, 0.1, 1.0, 3, 0.0, 0.0)
        >>> 2.0 < float(bound) < 5.0
        True

    Source: Chen et al., 2023 (arXiv 2302.04552), the theorem for exp-concave and
        smooth functions; the constants are ours.
    """
    beta = jnp.minimum(1 / (4 * gradient_bound * diameter), strength) / 2
    error = _error_without_motion(gradient_bound, variance, variation)
    growth = jnp.log1p(beta * error / (8 * dimension))
    motion = jnp.log(jnp.maximum(1.0, 32 * smoothness**2))
    prior = (1 + beta * gradient_bound**2 / 2) * diameter**2 / 2
    return prior + 16 * dimension / beta * (growth + motion)


def dynamic_regret_bound(
    diameter: Scalar,
    gradient_bound: Scalar,
    smoothness: Scalar,
    learners: int,
    variance: Scalar,
    variation: Scalar,
    path_length: Scalar,
) -> Scalar:
    """Of `DynamicOptimisticOMD`, against any sequence with the given path length.

    With `C = D^2 + 2 D P` and N base learners: `12.5 L D^2 log N + 3 sqrt(log N) D
    sqrt(G^2 + V_0 / 4) + 3 sqrt(C V_0 / 2) + 4 L C`. The mixture pays `8 L D^2 log N +
    3 sqrt(log N) D sqrt(G^2 + V / 4)` less `L D^2` times its squared motion in l1 and
    `2 L` times the mean motion of the base learners; a base learner with stepsize at
    most `1 / (8 L)` pays `stepsize V + C / (2 stepsize)`, its own motion cancelling the
    correction. What `V` has of the motion fits into both, at the price of another `4.5
    L D^2 log N`; the doubling grid costs a factor 3/2.

    Args:
        diameter: `D`.
        gradient_bound: `G`.
        smoothness: `L` of the expected losses.
        learners: N, the number of base stepsizes.
        variance: `sum sigma_t^2`.
        variation: `sum Sigma_t^2`, the first round included.
        path_length: `P`, the sum of `||u_t - u_{t-1}||`.

    Returns:
        The bound on the expected dynamic regret.

    Example:
        >>> from varan.games import dynamic_regret_bound
        >>> still = dynamic_regret_bound(2.0, 1.0, 1.0, 8, 0.0, 0.0, 0.0)
        >>> moving = dynamic_regret_bound(2.0, 1.0, 1.0, 8, 0.0, 0.0, 10.0)
        >>> bool(still < moving)
        True

    Source: Chen et al., 2023 (arXiv 2302.04552), the theorem on dynamic regret; the
        constants are ours.
    """
    error = _error_without_motion(gradient_bound, variance, variation)
    comparison = diameter**2 + 2 * diameter * path_length
    log = math.log(learners)
    mixture = 12.5 * smoothness * diameter**2 * log
    mixture += 3 * math.sqrt(log) * diameter * jnp.sqrt(gradient_bound**2 + error / 4)
    return mixture + 3 * jnp.sqrt(comparison * error / 2) + 4 * smoothness * comparison


def _error_without_motion(gradient_bound, variance, variation):
    return gradient_bound**2 + 8 * variance + 4 * variation
