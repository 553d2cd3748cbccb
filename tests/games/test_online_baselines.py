"""The baselines: their formulae, their own regret bounds, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.games import (
    AdaGradNorm,
    EntropySimplex,
    EuclideanBall,
    EuclideanBox,
    EuclideanSpace,
    OnlineGradientDescent,
    OnlineNewtonStep,
    OptimisticFTRL,
    linear_regret,
    play,
)

BALL = EuclideanBall(1.0)
START = jnp.zeros(3)
ROUNDS = 60


def _gradients(seed):
    g = jax.random.normal(jax.random.key(seed), (ROUNDS, 3))
    return g / jnp.maximum(1.0, jnp.linalg.norm(g, axis=1, keepdims=True))


def _regret(learner, gradients):
    points, _, _ = play(learner, lambda t, x: gradients[t], START, ROUNDS)
    return points, linear_regret(BALL, points, gradients)[-1]


@pytest.mark.parametrize("seed", range(3))
def test_linear_losses_keep_the_published_bounds(seed):
    gradients = _gradients(seed)
    _, paid = _regret(OnlineGradientDescent(BALL, gradient_bound=1.0), gradients)
    assert paid <= 1.5 * 2 * jnp.sqrt(ROUNDS)
    _, paid = _regret(AdaGradNorm(BALL), gradients)
    assert paid <= jnp.sqrt(2.0) * 2 * jnp.sqrt(jnp.sum(gradients**2))
    _, paid = _regret(OptimisticFTRL(BALL, gradient_bound=1.0), gradients)
    hints = jnp.concatenate([jnp.zeros((1, 3)), gradients[:-1]])
    missed = jnp.sum((gradients - hints) ** 2)
    # Equation (9) of Sachs et al. with nu = D G, D = 2, G = 1.
    assert paid <= 3 / jnp.sqrt(2.0) * 2 * jnp.sqrt(missed) + 2 + 4 * 4 / 2


def test_optimistic_ftrl_follows_its_formula():
    gradients = _gradients(5)
    points, _ = _regret(
        OptimisticFTRL(BALL, gradient_bound=1.0, smoothness=0.5), gradients
    )
    weight, total, hint = 0.5 * 4 + 2, jnp.zeros(3), jnp.zeros(3)
    for t in range(10):
        stepsize = 4 / weight
        expected = BALL.project(-stepsize / 2 * (total + hint))
        np.testing.assert_allclose(points[t], expected, atol=1e-13)
        weight += stepsize * jnp.sum((gradients[t] - hint) ** 2)
        total, hint = total + gradients[t], gradients[t]


def test_online_newton_step_follows_its_formula_inside_the_ball():
    gradients = 0.01 * _gradients(6)
    learner = OnlineNewtonStep(BALL, gradient_bound=1.0, strength=1.0)
    points, _ = _regret(learner, gradients)
    gamma = min(1 / 8, 1.0) / 2
    matrix, x = jnp.eye(3) / (2 * gamma) ** 2, START
    for t in range(10):
        np.testing.assert_allclose(points[t], x, atol=1e-13)
        matrix += jnp.outer(gradients[t], gradients[t])
        x = x - jnp.linalg.solve(matrix, gradients[t]) / gamma


def test_online_newton_step_stays_in_the_ball():
    learner = OnlineNewtonStep(BALL, gradient_bound=1.0, strength=1.0)
    points, _ = _regret(learner, jnp.ones((ROUNDS, 3)) / 2)
    assert jnp.all(jnp.linalg.norm(points, axis=1) <= 1 + 1e-12)
    np.testing.assert_allclose(jnp.linalg.norm(points[-1]), 1.0, rtol=1e-12)


def test_a_first_zero_gradient_moves_nothing():
    state = AdaGradNorm(BALL).init(START)
    assert jnp.all(AdaGradNorm(BALL).update(state, START).x == 0)


def test_bad_settings():
    with pytest.raises(ValueError, match="exactly one of"):
        OnlineGradientDescent(BALL)
    with pytest.raises(ValueError, match="exactly one of"):
        OnlineGradientDescent(BALL, gradient_bound=1.0, strength=1.0)
    with pytest.raises(ValueError, match="`geometry` must be bounded"):
        AdaGradNorm(EuclideanSpace())
    with pytest.raises(ValueError, match="`geometry` must be Euclidean"):
        OptimisticFTRL(EntropySimplex(3), gradient_bound=1.0)
    with pytest.raises(ValueError, match="must be an EuclideanBall"):
        box = EuclideanBox(START, jnp.ones(3))
        OnlineNewtonStep(box, gradient_bound=1.0, strength=1.0)
    with pytest.raises(ValueError, match="`gradient_bound` must be positive"):
        OptimisticFTRL(BALL, gradient_bound=0.0)
