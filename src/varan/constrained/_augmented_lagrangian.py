"""The augmented Lagrangian method: constraints as penalties whose price is learned.

Each step minimises `f + nu'h + rho/2 |h|^2 + |max(lam + rho g, 0)|^2 / (2 rho)` by a
solver of smooth problems, from where the last one ended and to a tolerance that
tightens. What the penalty pushed back with becomes the next multipliers, and `rho`
grows where the constraints did not come nearer. The penalty need not go to infinity, as
it must without multipliers.

Use it for smooth problems with nonlinear constraints, convex or not; quadratic programs
have solvers of their own (`OSQP`). It finds points that satisfy the optimality
condition; in a non-convex problem those can be local.

Cost: a step is a run of the inner solver; its evaluations are counted.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int

from ..core import Newton, Smooth, Solver, State, Status, solve
from ..core._checks import check_positive
from ..core._trees import tree_norm, tree_square
from ..core.optimality import KKTPoint
from ..problems import Constrained

# Andreani, Birgin, Martínez and Schuverdt's: the penalty grows tenfold where the
# violation has not halved, within these bounds; multipliers beyond the last are cut.
_GROW, _ENOUGH = 10.0, 0.5
_FLATTEST, _STEEPEST, _PRICIEST = 1e-4, 1e4, 1e12
# The inner tolerance's share of the residual, and its least, in the dtype's roundings.
_SHARE, _ROUNDINGS = 0.1, 16.0
# Steps in which neither violation nor stationarity gains before the run has stalled.
_PATIENCE = 12


class _Memory(eqx.Module):
    penalty: Float[Array, ""]
    violation: Float[Array, ""]
    best: Float[Array, ""]
    idle: Int[Array, ""]


class AugmentedLagrangian(Solver):
    """Augmented Lagrangian method for `Constrained` problems.

    Statuses: `STALLED` where a dozen steps brought nothing, as when the constraints
    contradict each other. That no point meets them is never claimed: for nonlinear
    constraints this method cannot prove it; see the certificate's `infeasibility`.

    Args:
        inner: Minimises the augmented Lagrangian: a `varan.Solver` of `Smooth`
            problems, such as `Newton()` or `NewtonCG()`, an optax transformation such
            as `optax.lbfgs()`, or an optimistix minimiser.
        inner_steps: Limit of the inner solver's steps in one step.
        penalty: The first penalty. By default one that balances objective and
            violation at the start.

    Raises:
        ValueError: If `inner_steps` is not a positive integer or `penalty` not
            positive.
        TypeError: In `solve`, if the problem is no `Constrained`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.constrained import AugmentedLagrangian
        >>> from varan.problems import Constrained
        >>> problem = Constrained(
        ...     lambda x: x[0] + x[1], equality=lambda x: x @ x - 2.0
        ... )
        >>> start = problem.start(jnp.array([-2.0, 0.5]))
        >>> end = solve(problem, AugmentedLagrangian(), start)
        >>> end.x.x.round(2), end.x.equality.round(2)
        (Array([-1., -1.], dtype=float32), Array(0.5, dtype=float32))

    Source:
        Hestenes, 1969; Powell, 1969; Rockafellar, 1973; the safeguards: Andreani,
        Birgin, Martínez, Schuverdt, 2007, "On augmented Lagrangian methods with general
        lower-level constraints", algorithm 3.1.

    Differences:
        Bounds are inequalities like others. The inner tolerance follows the residual.
    """

    inner: Any = eqx.field(default_factory=Newton)
    inner_steps: int = eqx.field(static=True, default=200)
    penalty: Float[Array, ""] | float | None = None

    def __check_init__(self):
        if not isinstance(self.inner_steps, int) or self.inner_steps < 1:
            raise ValueError(
                "AugmentedLagrangian: `inner_steps` must be a positive integer (got "
                f"{self.inner_steps!r})."
            )
        if self.penalty is not None:
            check_positive("AugmentedLagrangian", "penalty", self.penalty)

    def init(self, problem, start):
        if not isinstance(problem, Constrained):
            raise TypeError(
                "AugmentedLagrangian: the problem must be a Constrained (got "
                f"{type(problem).__name__})."
            )
        start = KKTPoint(*start)
        condition = problem.condition(start)
        h, g = problem.constraints(start.x)
        square = tree_square((h, jtu.tree_map(lambda v: jnp.maximum(v, 0), g)))
        if self.penalty is None:
            value = jnp.abs(problem.objective(start.x, *problem.params))
            balance = 10 * jnp.maximum(value, 1) / jnp.maximum(square / 2, 1)
            penalty = jnp.clip(balance, _FLATTEST, _STEEPEST)
        else:
            penalty = jnp.asarray(self.penalty, square.dtype)
        infinite = jnp.full_like(square, jnp.inf)
        idle = jnp.zeros((), jnp.int32)
        return State(start, condition, _Memory(penalty, infinite, infinite, idle))

    def step(self, problem: Any, state):
        memory, point = state.memory, state.x
        rho, nu, lam = memory.penalty, point.equality, point.inequality

        def lagrangian(x, rho, nu, lam):
            h, g = problem.constraints(x)
            pushed = _pushed(lam, g, rho)
            fixed = _dot(nu, h) + rho / 2 * tree_square(h)
            priced = (tree_square(pushed) - tree_square(lam)) / (2 * rho)
            return problem.objective(x, *problem.params) + fixed + priced

        residual = problem.residual(state.condition)
        eps = float(jnp.finfo(rho.dtype).eps)
        least = (
            _ROUNDINGS
            * eps
            * (1 + tree_norm(jax.grad(lagrangian)(point.x, rho, nu, lam)))
        )
        end = solve(
            Smooth(lagrangian, rho, nu, lam),
            self.inner,
            point.x,
            tol=jnp.maximum(_SHARE * jnp.minimum(residual, 1), least),
            max_steps=self.inner_steps,
            differentiate="none",
        )
        h, g = problem.constraints(end.x)
        new = KKTPoint(
            end.x,
            jtu.tree_map(lambda m, v: _cut(m + rho * v), nu, h),
            jtu.tree_map(_cut, _pushed(lam, g, rho)),
        )
        condition = problem.condition(new)
        # Of an inequality that is not active, the multiplier's change.
        violation = tree_norm((h, jtu.tree_map(jnp.maximum, g, _scaled(lam, -1 / rho))))
        slow = ~(violation <= _ENOUGH * memory.violation)
        grown = jnp.where(slow, jnp.minimum(_GROW * rho, 1 / eps), rho)
        # A step that leaves the finite numbers is told by the condition.
        size = problem.residual(condition)
        gained = size < memory.best
        idle = jnp.where(gained, 0, memory.idle + 1).astype(jnp.int32)
        status = jnp.where(idle >= _PATIENCE, Status.STALLED, Status.RUNNING)
        memory = _Memory(grown, violation, jnp.minimum(memory.best, size), idle)
        return State(
            new, condition, memory, evaluations=end.evaluations + 3, status=status
        )


def _pushed(lam, g, rho):
    """`max(lam + rho g, 0)`."""
    return jtu.tree_map(lambda m, v: jnp.maximum(m + rho * v, 0), lam, g)


def _scaled(tree, factor):
    return jtu.tree_map(lambda v: factor * v, tree)


def _cut(multiplier):
    return jnp.clip(multiplier, -_PRICIEST, _PRICIEST)


def _dot(a, b):
    return jnp.asarray(sum(jtu.tree_leaves(jtu.tree_map(jnp.vdot, a, b))))
