"""LV-HBA: constrained bilevel optimisation with first derivatives only.

Penalises `f - v <= 0`, `v` the proximal Lagrangian value function, and descends on
`F / c_k + f - v` with `c_k = c (k + 1)^p` growing. The saddle point that defines `v`
is not solved for: one projected gradient step a round tracks it, and its position
gives the gradient of `v`. One loop, two gradients of the lower Lagrangian, one each of
`F` and `f`, and one projection on the feasible set a round; no Hessian, and neither
strong convexity nor a unique answer of the lower level is needed.

Use it when the lower level has constraints that couple it to `x`, or many answers. With
a strongly convex, unconstrained lower level a method with implicit gradients reaches
higher accuracy: the distance to the answer here shrinks like `1 / c_k`.

Source: W. Yao, C. Yu, S. Zeng and J. Zhang (2024), Constrained Bi-Level Optimization:
Proximal Lagrangian Value Function Approach and Hessian-free Algorithm, ICLR 2024,
arXiv 2401.16164, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from ..core._checks import check_positive, is_traced
from ..core._solver import Solver, State
from ..core._status import Status
from ._problem import BilevelPoint, BilevelProblem, check_bilevel
from ._proximal_lagrangian import project_saddle, saddle_operator


class _Memory(eqx.Module):
    x: PyTree[Array]
    y: PyTree[Array]
    theta: PyTree[Array]
    multipliers: Any  # lambda: tracks the saddle point's maximiser
    center: Any  # z: the proximal centre of the multipliers
    count: Int[Array, ""]
    joint: Any
    warm: Any  # multipliers of the last joint projection


class LVHBA(Solver):
    """Single-loop first-order method for a constrained lower level.

    Args:
        stepsize: `alpha`, of `(x, y)`.
        center_stepsize: `beta`, of the multipliers' proximal centre.
        saddle_stepsize: `eta`, of the saddle point; below `saddle_stepsize_bound`.
        gamma1: Proximal parameter of the lower variables; below the inverse of the
            lower level's weak convexity.
        gamma2: Proximal parameter of the multipliers.
        penalty: `c > 0` in `c_k = c (k + 1)^p`.
        power: `p` in `[0, 1/2]` (the theory wants less than 1/2, the paper's last
            experiments take 1/2); 0 keeps the penalty fixed and leaves a bias of about
            `1 / c`.
        bound: `r`: multipliers stay in `[0, r]` (`[-r, r]` for equalities); larger
            than the lower level's multipliers.

    Raises:
        ValueError: if a setting is out of its range, or, in `init` with concrete
            values, `saddle_stepsize` is not below `saddle_stepsize_bound` at the
            start; under jit the status is then `DIVERGED` at once.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import LVHBA, BilevelProblem
        >>> problem = BilevelProblem(
        ...     lambda x, y: jnp.sum((y - 1) ** 2) / 2,
        ...     lambda x, y: jnp.sum((y - 2 * x) ** 2) / 2,
        ...     inequality=lambda x, y: y - 0.5,
        ... )
        >>> start = problem.point(jnp.zeros(1), jnp.zeros(1))
        >>> method = LVHBA(0.05, saddle_stepsize=0.3, gamma1=1.0, gamma2=1.0)
        >>> solution = solve(problem, method, start, max_steps=2000)
        >>> bool(jnp.abs(solution.x.y - 0.5) < 0.05)
        True

    Source: arXiv 2401.16164, algorithm 1.

    Differences: The stepsize test is the exact condition for a contraction in the
        Euclidean norm, which the paper's `rho_T / L_T^2` implies. The reported
        condition is that of the bilevel problem itself (`BilevelProblem.condition`,
        one Hessian-vector product, for measuring only): the penalty's saddle point
        supplies its adjoint, `c_k (y - theta)`.
    """

    stepsize: Float[Array, ""] | float = 0.01
    center_stepsize: Float[Array, ""] | float = 0.02
    saddle_stepsize: Float[Array, ""] | float = 0.1
    gamma1: Float[Array, ""] | float = 10.0
    gamma2: Float[Array, ""] | float = 1.0
    penalty: Float[Array, ""] | float = 1.0
    power: Float[Array, ""] | float = 0.3
    bound: Float[Array, ""] | float = 1e3

    def __check_init__(self):
        for name in (
            "stepsize",
            "center_stepsize",
            "saddle_stepsize",
            "gamma1",
            "gamma2",
            "penalty",
            "bound",
        ):
            check_positive("LVHBA", name, getattr(self, name))
        if not is_traced(self.power) and not 0 <= self.power <= 0.5:
            raise ValueError(
                f"LVHBA: `power` must lie in [0, 1/2] (got {self.power}). Beyond, the "
                "penalty outruns the saddle point."
            )

    def init(self, problem: BilevelProblem, start: BilevelPoint) -> State:
        check_bilevel("LVHBA", problem, start)
        limit = saddle_stepsize_bound(problem, start, self.gamma1, self.gamma2)
        fits = self.saddle_stepsize < limit
        if not is_traced(fits) and not bool(fits):
            raise ValueError(
                f"LVHBA: `saddle_stepsize` must be below {float(limit):.3g} for this "
                f"problem (got {self.saddle_stepsize}). Use a smaller one, or scale "
                "the constraints down."
            )
        memory = self.begin(problem, start)
        status = jnp.where(fits, Status.RUNNING, Status.DIVERGED)
        point = self._point(problem, memory, None)
        return State(point, problem.condition(point), memory, status=status)

    def step(self, problem: BilevelProblem, state: State) -> State:
        memory, projected = self._advance(problem, state.memory)
        point = self._point(problem, memory, projected)
        # Two gradients of the Lagrangian, one of f and one of F, and the condition.
        return State(point, problem.condition(point), memory, evaluations=5)

    def begin(self, problem: BilevelProblem, start: BilevelPoint) -> _Memory:
        """The memory at a start: saddle point and centre begin at the start."""
        joint = problem.joint_set(start.x, start.y)
        vector = ravel_pytree((start.x, start.y))[0]
        warm = joint.project(vector).multipliers
        # Copies: the start must not alias what the loop overwrites.
        theta = jtu.tree_map(jnp.copy, start.y)
        multipliers = jtu.tree_map(jnp.copy, start.multipliers)
        count = jnp.zeros((), jnp.int32)
        return _Memory(
            start.x, start.y, theta, multipliers, multipliers, count, joint, warm
        )

    def advance(self, problem: BilevelProblem, memory: _Memory) -> _Memory:
        """One round, without measuring anything: the paper's algorithm box."""
        return self._advance(problem, memory)[0]

    def penalty_at(self, count) -> Float[Array, ""]:
        """`c_k`."""
        dtype = jnp.result_type(float)
        grown = (jnp.asarray(count, dtype) + 1) ** jnp.asarray(self.power, dtype)
        return jnp.asarray(self.penalty, dtype) * grown

    def _advance(self, problem, memory):
        x, y, z = memory.x, memory.y, memory.center
        vector, unravel = ravel_pytree((x, y))
        alpha, beta, eta, gamma1, gamma2, bound = (
            jnp.asarray(v, vector.dtype)
            for v in (
                self.stepsize,
                self.center_stepsize,
                self.saddle_stepsize,
                self.gamma1,
                self.gamma2,
                self.bound,
            )
        )
        c = self.penalty_at(memory.count).astype(vector.dtype)

        def move(u, d, size):
            return jtu.tree_map(lambda a, b: a - size * b, u, d)

        saddle = (memory.theta, memory.multipliers)
        d_saddle = saddle_operator(problem, x, y, z, *saddle, gamma1, gamma2)
        theta, multipliers = project_saddle(
            problem, x, *move(saddle, d_saddle, eta), bound
        )

        # From here on with the new saddle point: the old one costs the descent.
        upper = jax.grad(problem.upper_value, argnums=(0, 1))(x, y)
        lower = jax.grad(problem.lower_value, argnums=(0, 1))(x, y)
        value_x = jax.grad(problem.lagrangian)(x, theta, multipliers)
        value_y = jtu.tree_map(lambda a, b: (a - b) / gamma1, y, theta)
        descent = jtu.tree_map(
            lambda F, f, v: F / c + f - v, upper, lower, (value_x, value_y)
        )
        target = vector - alpha * ravel_pytree(descent)[0]
        projected = memory.joint.project(target, memory.warm)
        x, y = unravel(projected.x)
        if problem.constrained:
            moved = move(z, (z - multipliers) / gamma2, beta)
            _, z = project_saddle(problem, x, theta, moved, bound)
        memory = _Memory(
            x,
            y,
            theta,
            multipliers,
            z,
            memory.count + 1,
            memory.joint,
            projected.multipliers,
        )
        return memory, projected

    def _point(self, problem, memory, projected):
        """The iterate with the adjoint that the penalty implies.

        Stationarity of the penalised function at `(x, y)`, minus that of the saddle
        point at `theta`, is the adjoint equation with `w = c_k (y - theta)` and
        `c_k` times the difference of the two multipliers, up to `O(1 / c_k)`.
        """
        x, y = memory.x, memory.y
        if projected is None:
            return problem.point(x, y, memory.multipliers)
        c = self.penalty_at(memory.count - 1)
        adjoint = jtu.tree_map(
            lambda a, b: c.astype(a.dtype) * (a - b), y, memory.theta
        )
        if not problem.constrained:
            return BilevelPoint(x, y, adjoint)
        values, slope = jax.jvp(lambda v: problem.constraints(x, v), (y,), (adjoint,))
        equalities = problem.equalities(x, y)
        first = getattr(memory.joint, "equalities", equalities)
        inequalities = values.size - equalities
        raw = projected.multipliers
        raw = jnp.concatenate([raw[:equalities], raw[first : first + inequalities]])
        alpha = jnp.asarray(self.stepsize, values.dtype)
        difference = c.astype(values.dtype) * (raw / alpha - memory.multipliers)
        equality = jnp.arange(values.size) < equalities
        active = equality | (memory.multipliers + values > 0)
        return BilevelPoint(
            x, y, adjoint, memory.multipliers, jnp.where(active, difference, -slope)
        )


def saddle_stepsize_bound(
    problem: BilevelProblem,
    point: BilevelPoint,
    gamma1: float | Float[Array, ""],
    gamma2: float | Float[Array, ""],
    *,
    max_steps: int = 60,
) -> Float[Array, ""]:
    """The largest stepsize with which a saddle step contracts, near a point.

    With `M` the saddle operator's Jacobian, `u - eta M u` contracts exactly when
    `eta M'M < M + M'`; the bound is the inverse of the largest eigenvalue of that
    pencil, by power iteration with inner conjugate gradients, matrix-free. The
    estimate approaches the bound from above; for a quadratic lower level with affine
    constraints it does not depend on the point.

    Args:
        problem: The problem.
        point: Where to linearise.
        gamma1: Proximal parameter of the lower variables.
        gamma2: Proximal parameter of the multipliers.
        max_steps: Power iterations.

    Returns:
        A positive number; NaN where the symmetric part is not positive definite
        (the lower level is not convex enough for `gamma1`).

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import BilevelProblem, saddle_stepsize_bound
        >>> problem = BilevelProblem(lambda x, y: 0.0 * y, lambda x, y: y**2 / 2)
        >>> point = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> float(saddle_stepsize_bound(problem, point, 1.0, 1.0))
        1.0

    Source: The contraction behind arXiv 2401.16164, lemma on the saddle step.
    """
    u, unravel = ravel_pytree((point.y, point.multipliers))
    gamma1, gamma2 = jnp.asarray(gamma1, u.dtype), jnp.asarray(gamma2, u.dtype)

    def operator(v):
        value = saddle_operator(
            problem, point.x, point.y, point.multipliers, *unravel(v), gamma1, gamma2
        )
        return ravel_pytree(value)[0]

    _, M = jax.linearize(operator, u)
    transposed = jax.linear_transpose(M, u)
    MT = lambda v: transposed(v)[0]  # noqa: E731
    symmetric = lambda v: M(v) + MT(v)  # noqa: E731

    def step(carry, _):
        v, _, convex = carry
        image = MT(M(v))
        energy = v @ symmetric(v)
        top = (v @ image) / energy
        v, _ = jax.scipy.sparse.linalg.cg(symmetric, image, maxiter=50)
        return (v / jnp.linalg.norm(v), top, convex & (energy > 0)), None

    # A fixed generic start, so that the bound is a function of its arguments.
    v = jnp.cos(1.0 + jnp.arange(u.size, dtype=u.dtype))
    carry = (v / jnp.linalg.norm(v), jnp.ones((), u.dtype), jnp.asarray(True))
    (_, top, convex), _ = jax.lax.scan(step, carry, None, length=max_steps)
    return jnp.where(convex & (top > 0), 1 / top, jnp.nan)
