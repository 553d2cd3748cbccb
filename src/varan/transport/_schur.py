"""The Newton system of entropic transport, eliminated to one side of the plan.

The Hessian of the dual is `[[diag r, P], [P', diag c]] / epsilon` with `r`, `c` the
marginals of `P`. Eliminating the longer side leaves the Schur complement
`S = diag r - P diag(1/c) P'`, symmetric, positive semidefinite with null vector 1: the
Laplacian of a graph. A rank-one term fixes the null vector and changes no solution with
a consistent right-hand side. Assembly takes `m m n` and Cholesky `m^3 / 3`
multiplications, with `m` the shorter side.
"""

from __future__ import annotations

import jax.numpy as jnp
import jax.scipy.linalg as jsl
import lineax as lx
from jaxtyping import Array, Float

from ._problem import EntropicTransport


def factorise(plan: Float[Array, "m n"], rows, columns):
    """Cholesky factor of the Schur complement, with its null vector filled in."""
    matrix = jnp.diag(rows) - (plan / columns[None, :]) @ plan.T
    # `rows rows'` on the null direction: of the size of the other eigenvalues.
    matrix = matrix + rows[:, None] * rows[None, :]
    # Cancellation may leave a pivot of a nearly isolated row below zero.
    slack = 4 * jnp.finfo(plan.dtype).eps
    return jsl.cho_factor(matrix + jnp.diag(slack * rows), lower=True)[0]


def apply_inverse(factor, vector):
    """Solves with the factor."""
    return jsl.cho_solve((factor, True), vector)


class DualHessian(lx.AbstractLinearSolver):
    """Solves linear systems with the condition's Jacobian by the Schur complement.

    A lineax solver that knows its problem, for `varan.core.implicit_root`: the
    derivative of an entropic plan costs one (m, m) Cholesky factorisation with `m` the
    shorter side, not one of (m + n, m + n).
    """

    problem: EntropicTransport
    x: tuple[Float[Array, " m"], Float[Array, " n"]]

    def init(self, operator, options):
        del operator, options
        plan = self.problem.plan(self.x)
        short = plan if plan.shape[0] <= plan.shape[1] else plan.T
        return plan, factorise(short, short.sum(1), short.sum(0))

    def compute(self, state, vector, options):
        del options
        plan, factor = state
        a, b, epsilon = self.problem.a, self.problem.b, self.problem.epsilon
        upper, lower = vector[: a.size], vector[a.size :]
        # The gauge's share of the right-hand side; what is left is consistent.
        level = (jnp.sum(upper) - jnp.sum(lower)) / 2
        upper = epsilon * (upper - level * a)
        lower = epsilon * (lower + level * b)
        if a.size <= b.size:
            df, dg = _eliminate(plan, factor, upper, lower)
        else:
            dg, df = _eliminate(plan.T, factor, lower, upper)
        shift = (epsilon * level - a @ df + b @ dg) / 2
        answer = jnp.concatenate([df + shift, dg - shift])
        return answer, lx.RESULTS.successful, {}

    def transpose(self, state, options):
        return state, options

    def conj(self, state, options):
        return state, options

    def assume_full_rank(self):
        return True


def _eliminate(plan, factor, upper, lower):
    columns = plan.sum(0)
    df = apply_inverse(factor, upper - plan @ (lower / columns))
    return df, (lower - df @ plan) / columns
