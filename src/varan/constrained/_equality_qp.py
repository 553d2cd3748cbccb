"""Quadratic programs with equalities alone: one factorisation.

The optimality system `[[Q, A'], [A, 0]] (x, y) = (-c, b)` is solved by the proximal
method of multipliers: one factorisation of `[[Q + shift I, A'], [A, -shift I]]`, which
is regular whatever `Q` and `A`, and refinements with it. Where rows are dependent or
the solution is a line, the method finds one; where there is none, its moves converge
to the proof.

Cost: 2 (n + p)^3 / 3 flops once, 2 (n + p)^2 and a condition a step; one to three
steps.

Source: Rockafellar, 1976, "Augmented Lagrangians and applications of the proximal point
algorithm in convex programming"; the moves' limits: Pazy, 1971, "Asymptotic behavior of
contractions in Hilbert space".
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array

from ..core import Solver, State
from ._scaled import Scaled, find_proof, scale
from ._shared import as_quadratic, state_of


class _Memory(eqx.Module):
    scaled: Scaled
    factors: Any
    x: Array
    y: Array


class EqualityQP(Solver):
    """Solves `Quadratic` problems without inequalities and bounds.

    Each step refines the last to the dtype's precision; usually the first or second
    meets the tolerance. Dependent rows are fine where they are consistent (for
    derivatives, say `unique=False` in the problem).

    Statuses: `INFEASIBLE` with multipliers that prove it, of size one; `UNBOUNDED` with
    the ray in `x`, of size one. See `varan.problems.Quadratic` for what they prove.

    Raises:
        TypeError: In `solve`, if the problem is no `Quadratic`, has inequalities or
            bounds, or holds operators.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.constrained import EqualityQP
        >>> from varan.problems import Quadratic
        >>> problem = Quadratic(
        ...     jnp.eye(2), jnp.zeros(2), A=jnp.ones((1, 2)), b=jnp.ones(1)
        ... )
        >>> solve(problem, EqualityQP(), problem.start()).x.x.round(3).tolist()
        [0.5, 0.5]

    Source:
        Rockafellar, 1976, "Augmented Lagrangians and applications of the proximal
        point algorithm in convex programming".
    """

    def init(self, problem, start):
        problem = as_quadratic(self, problem, ("G", "lower", "upper"))
        condition = problem.condition(start)
        scaled = scale(problem)
        x, y = scaled.to_scaled(problem, start)
        operator = lx.MatrixLinearOperator(_system(scaled))
        factors = lx.LU().init(operator, {})
        return State(start, condition, _Memory(scaled, factors, x, y))

    def step(self, problem: Any, state):
        scaled, x, y = state.memory.scaled, state.memory.x, state.memory.y
        right = jnp.concatenate(
            [-(scaled.gradient(x) + scaled.pull(y)), scaled.up - scaled.image(x)]
        )
        move = lx.LU().compute(state.memory.factors, right, {})[0]
        dx, dy = jnp.split(move, [x.size])
        x, y = x + dx, y + dy
        missed = jnp.max(jnp.abs(scaled.image(x) - scaled.up), initial=0)
        # Along a ray the constraints are met, but for the rounding of its length.
        feasible = missed <= 1e-3 * (1 + jnp.max(jnp.abs(x)))
        point = scaled.from_scaled(problem, x, y)
        return state_of(
            problem,
            scaled,
            point,
            problem.condition(point),
            find_proof(scaled, dx, dy, feasible),
            _Memory(scaled, state.memory.factors, x, y),
            evaluations=2,
        )


def _system(scaled: Scaled):
    # The moves' errors shrink by `shift` over the smallest curvature a step; the
    # factorisation's rounding, `eps / shift`, is forgiven by the next one.
    shift = float(np.finfo(scaled.q.dtype).eps) ** 0.6
    P = scaled.P + shift * jnp.eye(scaled.q.size, dtype=scaled.q.dtype)
    if not scaled.R:
        return P
    (R,) = scaled.R
    corner = -shift * jnp.eye(scaled.up.size, dtype=scaled.q.dtype)
    return jnp.block([[P, R.T], [R, corner]])
