"""The proximal Lagrangian value function: value, gradient, limits, honesty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from varan.bilevel import BilevelProblem, proximal_lagrangian_value, value_gap
from varan.operators import prox_ridge

MIXED = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)))
X, Y = jnp.array([0.5, -1.0]), jnp.array([0.2, -0.4, 1.0])
Z = jnp.array([0.7, 0.3])


def lower(x, y):
    # Convex, not strongly: the second entry has no curvature.
    return (y[0] - x[0]) ** 2 / 2 + y[1] + jnp.cosh(y[2]) - y @ MIXED @ x / 4


def constraints(x, y):
    return jnp.stack([y[0] + y[1] - x[0], -y[1] - x[1] ** 2 - 2.0])


PLAIN = BilevelProblem(lambda x, y: jnp.sum(y), lower)
PROBLEM = BilevelProblem(lambda x, y: jnp.sum(y), lower, inequality=constraints)
SETTINGS = {"gamma1": 0.8, "gamma2": 1.5}


@pytest.fixture(scope="module")
def value():
    return jax.jit(
        lambda x, y, z: proximal_lagrangian_value(
            PROBLEM, x, y, z, **SETTINGS, tol=1e-11
        )
    )


def test_saddle_point_has_no_better_neighbour(value):
    v = value(X, Y, Z)
    assert bool(v.converged) and jnp.all(v.multipliers >= 0)

    def saddle(theta, m):
        return (
            lower(X, theta)
            + m @ constraints(X, theta)
            + jnp.sum((theta - Y) ** 2) / 1.6
            - jnp.sum((m - Z) ** 2) / 3.0
        )

    assert abs(saddle(v.theta, v.multipliers) - v.value) < 1e-9
    for d in 0.1 * np.random.default_rng(1).standard_normal((20, 3)):
        assert saddle(v.theta + d, v.multipliers) >= v.value - 1e-9
        m = jnp.maximum(v.multipliers + d[:2], 0)
        assert saddle(v.theta, m) <= v.value + 1e-9


def test_gradient_is_the_envelope_formula_and_finite_differences(value):
    g_x, g_y, g_z = jax.grad(lambda *a: value(*a).value, argnums=(0, 1, 2))(X, Y, Z)
    v = value(X, Y, Z)
    np.testing.assert_allclose(g_y, (Y - v.theta) / 0.8, atol=1e-9)
    np.testing.assert_allclose(g_z, (v.multipliers - Z) / 1.5, atol=1e-9)
    explicit = jax.grad(PROBLEM.lagrangian)(X, v.theta, v.multipliers)
    np.testing.assert_allclose(g_x, explicit, atol=1e-9)
    total = jax.jit(lambda *a: value(*a).value)
    check_grads(total, (X, Y, Z), order=1, modes=["rev"])
    # The second derivative goes through the saddle point itself.
    slope = jax.jit(jax.grad(total, argnums=1))
    check_grads(lambda y: slope(X, y, Z), (Y,), order=1, modes=["fwd"])


def test_without_constraints_it_is_the_moreau_envelope():
    problem = BilevelProblem(lambda x, y: 0.0, lambda x, y: jnp.sum(y**2) / 2)
    v = proximal_lagrangian_value(problem, X, Y, gamma1=0.8, tol=1e-12)
    nearest = prox_ridge(Y, 1.0, 0.8)
    envelope = jnp.sum(nearest**2) / 2 + jnp.sum((nearest - Y) ** 2) / 1.6
    np.testing.assert_allclose(v.value, envelope, atol=1e-12)
    np.testing.assert_allclose(v.theta, nearest, atol=1e-12)
    assert v.multipliers is None


def test_never_above_the_lower_objective_on_feasible_points(value):
    draw = np.random.default_rng(2)
    feasible = 0
    for _ in range(40):
        x, y = jnp.array(draw.standard_normal(2)), jnp.array(draw.standard_normal(3))
        z = jnp.array(draw.uniform(0, 3, 2))
        if jnp.all(constraints(x, y) <= 0):
            feasible += 1
            assert value(x, y, z).value <= lower(x, y) + 1e-9
    assert feasible > 5


def test_gap_is_zero_exactly_at_an_answer_with_its_multipliers():
    # min (y - 2)^2 / 2 with y <= x: the answer x has multiplier 2 - x.
    problem = BilevelProblem(
        lambda x, y: 0.0,
        lambda x, y: jnp.sum((y - 2) ** 2) / 2,
        inequality=lambda x, y: y - x,
    )
    x = jnp.array([0.5])
    at = value_gap(problem, x, x, jnp.array([1.5]), tol=1e-9)
    off = value_gap(problem, x, x - 0.1, jnp.array([1.5]), tol=1e-9)
    wrong = value_gap(problem, x, x, jnp.array([0.0]), tol=1e-9)
    assert bool(at.met) and at.proof and at.details["infeasibility"] == 0
    assert off.value > 1e-3 and wrong.value > 1e-3


def test_weak_proximal_terms_give_the_constrained_minimum():
    problem = BilevelProblem(
        lambda x, y: 0.0,
        lambda x, y: jnp.sum((y - 2) ** 2) / 2,
        inequality=lambda x, y: y - x,
    )
    v = proximal_lagrangian_value(
        problem, jnp.array([0.5]), jnp.array([5.0]), gamma1=1e4, gamma2=1e4, tol=1e-6
    )
    # The lower level's minimum is 1.125; each term moves it by about 1 / gamma.
    np.testing.assert_allclose(v.value, 1.125, atol=5e-3)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_the_claimed_inexactness_is_never_below_the_true_one(value, steps):
    truth = value(X, Y, Z).value
    cut = proximal_lagrangian_value(
        PROBLEM, X, Y, Z, **SETTINGS, tol=1e-12, max_steps=steps
    )
    assert abs(cut.value - truth) <= cut.error
    assert not bool(cut.converged)


def test_a_run_that_was_cut_off_has_no_derivative():
    def cut(y):
        return proximal_lagrangian_value(
            PROBLEM, X, y, Z, **SETTINGS, max_steps=1
        ).theta[0]

    assert bool(jnp.any(jnp.isnan(jax.jit(jax.grad(cut))(Y))))


def test_equalities_take_multipliers_of_either_sign():
    problem = BilevelProblem(
        lambda x, y: 0.0,
        lambda x, y: jnp.sum((y + 2) ** 2) / 2,
        equality=lambda x, y: y - x,
    )
    x = jnp.array([0.5])
    v = proximal_lagrangian_value(problem, x, x, jnp.array([-2.5]))
    np.testing.assert_allclose(v.multipliers, [-2.5], atol=1e-6)


@pytest.mark.parametrize("name", ["gamma1", "gamma2", "bound", "tol"])
def test_bad_settings_are_named(name):
    with pytest.raises(ValueError, match=f"`{name}` must be positive"):
        proximal_lagrangian_value(PROBLEM, X, Y, Z, **{name: -1.0})
