"""Proximal point: the implicit step `z <- (I + a (F + G))^-1 z`.

It converges with any step for monotone operators, and for `rho`-negatively comonotone
ones with `a > 2 rho`, where explicit methods fail: every other method of this topic is
an approximation of it. The step is itself a nonlinear system,

    y - J(z - a F(y)) = 0,

solved here by Newton's method on the active piece of `J`: exactly in one iteration
where `F` is affine and there is no `G`. An iteration costs one call and `n`
Jacobian-vector products (dense, to 512 unknowns) or those of GMRES (above); all of them
count as evaluations, so that a step is rarely cheap.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from ..core._checks import check_positive
from ..core._solver import Solver, State
from ..core._status import Status
from ._game import as_game

_DENSE = 512
_SHORTEST = 1e-3
_RESTART = 20  # Krylov vectors of one cycle of GMRES


class ProximalPoint(Solver):
    """Proximal point with inner Newton steps.

    After N steps on a `rho`-negatively comonotone operator `||F||^2` is at most
    `||z_0 - z*||^2 / (a (a - 2 rho) N)`.

    Args:
        stepsize: `a`, positive; see `comonotone_steps` for the least one.
        max_inner: Newton trials of one step at most.

    Raises:
        ValueError: If a setting is not positive. A step whose inner iterations do not
            converge ends the run `STALLED`: the step is too long for the operator to be
            inverted from where it stands.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.games import ProximalPoint, bilinear_game
        >>> start = (jnp.ones(2), jnp.ones(2))
        >>> game = bilinear_game(jnp.eye(2))
        >>> bool(solve(game, ProximalPoint(10.0), start).converged)
        True

    Source:
        Martinet, 1970; Rockafellar, 1976; beyond monotonicity: Gorbunov, Taylor,
        Horvath and Gidel, 2023 (arXiv 2210.13831), the theorem on proximal point.
    """

    stepsize: float | Float[Array, ""]
    max_inner: int = eqx.field(static=True, default=100)

    def __check_init__(self):
        check_positive("ProximalPoint", "stepsize", self.stepsize)
        check_positive("ProximalPoint", "max_inner", self.max_inner)

    def init(self, problem, start):
        game = as_game(problem)
        condition = game.condition_with(start, game.apply(start))
        return State(start, condition, evaluations=game.cost)

    def step(self, problem, state):
        game = as_game(problem)
        y, force, gap, calls = _implicit(game, state.x, self.stepsize, self.max_inner)
        condition = game.condition_with(y, force)
        z = ravel_pytree(state.x)[0]
        near = float(np.sqrt(np.finfo(z.dtype).eps))
        solved = gap <= near * (1 + jnp.linalg.norm(z))
        status: Any = jnp.where(solved, Status.RUNNING, Status.STALLED)
        cost: Any = calls * game.cost
        return State(y, condition, evaluations=cost, status=status)


@eqx.filter_jit  # steps outside of `solve` share its compilation
def _implicit(game, x, stepsize, max_inner):
    """The implicit step, `F` there, the gap left in its equation, evaluations."""
    z, unravel = ravel_pytree(x)
    size = jnp.asarray(stepsize, z.dtype)

    def gap(y):
        """The equation at `y`, and `F(y)`."""
        force = ravel_pytree(game.apply(unravel(y)))[0]
        back = ravel_pytree(game.backward(unravel(z - size * force), size))[0]
        return y - back, force

    end = _newton(gap, z, max_inner)
    return unravel(end.y), unravel(end.force), end.size, end.calls


class _Inner(eqx.Module):
    y: Float[Array, " n"]
    gap: Float[Array, " n"]
    force: Float[Array, " n"]
    size: Float[Array, ""]
    length: Float[Array, ""]  # of the next Newton step, at most 1
    calls: Int[Array, ""]
    count: Int[Array, ""]


def _newton(function: Any, start, max_inner) -> _Inner:
    """Newton's method; a step that does not lower the norm is halved.

    Between the pieces of a projection the norm may have a local minimum: a step that
    has become too short is taken all the same, to another piece.
    """
    eps = float(np.finfo(start.dtype).eps)
    target = 10 * eps * (1 + jnp.linalg.norm(start))

    def proceed(inner):
        return (inner.size > target) & (inner.count < max_inner)

    def advance(inner):
        direction, products = _linear_solve(
            lambda y: function(y)[0], inner.y, inner.gap
        )
        y = inner.y - inner.length * direction
        gap, force = function(y)
        size = jnp.linalg.norm(gap)
        taken = (size < inner.size) | (inner.length < _SHORTEST)

        def pick(new, old):
            return jnp.where(taken, new, old)

        return _Inner(
            pick(y, inner.y),
            pick(gap, inner.gap),
            pick(force, inner.force),
            pick(size, inner.size),
            pick(jnp.ones_like(inner.length), inner.length / 2),
            inner.calls + products + 1,
            inner.count + 1,
        )

    gap, force = function(start)
    zero = jnp.zeros((), jnp.int32)
    one = jnp.ones((), start.dtype)
    first = _Inner(start, gap, force, jnp.linalg.norm(gap), one, zero + 1, zero)
    return jax.lax.while_loop(proceed, advance, first)


def _linear_solve(function, point, vector):
    """Solves with the Jacobian; also how many of its products that took."""
    if point.size <= _DENSE:
        return jnp.linalg.solve(jax.jacfwd(function)(point), vector), point.size
    import lineax as lx

    _, product = jax.linearize(function, point)
    operator = lx.FunctionLinearOperator(product, jax.eval_shape(lambda: point))
    tight = float(np.finfo(point.dtype).eps) ** 0.75
    method = lx.GMRES(tight, tight, restart=_RESTART)
    answer = lx.linear_solve(operator, vector, method, throw=False)
    products = jnp.asarray(answer.stats["num_steps"], jnp.int32) * (_RESTART + 1)
    return answer.value, products
