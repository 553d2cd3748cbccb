"""How fast the closed loop under an expert forgets: what imitation bounds rest on.

The loop `x+ = f(x, expert(x))` is incrementally exponentially stable with overshoot c
and rate b if any two of its trajectories satisfy `|x_t - y_t| <= c b^t |x_0 - y_0|`.
For a linear loop a Lyapunov matrix proves both; for others they are estimated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg as sla
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_finite, check_shape
from ._sets import Box

# Where between the spectral radius and 1 rates are tried.
_SHARES = np.linspace(0.02, 0.98, 49)


class ExpertRate(eqx.Module):
    """Constants of an expert and of the system under it.

    Args:
        overshoot: `c` in `|x_t - y_t| <= c b^t |x_0 - y_0|`, at least 1.
        rate: `b`, below 1 for a stable loop.
        input_gain: Lipschitz constant of the system's step in the input.
        lipschitz: Lipschitz constant of the expert.
        proof: Whether these are proved or estimated.
    """

    overshoot: Float[Array, ""]
    rate: Float[Array, ""]
    input_gain: Float[Array, ""]
    lipschitz: Float[Array, ""]
    proof: bool = eqx.field(static=True)

    def __init__(self, overshoot, rate, input_gain, lipschitz, *, proof: bool):
        self.overshoot, self.rate, self.input_gain, self.lipschitz = (
            jnp.asarray(v, jnp.result_type(float))
            for v in (overshoot, rate, input_gain, lipschitz)
        )
        self.proof = proof


def linear_expert_rate(
    A: Float[Array, "states states"],
    B: Float[Array, "states inputs"],
    K: Float[Array, "inputs states"],
) -> ExpertRate:
    """The constants of the loop `x+ = (A + B K) x`, proved by a Lyapunov matrix.

    With `M = A + B K` and `M' P M <= b^2 P` trajectories approach each other in the
    norm of `P` by `b` a step, so that `c^2` is the condition number of `P`. Of the
    matrices that solve the Lyapunov equation of `M / g`, for `g` between the spectral
    radius and 1, the one with the least `c / (1 - b)` is taken. Runs in NumPy.

    Args:
        A, B: The system `x+ = A x + B u`.
        K: The expert `u = K x`.

    Returns:
        An `ExpertRate`, a proof. An unstable loop has the rate 1 or more and an
        infinite overshoot, so that every bound from it is infinite.

    Raises:
        ValueError: Shapes that do not fit, or entries that are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import linear_expert_rate
        >>> one = jnp.ones((1, 1))
        >>> found = linear_expert_rate(one, one, -0.5 * one)
        >>> round(float(found.overshoot), 3), round(float(found.rate), 3)
        (1.0, 0.5)

    Source: derived here; Lyapunov's equation.
    """
    owner = "linear_expert_rate"
    check_shape(owner, "A", A, (None, None))
    states = np.shape(A)[0]
    check_shape(owner, "A", A, (states, states))
    check_shape(owner, "B", B, (states, None))
    check_shape(owner, "K", K, (np.shape(B)[1], states))
    for name, matrix in (("A", A), ("B", B), ("K", K)):
        check_finite(owner, name, matrix)
    a, b, k = (np.asarray(matrix, np.float64) for matrix in (A, B, K))
    loop = a + b @ k
    radius = float(np.max(np.abs(np.linalg.eigvals(loop))))
    gains = [float(np.linalg.norm(matrix, 2)) for matrix in (b, k)]
    if radius >= 1:
        return ExpertRate(np.inf, radius, *gains, proof=True)
    rates = [_proved(loop, radius + share * (1 - radius)) for share in _SHARES]
    overshoot, rate = min(rates, key=lambda r: r[0] / max(1 - r[1], 1e-300))
    return ExpertRate(overshoot, rate, *gains, proof=True)


def _proved(loop, level) -> tuple[float, float]:
    """Overshoot and rate in the norm of one Lyapunov matrix, rounding outward."""
    matrix = sla.solve_discrete_lyapunov((loop / level).T, np.eye(len(loop)))
    matrix = (matrix + matrix.T) / 2
    values = np.linalg.eigvalsh(matrix)
    if values[0] <= 0:
        return np.inf, 1.0
    condition = values[-1] / values[0]
    slack = 64 * len(loop) * np.finfo(float).eps * condition
    # Whatever equation the matrix solves, it is these two numbers that prove the rate.
    square = sla.eigh(loop.T @ matrix @ loop, matrix, eigvals_only=True)[-1]
    rate = np.sqrt(max(square, 0) + slack)
    return float(np.sqrt(condition) * (1 + slack)), float(rate)


def estimate_expert_rate(
    system: Any,
    expert: Callable[[Float[Array, " states"]], Float[Array, " inputs"]],
    domain: Box,
    *,
    steps: int = 50,
    pairs: int = 256,
    key: PRNGKeyArray,
) -> ExpertRate:
    """The constants of any loop, estimated from sampled pairs of trajectories.

    Pairs start at random in the domain; the overshoot is the least that their
    distances satisfy, at the rate with the least `c / (1 - b)`. The two Lipschitz
    constants are the largest Jacobians at the samples. All are lower estimates.

    Args:
        system: Has `step(x, u)`, the next state.
        expert: From a state to an input.
        domain: A bounded box of states.
        steps: How long the trajectories are, at least 1.
        pairs: How many there are, at least 1.
        key: A random key.

    Returns:
        An `ExpertRate`, an estimate; an overshoot that is infinite where trajectories
        are not finite.

    Raises:
        ValueError: Fewer than one step or pair, or an unbounded domain.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import Box, estimate_expert_rate
        >>> class Integrator:
        ...     def step(self, x, u):
        ...         return x + u
        >>> found = estimate_expert_rate(
        ...     Integrator(), lambda x: -x / 2, Box.linf(jnp.zeros(1), 1.0),
        ...     steps=5, pairs=4, key=jax.random.key(0))
        >>> round(float(found.lipschitz), 3), found.proof
        (0.5, False)

    Source: derived here.
    """
    owner = "estimate_expert_rate"
    for name, number in (("steps", steps), ("pairs", pairs)):
        if number < 1:
            raise ValueError(f"{owner}: `{name}` must be at least 1 (got {number}).")
    check_bounded(owner, domain)
    growth, gain, slope = _sampled(system, expert, domain, steps, pairs, key)
    growth = np.asarray(growth, np.float64)
    if not np.all(np.isfinite(growth)):
        return ExpertRate(np.inf, 1.0, gain, slope, proof=False)
    time = np.arange(steps + 1)
    found = [(float(np.max(growth * b**-time)), float(b)) for b in _SHARES]
    overshoot, rate = min(found, key=lambda r: r[0] / (1 - r[1]))
    return ExpertRate(max(overshoot, 1.0), rate, gain, slope, proof=False)


def _sampled(system, expert, domain, steps, pairs, key):
    dtype = domain.lower.dtype
    share = jax.random.uniform(key, (2, pairs, domain.lower.size), dtype)
    width = (domain.upper - domain.lower)[None, None]
    start = domain.lower[None, None] + share * width

    @jax.jit
    def run(start):
        def step(x, _):
            onward = jax.vmap(jax.vmap(lambda x: system.step(x, expert(x))))(x)
            return onward, jnp.linalg.norm(onward[0] - onward[1], axis=-1)

        first = jnp.linalg.norm(start[0] - start[1], axis=-1)
        later = jax.lax.scan(step, start, None, steps)[1]
        growth = jnp.concatenate([first[None], later]) / first[None]
        points = start.reshape(-1, start.shape[-1])
        gains = jax.vmap(lambda x: jax.jacfwd(system.step, 1)(x, expert(x)))(points)
        slopes = jax.vmap(jax.jacfwd(expert))(points)
        norms = [jnp.max(jnp.linalg.norm(j, 2, axis=(1, 2))) for j in (gains, slopes)]
        return jnp.max(growth, 1), *norms

    return run(start)


def check_bounded(owner: str, domain: Box) -> None:
    """Refuses a box with an infinite side, and one that is no vector."""
    check_shape(owner, "domain", domain.lower, (None,))
    check_finite(owner, "domain", domain.lower)
    check_finite(owner, "domain", domain.upper)
