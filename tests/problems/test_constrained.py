"""Bounds and constraints: conditions, derivatives, degenerate cases, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import solve
from varan.constrained import AugmentedLagrangian
from varan.core.optimality import KKTPoint
from varan.firstorder import ProximalGradient
from varan.problems import BoxConstrained, Constrained
from varan.secondorder import LBFGSB
from varan.testing import difference

C, OUTSIDE = jnp.array([2.0, 0.3, -1.5]), jnp.array([3.0, 4.0])


def bowl(x, c):
    return jnp.sum(jnp.cosh(x - c)) + 0.3 * jnp.sum(x) ** 2


def boxed(lower, upper, c=C, **settings):
    return BoxConstrained(bowl, lower, upper, c, **settings)


# ---------------------------------------------------------------------- bounds


def test_no_feasible_direction_descends_where_the_condition_is_zero():
    problem = boxed(-1.0, 1.0)
    x = solve(problem, LBFGSB(), jnp.zeros(3), tol=1e-10).x
    slope = jax.grad(problem.value)(x)
    for point in np.random.default_rng(0).uniform(-1, 1, (50, 3)):
        assert slope @ (point - x) >= -1e-8
    assert problem.residual(problem.condition(x * 0.9)) > 0.01


def test_first_order_methods_run_on_it():
    ends = [
        solve(boxed(-1.0, 1.0), solver, jnp.zeros(3), tol=1e-9).x
        for solver in (LBFGSB(), ProximalGradient())
    ]
    np.testing.assert_allclose(*ends, atol=1e-8)


def test_derivatives_in_bounds_and_data_are_those_of_differences():
    @jax.jit
    def answer(data):
        return solve(boxed(*data), LBFGSB(), jnp.zeros(3), tol=1e-12).x

    data = jnp.full(3, -1.0), jnp.full(3, 1.0), C
    rng = np.random.default_rng(1)
    direction = tuple(jnp.asarray(rng.standard_normal(3)) for _ in data)
    tangent = jax.jvp(answer, (data,), (direction,))[1]
    np.testing.assert_allclose(tangent, difference(answer, data, direction), atol=1e-6)


def test_an_active_bound_without_push_has_no_derivative():
    def answer(upper):
        problem = BoxConstrained(lambda x: jnp.sum((x - 1.0) ** 2), -2.0, upper)
        return solve(problem, LBFGSB(), jnp.zeros(2), tol=1e-10).x

    assert np.all(np.isnan(jax.jacobian(answer)(1.0)))
    np.testing.assert_allclose(jax.jacobian(answer)(0.5), 1.0)


def test_the_claimed_gap_is_never_below_the_true_one():
    problem = boxed(-1.0, 1.0, convex=True)
    end = solve(problem, LBFGSB(), jnp.zeros(3), tol=1e-10)
    best = problem.value(end.x)
    assert end.certificate.met and end.certificate.value < 1e-8
    for point in np.random.default_rng(2).uniform(-1, 1, (50, 3)):
        point = jnp.asarray(point)
        gap = problem.certify(point, problem.condition(point), 1e-6).value
        assert gap >= problem.value(point) - best


def test_without_bounds_the_gap_is_infinite_away_from_the_minimum():
    problem = boxed(-jnp.inf, jnp.inf, convex=True)
    certificate = problem.certify(C, problem.condition(C), 1e-6)
    assert np.isinf(certificate.value) and not certificate.met


def test_bounds_that_cross_are_refused():
    with pytest.raises(ValueError, match="`lower` must not exceed `upper`"):
        boxed(1.0, -1.0)
    with pytest.raises(ValueError, match=r"must not exceed `upper` \(got 1 entries"):
        boxed(jnp.array([0.0, 2.0, 0.0]), jnp.ones(3))
    with pytest.raises(ValueError, match="`lower` must not hold NaN"):
        boxed(jnp.nan, 1.0)
    with pytest.raises(ValueError, match="a bound must be a scalar or a pytree like"):
        boxed([0.0, 0.0], [1.0, 1.0]).prox(jnp.zeros(3))
    with pytest.raises(ValueError, match="must have one structure"):
        boxed([0.0, 0.0], (1.0, 1.0))

    @jax.jit
    def traced(lower):
        return solve(boxed(lower, 1.0), LBFGSB(), jnp.zeros(3)).converged

    assert traced(0.0) and not traced(2.0)


# ----------------------------------------------------------------- constraints


def disc(radius, c=OUTSIDE):
    return Constrained(
        lambda x, r, c: jnp.sum((x - c) ** 2),
        radius,
        c,
        inequality=lambda x, r, c: x @ x - r**2,
    )


def test_the_condition_is_zero_at_the_solution_and_nowhere_near():
    problem = disc(1.0)
    answer = KKTPoint(jnp.array([0.6, 0.8]), None, jnp.array(4.0))
    assert problem.residual(problem.condition(answer)) < 1e-14
    for wrong in (
        answer._replace(x=answer.x * 1.1),
        answer._replace(inequality=jnp.array(3.9)),
        KKTPoint(jnp.array([3.0, 4.0]), None, jnp.array(0.0)),  # outside
        KKTPoint(-answer.x, None, jnp.array(-6.0)),  # the furthest point
    ):
        assert problem.residual(problem.condition(wrong)) > 0.05


def test_the_certificate_names_what_is_missed():
    problem = disc(1.0)
    point = KKTPoint(jnp.array([2.0, 0.0]), None, jnp.array(-0.5))
    details = problem.certify(point, problem.condition(point), 1e-6).details
    assert details["infeasibility"] == 3.0
    assert details["complementarity"] == 1.5
    assert details["negative_multiplier"] == 0.5
    assert details["objective"] == 17.0
    np.testing.assert_allclose(details["stationarity"], np.hypot(-4.0, -8.0))


@pytest.fixture(scope="module")
def answer():
    def answer(radius, c):
        problem = disc(radius, c)
        start = problem.start(jnp.zeros(2))
        return solve(problem, AugmentedLagrangian(), start, tol=1e-11).x

    return jax.jit(answer)


def test_derivatives_of_point_and_multiplier_are_those_of_the_closed_form(answer):
    # x = r c / |c|, multiplier |c| / r - 1.
    c = jnp.array([3.0, 4.0])
    slope = jax.jacobian(answer)(2.0, c)
    np.testing.assert_allclose(slope.x, c / 5, atol=1e-8)
    np.testing.assert_allclose(slope.inequality, -5 / 4, atol=1e-8)
    towards = jax.jacobian(answer, argnums=1)(2.0, c).x
    frame = np.eye(2) - np.outer(c, c) / 25
    np.testing.assert_allclose(towards, 2 * frame / 5, atol=1e-8)


def test_inactive_constraints_move_nothing(answer):
    c = jnp.array([0.3, 0.4])
    slope = jax.jacobian(answer)(2.0, c)
    np.testing.assert_allclose(slope.x, 0, atol=1e-9)


def test_an_active_constraint_without_price_has_no_derivative(answer):
    assert np.all(np.isnan(jax.jacobian(answer)(5.0, jnp.array([3.0, 4.0])).x))


def test_dependent_constraints_have_no_derivative_of_their_multipliers():
    def answer(b):
        problem = Constrained(
            lambda x, b: jnp.sum(x**2),
            b,
            equality=lambda x, b: jnp.stack([jnp.sum(x) - b, 2 * jnp.sum(x) - 2 * b]),
        )
        start = problem.start(jnp.zeros(2))
        return solve(problem, AugmentedLagrangian(), start, tol=1e-9).x

    np.testing.assert_allclose(answer(1.0).x, 0.5, atol=1e-8)
    assert np.all(np.isnan(jax.jacobian(answer)(1.0).equality))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`equality` or `inequality` must be given"):
        Constrained(jnp.sum)
    with pytest.raises(TypeError, match="Constrained: `inequality` must be callable"):
        Constrained(jnp.sum, inequality=3.0)
    problem = disc(1.0)
    with pytest.raises(ValueError, match="Build the unknown as KKTPoint"):
        problem.condition(KKTPoint(jnp.zeros(2)))
