"""What it means to have solved a bilevel problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from varan import Smooth, solve
from varan.bilevel import (
    LVHBA,
    SOBA,
    AiPOD,
    BilevelPoint,
    BilevelProblem,
    linear_lower_example,
)


def quadratic(t, inequality=None, **settings):
    """`y = 2 x`, the upper level wants `y = t`; perhaps constrained."""
    return BilevelProblem(
        lambda x, y, t: jnp.sum((y - t) ** 2) / 2 + 0.05 * jnp.sum(x**2),
        lambda x, y, t: jnp.sum((y - 2 * x) ** 2) / 2,
        t,
        inequality=inequality,
        **settings,
    )


def test_the_known_answer_of_a_lower_level_with_many_answers_has_residual_zero():
    target = jnp.array([0.3, -1.0, 2.0])
    problem, (x, y) = linear_lower_example(target)
    scale = 9**-0.5
    price = (target - y["y1"])[0] / 3
    point = BilevelPoint(
        x,
        y,
        {"y1": jnp.full(3, 2 * price), "y2": jnp.full(3, -2 * price)},
        jnp.array([-1 / scale]),
        (price / scale)[None],
    )
    assert problem.residual(problem.condition(point)) < 1e-13


def test_another_answer_of_the_lower_level_is_not_an_answer():
    problem, (x, y) = linear_lower_example(jnp.ones(2))
    other = {"y1": y["y1"], "y2": y["y2"] + jnp.array([0.1, -0.1])}
    point = problem.point(x, other, jnp.array([-(6**0.5)]))
    condition = problem.condition(point)
    # It solves the lower level, and is not the one that the upper level prefers.
    assert jnp.linalg.norm(condition.adjoint["y2"]) < 1e-12
    assert jnp.linalg.norm(condition.y["y2"]) > 0.05


def test_the_condition_of_a_plain_problem_contains_the_hypergradient():
    problem = quadratic(jnp.array([1.0, -2.0]))
    x = jnp.array([0.4, 0.7])
    y, adjoint = 2 * x, -(2 * x - jnp.array([1.0, -2.0]))
    condition = problem.condition(BilevelPoint(x, y, adjoint))
    reduced = jax.grad(lambda x: problem.upper_value(x, 2 * x))(x)
    np.testing.assert_allclose(condition.x, reduced, atol=1e-14)
    np.testing.assert_allclose(condition.y, 0, atol=1e-14)


def test_solution_differentiates_through_active_and_inactive_constraints():
    # The first entry's constraint is active, the second's is not, so that near this
    # answer the problem is quadratic and Newton's method exact after one step.
    def answer(t):
        problem = quadratic(t, inequality=lambda x, y, t: y - 0.5 - 0.1 * x)
        start = problem.point(
            jnp.array([0.4, -0.5]), jnp.array([0.5, -0.9]), jnp.array([0.2, 0.0])
        )
        newton = optx.Newton(rtol=1e-10, atol=1e-10)
        return solve(problem, newton, start, tol=1e-9, max_steps=5)

    t = jnp.array([0.9, -1.0])
    solution = jax.jit(answer)(t)
    assert bool(solution.converged)
    assert solution.x.multipliers[0] > 0.1 and solution.x.multipliers[1] == 0
    jacobian = jax.jit(jax.jacrev(lambda t: answer(t).x.y))(t)
    h, follow = 1e-5, jax.jit(lambda t: answer(t).x.y)
    for i in range(2):
        e = h * jnp.eye(2)[i]
        difference = (follow(t + e) - follow(t - e)) / (2 * h)
        np.testing.assert_allclose(jacobian[:, i], difference, atol=1e-8)


def test_complementarity_is_part_of_the_lower_level():
    problem = quadratic(jnp.ones(1), inequality=lambda x, y, t: y - 0.5)
    x, y = jnp.ones(1), jnp.full(1, 0.5)
    _, right = problem.lower_condition(x, y, jnp.array([1.5]))
    _, negative = problem.lower_condition(x, y, jnp.array([-1.0]))
    assert right[0] == 0 and negative[0] == -1


def test_sets_enter_by_their_projections():
    problem = quadratic(
        jnp.ones(1),
        project_x=lambda x: jnp.clip(x, 0.0, 0.25),
        project_y=lambda y: jnp.clip(y, -1.0, 1.0),
    )
    x, y = jnp.full(1, 0.25), jnp.full(1, 0.5)
    point = BilevelPoint(x, y, 1 - y)
    assert problem.residual(problem.condition(point)) < 1e-14


def test_certificate_names_its_parts():
    problem = quadratic(jnp.ones(1))
    start = problem.point(jnp.zeros(1), jnp.zeros(1))
    certificate = problem.certify(start, problem.condition(start), 1e-3)
    assert set(certificate.details) == {"lower", "adjoint", "hypergradient"}
    assert certificate.proof and not bool(certificate.met)


def test_joint_set_of_affine_constraints_is_built():
    problem = quadratic(jnp.ones(1), inequality=lambda x, y, t: y - x - 1.0)
    joint = problem.joint_set(jnp.zeros(1), jnp.zeros(1))
    landed = joint.project(jnp.array([0.0, 3.0])).x
    np.testing.assert_allclose(landed, [1.0, 2.0], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BilevelProblem(3, lambda x, y: 0.0), TypeError, "must be callable"),
        (
            lambda: quadratic(jnp.ones(1), lambda x, y, t: y, project_y=lambda y: y),
            ValueError,
            "need `joint`",
        ),
        (
            lambda: quadratic(jnp.ones(1), lambda x, y, t: y**2 - 1.0).joint_set(
                jnp.zeros(1), jnp.zeros(1)
            ),
            ValueError,
            "not affine",
        ),
        (
            lambda: quadratic(jnp.ones(1)).point(jnp.full(1, jnp.nan), jnp.zeros(1)),
            ValueError,
            "`x` must be finite",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_other_problems_and_starts_are_named():
    problem = BilevelProblem(lambda x, y: x @ y, lambda x, y: jnp.sum((y - x) ** 2))
    one = jnp.ones(2)
    with pytest.raises(TypeError, match=r"Pass problem.point\(x, y\)"):
        problem.condition((one, one))
    start = problem.point(one, one)
    for solver in (SOBA(0.1, 0.1, 0.1), LVHBA(0.1), AiPOD(0.1)):
        with pytest.raises(TypeError, match="`problem` must be a BilevelProblem"):
            solver.init(Smooth(lambda z: jnp.sum(z**2)), start)
        with pytest.raises(TypeError, match="must be a BilevelPoint"):
            solver.init(problem, one)
