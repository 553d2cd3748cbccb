"""L-BFGS-B: limited-memory BFGS between bounds.

Each step has three parts. Along the projected gradient the quadratic model is piecewise
a parabola, and its first minimum, the Cauchy point, decides which bounds are active.
Over the entries that are not, the model is minimised exactly, which the compact form of
BFGS makes a system of twice the memory. Between `x` and that point a line search for
Wolfe's conditions decides how far to go. Every iterate keeps its bounds exactly.

Use it for smooth problems with bounds where Hessians are not affordable. Cost: a step
takes one evaluation of value and gradient (more where the first trial is refused), a
sort, and `O(m^2 n)` flops with a memory of `m`.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from ..core import Solver, State, Status
from ..problems import BoxConstrained
from ._hager_zhang import search

_MAX_TRIALS = 30


class _Memory(eqx.Module):
    value: Float[Array, ""]
    gradient: Float[Array, " n"]
    # Steps and the gradient's changes, the latest last, each pair scaled to a product
    # of one; unused rows are zero.
    steps: Float[Array, "m n"]
    changes: Float[Array, "m n"]
    count: Int[Array, ""]


class LBFGSB(Solver):
    """L-BFGS-B for `BoxConstrained` problems.

    Statuses: `STALLED` where not even a step along the projected gradient gains.

    Args:
        history: Pairs of steps and gradient changes that are remembered.

    Raises:
        ValueError: If `history` is not a positive integer.
        TypeError: In `solve`, if the problem is no `BoxConstrained`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.problems import BoxConstrained
        >>> from varan.secondorder import LBFGSB
        >>> problem = BoxConstrained(lambda x: jnp.sum(jnp.cosh(x - 2.0)), -1.0, 1.0)
        >>> solve(problem, LBFGSB(), jnp.zeros(2)).x
        Array([1., 1.], dtype=float32)

    Source:
        Byrd, Lu, Nocedal, Zhu, 1995, "A limited memory algorithm for bound constrained
        optimization"; the projection of the subspace minimum: Morales, Nocedal, 2011,
        "Remark on algorithm 778".

    Differences:
        The model's values at all breakpoints are computed at once, by sums that run
        along the sorted entries, instead of one breakpoint after the other: the same
        point, without an inner loop. The line search is Hager and Zhang's. A direction
        that does not descend clears the memory.
    """

    history: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        if not isinstance(self.history, int) or self.history < 1:
            raise ValueError(
                f"LBFGSB: `history` must be a positive integer (got {self.history!r})."
            )

    def init(self, problem, start):
        if not isinstance(problem, BoxConstrained):
            raise TypeError(
                "LBFGSB: the problem must be a BoxConstrained (got "
                f"{type(problem).__name__}). Without bounds use optax.lbfgs."
            )
        start = problem.prox(start)
        value, gradient = jax.value_and_grad(problem.value)(start)
        flat = ravel_pytree(gradient)[0]
        rows = jnp.zeros((self.history, flat.size), flat.dtype)
        memory = _Memory(
            jnp.asarray(value, flat.dtype),
            flat,
            rows,
            rows,
            jnp.zeros((), jnp.int32),
        )
        return State(start, problem.condition_with(start, gradient), memory)

    def step(self, problem: Any, state):
        memory: _Memory = state.memory
        x, unravel = ravel_pytree(state.x)
        lower, upper = (ravel_pytree(bound)[0] for bound in problem.bounds(state.x))

        def evaluate(v):
            inside = jnp.clip(v, lower, upper)  # against the rounding of x + t d
            value, gradient = jax.value_and_grad(problem.value)(unravel(inside))
            return jnp.asarray(value, x.dtype), ravel_pytree(gradient)[0]

        g = memory.gradient
        model = _Model.make(memory)
        target = _subspace_minimum(model, x, g, lower, upper)
        direction = target - x
        sound = (direction @ g < 0) & (memory.count > 0)
        plain = jnp.clip(x - g, lower, upper) - x
        direction = jnp.where(sound, direction, plain)
        # Of the first step only the direction is known.
        length = jnp.sqrt(jnp.sum(direction * direction))
        first = jnp.where(sound, 1, 1 / jnp.maximum(length, 1))
        found = search(
            evaluate,
            x,
            direction,
            memory.value,
            g,
            first,
            furthest=_room(x, direction, lower, upper),
            max_steps=_MAX_TRIALS,
        )
        new = jnp.clip(x + found.t * direction, lower, upper)
        moved = found.t > 0
        kept = _remember(memory, sound & moved, new - x, found)
        status = jnp.where(sound | moved, Status.RUNNING, Status.STALLED)
        condition = problem.condition_with(unravel(new), unravel(found.gradient))
        return State(
            unravel(new),
            condition,
            kept,
            evaluations=found.count,
            status=status,
        )


class _Model(eqx.Module):
    """BFGS's matrix as `theta I + Y'Y - G'G`, with 2m rows `V` of signs `signs`.

    The compact form's middle matrix, factorised once into the rows: with pairs of
    product one, `G = C^-1 (theta S + L Y)`, where L is the lower part of `S Y'` and
    `C C' = theta S S' + L L'`.
    """

    theta: Float[Array, ""]
    V: Float[Array, "2m n"]
    signs: Float[Array, " 2m"]

    @staticmethod
    def make(memory: _Memory) -> _Model:
        S, Y = memory.steps, memory.changes
        m = S.shape[0]
        square = jnp.sum(Y[-1] * Y[-1])
        theta = jnp.where(square > 0, square, 1)  # y'y / s'y, where s'y is one
        used = jnp.arange(m, dtype=jnp.int32) >= m - memory.count
        L = jnp.tril(S @ Y.T, -1)
        # An unused row is zero: what stands on its diagonal reaches nothing.
        middle = theta * (S @ S.T) + L @ L.T + jnp.diag(jnp.where(used, 0, theta))
        factor = jnp.linalg.cholesky(middle, symmetrize_input=False)
        G = jax.lax.linalg.triangular_solve(
            factor, theta * S + L @ Y, left_side=True, lower=True
        )
        signs = jnp.concatenate([jnp.ones_like(S[:, 0]), -jnp.ones_like(S[:, 0])])
        return _Model(theta, jnp.concatenate([Y, G]), signs)


def _subspace_minimum(model, x, g, lower, upper):
    """Where the model is least over the face that the Cauchy point lies in."""
    cauchy, free = _cauchy_point(model, x, g, lower, upper)
    theta, V, signs = model.theta, model.V, model.signs
    residual = g + theta * (cauchy - x) + (signs * (V @ (cauchy - x))) @ V
    residual = jnp.where(free, residual, 0)
    face = jnp.where(free[None, :], V, 0)
    # Sherman, Morrison and Woodbury, on the face.
    weights = jnp.linalg.solve(jnp.diag(theta * signs) + face @ face.T, face @ residual)
    step = -(residual - weights @ face) / theta
    # Projected, the minimum mostly still descends; else the step ends at the face's
    # boundary (Morales and Nocedal).
    projected = jnp.clip(cauchy + step, lower, upper)
    share = jnp.minimum(_room(cauchy, step, lower, upper), 1)
    cut = jnp.clip(cauchy + share * step, lower, upper)
    return jnp.where((projected - x) @ g < 0, projected, cut)


def _cauchy_point(model, x, g, lower, upper):
    """The model's first minimum along the projected gradient, and who is free there.

    Entry i stops at `times[i]`. From one breakpoint to the next, in sorted order, the
    direction `d` loses an entry; all that the model's slope and curvature need are sums
    over the entries that still move.
    """
    distance = jnp.where(g > 0, x - lower, x - upper)
    times = jnp.where(g == 0, jnp.inf, distance / jnp.where(g == 0, 1, g))
    d = jnp.where(times > 0, -g, 0)
    order = jnp.argsort(times)
    ends = times[order]
    begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])
    ends = jnp.concatenate([ends, jnp.full_like(ends[:1], jnp.inf)])
    reached = jnp.isfinite(begins)
    begins = jnp.where(reached, begins, 0)
    lengths = jnp.where(jnp.isfinite(ends), ends - begins, 0)

    moving = d[order]
    # V d and d'd, segment by segment.
    rows = jnp.concatenate([model.V[:, order], moving[None, :]]) * moving[None, :]
    sums = _tail_sums(rows)
    p, square = sums[:-1], sums[-1]
    along = p * lengths[None, :]
    c = jnp.cumsum(along, axis=1) - along  # V (x(t) - x), where each segment begins
    signed = model.signs[:, None] * p
    slope = -square + model.theta * begins * square + jnp.sum(signed * c, axis=0)
    bend = model.theta * square + jnp.sum(signed * p, axis=0)
    # The model is convex: less than this is rounding.
    least = float(np.finfo(x.dtype).eps) * model.theta * square
    bend = jnp.maximum(bend, jnp.where(least > 0, least, 1))
    stop = begins + jnp.maximum(-slope / bend, 0)
    here = jnp.argmax(((slope >= 0) | (stop < ends)) & reached)
    t = stop[here]
    point = jnp.clip(x + jnp.minimum(times, t) * d, lower, upper)
    bound = jnp.where(g > 0, lower, upper)
    fixed = times <= t
    point = jnp.where(fixed & (times > 0), bound, point)
    return point, ~fixed & (point > lower) & (point < upper)


def _tail_sums(rows):
    """Sums from each entry to the end, and the empty one."""
    sums = jnp.cumsum(rows[:, ::-1], axis=1)[:, ::-1]
    return jnp.concatenate([sums, jnp.zeros_like(rows[:, :1])], axis=1)


def _room(x, direction, lower, upper):
    """How far one can go before a bound; at least one, where one was feasible."""
    distance = jnp.where(direction > 0, upper - x, lower - x)
    still = direction == 0
    return jnp.min(jnp.where(still, jnp.inf, distance / jnp.where(still, 1, direction)))


def _remember(memory, keep, s, found):
    """Adds a pair, if its curvature is positive; without `keep`, begins anew."""
    y = found.gradient - memory.gradient
    product = s @ y
    tiny = float(np.finfo(s.dtype).eps)
    sound = product > tiny * (y @ y) * 1e-1
    scale = jnp.where(sound, 1 / jnp.sqrt(jnp.where(sound, product, 1)), 0)

    def push(rows, row):
        rows = jnp.where(keep, rows, 0)
        added = jnp.concatenate([rows[1:], (scale * row)[None, :]])
        return jnp.where(sound, added, rows)

    m = memory.steps.shape[0]
    count = jnp.where(keep, memory.count, 0) + sound.astype(jnp.int32)
    return _Memory(
        found.value,
        found.gradient,
        push(memory.steps, s),
        push(memory.changes, y),
        jnp.minimum(count, m),
    )
