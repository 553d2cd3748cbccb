"""The two-layer learner: layers, certificate, and what it follows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.games import (
    DynamicOptimisticOMD,
    EntropySimplex,
    EuclideanBall,
    EuclideanSpace,
    OptimisticOMD,
    dynamic_regret_bound,
    play,
    regret,
    sea,
)

BALL = EuclideanBall(1.0)
START = jnp.zeros(3)
ROUNDS = 40
LEARNER = DynamicOptimisticOMD(BALL, ROUNDS, gradient_bound=2.0, smoothness=0.25)


def test_stepsizes_double_from_the_worst_case_to_the_smooth_one():
    learner = DynamicOptimisticOMD(BALL, 1000, gradient_bound=2.0, smoothness=0.25)
    ratios = learner.stepsizes[1:] / learner.stepsizes[:-1]
    np.testing.assert_allclose(learner.stepsizes[0], 2 / (2 * np.sqrt(8000)))
    np.testing.assert_allclose(ratios[:-1], 2.0)
    np.testing.assert_allclose(learner.stepsizes[-1], 1 / (8 * 0.25))
    assert 1 <= ratios[-1] <= 2


def test_one_base_learner_is_optimistic_mirror_descent():
    learner = DynamicOptimisticOMD(BALL, 1, gradient_bound=0.5, smoothness=1.0)
    assert learner.stepsizes.size == 1
    single = OptimisticOMD(BALL, "constant", stepsize=1 / 8)
    gradients = jax.random.normal(jax.random.key(0), (ROUNDS, 3))
    two, _, _ = play(learner, lambda t, x: gradients[t], START, ROUNDS)
    one, _, _ = play(single, lambda t, x: gradients[t], START, ROUNDS)
    np.testing.assert_allclose(two, one, atol=1e-13)


def test_the_mixture_follows_its_formula():
    gradients = jax.random.normal(jax.random.key(1), (6, 3))
    state, n = LEARNER.init(START), LEARNER.stepsizes.size
    losses, missed, previous, hint = jnp.zeros(n), 0.0, state.points, START
    for g in gradients:
        bases = jnp.stack(
            [
                BALL.project(a - s * hint)
                for a, s in zip(state.anchors, LEARNER.stepsizes, strict=True)
            ]
        )
        correction = 2 * 0.25 * jnp.sum((bases - previous) ** 2, axis=1)
        rate = min(1 / (8 * 0.25 * 4), float(np.sqrt(np.log(n)) / np.sqrt(16 + missed)))
        weights = jax.nn.softmax(-rate * (losses + bases @ hint + correction))
        np.testing.assert_allclose(LEARNER.predict(state), weights @ bases, atol=1e-13)
        errors = bases @ (g - hint)
        missed += ((jnp.max(errors) - jnp.min(errors)) / 2) ** 2
        losses += bases @ g + correction
        state, previous, hint = LEARNER.update(state, g), bases, g


@functools.lru_cache
def _runner():
    @jax.jit
    def run(gradients, comparators):
        points, _, state = play(LEARNER, lambda t, x: gradients[t], START, ROUNDS)
        path = jnp.sum(jnp.linalg.norm(jnp.diff(comparators, axis=0), axis=1))
        truth = regret(lambda t, x: gradients[t] @ x, points, comparators)[-1]
        return truth, LEARNER.certificate(state, path).value

    return run


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), block=st.sampled_from([1, 4, 40]))
def test_the_certificate_holds_for_the_worst_comparators_of_a_path(seed, block):
    gradients = jax.random.normal(jax.random.key(seed), (ROUNDS, 3))
    # The best point of each block: much is gained for the path length paid.
    sums = jnp.sum(gradients.reshape(-1, block, 3), axis=1)
    best = -sums / jnp.linalg.norm(sums, axis=1, keepdims=True)
    truth, value = _runner()(gradients, jnp.repeat(best, block, axis=0))
    assert truth <= value + 1e-10


def test_it_tracks_a_moving_target_within_the_derived_bound():
    horizon, speed = 400, 6.0 / 399
    learner = DynamicOptimisticOMD(BALL, horizon, gradient_bound=1.8, smoothness=1.0)

    @jax.jit
    def run():
        angle = speed * jnp.arange(float(horizon))
        targets = 0.7 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
        losses = sea.drift(jax.random.key(0), targets, jnp.eye(2), noise=0.1)
        points, gradients, _ = play(learner, losses.gradient, jnp.zeros(2), horizon)
        still = jnp.broadcast_to(losses.best(), targets.shape)
        paid = [regret(losses.expected_loss, p, targets)[-1] for p in (points, still)]
        longest = jnp.max(jnp.linalg.norm(gradients, axis=1))
        sums = jnp.sum(losses.variances), jnp.sum(losses.variations)
        path = 0.7 * 6.0
        n = learner.stepsizes.size
        return *paid, dynamic_regret_bound(2.0, 1.8, 1.0, n, *sums, path), longest

    paid, standing, bound, longest = run()
    assert longest <= 1.8
    assert 0 <= paid <= bound
    # A fixed point cannot follow a circle: the learner does at least twice as well.
    assert paid <= standing / 2


def test_bad_input():
    with pytest.raises(ValueError, match="`horizon` must be positive"):
        DynamicOptimisticOMD(BALL, 0, gradient_bound=1.0, smoothness=1.0)
    with pytest.raises(ValueError, match="`smoothness` must be positive"):
        DynamicOptimisticOMD(BALL, 10, gradient_bound=1.0, smoothness=0.0)
    for geometry in (EuclideanSpace(), EntropySimplex(2)):
        with pytest.raises(ValueError, match="a bounded Euclidean set"):
            DynamicOptimisticOMD(geometry, 10, gradient_bound=1.0, smoothness=1.0)
    state = LEARNER.init(START)
    with pytest.raises(ValueError, match="`path_length` must not be negative"):
        LEARNER.certificate(state, -1.0)
    with pytest.raises(ValueError, match="`gradient` must have the structure"):
        LEARNER.update(state, jnp.ones(2))


def test_float32_stays_float32(float32):
    learner = DynamicOptimisticOMD(BALL, 10, gradient_bound=1.0, smoothness=1.0)
    state = learner.update(learner.init(jnp.zeros(2)), jnp.ones(2))
    assert state.x.dtype == learner.certificate(state, 1.0).value.dtype == jnp.float32
