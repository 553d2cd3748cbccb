"""Quadratic programs by the alternating direction method of multipliers, polished.

All constraints are `lo <= M x <= up` (see `_scaled`). An iteration solves a linear
system that never changes while the penalty `rho` does not, clips `M x` to the
intervals, and moves the multipliers:

    (P + sigma I + rho M'M) u = sigma x - q + M'(rho z - y)
    x, w = relaxed(u), relaxed(M u)
    z = clip(w + y / rho, lo, up),  y = y + rho (w - z)

A step is many iterations, and then, once: the penalty adapts to the ratio of the two
residuals, with a new factorisation where it changes much; the differences are looked
at as proofs that there is no solution; and the polish guesses the active constraints
and solves the optimality system with these. A right guess gives the solution to the
dtype's precision long before the iteration does.

Cost: a factorisation is n^3 flops (the inverse is kept, since products with it are the
fastest solves), an iteration 2 n^2 + 4 n m, the polish n^3 / 3 a step.

Source: Stellato, Banjac, Goulart, Bemporad, Boyd, 2020, "OSQP: an operator splitting
solver for quadratic programs" (arXiv 1711.08013).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
from jaxtyping import Array, Float

from ..core import Solver, State, Status
from ..core._checks import check_positive
from ..problems._quadratic import apply
from ._scaled import Scaled, find_proof, scale, solve_active
from ._shared import as_quadratic, choose, state_of

# The paper's: sections 5.1 and 5.2, and table 1.
_SIGMA = 1e-6
_STIFF = 1e3
_MIN_RHO, _MAX_RHO = 1e-6, 1e6
_ADAPT = 5.0
_REFINEMENTS = 6


class _Memory(eqx.Module):
    scaled: Scaled
    x: Array
    z: Array
    y: Array
    rho: Float[Array, ""]
    inverse: Array | None


class OSQP(Solver):
    """The operator splitting solver for `Quadratic` problems.

    Starts warm from any `KKTPoint`: the answer of a nearby problem saves most steps.
    With lineax operators in the problem the linear systems are solved by conjugate
    gradients from the last iterate; nothing is then scaled or polished.

    Statuses: `INFEASIBLE` with multipliers that prove it, of size one; `UNBOUNDED` with
    the ray in `x`, of size one. See `varan.problems.Quadratic` for what they prove.

    Args:
        rho: The first penalty, positive; it adapts.
        relaxation: In (0, 2); the paper's.
        iterations: Of ADMM in one step.
        polish: Whether each step guesses the active constraints.

    Raises:
        TypeError: In `solve`, if the problem is no `Quadratic`.
        ValueError: If a setting is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.constrained import OSQP
        >>> from varan.problems import Quadratic
        >>> problem = Quadratic(
        ...     jnp.eye(2), jnp.zeros(2), G=-jnp.ones((1, 2)), h=-jnp.ones(1)
        ... )
        >>> solution = solve(problem, OSQP(), problem.start())
        >>> solution.x.x.round(3), solution.x.inequality.round(3)
        (Array([0.5, 0.5], dtype=float32), Array([0.5], dtype=float32))

    Source:
        Stellato, Banjac, Goulart, Bemporad, Boyd, 2020, "OSQP: an operator splitting
        solver for quadratic programs" (arXiv 1711.08013); on graphics processors and
        with conjugate gradients: Schubiger, Banjac, Lygeros, 2020 (arXiv 1912.04263).

    Differences:
        The run stops on the problem's condition, of which the bounds' multipliers are
        no part, not on the paper's residuals. Every step is polished, not the last
        one, by the proximal method of multipliers on a matrix of the size of `x`.
        Proofs of infeasibility are judged relative to their own terms, and more
        strictly.
    """

    rho: Float[Array, ""] | float = 0.1
    relaxation: Float[Array, ""] | float = 1.6
    iterations: int = eqx.field(static=True, default=25)
    polish: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        check_positive("OSQP", "rho", self.rho)
        check_positive("OSQP", "relaxation", self.relaxation)
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(
                "OSQP: `iterations` must be a positive integer (got "
                f"{self.iterations!r})."
            )

    def init(self, problem, start):
        as_quadratic(self, problem, operators=True)
        condition = problem.condition(start)
        scaled = scale(problem)
        x, y = scaled.to_scaled(problem, start)
        rho = jnp.asarray(self.rho, x.dtype)
        inverse = None if problem.matrix_free else _invert(scaled, rho)
        z = jnp.clip(scaled.image(x), scaled.lo, scaled.up)
        return State(start, condition, _Memory(scaled, x, z, y, rho, inverse))

    def step(self, problem, state):
        old = state.memory
        scaled = old.scaled

        def iterate(_, carry):
            return _iterate(old, jnp.asarray(self.relaxation, old.rho.dtype), *carry)

        x, z, y = jax.lax.fori_loop(0, self.iterations, iterate, (old.x, old.z, old.y))
        rows, pull = scaled.image(x), scaled.pull(y)
        primal = _largest(rows - z)
        dual = _largest(scaled.gradient(x) + pull)
        point = scaled.from_scaled(problem, x, y)
        condition = problem.condition(point)
        feasible = primal <= 1e-3 * (1 + _largest(rows))
        proof = find_proof(scaled, x - old.x, y - old.y, feasible)
        if self.polish and not problem.matrix_free:
            better, moves = _polish(problem, scaled, x, z, y, point, condition)
            point, condition = better
            other = find_proof(scaled, *moves, feasible)
            proof = choose(proof[0] == Status.RUNNING, other, proof)
        primal = primal / _floor(_largest(rows, z))
        dual = dual / _floor(_largest(apply(scaled.P, x), pull, scaled.q))
        rho, inverse = _adapt(old, primal, dual)
        memory = _Memory(scaled, x, z, y, rho, inverse)
        return state_of(
            problem,
            scaled,
            point,
            condition,
            proof,
            memory,
            evaluations=self.iterations + 3,
        )


def _penalties(scaled, rho):
    """Stiff where the interval is a point, next to none where it is the line."""
    fixed = scaled.lo == scaled.up
    free = jnp.isinf(scaled.lo) & jnp.isinf(scaled.up)
    rho = jnp.where(fixed, _STIFF * rho, jnp.where(free, _MIN_RHO, rho))
    return jnp.clip(rho, _MIN_RHO, _MAX_RHO)


def _invert(scaled, rho):
    factor = scaled.factor(_SIGMA, _penalties(scaled, rho))
    eye = jnp.eye(scaled.q.size, dtype=scaled.q.dtype)
    half = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    return half.T @ half


def _iterate(memory, relaxation, x, z, y):
    scaled, rho = memory.scaled, _penalties(memory.scaled, memory.rho)
    right = _SIGMA * x - scaled.q + scaled.pull(rho * z - y)
    if memory.inverse is None:
        u = _conjugate_gradients(scaled, rho, right, x)
    else:
        u = memory.inverse @ right
    w = relaxation * scaled.image(u) + (1 - relaxation) * z
    x = relaxation * u + (1 - relaxation) * x
    z = jnp.clip(w + y / rho, scaled.lo, scaled.up)
    return x, z, y + rho * (w - z)


def _conjugate_gradients(scaled, rho, right, x):
    def product(v):
        return apply(scaled.P, v) + _SIGMA * v + scaled.pull(rho * scaled.image(v))

    # Little is asked of each solve: the start is the last one's answer.
    tol = float(np.finfo(x.dtype).eps) ** 0.75
    return jsp.sparse.linalg.cg(product, right, x, tol=tol, maxiter=x.size)[0]


def _adapt(memory, primal, dual):
    tiny = float(np.finfo(primal.dtype).tiny)
    wanted = memory.rho * jnp.sqrt((primal + tiny) / (dual + tiny))
    wanted = jnp.clip(wanted, _MIN_RHO, _MAX_RHO)
    change = wanted / memory.rho
    much = (change > _ADAPT) | (change < 1 / _ADAPT)
    rho = jnp.where(much, wanted, memory.rho)
    if memory.inverse is None:
        return rho, None
    inverse = jax.lax.cond(
        much, lambda: _invert(memory.scaled, rho), lambda: memory.inverse
    )
    return rho, inverse


def _polish(problem, scaled, x, z, y, point, condition):
    """The better of the iterate and the solution with the constraints it calls active.

    A constraint is active where its multiplier outweighs its distance. Also returns the
    last moves: where the active constraints exclude each other they are a proof.
    """
    at_lower, at_upper = z - scaled.lo < -y, scaled.up - z < y
    active = at_lower | at_upper | (scaled.lo == scaled.up)
    target = jnp.where(at_lower, scaled.lo, scaled.up)
    x, y, *moves = solve_active(scaled, x, y, active, target, _REFINEMENTS)
    polished = scaled.from_scaled(problem, x, y)
    finished = problem.condition(polished)
    better = problem.residual(finished) < problem.residual(condition)
    return choose(better, (polished, finished), (point, condition)), moves


def _largest(*vectors):
    return jnp.max(jnp.stack([jnp.max(jnp.abs(v), initial=0) for v in vectors]))


def _floor(size):
    return jnp.maximum(size, float(np.finfo(size.dtype).tiny))
