"""The streams' noise, drift and bounds against sampling; the regret bounds' shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from varan.games import (
    convex_regret_bound,
    dynamic_regret_bound,
    exp_concave_regret_bound,
    sea,
    strongly_convex_regret_bound,
)

KEY = jax.random.key(0)
Q = jnp.diag(jnp.array([1.0, 0.5, 0.0]))
W = jnp.diag(jnp.array([0.0, -1.0, 0.7]))
MEAN = jnp.array([0.3, -0.2, 0.1])


def test_variance_is_the_largest_over_the_ball():
    losses = sea.iid(
        KEY, 4000, MEAN, curvature=Q, noise=jnp.diag(MEAN), wobble=W, radius=0.8
    )

    def spread(x):
        gradients = jax.vmap(losses.gradient, (0, None))(jnp.arange(4000), x)
        return jnp.mean(jnp.sum((gradients - (Q @ x + MEAN)[None, :]) ** 2, axis=1))

    worst = jnp.array([0.0, 0.8, 0.0])
    # The mean of 4000 bounded terms: three standard errors are below 3 per cent.
    np.testing.assert_allclose(spread(worst), losses.variances[0], rtol=0.03)
    assert spread(jnp.zeros(3)) < losses.variances[0]


@pytest.mark.parametrize("wobble", [None, W])
def test_no_gradient_exceeds_the_bound_and_losses_match_their_gradients(wobble):
    losses = sea.adversarial(
        KEY, 200, MEAN, 3, curvature=Q, noise=0.4, wobble=wobble, radius=1.3
    )
    points = jax.random.normal(jax.random.key(1), (200, 3))
    points = 1.3 * points / jnp.linalg.norm(points, axis=1, keepdims=True)
    rounds = jnp.arange(200)
    gradients = jax.vmap(losses.gradient)(rounds, points)
    assert jnp.all(jnp.linalg.norm(gradients, axis=1) <= losses.gradient_bound)
    slopes = jax.vmap(jax.grad(losses.loss, argnums=1))(rounds, points)
    np.testing.assert_allclose(gradients, slopes, atol=1e-14)


def test_drift_of_flips():
    losses = sea.adversarial(KEY, 9, MEAN, 4, curvature=Q, radius=2.0)
    flips = 4 * MEAN @ MEAN
    expected = [0, 0, 0, flips, 0, 0, 0, flips]
    np.testing.assert_allclose(losses.variations[1:], expected, atol=1e-15)
    first = jnp.linalg.norm(jax.vmap(lambda x: Q @ x + MEAN)(2 * jnp.eye(3)), axis=1)
    assert losses.variations[0] >= jnp.max(first) ** 2


def test_random_order_is_the_distribution_of_the_rest():
    slopes = jax.random.normal(KEY, (7, 2))
    losses = sea.random_order(KEY, slopes, passes=2)
    for turn in (losses.slopes[:7], losses.slopes[7:]):
        np.testing.assert_allclose(
            jnp.sort(turn, axis=0), jnp.sort(slopes, axis=0), atol=1e-15
        )
    rest = losses.slopes[9:14]
    np.testing.assert_allclose(losses.means[9], jnp.mean(rest, axis=0), atol=1e-14)
    spread = jnp.mean(jnp.sum((rest - jnp.mean(rest, axis=0)[None, :]) ** 2, axis=1))
    np.testing.assert_allclose(losses.variances[9], spread, atol=1e-14)


def test_corruption_and_targets():
    losses = sea.corrupted(KEY, 500, MEAN, -3 * MEAN, 0.2)
    share = jnp.mean(losses.means[:, 0] < 0)
    assert 0.12 < share < 0.28
    targets = 0.5 * jax.random.normal(KEY, (5, 3)) / 3
    moving = sea.drift(KEY, targets, Q + jnp.eye(3), noise=0.1)
    np.testing.assert_allclose(moving.minimisers(), targets, atol=1e-12)


def test_best_points_are_best():
    losses = sea.adversarial(KEY, 30, 3 * MEAN, 20, curvature=Q, noise=1.0)
    for best, loss in (
        (losses.best(17), losses.expected_loss),
        (losses.best_in_hindsight(17), losses.loss),
    ):

        def total(x, loss=loss):
            return float(jnp.sum(jax.vmap(loss, (0, None))(jnp.arange(17), x)))

        reference = minimize(
            lambda x: total(jnp.asarray(x)),
            np.zeros(3),
            constraints={"type": "ineq", "fun": lambda x: 1 - x @ x},
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        assert total(best) <= reference.fun + 1e-8
        assert jnp.linalg.norm(best) <= 1 + 1e-12


def test_bad_input():
    with pytest.raises(ValueError, match="`means` must have shape"):
        sea.stream(KEY, jnp.zeros(3))
    with pytest.raises(ValueError, match="`curvature` must have shape"):
        sea.stream(KEY, jnp.zeros((4, 3)), curvature=jnp.eye(2))
    with pytest.raises(ValueError, match="`radius` must be positive"):
        sea.iid(KEY, 4, MEAN, radius=0.0)
    with pytest.raises(ValueError, match="`period` must be positive"):
        sea.adversarial(KEY, 4, MEAN, 0)
    with pytest.raises(ValueError, match="single losses are not convex"):
        sea.iid(KEY, 4, MEAN, wobble=W).best_in_hindsight()


def test_the_balanced_constant_of_the_convex_bound():
    # 5/2 D sqrt(delta) + 25 D^3 L^2 / sqrt(delta) is least at delta = 10 D^2 L^2.
    diameter, smoothness = 1.7, 0.6

    def price(delta):
        root = jnp.sqrt(delta)
        return 2.5 * diameter * root + 25 * diameter**3 * smoothness**2 / root

    delta = 10 * (diameter * smoothness) ** 2
    bound = convex_regret_bound(diameter, 0.0, smoothness, 0.0, 0.0)
    np.testing.assert_allclose(price(delta), bound, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(price)(delta), 0.0, atol=1e-9)


def test_bounds_grow_with_what_they_measure():
    still = jnp.zeros(1000)
    noisy = jnp.full(1000, 0.3)
    low = strongly_convex_regret_bound(2.0, 1.0, 1.0, 0.5, still, still)
    high = strongly_convex_regret_bound(2.0, 1.0, 1.0, 0.5, noisy, still)
    longer = strongly_convex_regret_bound(
        2.0, 1.0, 1.0, 0.5, jnp.full(4000, 0.3), jnp.zeros(4000)
    )
    assert low < high < longer
    # The price of noise is logarithmic: 16 / strength sigma^2 log 4 for four times T.
    np.testing.assert_allclose(longer - high, 32 * 0.3 * np.log(4), rtol=0.01)
    newton = [
        exp_concave_regret_bound(2.0, 1.0, 1.0, 1.0, 3, v, 1.0) for v in (0.0, 9.0)
    ]
    moving = [dynamic_regret_bound(2.0, 1.0, 1.0, 5, 1.0, 1.0, p) for p in (0.0, 9.0)]
    assert newton[0] < newton[1] and moving[0] < moving[1]
