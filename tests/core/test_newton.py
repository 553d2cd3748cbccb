"""Newton and Newton-CG: convex and not, quadratic rates, honest failures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Newton, NewtonCG, Root, Smooth, Status, solve
from varan.testing import Case, contract


def logistic_loss(w, X, y, lam):
    return jnp.mean(jax.nn.softplus(-y * (X @ w))) + 0.5 * lam * w @ w


def logistic(seed):
    rng = np.random.default_rng(seed)
    X, y = rng.standard_normal((8, 3)), np.sign(rng.standard_normal(8))
    return Smooth(logistic_loss, jnp.asarray(X), jnp.asarray(y), 0.2, convex=True)


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


MOTIONS = {"shift", "scale", "permutation", "reflection"}
PROBLEMS = (logistic(0), logistic(1))
CASES = [
    Case(Newton, PROBLEMS, jnp.zeros(3), tags=MOTIONS, name="Newton"),
    Case(NewtonCG, PROBLEMS, jnp.zeros(3), tags=MOTIONS, name="NewtonCG"),
]
test_contract = contract(CASES)

BOTH = pytest.mark.parametrize("solver", [Newton(), NewtonCG()], ids=["dense", "cg"])


@BOTH
def test_rosenbrock_from_far_through_indefinite_hessians(solver):
    start = jnp.asarray([-1.2, 1.0, -1.2, 1.0])
    end = solve(Smooth(rosenbrock), solver, start, tol=1e-9, max_steps=200)
    assert end.converged
    # Four variables have a second minimiser, near (-0.776, 0.613, 0.382, 0.146).
    assert rosenbrock(end.x) < 1e-12 or abs(end.x[0] + 0.776) < 1e-2
    hessian = jax.hessian(rosenbrock)(end.x)
    assert np.all(np.linalg.eigvalsh(hessian) > 0)


def test_dense_newton_converges_quadratically():
    end = solve(logistic(0), Newton(), jnp.zeros(3), tol=1e-13)
    assert end.converged and end.steps <= 7
    residual = np.asarray(end.trace.residual[: int(end.steps) + 1])
    near = residual[:-1] < 1e-2
    assert np.any(near)
    assert np.all(residual[1:][near] <= 10 * residual[:-1][near] ** 2 + 1e-15)


def test_one_step_solves_a_quadratic():
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((4, 4))
    matrix, vector = jnp.asarray(factor @ factor.T + np.eye(4)), jnp.ones(4)
    problem = Smooth(lambda x, A, b: 0.5 * x @ A @ x - b @ x, matrix, vector)
    end = solve(problem, Newton(), 10 * jnp.ones(4), tol=1e-9)
    assert end.converged and end.steps == 1
    # A value and gradient a trial and n Hessian-vector products.
    assert end.evaluations == 1 + (4 + 1)


@BOTH
def test_a_saddle_is_not_called_a_solution_of_another_kind(solver):
    """Started beside a saddle it leaves; f = x^2 - y^2 + y^4 / 2 has minima y = +-1."""
    problem = Smooth(lambda v: v[0] ** 2 - v[1] ** 2 + 0.5 * v[1] ** 4)
    end = solve(problem, solver, jnp.asarray([1.0, 1e-3]), tol=1e-9)
    assert end.converged
    assert abs(abs(end.x[1]) - 1) < 1e-8


@BOTH
def test_unbounded_below_never_converges(solver):
    end = solve(Smooth(lambda x: jnp.sum(x) - jnp.sum(x**2)), solver, jnp.zeros(2))
    assert not end.converged
    assert end.status in (Status.DIVERGED, Status.STEP_LIMIT, Status.STALLED)


@BOTH
def test_needs_an_objective(solver):
    with pytest.raises(TypeError, match=r"must have an objective `value`.*got Root"):
        solve(Root(lambda x: x), solver, jnp.ones(2))


def test_tolerance_beyond_reach_is_stalled_soon():
    for solver in (Newton(), NewtonCG()):
        end = solve(logistic(0), solver, jnp.zeros(3), tol=1e-30, max_steps=100_000)
        assert end.status == Status.STALLED or end.residual == 0
        assert end.steps < 300


def test_ill_conditioned_quartic_in_float32():
    problem = Smooth(lambda x: jnp.sum(jnp.asarray([1, 1e3], x.dtype) * x**4))
    end = solve(problem, Newton(), jnp.ones(2, jnp.float32), tol=1e-4)
    assert end.converged and end.x.dtype == jnp.float32
