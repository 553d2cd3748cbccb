"""Fusedmax: the answer of its problem, fused, and the gradient of its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.optimize import minimize

from varan.fenchel_young import Fused, fusedmax, sparsemax

SCORES = jnp.array([0.9, 0.75, 0.8, -0.4, 0.6])
TARGET = jnp.array([0.3, 0.3, 0.4, 0.0, 0.0])


@pytest.mark.parametrize("weight", [0.05, 0.3])
def test_solves_its_problem(weight):
    # SciPy on p and the sizes d of the differences, |p_{i+1} - p_i| <= d: smooth.
    n = SCORES.size
    steps = np.diff(np.eye(n), axis=0)

    def objective(v):
        p, d = v[:n], v[n:]
        return p @ p / 2 - p @ np.asarray(SCORES) + weight * d.sum()

    constraints = [
        {"type": "eq", "fun": lambda v: v[:n].sum() - 1},
        {"type": "ineq", "fun": lambda v: v[n:] - steps @ v[:n]},
        {"type": "ineq", "fun": lambda v: v[n:] + steps @ v[:n]},
    ]
    best = minimize(
        objective,
        np.r_[np.full(n, 1 / n), np.zeros(n - 1)],
        method="SLSQP",
        bounds=[(0, None)] * (2 * n - 1),
        constraints=constraints,
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(fusedmax(SCORES, weight), best.x[:n], atol=1e-6)


def test_neighbours_fuse_and_zero_weight_is_sparsemax():
    p = fusedmax(SCORES, 0.3)
    np.testing.assert_allclose(p[:3], p[0], atol=1e-14)
    np.testing.assert_allclose(fusedmax(SCORES, 0.0), sparsemax(SCORES), atol=1e-14)


def test_loss_gradient_and_derivatives():
    def loss(weight, scores):
        return Fused(weight).loss(scores, TARGET)

    run = jax.jit(jax.value_and_grad(loss, 1))
    value, gradient = run(jnp.array(0.07), SCORES)
    np.testing.assert_allclose(gradient, fusedmax(SCORES, 0.07) - TARGET, atol=1e-12)
    assert value > 0
    at_prediction = Fused(0.07).certify(SCORES, fusedmax(SCORES, 0.07))
    np.testing.assert_allclose(at_prediction.value, 0, atol=1e-14)
    check_grads(jax.jit(loss), (jnp.array(0.07), SCORES), order=1, rtol=1e-6)
    check_grads(jax.jit(fusedmax), (SCORES, jnp.array(0.07)), order=1, rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`weight` must not be negative"):
        Fused(-1.0)
    with pytest.raises(ValueError, match="`scores` must have shape"):
        fusedmax(jnp.ones((2, 2)))
    assert Fused(0.1).loss(SCORES, 2 * TARGET) == jnp.inf
    assert jnp.all(jnp.isnan(fusedmax(SCORES.at[0].set(jnp.nan))))
