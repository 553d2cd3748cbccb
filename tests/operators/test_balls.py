"""Quadratics on a ball against a general constrained minimiser, and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.optimize import minimize

from varan.operators import (
    minimise_quadratic_on_ball,
    project_l2_ball,
    project_l2_ball_in_metric,
)

minimise = jax.jit(minimise_quadratic_on_ball)
project = jax.jit(project_l2_ball_in_metric)


def _instance(seed, rank=4):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(4, rank))
    return jnp.asarray(factor @ factor.T), jnp.asarray(3 * rng.normal(size=4))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("radius", [0.05, 0.7, 50.0])
def test_agrees_with_a_constrained_minimiser(seed, radius):
    metric, x = _instance(seed)
    reference = minimize(
        lambda y: 0.5 * (y - x) @ metric @ (y - x),
        np.zeros(4),
        jac=lambda y: np.asarray(metric @ (y - x)),
        constraints={
            "type": "ineq",
            "fun": lambda y: radius**2 - y @ y,
            "jac": lambda y: -2 * y,
        },
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    # SLSQP stops at about the square root of its objective tolerance.
    np.testing.assert_allclose(project(x, metric, radius), reference.x, atol=2e-6)


@pytest.mark.parametrize("rank", [0, 2, 4])
def test_optimality_conditions_hold_also_for_a_singular_matrix(rank):
    matrix, linear = _instance(9, rank)
    x = minimise(matrix, linear, 1.0)
    residual = linear - matrix @ x
    mu = residual @ x
    assert mu >= -1e-9
    np.testing.assert_allclose(residual, mu * x, atol=1e-9)
    np.testing.assert_allclose(jnp.linalg.norm(x), 1.0, rtol=1e-12)


def test_identity_metric_is_the_euclidean_projection():
    x = jnp.array([3.0, -1.0, 0.5])
    center = jnp.array([0.2, 0.1, -0.3])
    expected = project_l2_ball(x, 0.7, center)
    np.testing.assert_allclose(
        project(x, jnp.eye(3), 0.7, center), expected, rtol=1e-12
    )


def test_a_point_inside_stays():
    x = jnp.array([0.1, 0.2])
    assert jnp.all(project(x, jnp.eye(2) * 3.0, 1.0) == x)


@pytest.mark.parametrize("matrix", [jnp.eye(3), jnp.diag(jnp.array([1.0, 2.0, 9.0]))])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_derivative_agrees_with_differences_also_at_equal_eigenvalues(matrix, scale):
    linear = scale * jnp.array([1.0, -2.0, 0.5])

    def value(matrix, linear, radius):
        x = minimise_quadratic_on_ball(matrix, linear, radius)
        return jnp.sum(jnp.sin(3 * x))

    check_grads(
        value,
        (matrix, linear, jnp.array(0.8)),
        order=1,
        modes=["fwd", "rev"],
        rtol=1e-5,
    )


def test_bad_input():
    with pytest.raises(ValueError, match="`radius` must be positive"):
        minimise_quadratic_on_ball(jnp.eye(2), jnp.ones(2), -1.0)
    with pytest.raises(ValueError, match="`matrix` must have shape"):
        minimise_quadratic_on_ball(jnp.eye(3), jnp.ones(2))
    with pytest.raises(ValueError, match="`linear` must be finite"):
        minimise_quadratic_on_ball(jnp.eye(2), jnp.array([jnp.nan, 1.0]))
    assert jnp.all(jnp.isnan(minimise(jnp.eye(2), jnp.array([jnp.nan, 1.0]), 1.0)))


def test_float32_stays_float32(float32):
    x = minimise_quadratic_on_ball(jnp.eye(2), jnp.array([3.0, 4.0]))
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, [0.6, 0.8], rtol=1e-6)
