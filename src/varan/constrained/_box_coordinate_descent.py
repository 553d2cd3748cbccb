"""Quadratic programs with bounds alone, one coordinate after the other.

Each coordinate moves to its exact minimum within its bounds, and the gradient follows
with one row of `Q`: no factorisation, nothing to tune, every iterate feasible and the
objective never higher than before. Good where `Q` is near diagonal or so large that
n^3 flops are too many (the dual of a support vector machine, non-negative least
squares); slow where coordinates pull against each other: there take `OSQP`.

Cost: a sweep is n coordinates at 2 n flops each.

Source: Hildreth, 1957, "A quadratic programming procedure"; for support vector
machines: Hsieh, Chang, Lin, Keerthi, Sundararajan, 2008, "A dual coordinate descent
method for large-scale linear SVM".
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..core import Solver, State
from ._scaled import Scaled, find_proof, scale
from ._shared import as_quadratic, state_of


class BoxCoordinateDescent(Solver):
    """Cyclic exact coordinate minimisation of a `Quadratic` with bounds alone.

    Statuses: `UNBOUNDED` with the ray in `x`, of size one, `INFEASIBLE` where bounds
    cross; see `varan.problems.Quadratic`.

    Args:
        sweeps: Over all coordinates, in one step; the condition is looked at once a
            step.

    Raises:
        TypeError: In `solve`, if the problem is no `Quadratic`, has equalities or
            inequalities, or holds operators.
        ValueError: If `sweeps` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.constrained import BoxCoordinateDescent
        >>> from varan.problems import Quadratic
        >>> c = jnp.array([-2.0, 1.0])
        >>> problem = Quadratic(jnp.eye(2), c, lower=0.0, upper=1.0)
        >>> solution = solve(problem, BoxCoordinateDescent(), problem.start())
        >>> solution.x.x.round(3).tolist()
        [1.0, 0.0]

    Source:
        Hildreth, 1957, "A quadratic programming procedure".

    Differences:
        The gradient is computed afresh once a step, against the drift of its updates.
    """

    sweeps: int = eqx.field(static=True, default=5)

    def __check_init__(self):
        if not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise ValueError(
                "BoxCoordinateDescent: `sweeps` must be a positive integer (got "
                f"{self.sweeps!r})."
            )

    def init(self, problem, start):
        problem = as_quadratic(self, problem, ("A", "G"))
        scaled = scale(problem)
        return State(start, problem.condition(start), scaled)

    def step(self, problem: Any, state):
        scaled: Scaled = state.memory
        old = jnp.clip(state.x.x / scaled.columns, scaled.lower, scaled.upper)
        size, diagonal = old.size, jnp.diagonal(scaled.P)

        def move(index, carry):
            x, gradient = carry
            i = index % size
            new = _minimum(
                x[i], gradient[i], diagonal[i], scaled.lower[i], scaled.upper[i]
            )
            gradient = gradient + (new - x[i]) * scaled.P[i]
            return x.at[i].set(new), gradient

        carry = old, scaled.gradient(old)
        x, _ = jax.lax.fori_loop(0, self.sweeps * size, move, carry)
        point = scaled.from_scaled(problem, x, scaled.lo)
        # A linear coordinate without the bound that it falls to stays where it is.
        falls = (diagonal == 0) & jnp.isinf(
            jnp.where(scaled.q > 0, scaled.lower, scaled.upper)
        )
        ray = jnp.where(falls, -scaled.q, 0)
        ray = jnp.where(jnp.any(ray != 0), ray, x - old)
        proof = find_proof(scaled, ray, jnp.zeros_like(scaled.lo), True)
        return state_of(
            problem,
            scaled,
            point,
            problem.condition(point),
            proof,
            scaled,
            evaluations=self.sweeps + 2,
        )


def _minimum(x, gradient, curvature, lower, upper):
    """Of a parabola, or a line, over an interval."""
    curved = curvature > 0
    inner = x - gradient / jnp.where(curved, curvature, 1)
    end = jnp.where(gradient > 0, lower, upper)
    end = jnp.where((gradient == 0) | jnp.isinf(end), x, end)
    return jnp.where(curved, jnp.clip(inner, lower, upper), end)
