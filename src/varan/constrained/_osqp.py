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
and solves the optimality system with these. A right guess gives the solution, or the
proof, to the dtype's precision long before the iteration does; a nearly right one is
mended by a few rounds of the primal-dual active-set method.

Cost: a factorisation is n^3 flops (the inverse is kept, since products with it are the
fastest solves), an iteration 2 n^2 + 4 n m flops, the polish n^3 / 3 + n^2 m for each
guess.

Source: Stellato, Banjac, Goulart, Bemporad, Boyd, 2020, "OSQP: an operator splitting
solver for quadratic programs" (arXiv 1711.08013).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy as jsp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from ..core import Solver, State, Status
from ..core._checks import check_positive, is_traced
from ..problems._quadratic import apply
from ._scaled import Scaled, find_proof, scale, solve_active
from ._shared import as_quadratic, state_of

# The paper's: sections 5.1 and 5.2, and table 1.
_SIGMA = 1e-6
_STIFF = 1e3
_MIN_RHO, _MAX_RHO = 1e-6, 1e6
_ADAPT = 5.0
_REFINEMENTS = 6
_GUESSES = 4


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
    gradients from the last iterate; nothing is then scaled or polished. Only without
    the polish can the run be differentiated by unrolling.

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
        >>> solution.x.x.round(3).tolist(), solution.x.inequality.round(3).tolist()
        ([0.5, 0.5], [0.5])

    Source:
        Stellato, Banjac, Goulart, Bemporad, Boyd, 2020, "OSQP: an operator splitting
        solver for quadratic programs" (arXiv 1711.08013); on graphics processors and
        with conjugate gradients: Schubiger, Banjac, Lygeros, 2020 (arXiv 1912.04263).

    Differences:
        The run stops on the problem's condition, of which the bounds' multipliers are
        no part, not on the paper's residuals. Every step is polished, not the last
        one, by the proximal method of multipliers on a matrix of the size of `x`, with
        up to four guesses of the active constraints (Hintermüller, Ito, Kunisch, 2002).
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
        if not is_traced(self.relaxation) and np.any(np.asarray(self.relaxation) >= 2):
            raise ValueError(
                f"OSQP: `relaxation` must be below 2 (got {self.relaxation})."
            )
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(
                "OSQP: `iterations` must be a positive integer (got "
                f"{self.iterations!r})."
            )

    def init(self, problem, start):
        problem = as_quadratic(self, problem, operators=True)
        condition = problem.condition(start)
        scaled = scale(problem)
        x, y = scaled.to_scaled(problem, start)
        rho = jnp.asarray(self.rho, x.dtype)
        inverse = None if problem.matrix_free else _invert(scaled, rho)
        z = jnp.clip(scaled.image(x), scaled.lo, scaled.up)
        return State(start, condition, _Memory(scaled, x, z, y, rho, inverse))

    def step(self, problem: Any, state):
        old = state.memory
        x, z, y = self._run(old)
        scaled, rows, pull = old.scaled, old.scaled.image(x), old.scaled.pull(y)
        primal, image = _largest(rows - z), apply(scaled.P, x)
        dual = _largest(image + scaled.q + pull)
        ends, moves = [(x, y)], [(x - old.x, y - old.y)]
        if self.polish and not problem.matrix_free:
            end, move = _polish(scaled, x, z, y)
            ends.append(end)
            moves.append(move)
        point, condition = _best(problem, scaled, ends)
        # Along a ray the constraints are met, but for the rounding of its length.
        feasible = primal <= 1e-3 * (1 + _largest(rows))
        proof = _first_proof(scaled, moves, feasible)
        rho, inverse = _adapt(
            old,
            primal / _floor(_largest(rows, z)),
            dual / _floor(_largest(image, pull, scaled.q)),
        )
        memory = _Memory(scaled, x, z, y, rho, inverse)
        work = self.iterations + 1 + len(ends)
        return state_of(
            problem, scaled, point, condition, proof, memory, evaluations=work
        )

    def _run(self, memory):
        scaled, relaxation = memory.scaled, jnp.asarray(self.relaxation, memory.x.dtype)
        rho = _penalties(scaled, memory.rho)

        def iterate(_, carry):
            x, z, y = carry
            right = _SIGMA * x - scaled.q + scaled.pull(rho * z - y)
            if memory.inverse is None:
                u = _conjugate_gradients(scaled, rho, right, x)
            else:
                u = memory.inverse @ right
            w = relaxation * scaled.image(u) + (1 - relaxation) * z
            x = relaxation * u + (1 - relaxation) * x
            z = jnp.clip(w + y / rho, scaled.lo, scaled.up)
            return x, z, y + rho * (w - z)

        start = memory.x, memory.z, memory.y
        return jax.lax.fori_loop(0, self.iterations, iterate, start)


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


def _conjugate_gradients(scaled, rho, right, x):
    def product(v):
        return apply(scaled.P, v) + _SIGMA * v + scaled.pull(rho * scaled.image(v))

    # From the last answer, which is near: few iterations reach a tight tolerance.
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

    def renew():
        return jnp.where(much, _invert(memory.scaled, rho), memory.inverse)

    inverse = jax.lax.cond(_in_any_lane(much), renew, lambda: memory.inverse)
    return rho, inverse


@jax.custom_batching.custom_vmap
def _in_any_lane(flag):
    """Itself; under `vmap` whether any lane's is true, one scalar for all lanes.

    A `cond` on it keeps its branches apart, where one on a batched flag runs both.
    """
    return flag


@_in_any_lane.def_vmap
def _in_any_lane_of_these(size, batched, flag):
    del size, batched
    return jnp.any(flag, axis=0), False


def _polish(scaled, x, z, y):
    """The solution with the constraints that the iterate calls active held.

    A constraint is active where its multiplier outweighs its distance. What the
    solution calls active itself is the next guess, until it is the same: that mends
    guesses that are nearly right. Also returns the last moves: where the active
    constraints exclude each other they are a proof.
    """

    def guess(rows, y):
        at_lower, at_upper = rows - scaled.lo < -y, scaled.up - rows < y
        active = at_lower | at_upper | (scaled.lo == scaled.up)
        return active, jnp.where(at_lower, scaled.lo, scaled.up)

    def proceed(carry):
        *_, changed, count = carry
        return changed & (count < _GUESSES)

    def improve(carry):
        x, y, _, _, active, target, _, count = carry
        x, y, dx, dy = solve_active(scaled, x, y, active, target, _REFINEMENTS)
        following, goal = guess(scaled.image(x), y)
        changed = jnp.any((following != active) | (following & (goal != target)))
        return x, y, dx, dy, following, goal, changed, count + 1

    first = (x, y, x, y, *guess(z, y), jnp.asarray(True), jnp.asarray(0))
    x, y, dx, dy, *_ = jax.lax.while_loop(proceed, improve, first)
    return (x, y), (dx, dy)


def _best(problem, scaled, ends):
    """The end with the smallest residual, as a point, and the condition there."""

    def measure(x, y):
        point = scaled.from_scaled(problem, x, y)
        condition = problem.condition(point)
        return point, condition, problem.residual(condition)

    points, conditions, residuals = jax.vmap(measure)(*_stack(ends))
    best = jnp.argmin(jnp.where(jnp.isnan(residuals), jnp.inf, residuals))
    return jtu.tree_map(lambda leaves: leaves[best], (points, conditions))


def _first_proof(scaled, moves, feasible):
    prove = jax.vmap(lambda dx, dy: find_proof(scaled, dx, dy, feasible))
    proofs = prove(*_stack(moves))
    first = jnp.argmax(proofs[0] != Status.RUNNING)
    return jtu.tree_map(lambda leaves: leaves[first], proofs)


def _stack(pairs):
    return tuple(jnp.stack(part) for part in zip(*pairs, strict=True))


def _largest(*vectors):
    return jnp.max(jnp.stack([jnp.max(jnp.abs(v), initial=0) for v in vectors]))


def _floor(size):
    return jnp.maximum(size, float(np.finfo(size.dtype).tiny))
