"""AiPOD and E-AiPOD: implicit gradients under equality constraints.

The lower level is `min_y f(x, y)` subject to `A y + h(x) = 0`. Projected gradient
steps follow its answer; the implicit gradient is taken in the null space of `A`, with
orthonormal basis `V`:

    grad = F_x - (A^+ h_x)' F_y - (f_xy - f_yy A^+ h_x)' V (V' f_yy V)^-1 V' F_y.

E-AiPOD projects only with probability `p` and corrects the gradient for the skipped
projections, and takes several upper steps for each projection of `x`. Both need
`V' f_yy V` invertible: a lower level that is strongly convex on the constraint set.
Where it is singular the pseudo-inverse is taken, as the released code does, and the
directions that the upper level could choose freely are never moved.

Source: Q. Xiao, H. Shen, W. Yin and T. Chen (2023), Alternating Projected SGD for
Equality-constrained Bilevel Optimization, AISTATS 2023, arXiv 2211.07096.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_positive, is_traced
from ..core._solver import Solver, State
from ._problem import BilevelPoint, BilevelProblem, check_bilevel


class _Memory(eqx.Module):
    correction: Float[Array, " m"]
    pseudo_inverse: Float[Array, "m p"]
    basis: Float[Array, "m m-p"]
    key: PRNGKeyArray


class AiPOD(Solver):
    """Alternating implicit projected gradient descent for equality constraints.

    Costs `inner_steps` lower gradients and projections and two dense solves with the
    reduced Hessian a round. The equalities must be affine in `y`, with a matrix that
    does not depend on `x` and has independent rows.

    Args:
        stepsize: Of `x`.
        lower_stepsize: Of `y`.
        inner_steps: Lower steps a round (`S` in the paper).
        upper_steps: Upper steps a round with one adjoint, then one projection of `x`
            (`T`).
        probability: Of projecting after a lower step; 1 is AiPOD, below it E-AiPOD.
        key: Draws the projections; only read when `probability < 1`.

    Raises:
        ValueError: if a setting is out of range, or the problem has inequalities, a
            set Y, or no equality constraint.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import AiPOD, BilevelProblem
        >>> problem = BilevelProblem(
        ...     lambda x, y: jnp.sum((y - 1) ** 2) / 2 + jnp.sum(x**2) / 2,
        ...     lambda x, y: jnp.sum((y - x) ** 2) / 2,
        ...     equality=lambda x, y: jnp.sum(y, keepdims=True),
        ... )
        >>> start = problem.point(jnp.zeros(2), jnp.zeros(2))
        >>> method = AiPOD(0.3, lower_stepsize=0.5)
        >>> bool(solve(problem, method, start, tol=1e-3).converged)
        True

    Source: arXiv 2211.07096, algorithms 1 and 2.

    Differences: Deterministic gradients; the term `-(A^+ h_x)' F_y`, which the
        released toy script leaves out, is kept.
    """

    stepsize: Float[Array, ""] | float = 0.01
    lower_stepsize: Float[Array, ""] | float = 0.1
    inner_steps: int = eqx.field(static=True, default=5)
    upper_steps: int = eqx.field(static=True, default=1)
    probability: Float[Array, ""] | float = 1.0
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        check_positive("AiPOD", "stepsize", self.stepsize)
        check_positive("AiPOD", "lower_stepsize", self.lower_stepsize)
        if self.inner_steps < 1 or self.upper_steps < 1:
            raise ValueError("AiPOD: `inner_steps` and `upper_steps` must be positive.")
        if not is_traced(self.probability) and not 0 < self.probability <= 1:
            raise ValueError(
                f"AiPOD: `probability` must lie in (0, 1] (got {self.probability})."
            )

    def init(self, problem: BilevelProblem, start: BilevelPoint) -> State:
        check_bilevel("AiPOD", problem, start)
        if (
            problem.equality is None
            or problem.inequality is not None
            or problem.project_y is not None
        ):
            raise ValueError(
                "AiPOD: needs equality constraints and nothing else on the lower "
                "level. Use LVHBA for inequalities."
            )
        y, unravel = ravel_pytree(start.y)
        A = jax.jacfwd(lambda v: problem.constraints(start.x, unravel(v)))(y)
        rows = A.shape[0]
        Q, R = jnp.linalg.qr(A.T, mode="complete")
        # Dependent rows make this infinite, and the status DIVERGED.
        pseudo_inverse = Q[:, :rows] @ jnp.linalg.inv(R[:rows]).T
        basis = Q[:, rows:]
        key = jax.random.key(0) if self.key is None else self.key
        memory = _Memory(jnp.zeros_like(y), pseudo_inverse, basis, key)
        return self._state(problem, start.x, start.y, memory)

    def step(self, problem: BilevelProblem, state: State) -> State:
        memory, point = state.memory, state.x
        y, memory = self._follow(problem, point.x, point.y, memory)
        adjoint, _, multiplier_adjoint = self._adjoint(problem, point.x, y, memory)

        def upper_lagrangian(x):
            slope = jax.grad(problem.lower_value, argnums=1)(x, y)
            pairing = jtu.tree_map(jnp.vdot, adjoint, slope)
            value = problem.upper_value(x, y) + sum(jtu.tree_leaves(pairing))
            return value + multiplier_adjoint @ problem.constraints(x, y)

        def upper_step(x, _):
            gradient = jax.grad(upper_lagrangian)(x)
            size = self.stepsize
            return jtu.tree_map(
                lambda v, d: v - jnp.asarray(size, v.dtype) * d, x, gradient
            ), None

        x, _ = jax.lax.scan(upper_step, point.x, None, length=self.upper_steps)
        if problem.project_x is not None:
            x = problem.project_x(x)
        return self._state(problem, x, y, memory)

    def _follow(self, problem, x, y, memory):
        """Lower steps with corrections for skipped projections."""
        flat, unravel = ravel_pytree(y)
        size = jnp.asarray(self.lower_stepsize, flat.dtype)
        probability = jnp.asarray(self.probability, flat.dtype)
        key, used = jax.random.split(memory.key)
        draws = jax.random.bernoulli(used, self.probability, (self.inner_steps,))

        def one(carry, project):
            y, r = carry
            gradient = jax.grad(problem.lower_value, argnums=1)(x, unravel(y))
            z = y - size * (ravel_pytree(gradient)[0] - r)
            ahead = z - size / probability * r
            gap = problem.constraints(x, unravel(ahead))
            landed = ahead - memory.pseudo_inverse @ gap
            corrected = r + probability / size * (landed - z)
            return (
                jnp.where(project, landed, z),
                jnp.where(project, corrected, r),
            ), None

        (flat, r), _ = jax.lax.scan(one, (flat, memory.correction), draws)
        memory = _Memory(r, memory.pseudo_inverse, memory.basis, key)
        return unravel(flat), memory

    def _adjoint(self, problem, x, y, memory):
        """`w = -V (V' f_yy V)^+ V' F_y`, and the two multipliers."""
        flat, unravel = ravel_pytree(y)
        lower = lambda v: problem.lower_value(x, unravel(v))  # noqa: E731
        hessian, V = jax.hessian(lower)(flat), memory.basis
        force = ravel_pytree(jax.grad(problem.upper_value, argnums=1)(x, y))[0]
        reduced = jnp.linalg.pinv(V.T @ hessian @ V, hermitian=True)
        adjoint = -V @ (reduced @ (V.T @ force))
        back = memory.pseudo_inverse.T
        multipliers = -back @ jax.grad(lower)(flat)
        multiplier_adjoint = -back @ (force + hessian @ adjoint)
        return unravel(adjoint), multipliers, multiplier_adjoint

    def _state(self, problem, x, y, memory):
        adjoint, multipliers, multiplier_adjoint = self._adjoint(problem, x, y, memory)
        point = BilevelPoint(x, y, adjoint, multipliers, multiplier_adjoint)
        evaluations = self.inner_steps + self.upper_steps
        return State(point, problem.condition(point), memory, evaluations=evaluations)
