"""Broyden's method for systems of equations: Newton without a Jacobian.

The inverse Jacobian is kept as the identity plus rank-one corrections, each of which
makes the last step's secant equation hold. Near a root with a regular Jacobian the
convergence is superlinear. A derivative-free line search lets the residual's norm grow
only by a summable amount, so that the run cannot oscillate.

Use it where the function is dear and its Jacobian dearer; with Jacobian-vector products
at hand, `optimistix.Newton` needs fewer steps. Cost: one evaluation a step and
`O(history n)`.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from ..core import Solver, State
from ..core._control import when

# Sufficient decrease and the allowed growth's first share (Li and Fukushima).
_DECREASE = 1e-4
_GROWTH = 0.5
_HALVINGS = 20
# The cosine below which the slope along the value says nothing of the scale.
_FLAT = 1e-3


class _Memory(eqx.Module):
    # The corrections `u v'` of the inverse Jacobian, one a row; unused rows are zero.
    u: Float[Array, "m n"]
    v: Float[Array, "m n"]
    count: Int[Array, ""]
    # The first inverse Jacobian, as a multiple of the identity.
    scale: Float[Array, ""]
    steps: Int[Array, ""]


class Broyden(Solver):
    """Broyden's good method with limited memory and a line search.

    Works on the condition itself: `Root`, `FixedPoint`, or any problem whose condition
    is an equation in as many unknowns.

    The first inverse Jacobian is a multiple of the identity: the one that fits the
    function's slope along its own value best.

    Args:
        history: Corrections kept. When they are full, or the line search finds no
            decrease, the method begins anew from where it is.

    Raises:
        ValueError: If `history` is not a positive integer.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import Root, solve
        >>> from varan.secondorder import Broyden
        >>> problem = Root(lambda x: jnp.stack([x[0] ** 2 - x[1], x[1] + x[0] - 2.0]))
        >>> solve(problem, Broyden(), jnp.array([0.5, 0.5]), tol=1e-5).x.round(3)
        Array([1., 1.], dtype=float32)

    Source:
        Broyden, 1965; limited memory: Kelley, 1995, "Iterative methods for linear and
        nonlinear equations", section 7.3; line search: Li, Fukushima, 2000.
    """

    history: int = eqx.field(static=True, default=20)

    def __check_init__(self):
        if not isinstance(self.history, int) or self.history < 1:
            raise ValueError(
                f"Broyden: `history` must be a positive integer (got {self.history!r})."
            )

    def init(self, problem, start):
        x = ravel_pytree(start)[0]
        rows = jnp.zeros((self.history, x.size), x.dtype)
        # Full: the first step begins anew, as a later one may.
        full = jnp.asarray(self.history, jnp.int32)
        zero = jnp.asarray(0, jnp.int32)
        memory = _Memory(rows, rows, full, jnp.ones((), x.dtype), zero)
        return State(start, problem.condition(start), memory)

    def step(self, problem, state):
        x, unravel = ravel_pytree(state.x)
        f, pull = ravel_pytree(state.condition)

        def evaluate(x):
            return ravel_pytree(problem.condition(unravel(x)))[0]

        full = state.memory.count >= self.history
        memory = when(full, lambda memory: _anew(evaluate, x, f, memory), state.memory)
        direction = -_apply(memory, f)
        growth = _GROWTH / (1 + memory.steps.astype(x.dtype)) ** 2
        new, f_new, good, tried = _search(evaluate, x, f, direction, growth)
        memory = _update(memory, new - x, f_new - f, ~good)
        work = tried + full.astype(jnp.int32)
        return State(unravel(new), pull(f_new), memory, evaluations=work)


def _anew(evaluate, x, f, memory):
    """No corrections, and the scale whose secant along `f` is best."""
    _, slope = jax.jvp(evaluate, (x,), (f,))
    square = slope @ slope
    scale = (slope @ f) / jnp.where(square > 0, square, 1)
    # A function that is flat along its value, or turns at a right angle to it.
    sound = jnp.abs(scale) * jnp.sqrt(square) > _FLAT * jnp.linalg.norm(f)
    return _Memory(
        jnp.zeros_like(memory.u),
        jnp.zeros_like(memory.v),
        jnp.zeros_like(memory.count),
        jnp.where(sound, scale, 1),
        memory.steps,
    )


def _apply(memory, vector):
    return memory.scale * vector + (memory.v @ vector) @ memory.u


def _apply_transposed(memory, vector):
    return memory.scale * vector + (memory.u @ vector) @ memory.v


def _search(evaluate, x, f, direction, growth):
    """Halves the step until the norm falls, up to the allowed growth."""
    norm = jnp.linalg.norm(f)
    square = direction @ direction

    def trial(carry):
        t, _, _, _, count = carry
        new = x + t * direction
        f_new = evaluate(new)
        bound = (1 + growth) * norm - _DECREASE * t * t * square
        good = jnp.linalg.norm(f_new) <= bound
        return t / 2, new, f_new, good, count + 1

    def proceed(carry):
        _, _, _, good, count = carry
        return ~good & (count < _HALVINGS)

    start = (
        jnp.ones_like(norm),
        x,
        f,
        jnp.asarray(False),
        jnp.asarray(0, jnp.int32),
    )
    _, new, f_new, good, count = jax.lax.while_loop(proceed, trial, start)
    return new, f_new, good, count


def _update(memory, s, y, failed):
    """Sherman and Morrison: the correction after which the inverse maps `y` to `s`."""
    moved = _apply(memory, y)
    denominator = s @ moved
    size = jnp.linalg.norm(s) * jnp.linalg.norm(moved)
    # A step orthogonal to its image carries no secant that the inverse could keep.
    sound = jnp.abs(denominator) > jnp.finfo(s.dtype).eps * size
    u = (s - moved) / jnp.where(sound, denominator, 1)
    v = jnp.where(sound, _apply_transposed(memory, s), 0)

    def write(rows, row):
        return jax.lax.dynamic_update_index_in_dim(rows, row, memory.count, 0)

    full = jnp.asarray(memory.u.shape[0], jnp.int32)
    count = jnp.where(failed, full, memory.count + 1)
    return _Memory(
        write(memory.u, u), write(memory.v, v), count, memory.scale, memory.steps + 1
    )
