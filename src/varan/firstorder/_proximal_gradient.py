"""Proximal gradient: a gradient step on the smooth part, a proximal step on the rest.

`x <- prox(y - t grad f(y), t)` at `y`, the iterate carried on by its momentum. Without
momentum the objective's error falls like `1 / k`; with it like `1 / k^2`, and, as the
momentum is dropped whenever it points uphill, linearly where the problem is strongly
convex near the solution. On `SetConstrained` the proximal step is the projection, and
the method is projected gradient.

Use it where the proximal operator is cheap and Newton's method is not affordable; the
iterates are sparse or feasible exactly, not in the limit.

Cost: an iteration takes one gradient, one proximal step and, with line search, one
value or more. The condition is looked at once in ten iterations, for one gradient more.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..core import Smooth, Solver, State
from ..core._checks import check_positive
from ..core._trees import tree_square

_SHRINK = 0.5
# The first stepsize tried, in units of what the curvature along one gradient allows.
_BOLD = 4.0
_HALVINGS = 60


class _Memory(eqx.Module):
    y: PyTree[Array]
    theta: Float[Array, ""]
    stepsize: Float[Array, ""]


class ProximalGradient(Solver):
    """Proximal (projected) gradient, accelerated with adaptive restart.

    Args:
        stepsize: Positive, in units of x per unit of gradient: at most the reciprocal
            of the gradient's Lipschitz constant. Left out, a line search finds it.
        accelerate: Nesterov's momentum, dropped where it points uphill.
        iterations: Iterations in one step; the condition is looked at once a step.

    Raises:
        ValueError: If `stepsize` is not positive or `iterations` below 1.
        TypeError: In `solve`, if the problem has no `smooth` and `prox`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.firstorder import ProximalGradient
        >>> from varan.operators import project_nonnegative
        >>> from varan.problems import SetConstrained
        >>> problem = SetConstrained(
        ...     lambda x: jnp.sum((x - jnp.array([1.0, -1.0])) ** 2),
        ...     project_nonnegative,
        ... )
        >>> solve(problem, ProximalGradient(), jnp.ones(2)).x.round(3)
        Array([1., 0.], dtype=float32)

    Source:
        Beck, Teboulle, 2009, "A fast iterative shrinkage-thresholding algorithm for
        linear inverse problems"; restart: O'Donoghue, Candès, 2015 (arXiv 1204.3982).

    Differences:
        The line search begins at the curvature seen along the first gradient; a step
        that the rounding of the values cannot judge is taken.
    """

    stepsize: Float[Array, ""] | float | None = None
    accelerate: bool = eqx.field(static=True, default=True)
    iterations: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        if self.stepsize is not None:
            check_positive("ProximalGradient", "stepsize", self.stepsize)
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(
                "ProximalGradient: `iterations` must be a positive integer (got "
                f"{self.iterations!r})."
            )

    def init(self, problem, start):
        smooth, _ = _parts(problem)
        condition = problem.condition(start)
        dtype = jnp.result_type(*jtu.tree_leaves(start))
        if self.stepsize is None:
            stepsize, work = _first_stepsize(smooth, start), 3
        else:
            stepsize, work = jnp.asarray(self.stepsize, dtype), 1
        memory = _Memory(start, jnp.ones((), dtype), stepsize)
        return State(start, condition, memory, evaluations=work)

    def step(self, problem, state):
        smooth, prox = _parts(problem)

        def iterate(_, carry):
            x, memory = carry
            new, stepsize, lost = self._forward_backward(smooth, prox, memory)
            # Momentum may leave the domain: back to the last iterate.
            new = jtu.tree_map(lambda n, o: jnp.where(lost, o, n), new, x)
            return new, self._momentum(x, new, memory, stepsize, lost)

        x, memory = jax.lax.fori_loop(
            0, self.iterations, iterate, (state.x, state.memory)
        )
        condition = problem.condition(x)
        return State(x, condition, memory, evaluations=self.iterations + 1)

    def _forward_backward(self, smooth, prox, memory):
        """One step from `y`, the stepsize it took, and whether `y` has no value."""
        y, t = memory.y, memory.stepsize
        if self.stepsize is not None:
            return prox(_add(y, jax.grad(smooth)(y), -t), t), t, jnp.asarray(False)
        value, gradient = jax.value_and_grad(smooth)(y)
        noise = 8 * float(np.finfo(t.dtype).eps) * jnp.abs(value)

        def trial(carry):
            t, _, _, count = carry
            new = prox(_add(y, gradient, -t), t)
            move = jtu.tree_map(jnp.subtract, new, y)
            model = value + _dot(gradient, move) + tree_square(move) / (2 * t)
            good = smooth(new) <= model + noise
            return jnp.where(good, t, _SHRINK * t), new, good, count + 1

        def proceed(carry):
            _, _, good, count = carry
            return ~good & (count < _HALVINGS)

        lost = ~jnp.isfinite(value)
        start = (t, y, lost, jnp.asarray(0, jnp.int32))
        t, new, _, _ = jax.lax.while_loop(proceed, trial, start)
        return new, t, lost

    def _momentum(self, x, new, memory, stepsize, lost):
        if not self.accelerate:
            return _Memory(new, memory.theta, stepsize)
        moved = jtu.tree_map(jnp.subtract, new, x)
        uphill = lost | (_dot(jtu.tree_map(jnp.subtract, memory.y, new), moved) > 0)
        theta = (1 + jnp.sqrt(1 + 4 * memory.theta**2)) / 2
        push = jnp.where(uphill, 0, (memory.theta - 1) / theta)
        return _Memory(_add(new, moved, push), jnp.where(uphill, 1, theta), stepsize)


def _parts(problem):
    """The smooth part, and the proximal operator of the rest."""
    if isinstance(problem, Smooth):
        return problem.value, lambda v, stepsize: v
    if not (hasattr(problem, "smooth") and hasattr(problem, "prox")):
        raise TypeError(
            "ProximalGradient: the problem must have `smooth` and `prox`, as Composite "
            f"and SetConstrained do (got {type(problem).__name__})."
        )
    return problem.smooth, problem.prox


def _first_stepsize(smooth, x) -> Float[Array, ""]:
    """From the curvature along the gradient, for two gradients; 1 where it has none."""
    gradient = jax.grad(smooth)(x)
    size = jnp.sqrt(tree_square(gradient))
    scale = jnp.sqrt(tree_square(x))
    # As far as differences of gradients are exact to half the digits.
    length = float(np.sqrt(np.finfo(size.dtype).eps)) * (1 + scale)
    t = length / jnp.where(size > 0, size, 1)
    moved = jax.grad(smooth)(_add(x, gradient, -t))
    change = jnp.sqrt(tree_square(jtu.tree_map(jnp.subtract, moved, gradient)))
    good = (change > 0) & jnp.isfinite(change) & (size > 0)
    return jnp.where(good, _BOLD * length / jnp.where(good, change, 1), 1)


def _add(x, direction, stepsize):
    return jtu.tree_map(
        lambda v, d: v + jnp.asarray(stepsize, v.dtype) * d, x, direction
    )


def _dot(a, b) -> Float[Array, ""]:
    return jnp.asarray(
        sum(
            jnp.sum(u * v)
            for u, v in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True)
        )
    )
