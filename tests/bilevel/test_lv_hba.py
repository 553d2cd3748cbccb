"""LV-HBA: the paper's round, its limits, its stepsize bound, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Status, compare, solve
from varan.bilevel import (
    LVHBA,
    AiPOD,
    BilevelProblem,
    linear_lower_example,
    saddle_stepsize_bound,
)
from varan.operators import Polyhedron

SETTINGS = {
    "stepsize": 0.05,
    "center_stepsize": 0.2,
    "saddle_stepsize": 0.2,
    "gamma1": 2.0,
    "gamma2": 0.5,
    "penalty": 1.5,
    "power": 0.4,
    "bound": 3.0,
}


def coupled(x, y):
    return (y + 2 * x - 1.0)[:1]


def problem_with(inequality=None, equality=None):
    return BilevelProblem(
        lambda x, y: jnp.sum((y - 1) ** 2) / 2 + jnp.sum(jnp.cos(x)),
        lambda x, y: jnp.sum((y - x) ** 2) / 2 + jnp.sum(x * y),
        inequality=inequality,
        equality=equality,
    )


def start_of(problem):
    return problem.point(jnp.array([0.3, -0.2]), jnp.array([0.1, 0.5]))


def test_rounds_equal_the_algorithm_written_out():
    # By hand, for f = |y - x|^2 / 2 + x . y and g = y_0 + 2 x_0 - 1.
    problem = problem_with(coupled)
    method = LVHBA(**SETTINGS)
    memory = method.begin(problem, start_of(problem))
    x, y = np.array([0.3, -0.2]), np.array([0.1, 0.5])
    theta, lam, z = y.copy(), 0.0, 0.0
    normal = np.array([2.0, 0, 1, 0])
    advance = jax.jit(method.advance)
    for k in range(4):
        c = 1.5 * (k + 1) ** 0.4
        e0 = np.array([1.0, 0])
        d_theta = theta - x + x + lam * e0 + (theta - y) / 2.0
        d_lam = -(theta[0] + 2 * x[0] - 1) + (lam - z) / 0.5
        theta, lam = theta - 0.2 * d_theta, np.clip(lam - 0.2 * d_lam, 0, 3)
        d_x = -np.sin(x) / c + (x - y + y) - (x - theta + theta) - lam * 2 * e0
        d_y = (y - 1) / c + y - (y - theta) / 2.0
        d_z = -(lam - z) / 0.5
        v = np.concatenate([x - 0.05 * d_x, y - 0.05 * d_y])
        v = v - max(normal @ v - 1, 0) / (normal @ normal) * normal
        x, y, z = v[:2], v[2:], np.clip(z - 0.2 * d_z, 0, 3)
        memory = advance(problem, memory)
        for found, wanted in (
            (memory.x, x),
            (memory.y, y),
            (memory.theta, theta),
            (memory.multipliers[0], lam),
            (memory.center[0], z),
        ):
            # The joint projection stops at a relative residual of 1.5e-8.
            np.testing.assert_allclose(found, wanted, atol=1e-7)


def test_without_constraints_it_is_moreau_envelope_descent():
    problem = problem_with()
    method = LVHBA(**SETTINGS)
    memory = method.begin(problem, start_of(problem))
    x, y = np.array([0.3, -0.2]), np.array([0.1, 0.5])
    theta = y.copy()
    for k in range(4):
        c = 1.5 * (k + 1) ** 0.4
        theta = theta - 0.2 * (theta + (theta - y) / 2.0)
        # grad_x f does not depend on y here, so that its difference vanishes.
        d_x, d_y = -np.sin(x) / c, (y - 1) / c + y - (y - theta) / 2.0
        x, y = x - 0.05 * d_x, y - 0.05 * d_y
        memory = method.advance(problem, memory)
        np.testing.assert_allclose(memory.x, x, atol=1e-12)
        np.testing.assert_allclose(memory.y, y, atol=1e-12)
    assert memory.multipliers is None and memory.center is None


def toy_errors(n, **settings):
    problem, (x, _) = linear_lower_example(jnp.ones(n))
    start = problem.point(jnp.zeros(n), {"y1": jnp.zeros(n), "y2": jnp.zeros(n)})
    solution = solve(problem, LVHBA(**settings), start, max_steps=20_000, tol=1e-9)
    return jnp.linalg.norm(solution.x.x - x) / jnp.linalg.norm(x), solution


def test_a_frozen_penalty_leaves_a_bias_of_its_inverse_order():
    settings = {"stepsize": 0.02, "gamma1": 10.0, "gamma2": 1.0, "power": 0.0}
    coarse, _ = toy_errors(2, penalty=5.0, **settings)
    fine, _ = toy_errors(2, penalty=10.0, **settings)
    assert 1.7 < coarse / fine < 2.2


def test_the_errors_do_not_depend_on_the_size():
    (small, solution), (large, _) = (toy_errors(n, penalty=3.0) for n in (2, 7))
    np.testing.assert_allclose(small, large, rtol=1e-6)
    assert small < 1e-2
    # The residual of the bilevel problem's own optimality system falls along.
    residual = solution.trace.residual
    assert residual[-1] < 0.02 * residual[1]


def test_inequality_multipliers_stay_in_their_box_and_iterates_feasible():
    problem = problem_with(coupled)
    method = LVHBA(**SETTINGS)
    memory = method.begin(problem, start_of(problem))

    def one(memory, _):
        memory = method.advance(problem, memory)
        return memory, (memory.multipliers, memory.center, coupled(memory.x, memory.y))

    _, (m, z, g) = jax.lax.scan(one, memory, None, length=300)
    assert jnp.all((m >= 0) & (m <= 3)) and jnp.all((z >= 0) & (z <= 3))
    assert jnp.all(g <= 1e-7)


def test_solves_a_problem_with_an_inequality():
    # The lower answer is min(2 x, 1/2); the upper level wants y = 1 and small x.
    problem = BilevelProblem(
        lambda x, y: jnp.sum((y - 1) ** 2) / 2 + jnp.sum(x**2) / 8,
        lambda x, y: jnp.sum((y - 2 * x) ** 2) / 2,
        inequality=lambda x, y: y - 0.5,
    )
    start = problem.point(jnp.zeros(1), jnp.zeros(1))
    method = LVHBA(0.02, 0.1, 0.3, 1.0, 1.0, penalty=10.0, power=0.3)
    x = solve(problem, method, start, max_steps=20_000).x
    np.testing.assert_allclose(x.x, [0.25], atol=0.02)
    np.testing.assert_allclose(x.y, [0.5], atol=0.01)


def dense_bound(M):
    root = np.linalg.cholesky(M + M.T)
    inner = np.linalg.solve(root, np.linalg.solve(root, M.T @ M).T)
    return 1 / np.linalg.eigvalsh(inner)[-1]


@pytest.mark.parametrize(("gamma1", "gamma2"), [(10.0, 1.0), (1.0, 1.0), (0.5, 3.0)])
def test_the_stepsize_bound_is_that_of_the_dense_pencil(gamma1, gamma2):
    problem, _ = linear_lower_example(jnp.ones(2))
    start = problem.point(jnp.ones(2), {"y1": jnp.ones(2), "y2": jnp.ones(2)})
    found = saddle_stepsize_bound(problem, start, gamma1, gamma2)
    g = np.full((1, 4), 6**-0.5)
    P = np.diag([1.0, 1, 0, 0]) + np.eye(4) / gamma1
    M = np.block([[P, g.T], [-g, np.eye(1) / gamma2]])
    np.testing.assert_allclose(found, dense_bound(M), rtol=1e-3)
    # Below it a saddle step contracts, above it some step does not.
    for eta, contracts in ((0.99 * found, True), (1.01 * found, False)):
        norm = np.linalg.norm(np.eye(5) - float(eta) * M, 2)
        assert (norm < 1) == contracts
    rho, L = np.linalg.eigvalsh((M + M.T) / 2)[0], np.linalg.norm(M, 2)
    assert found >= rho / L**2


def unscaled_toy():
    """The released script's scaling: the constraint is a plain sum."""
    problem = BilevelProblem(
        lambda x, y: jnp.sum((x - y) ** 2) / 2,
        lambda x, y: jnp.sum(y),
        equality=lambda x, y: (jnp.sum(x) + jnp.sum(y))[None],
    )
    return problem, problem.point(jnp.ones(100), jnp.ones(100))


def test_a_stepsize_above_the_bound_is_refused_with_the_bound():
    problem, start = unscaled_toy()
    method = LVHBA(0.008, 0.02, 0.01, 10.0, 10.0, penalty=0.025)
    with pytest.raises(ValueError, match=r"`saddle_stepsize` must be below 0\.00"):
        method.init(problem, start)
    solution = solve(problem, method, start, max_steps=10)
    assert solution.status == Status.DIVERGED and solution.steps == 0


def test_a_nonconvex_lower_level_is_refused():
    problem = BilevelProblem(lambda x, y: jnp.sum(y), lambda x, y: -jnp.sum(y**2))
    start = problem.point(jnp.ones(1), jnp.ones(1))
    assert jnp.isnan(saddle_stepsize_bound(problem, start, 1.0, 1.0))
    with pytest.raises(ValueError, match="must be below nan"):
        LVHBA(gamma1=1.0).init(problem, start)
    # With a smaller gamma1 the proximal term convexifies it.
    assert saddle_stepsize_bound(problem, start, 0.25, 1.0) > 0


def test_extra_rows_of_the_joint_set_are_respected():
    n = 2
    A = jnp.array([[1.0, 1, 1, 1], [1.0, -1, 0, 0]])
    problem = BilevelProblem(
        lambda x, y: jnp.sum((y - 1) ** 2) / 2,
        lambda x, y: jnp.sum((y - x) ** 2) / 2,
        equality=lambda x, y: (jnp.sum(x) + jnp.sum(y))[None],
        project_x=lambda x: jnp.full(n, 0.5) * jnp.sum(x),
        joint=Polyhedron(A, jnp.zeros(2)),
    )
    start = problem.point(jnp.array([1.0, -1.0]), jnp.zeros(2))
    x = solve(problem, LVHBA(), start, max_steps=5).x
    np.testing.assert_allclose(A @ jnp.concatenate([x.x, x.y]), 0, atol=1e-12)


def test_runs_in_a_comparison():
    problem, _ = linear_lower_example(jnp.ones(2))
    start = problem.point(jnp.zeros(2), {"y1": jnp.zeros(2), "y2": jnp.zeros(2)})
    table = str(compare(problem, [LVHBA(), AiPOD()], start, max_evaluations=300))
    assert "LVHBA" in table and "AiPOD" in table


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepsize": 0.0}, "`stepsize` must be positive"),
        ({"penalty": -1.0}, "`penalty` must be positive"),
        ({"bound": 0.0}, "`bound` must be positive"),
        ({"gamma1": jnp.nan}, "`gamma1` must be positive"),
        ({"power": 0.6}, "`power` must lie in"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LVHBA(**settings)
