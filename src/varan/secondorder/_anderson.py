"""Anderson acceleration: extrapolate from the last few steps of a fixed-point map.

From iterates `x_i` and residuals `r_i = T(x_i) - x_i` the combination of weights that
sum to one and makes the combined residual least is where the next iterate starts. On
linear maps it is GMRES in disguise; on contractions it keeps their rate and mostly
betters it. A step whose residual grows is dropped for the plain one, and the history
with it.

Use it for any fixed-point map, or around a first-order solver, where steps are dear and
memory for a few of them is not. Cost: one application of the map a step, and
`O(history^2 n)`.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from ..core import FixedPoint, Solver, State
from ..core._checks import check_positive
from ..core._control import when

# Of the history's scale, against directions that are the same up to rounding.
_RIDGE = 10.0
# A residual that grows by more than this is worse than none of the plain steps.
_GROWTH = 2.0


class _Memory(eqx.Module):
    # Differences of iterates and of residuals, one a row; unused rows are zero.
    dx: Float[Array, "m n"]
    dr: Float[Array, "m n"]
    # The last iterate and its residual; before the first step there is none.
    x: Float[Array, " n"]
    residual: Float[Array, " n"]
    count: Int[Array, ""]
    # The state of the solver that is accelerated, where there is one.
    inner: State | None


class Anderson(Solver):
    """Anderson acceleration of a `FixedPoint`'s map, or of another solver's step.

    Args:
        solver: The solver whose step is accelerated; left out, the problem is a
            `FixedPoint` and its own map is. A solver with momentum of its own, or with
            a line search, gains little.
        history: How many steps are remembered.
        damping: In (0, 1]: how far the combined residual is followed.

    Raises:
        ValueError: If `history` is below 1 or `damping` not positive.
        TypeError: In `solve`, without `solver`, if the problem is no `FixedPoint`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import FixedPoint, solve
        >>> from varan.secondorder import Anderson
        >>> problem = FixedPoint(lambda x: jnp.cos(x))
        >>> end = solve(problem, Anderson(), jnp.ones(3), tol=1e-5)
        >>> end.x.round(3), int(end.steps) < 10
        (Array([0.739, 0.739, 0.739], dtype=float32), True)

    Source:
        Anderson, 1965; Walker, Ni, 2011, "Anderson acceleration for fixed-point
        iterations" (type II); the safeguard follows Zhang, O'Donoghue, Boyd, 2020
        (arXiv 1808.03971).
    """

    solver: Solver | None = None
    history: int = eqx.field(static=True, default=5)
    damping: float | Float[Array, ""] = 1.0

    def __check_init__(self):
        if not isinstance(self.history, int) or self.history < 1:
            raise ValueError(
                "Anderson: `history` must be a positive integer (got "
                f"{self.history!r})."
            )
        check_positive("Anderson", "damping", self.damping)

    def init(self, problem, start):
        if self.solver is None and not isinstance(problem, FixedPoint):
            raise TypeError(
                "Anderson: without `solver` the problem must be a FixedPoint (got "
                f"{type(problem).__name__}). Pass the solver to accelerate."
            )
        if self.solver is None:
            condition, inner, work = problem.condition(start), None, 1
        else:
            inner = self.solver.init(problem, start)
            condition, work = inner.condition, inner.evaluations
        x = ravel_pytree(start)[0]
        rows = jnp.zeros((self.history, x.size), x.dtype)
        memory = _Memory(rows, rows, x, x, jnp.asarray(0, jnp.int32), inner)
        return State(start, condition, memory, evaluations=work)

    def step(self, problem, state):
        x, unravel = ravel_pytree(state.x)
        plain, inner, work = self._plain(problem, state, x)
        memory = _remember(state.memory, x, plain - x)
        new = _extrapolate(memory, x, jnp.asarray(self.damping, x.dtype))
        condition, pull = ravel_pytree(problem.condition(unravel(new)))

        def drop(_):
            point = ravel_pytree(problem.condition(unravel(plain)))[0]
            return plain, point, jnp.zeros_like(memory.count)

        before = problem.residual(state.condition)
        worse = ~(problem.residual(pull(condition)) <= _GROWTH * before)
        new, condition, count = when(worse, drop, (new, condition, memory.count))
        new, condition = unravel(new), pull(condition)
        if inner is not None:
            inner = State(
                new,
                condition,
                inner.memory,
                evaluations=inner.evaluations,
                status=inner.status,
            )
        memory = _Memory(memory.dx, memory.dr, x, plain - x, count, inner)
        work = work + 1 + worse.astype(jnp.int32)
        return State(new, condition, memory, evaluations=work)

    def _plain(self, problem, state, x):
        """Where the accelerated map leads from `x`, its inner state, its work."""
        if self.solver is None:
            return x + ravel_pytree(state.condition)[0], None, 0
        inner = self.solver.step(problem, state.memory.inner)
        return ravel_pytree(inner.x)[0], inner, inner.evaluations


def _remember(memory, x, residual):
    """Adds the last step to the history; a count of zero says that there is none."""
    m = memory.dx.shape[0]
    place = (memory.count - 1) % m
    used = jnp.arange(m, dtype=jnp.int32) < memory.count

    def write(rows, difference):
        new = jax.lax.dynamic_update_index_in_dim(rows, difference, place, 0)
        return jnp.where(used[:, None], new, 0)

    return _Memory(
        write(memory.dx, x - memory.x),
        write(memory.dr, residual - memory.residual),
        x,
        residual,
        memory.count + 1,
        memory.inner,
    )


def _extrapolate(memory, x, damping):
    """The iterate whose combined residual is least, and a step along that residual."""
    gram = memory.dr @ memory.dr.T
    ridge = _RIDGE * jnp.finfo(x.dtype).eps * jnp.trace(gram)
    # An unused row is zero: its weight is zero whatever stands on its diagonal.
    ridge = jnp.where(ridge > 0, ridge, 1)
    gram = gram + ridge * jnp.eye(gram.shape[0], dtype=x.dtype)
    weights = jsl.solve(gram, memory.dr @ memory.residual, assume_a="pos")
    step = damping * (memory.residual - weights @ memory.dr) - weights @ memory.dx
    return x + step
