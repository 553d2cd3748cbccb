"""Least squares through optimistix and varan solvers, and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from varan import Newton, solve
from varan.problems import LeastSquares

T = jnp.linspace(0.0, 1.0, 6)


def curve(x, y):
    return x["size"] * jnp.exp(x["rate"] * T) - y


START = {"size": jnp.array(1.0), "rate": jnp.array(0.0)}
Y = 2 * jnp.exp(-1.5 * T) + 0.05 * jnp.sin(9 * T)
SOLVERS = [
    optx.LevenbergMarquardt(rtol=1e-12, atol=1e-12),
    optx.Dogleg(rtol=1e-12, atol=1e-12),
    Newton(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_every_kind_of_solver_finds_the_minimum_and_its_derivative(solver):
    def fit(y):
        return solve(LeastSquares(curve, y), solver, START, tol=1e-11)

    assert fit(Y).converged
    direction = jnp.cos(5 * T)
    tangent = jax.jvp(lambda y: fit(y).x, (Y,), (direction,))[1]
    up, down = fit(Y + 1e-5 * direction).x, fit(Y - 1e-5 * direction).x
    for name in START:
        difference = (up[name] - down[name]) / 2e-5
        np.testing.assert_allclose(tangent[name], difference, rtol=1e-6)


def test_the_condition_is_the_gradient_of_the_value():
    problem = LeastSquares(curve, Y)
    gradient = jax.grad(problem.value)(START)
    condition = problem.condition(START)
    for name in START:
        np.testing.assert_allclose(condition[name], gradient[name], rtol=1e-13)


def test_rank_deficient_fits_differentiate_in_what_is_unique():
    X = jnp.array([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])

    def fitted(y):
        problem = LeastSquares(lambda w, y: X @ w - y, y, unique=False)
        return X @ solve(problem, Newton(), jnp.zeros(2), tol=1e-9).x

    hat = X @ jnp.linalg.pinv(X)
    y = jnp.array([1.0, -1.0, 3.0])
    np.testing.assert_allclose(jax.jacobian(fitted)(y), hat, atol=1e-8)


def test_residuals_must_be_a_function():
    with pytest.raises(TypeError, match="LeastSquares: `residuals` must be callable"):
        LeastSquares(jnp.ones(3))
