"""Invariants of optimistic mirror descent and the honesty of its certificates."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.games import (
    EntropySimplex,
    EuclideanBall,
    EuclideanBox,
    EuclideanSpace,
    OnlineGradientDescent,
    OptimisticOMD,
    linear_regret,
    play,
    regret,
    sea,
)

BALL = EuclideanBall(1.0)
BOX = EuclideanBox(-jnp.ones(3), jnp.array([0.5, 1.0, 2.0]))
SIMPLEX = EntropySimplex(3)
UNIFORM = jnp.full(3, 1 / 3)
START = jnp.zeros(3)
ROUNDS = 40


def _replay(learner, gradients, start=START):
    """Plays against given gradients, whatever is played."""
    return play(learner, lambda t, x: gradients[t], start, len(gradients))


def _noise(seed, rounds=ROUNDS, size=3):
    return jax.random.normal(jax.random.key(seed), (rounds, size))


# --- what the method reduces to ---------------------------------------------------


@pytest.mark.parametrize("geometry", [BALL, BOX, EuclideanSpace()])
def test_without_hints_and_with_one_stepsize_it_is_gradient_descent(geometry):
    gradients = _noise(0)
    learner = OptimisticOMD(geometry, "constant", stepsize=0.1, optimistic=False)
    points, _, _ = _replay(learner, gradients)
    x = START
    for t in range(ROUNDS):
        np.testing.assert_allclose(points[t], x, atol=1e-14)
        x = geometry.project(x - 0.1 * gradients[t])


def test_unconstrained_it_is_optaxs_optimistic_gradient_descent():
    target = jnp.array([1.0, -2.0, 0.5])
    learner = OptimisticOMD(EuclideanSpace(), "constant", stepsize=0.1)
    optimiser = optax.optimistic_gradient_descent(0.1, alpha=1.0, beta=1.0)
    # Optax takes the first gradient for the one before it, as if it had been the hint.
    first = START - target
    state = learner.hinted(learner.init(START + 0.1 * first), first)
    x, memory = START, optimiser.init(START)
    for _ in range(10):
        np.testing.assert_allclose(learner.predict(state), x, atol=1e-13)
        updates, memory = optimiser.update(x - target, memory)
        x = optax.apply_updates(x, updates)
        state = learner.update(state, learner.predict(state) - target)


def test_entropy_geometry_is_optimistic_hedge():
    losses = _noise(1)
    learner = OptimisticOMD(SIMPLEX, "constant", stepsize=0.3)
    points, _, _ = _replay(learner, losses, UNIFORM)
    before = jnp.cumsum(losses, axis=0) - losses
    hints = jnp.concatenate([jnp.zeros((1, 3)), losses[:-1]])
    expected = jax.nn.softmax(-0.3 * (before + hints), axis=1)
    np.testing.assert_allclose(points, expected, atol=1e-13)


def test_exp_concave_with_tiny_gradients_has_a_scaled_identity_metric():
    # beta = 1 / (8 G D) with G huge makes H_t nearly (1 + G / (16 D)) I.
    gradients = 1e-3 * _noise(2)
    learner = OptimisticOMD(BALL, "exp_concave", gradient_bound=1e6, strength=1.0)
    points, _, _ = _replay(learner, gradients)
    flat = OptimisticOMD(BALL, "constant", stepsize=1 / (1 + 1e6 / 32))
    np.testing.assert_allclose(points, _replay(flat, gradients)[0], rtol=1e-6)


# --- stepsizes --------------------------------------------------------------------


def test_convex_stepsize_reads_only_earlier_errors_and_never_grows():
    gradients = _noise(3)
    learner = OptimisticOMD(BALL, gradient_bound=2.0, smoothness=0.3)
    state, stepsizes = learner.init(START), []
    for g in gradients:
        stepsizes.append(state.metric)
        state = learner.update(state, g)
    hints = jnp.concatenate([jnp.zeros((1, 3)), gradients[:-1]])
    errors = jnp.cumsum(jnp.sum((gradients - hints) ** 2, axis=1))
    earlier = jnp.concatenate([jnp.zeros(1), errors[:-1]])
    expected = 2 / jnp.sqrt(10 * 4 * 0.3**2 + 4 * 2.0**2 + earlier)
    np.testing.assert_allclose(jnp.stack(stepsizes), expected, rtol=1e-12)
    assert jnp.all(jnp.diff(jnp.stack(stepsizes)) <= 0)


def test_the_metric_of_exp_concave_rounds():
    gradients = _noise(4)
    learner = OptimisticOMD(BALL, "exp_concave", gradient_bound=4.0, strength=0.5)
    _, _, state = _replay(learner, gradients)
    beta = min(1 / (4 * 4.0 * 2.0), 0.5) / 2
    expected = (1 + beta * 8) * jnp.eye(3) + beta / 2 * gradients.T @ gradients
    np.testing.assert_allclose(state.memory, expected, rtol=1e-12)


# --- certificates -----------------------------------------------------------------

LEARNERS = {
    "ball": OptimisticOMD(BALL, gradient_bound=1.0),
    "smooth": OptimisticOMD(BALL, gradient_bound=1.0, smoothness=1.0),
    "plain": OptimisticOMD(BALL, gradient_bound=1.0, optimistic=False),
    "box": OptimisticOMD(BOX, gradient_bound=1.0),
    "constant": OptimisticOMD(BALL, "constant", stepsize=0.2),
    "hedge": OptimisticOMD(SIMPLEX, "constant", stepsize=0.2),
    "entropy": OptimisticOMD(SIMPLEX, gradient_bound=1.0),
}


@functools.lru_cache
def _certified(name):
    learner = LEARNERS[name]
    start = UNIFORM if learner.geometry is SIMPLEX else START

    @jax.jit
    def run(seed, kind):
        noise = jax.random.normal(jax.random.key(seed), (ROUNDS, 3))
        still = jnp.broadcast_to(noise[0], noise.shape)
        signs = jnp.where(jnp.arange(ROUNDS) % 3 == 0, -1.0, 1.0)
        kinds = jnp.stack([noise, still, still * signs[:, None], 1e4 * noise])
        points, gradients, state = _replay(learner, kinds[kind], start)
        truth = linear_regret(learner.geometry, points, gradients)[-1]
        size = jnp.sum(jnp.abs(gradients))
        return truth, learner.certificate(state).value, size

    return run


@pytest.mark.parametrize("name", LEARNERS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), kind=st.integers(0, 3))
def test_the_linearised_regret_never_exceeds_the_certificate(name, seed, kind):
    truth, value, size = _certified(name)(seed, kind)
    assert value >= truth - 1e-10 * size


@pytest.mark.parametrize("seed", range(5))
def test_the_certificate_is_below_the_closed_forms(seed):
    gradients = _noise(seed) / 5
    bound = float(jnp.max(jnp.linalg.norm(gradients, axis=1)))
    learner = OptimisticOMD(BALL, gradient_bound=bound, smoothness=0.2)
    _, _, state = _replay(learner, gradients)
    hints = jnp.concatenate([jnp.zeros((1, 3)), gradients[:-1]])
    errors = jnp.sum((gradients - hints) ** 2, axis=1)
    base = 10 * 0.4**2 + 4 * bound**2
    stepsizes = 2 / jnp.sqrt(base + jnp.cumsum(errors) - errors)
    tight = 2 / stepsizes[-1] + jnp.sum(stepsizes * errors) / 2
    value = learner.certificate(state).value
    assert value <= tight + 1e-12
    assert tight <= 3 * jnp.sqrt(base + jnp.sum(errors)) + 1e-12


def test_perfect_hints_cost_only_the_first_distance():
    gradients = _noise(5)
    learner = OptimisticOMD(BALL, "constant", stepsize=0.3)
    state, points = learner.init(START), []
    for g in gradients:
        state = learner.hinted(state, g)
        points.append(learner.predict(state))
        state = learner.update(state, g)
    truth = linear_regret(BALL, jnp.stack(points), gradients)[-1]
    value = learner.certificate(state).value
    assert truth - 1e-12 <= value <= 2.0**2 / (2 * 0.3)


def _stream(seed, curvature, **noise):
    mean = 0.4 * jax.random.normal(jax.random.key(seed + 100), (ROUNDS, 3))
    return sea.stream(jax.random.key(seed), mean, curvature=curvature, **noise)


@eqx.filter_jit
def _curved(learner, losses):
    points, _, state = play(learner, losses.gradient, START, ROUNDS)
    truth = regret(losses.loss, points, losses.best_in_hindsight())[-1]
    return truth, learner.certificate(state).value


@pytest.mark.parametrize("seed", range(8))
def test_the_strongly_convex_certificate_is_never_below_the_regret(seed):
    losses = _stream(seed, jnp.diag(jnp.array([0.5, 1.0, 3.0])), noise=0.7)
    learner = OptimisticOMD(BALL, "strongly_convex", strength=0.5)
    truth, value = _curved(learner, losses)
    assert truth <= value + 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_the_exp_concave_certificate_is_never_below_the_regret(seed):
    curvature = jnp.diag(jnp.array([0.3, 1.0, 2.0]))
    losses = _stream(seed, curvature, noise=0.5)
    # f is alpha-exp-concave when grad f' Q^{-1} grad f <= 1 / alpha on the ball.
    scaled = losses.slopes / jnp.sqrt(jnp.diag(curvature))[None, :]
    reach = jnp.linalg.norm(scaled, axis=1)
    strength = 1 / (jnp.sqrt(2.0) + jnp.max(reach)) ** 2
    learner = OptimisticOMD(
        BALL,
        "exp_concave",
        gradient_bound=losses.gradient_bound,
        strength=strength,
    )
    truth, value = _curved(learner, losses)
    assert truth <= value + 1e-12


def test_the_curved_certificates_are_below_their_closed_forms():
    gradients = _noise(6) / 4
    hints = jnp.concatenate([jnp.zeros((1, 3)), gradients[:-1]])
    errors = gradients - hints
    strong = OptimisticOMD(BALL, "strongly_convex", strength=0.5)
    value = strong.certificate(_replay(strong, gradients)[2]).value
    rounds = jnp.arange(1.0, ROUNDS + 1)
    assert value <= jnp.sum(jnp.sum(errors**2, axis=1) / (0.5 * rounds)) + 1e-12

    bound = float(jnp.max(jnp.linalg.norm(gradients, axis=1)))
    newton = OptimisticOMD(BALL, "exp_concave", gradient_bound=bound, strength=1.0)
    beta = min(1 / (8 * bound), 1.0) / 2
    state, total = newton.init(START), (1 + beta * bound**2 / 2) * 2
    update = jax.jit(newton.update)
    for g, e in zip(gradients, errors, strict=True):
        total += 1.5 * e @ jnp.linalg.solve(state.memory, e)
        state = update(state, g)
    assert newton.certificate(state).value <= total + 1e-12


def test_a_broken_gradient_bound_is_reported():
    gradients = 10 * _noise(7)
    newton = OptimisticOMD(BALL, "exp_concave", gradient_bound=1.0, strength=1.0)
    certificate = newton.certificate(_replay(newton, gradients)[2])
    assert jnp.isinf(certificate.value)
    assert certificate.details["largest gradient norm"] > 1.0
    assert certificate.proof


# --- compiled, batched, in either precision ---------------------------------------


def test_pytrees_and_vmap_agree_with_vectors_and_loops():
    gradients = _noise(8)
    learner = OptimisticOMD(BALL, gradient_bound=3.0)
    points, _, _ = _replay(learner, gradients)

    def split(v):
        return {"a": v[..., :1], "b": v[..., 1:]}

    trees, _, _ = play(learner, lambda t, x: split(gradients[t]), split(START), ROUNDS)
    np.testing.assert_allclose(trees["b"], points[:, 1:], atol=1e-14)

    batch = jnp.stack([gradients, 2 * gradients])
    many = jax.vmap(lambda g: _replay(learner, g)[0])(batch)
    np.testing.assert_allclose(many[0], points, atol=1e-14)


def test_new_values_do_not_compile_again():
    count = 0

    @eqx.filter_jit
    def run(learner, gradients):
        nonlocal count
        count += 1
        return _replay(learner, gradients)[2].x

    for bound in (1.0, 2.0):
        learner = OptimisticOMD(
            EuclideanBall(jnp.array(bound)), gradient_bound=jnp.array(bound)
        )
        run(learner, bound * _noise(9))
    assert count == 1


@pytest.mark.parametrize("regime", ["convex", "strongly_convex", "exp_concave"])
def test_float32_stays_float32(float32, regime):
    learner = OptimisticOMD(BALL, regime, gradient_bound=1.0, strength=1.0)
    state = learner.init(jnp.zeros(2, jnp.float32))
    state = learner.update(state, jnp.ones(2, jnp.float32))
    assert state.x.dtype == learner.certificate(state).value.dtype == jnp.float32


def test_nan_spreads_to_the_point_and_the_certificate():
    learner = LEARNERS["ball"]
    state = learner.update(learner.init(START), jnp.array([jnp.nan, 0.0, 0.0]))
    assert bool(jnp.any(jnp.isnan(state.x)))
    assert not bool(learner.certificate(state).met)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BALL, "convex", {}), "`gradient_bound` must be given for 'convex'"),
        ((BALL, "convex", {"gradient_bound": -1.0}), "must be positive"),
        ((BALL, "convex", {"gradient_bound": 1.0, "smoothness": -1.0}), "negative"),
        ((BALL, "strongly_convex", {"strength": 0.0}), "`strength` must be positive"),
        ((BALL, "exp_concave", {"gradient_bound": 1.0}), "`strength` must be given"),
        ((BALL, "constant", {}), "`stepsize` must be given"),
        ((BALL, "convexe", {}), "`regime` must be one of"),
        ((EuclideanSpace(), "convex", {"gradient_bound": 1.0}), "a bounded set"),
        ((SIMPLEX, "strongly_convex", {"strength": 1.0}), "a Euclidean geometry"),
        ((BOX, "exp_concave", {"gradient_bound": 1.0, "strength": 1.0}), "Ball"),
    ],
)
def test_bad_settings(arguments, message):
    geometry, regime, constants = arguments
    with pytest.raises(ValueError, match=message):
        OptimisticOMD(geometry, regime, **constants)


def test_bad_points():
    learner = LEARNERS["ball"]
    with pytest.raises(ValueError, match="`start` must lie in the feasible set"):
        learner.init(jnp.full(3, 2.0))
    with pytest.raises(ValueError, match="`start` must be finite"):
        learner.init(jnp.array([jnp.nan]))
    with pytest.raises(ValueError, match="`start` must not be empty"):
        learner.init(jnp.zeros(0))
    with pytest.raises(ValueError, match="`gradient` must have the structure"):
        learner.update(learner.init(START), jnp.ones(2))
    with pytest.raises(ValueError, match="`comparator` must lie in the feasible set"):
        regret(lambda t, x: x[0], jnp.zeros((4, 1)), 2 * jnp.ones(1), geometry=BALL)
    with pytest.raises(ValueError, match="`comparator` must be one point"):
        regret(lambda t, x: x[0], jnp.zeros((4, 1)), jnp.ones(2))
    with pytest.raises(ValueError, match="`rounds` must be at least 1"):
        play(learner, lambda t, x: x, START, 0)


def test_online_gradient_descent_is_what_no_hints_give_up_to_the_stepsize():
    gradients = _noise(10)
    learner = OnlineGradientDescent(BALL, strength=2.0)
    plain = OptimisticOMD(BALL, "strongly_convex", strength=4.0, optimistic=False)
    np.testing.assert_allclose(
        _replay(learner, gradients)[0], _replay(plain, gradients)[0], atol=1e-14
    )
