"""Quadratic programs against jaxopt: same instances, same answers and derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Status, solve
from varan.constrained import (
    OSQP,
    BoxCoordinateDescent,
    EqualityQP,
    IterativeRefinement,
    quadratic_program,
)
from varan.problems import Quadratic

jaxopt = pytest.importorskip("jaxopt")

# Its code predates some of JAX's renamings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RNG = np.random.default_rng(0)
HALF, INSIDE = RNG.standard_normal((5, 5)), RNG.standard_normal(5)
Q, C = jnp.asarray(HALF @ HALF.T + np.eye(5)), jnp.asarray(RNG.standard_normal(5))
A, G = (jnp.asarray(RNG.standard_normal((rows, 5))) for rows in (2, 3))
B, H = A @ INSIDE, G @ INSIDE + jnp.array([0.0, 0.1, 0.5])
LOWER, UPPER = -0.1 * jnp.ones(5), 0.2 * jnp.ones(5)


def compare(ours, theirs, *data, atol=1e-5):
    """Answers, and the derivatives of a weighted sum in all data."""
    weight = jnp.arange(1.0, 6.0)
    np.testing.assert_allclose(ours(*data), theirs(*data), atol=atol)
    numbers = range(len(data))
    mine, other = (
        jax.jit(jax.grad(lambda *d, f=f: f(*d) @ weight, tuple(numbers)))(*data)
        for f in (ours, theirs)
    )
    for one, two in zip(mine, other, strict=True):
        if one.shape == (5, 5):  # ours are with respect to the symmetric part
            two = (two + two.T) / 2
        np.testing.assert_allclose(one, two, atol=20 * atol, rtol=1e-3)


def test_equality_constrained():
    peer = jaxopt.EqualityConstrainedQP(tol=1e-10)

    def theirs(Q, c, A, b):
        return peer.run(params_obj=(Q, c), params_eq=(A, b)).params.primal

    def ours(Q, c, A, b):
        problem = Quadratic(Q, c, A=A, b=b)
        return solve(problem, EqualityQP(), problem.start()).x.x

    def qs(Q, c, b):
        return ours((Q + Q.T) / 2, c, A, b)

    compare(qs, lambda Q, c, b: theirs(Q, c, A, b), Q, C, B)
    compare(lambda c, A: ours(Q, c, A, B), lambda c, A: theirs(Q, c, A, B), C, A)


def test_osqp():
    # Its derivative's linear solve stops at three digits, unless told otherwise.
    gmres = partial(jaxopt.linear_solve.solve_gmres, tol=1e-12, maxiter=100)
    peer = jaxopt.OSQP(tol=1e-9, implicit_diff_solve=gmres)

    def theirs(c, b, h):
        return peer.run(
            params_obj=(Q, c), params_eq=(A, b), params_ineq=(G, h)
        ).params.primal

    def ours(c, b, h):
        return quadratic_program(Q, c, A=A, b=b, G=G, h=h).x.x

    compare(ours, theirs, C, B, H)


def test_box_osqp():
    peer = jaxopt.BoxOSQP(tol=1e-9)

    def theirs(c, h):
        free = jnp.full(3, -jnp.inf)
        return peer.run(
            params_obj=(Q, c), params_eq=G, params_ineq=(free, h)
        ).params.primal[0]

    def ours(c, h):
        problem = Quadratic(Q, c, G=G, h=h)
        return solve(problem, OSQP(), problem.start()).x.x

    compare(ours, theirs, C, H)


def test_box_coordinate_descent():
    peer = jaxopt.BoxCDQP(tol=1e-10, maxiter=1000)

    def theirs(c, upper):
        bounds = (LOWER, upper)
        return peer.run(jnp.zeros(5), params_obj=(Q, c), params_ineq=bounds).params

    def ours(c, upper):
        problem = Quadratic(Q, c, lower=LOWER, upper=upper)
        return solve(problem, BoxCoordinateDescent(), problem.start()).x.x

    compare(ours, theirs, C, UPPER)


def test_iterative_refinement():
    import lineax as lx

    peer = jaxopt.IterativeRefinement(tol=1e-12)
    theirs = peer.run(init_params=None, A=Q, b=C).params
    operator = lx.MatrixLinearOperator(Q)
    ours = lx.linear_solve(operator, C, IterativeRefinement()).value
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_infeasible_rows_are_solved_by_neither():
    rows = jnp.concatenate([G, -G[:1]])
    right = jnp.concatenate([H, -H[:1] - 1.0])
    solution = quadratic_program(Q, C, G=rows, h=right)
    assert solution.status == Status.INFEASIBLE
    peer = jaxopt.BoxOSQP(tol=1e-6)
    free = jnp.full(4, -jnp.inf)
    state = peer.run(params_obj=(Q, C), params_eq=rows, params_ineq=(free, right)).state
    assert int(state.status) != jaxopt.BoxOSQP.SOLVED
