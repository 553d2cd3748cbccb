"""Newton's method for smooth minimisation: dense, and by conjugate gradients.

Each step minimises the regularised model `g'd + d'(H + mu I)d / 2` and tries `x + d`.
The trial is accepted when the objective falls by a fraction of what the model
predicts; else the damping `mu` grows, as in Levenberg and Marquardt's rule. A trial
costs one value and gradient, which is also what the stopping test needs: nothing is
evaluated twice. With `mu = 0`, where it starts and where it returns when the model is
good, convergence is quadratic (dense) or as fast as the forcing sequence (CG).

When to use: smooth problems whose Hessian is affordable (`Newton`, up to a few hundred
unknowns) or whose Hessian-vector products are (`NewtonCG`). Where only gradients are
affordable take `optax.lbfgs()` or `optimistix.LBFGS`.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ._problem import Problem, objective_of
from ._solver import Solver, State

# Accept at a hundredth of a percent of the predicted decrease (Armijo's usual
# constant); trust the model above three quarters of it (Conn, Gould and Toint).
_ACCEPT, _GOOD = 1e-4, 0.75
_SHRINK, _GROW = 0.1, 8.0
# First damping after a failure, relative to the size of the Hessian.
_FIRST = 1e-3


class _Memory(eqx.Module):
    value: Float[Array, ""]
    damping: Float[Array, ""]


class Newton(Solver):
    """Damped Newton with a dense Cholesky factorisation.

    A step costs one value and gradient, one Hessian (n Hessian-vector products) and
    n^3 / 3 flops; the evaluations it reports count n + 1.

    For problems with an objective `value` (such as `Smooth`), convex or not.

    Raises:
        TypeError: If the problem has no objective.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import Newton, Smooth, solve
        >>> problem = Smooth(lambda x: jnp.sum(jnp.cosh(x - 1.0)))
        >>> solve(problem, Newton(), jnp.zeros(2)).x.round(3)
        Array([1., 1.], dtype=float32)

    Source:
        Levenberg, 1944; Marquardt, 1963; Conn, Gould and Toint, 2000,
        "Trust-Region Methods", section 6.1.
    """

    def init(self, problem, start):
        return _first_state(self, problem, start)

    def step(self, problem, state):
        x, unravel = ravel_pytree(state.x)
        gradient = ravel_pytree(state.condition)[0]
        damping = state.memory.damping

        def condition(v):
            return ravel_pytree(problem.condition(unravel(v)))[0]

        hessian = jax.jacfwd(condition)(x)
        # A Hessian that is not positive definite gives NaN here; the trial is then
        # refused and the damping grows.
        factor = jnp.linalg.cholesky(
            hessian + damping * jnp.eye(x.size, dtype=x.dtype), symmetrize_input=False
        )
        half = jax.lax.linalg.triangular_solve(
            factor, gradient[:, None], left_side=True, lower=True
        )
        direction = -jax.lax.linalg.triangular_solve(
            factor, half, left_side=True, lower=True, transpose_a=True
        ).squeeze(-1)
        size = jnp.mean(jnp.abs(jnp.diagonal(hessian)))
        return _try_step(problem, state, direction, size, x.size + 1)


class NewtonCG(Solver):
    """Inexact Newton: the system is solved by conjugate gradients, matrix-free.

    The inner iteration stops at a residual of `min(1/2, sqrt(|g|)) |g|`, relative to
    the first gradient's norm, so that convergence is superlinear without
    over-solving, and at the first direction of nonpositive curvature. A step costs
    one value and gradient and one Hessian-vector product (about two gradients, shared
    linearisation) per inner iteration; the evaluations it reports count all of them.

    For problems with an objective `value` (such as `Smooth`), convex or not.

    Args:
        max_inner: Limit of inner iterations a step; default: the number of unknowns.

    Raises:
        TypeError: If the problem has no objective.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import NewtonCG, Smooth, solve
        >>> problem = Smooth(lambda x: jnp.sum(jnp.cosh(x - 1.0)))
        >>> solve(problem, NewtonCG(), jnp.zeros(2)).x.round(3)
        Array([1., 1.], dtype=float32)

    Source:
        Dembo, Eisenstat and Steihaug, 1982; Nocedal and Wright, 2006, algorithm 7.1.
    """

    max_inner: int | None = None

    def init(self, problem, start):
        return _first_state(self, problem, start)

    def step(self, problem, state):
        x, unravel = ravel_pytree(state.x)
        gradient = ravel_pytree(state.condition)[0]

        def condition(v):
            return ravel_pytree(problem.condition(unravel(v)))[0]

        _, product = jax.linearize(condition, x)
        damping = state.memory.damping
        norm = jnp.linalg.norm(gradient)
        target = jnp.minimum(0.5, jnp.sqrt(norm)) * norm
        limit = x.size if self.max_inner is None else self.max_inner
        direction, curvature, count = _conjugate_gradients(
            lambda v: product(v) + damping * v, gradient, target, limit
        )
        return _try_step(problem, state, direction, curvature, count + 1)


def _conjugate_gradients(product, gradient, target, limit):
    """Solves `A d = -gradient` to `target`; stops at nonpositive curvature.

    Returns the direction (never zero: at once nonpositive curvature gives the
    negative gradient), the largest Rayleigh quotient met, and the products used.
    """

    def proceed(carry):
        _, _, _, square, _, count, convex = carry
        return (square > target**2) & (count < limit) & convex

    def advance(carry):
        d, r, p, square, largest, count, _ = carry
        Ap = product(p)
        quotient = jnp.vdot(p, Ap)
        convex = quotient > 0
        length = jnp.where(convex, square / jnp.where(convex, quotient, 1), 0)
        length = jnp.where(~convex & (count == 0), 1, length)
        r = r - length * Ap
        new = jnp.vdot(r, r)
        largest = jnp.maximum(largest, jnp.abs(quotient) / jnp.vdot(p, p))
        return (
            d + length * p,
            r,
            r + (new / square) * p,
            new,
            largest,
            count + 1,
            convex,
        )

    zero, one = jnp.zeros_like(gradient), jnp.asarray(True)
    square = jnp.vdot(gradient, gradient)
    start = (zero, -gradient, -gradient, square, jnp.zeros_like(square), 0, one)
    d, _, _, _, largest, count, _ = jax.lax.while_loop(proceed, advance, start)
    return d, largest, count


def _first_state(solver, problem: Problem, start) -> State:
    objective = objective_of(problem)
    if objective is None:
        raise TypeError(
            f"{type(solver).__name__}: the problem must have an objective `value`, as "
            f"Smooth has (got {type(problem).__name__}). For a root use "
            "optimistix.Newton."
        )
    value = objective(start)
    memory = _Memory(value, jnp.zeros_like(value))
    return State(start, problem.condition(start), memory)


def _try_step(problem: Any, state: State, direction, size, evaluations) -> State:
    """Evaluates the trial once, and accepts it or raises the damping."""
    _, unravel = ravel_pytree(state.x)
    gradient = ravel_pytree(state.condition)[0]
    damping, value = state.memory.damping, state.memory.value
    trial = jtu.tree_map(jnp.add, state.x, unravel(direction))
    # XLA shares the forward pass of the two.
    trial_value, trial_condition = problem.value(trial), problem.condition(trial)
    slope = -jnp.vdot(gradient, direction)
    predicted = (slope + damping * jnp.vdot(direction, direction)) / 2
    ratio = (value - trial_value) / predicted
    accept = (predicted > 0) & (ratio >= _ACCEPT)
    # Near the solution the decrease drowns in rounding of the objective, while the
    # gradient still tells progress.
    eps = np.finfo(gradient.dtype).eps
    blind = jnp.abs(value - trial_value) <= 4 * eps * jnp.abs(value)
    trial_gradient = ravel_pytree(trial_condition)[0]
    fell = jnp.vdot(trial_gradient, trial_gradient) < jnp.vdot(gradient, gradient)
    accept = accept | (blind & fell)

    def choose(new, old):
        return jtu.tree_map(lambda n, o: jnp.where(accept, n, o), new, old)

    first = _FIRST * jnp.where(jnp.isfinite(size) & (size > 0), size, 1)
    eased = jnp.where(damping > eps * size, _SHRINK * damping, 0)
    kept = jnp.where((ratio > _GOOD) | blind, eased, damping)
    raised = jnp.maximum(_GROW * damping, first)
    return State(
        choose(trial, state.x),
        choose(trial_condition, state.condition),
        _Memory(choose(trial_value, value), jnp.where(accept, kept, raised)),
        evaluations=evaluations,
    )
