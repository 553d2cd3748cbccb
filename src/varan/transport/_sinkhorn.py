"""Sinkhorn's method: scale rows, scale columns, repeat; plain or over-relaxed.

Each half-sweep makes one marginal exact. Plain Sinkhorn contracts the error by the
square `s` of the second singular value of the scaled plan, and `s` nears 1 as epsilon
falls. Over-relaxation takes each update `relaxation` times as far; the best choice
`2 / (1 + sqrt(1 - s))` turns `k` sweeps into about `sqrt(k)`. With
`relaxation="adaptive"` that choice is estimated during the run from the observed rate,
by Young's relation between the rate and the relaxation.

Use it for moderate epsilon (a thousandth of the largest cost and more); below, a Newton
method takes a time that hardly depends on epsilon.

A sweep in the scaling domain is two reads of the matrix: 16 m n bytes of traffic in
float64, nothing else of that size. In the log domain it is two passes of exponentials.
"""

from __future__ import annotations

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..core import Solver, State
from ..core._checks import check_choice
from ._kernel import (
    Corrections,
    Kernel,
    open_logarithmic,
    open_scaling,
    refresh,
    sweep,
)
from ._problem import check_entropic

# Over-relaxation begins once the error says that Sinkhorn is near its linear regime.
_NEAR = 0.1
# The estimate of 1 - s is kept off zero: a stalled run must not relax without bound.
_LARGEST_RATE = 1 - 1e-7
# A chunk of sweeps that grows the best error by this much has been relaxed too far.
_GROWTH = 10.0
# Early rates flatter: of the way to 2, at most this share is gone at once.
_BOLDNESS = 0.5


class _Pace(eqx.Module):
    """The relaxation, and the errors that it is judged by."""

    relaxation: Float[Array, ""]
    best: Float[Array, ""]
    # The error when the present pair of steps began.
    before: Float[Array, ""]
    second: Bool[Array, ""]


class _Memory(eqx.Module):
    kernel: Kernel
    at: Corrections
    pace: _Pace


class Sinkhorn(Solver):
    """Sinkhorn's method for `EntropicTransport`, plain or over-relaxed.

    Args:
        mode: `"scaling"`: on the kernel matrix, with absorption; a half-sweep costs
            one read of it. `"log"`: on its logarithm; a half-sweep costs a pass of
            exponentials, and unrolled derivatives are best conditioned.
        relaxation: 1 is Sinkhorn's own; a number in (0, 2) is a fixed relaxation;
            `"adaptive"` estimates the best one from the observed rate.
        sweeps: Sweeps in one step; the error is looked at once a step.

    Raises:
        ValueError: If `mode` is unknown, `relaxation` not in (0, 2) or `sweeps` < 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.transport import EntropicTransport, Sinkhorn
        >>> cost = (jnp.arange(4.0)[:, None] - jnp.arange(5.0)[None, :]) ** 2 / 16
        >>> problem = EntropicTransport(cost, epsilon=0.1)
        >>> solver = Sinkhorn(relaxation="adaptive")
        >>> bool(solve(problem, solver, problem.start(), tol=1e-5).converged)
        True

    Source:
        Sinkhorn iteration for transport: Cuturi, 2013 (arXiv 1306.0895); absorption:
        Schmitzer, 2019 (arXiv 1610.06519); best relaxation: Lehmann, von Renesse,
        Sambale, Uschmajew, 2022 (arXiv 2012.12562).

    Differences:
        The relaxation is estimated anew during the run, and drops to 1 where the error
        grows; the sources choose it once.
    """

    mode: Literal["scaling", "log"] = eqx.field(static=True, default="scaling")
    relaxation: float | Literal["adaptive"] = eqx.field(static=True, default=1.0)
    sweeps: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        check_choice("Sinkhorn", "mode", self.mode, ("scaling", "log"))
        if self.relaxation != "adaptive" and not (
            isinstance(self.relaxation, (int, float)) and 0 < self.relaxation < 2
        ):
            raise ValueError(
                "Sinkhorn: `relaxation` must be a number in (0, 2) or 'adaptive' (got "
                f"{self.relaxation!r})."
            )
        if not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise ValueError(
                f"Sinkhorn: `sweeps` must be a positive integer (got {self.sweeps!r})."
            )

    def init(self, problem, start):
        check_entropic("Sinkhorn", problem)
        opened = open_scaling if self.mode == "scaling" else open_logarithmic
        condition, kernel, at = opened(problem, start)
        error = problem.residual(at.condition(problem))
        pace = _Pace(jnp.ones_like(error), error, error, jnp.asarray(False))
        return State(start, condition, _Memory(kernel, at, pace), evaluations=2)

    def step(self, problem, state):
        kernel, at, pace = state.memory.kernel, state.memory.at, state.memory.pace
        adaptive = self.relaxation == "adaptive"
        relaxation = pace.relaxation if adaptive else float(self.relaxation)
        log_a, log_b = jnp.log(problem.a), jnp.log(problem.b)
        at = jax.lax.fori_loop(
            0,
            self.sweeps,
            lambda _, at: sweep(kernel, log_a, log_b, at, relaxation),
            at,
        )
        condition = at.condition(problem)
        x = kernel.potentials(problem, at.phi, at.psi)
        if adaptive:
            pace = _adapt(pace, problem.residual(condition), self.sweeps)
        if self.mode == "scaling":
            kernel, at = refresh(problem, kernel, at)
        return State(x, condition, _Memory(kernel, at, pace), evaluations=self.sweeps)


def _adapt(pace, error, sweeps):
    """The next relaxation, from the rate over the last two steps.

    With relaxation `w` below the best, the rate `rho` satisfies
    `(rho + w - 1)^2 = s w^2 rho` (Young); at the best and beyond the error oscillates
    and falls like `w - 1`, whatever `s`. So a steady rate above `w - 1` reveals `s`,
    and any other says that `w` is large enough. Two steps smooth the oscillation.
    """
    w = pace.relaxation
    rate = jnp.clip((error / pace.before) ** (1 / (2 * sweeps)), 1e-6, 1.0)
    s = jnp.minimum((rate + w - 1) ** 2 / (w * w * rate), _LARGEST_RATE)
    wanted = jnp.minimum(2 / (1 + jnp.sqrt(1 - s)), w + (2 - w) * _BOLDNESS)
    reveals = pace.second & (error < _NEAR) & (rate < 1) & (rate > w - 1)
    w = jnp.where(reveals, jnp.maximum(w, wanted), w)
    # Too far: back to plain sweeps.
    failed = ~(error < _GROWTH * pace.best)
    best = jnp.where(failed, error, jnp.minimum(pace.best, error))
    before = jnp.where(pace.second | failed, error, pace.before)
    return _Pace(jnp.where(failed, 1, w), best, before, ~pace.second & ~failed)
