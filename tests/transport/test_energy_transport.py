"""The energy-based plan: its density, chains and dual against Gaussian closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.transport import (
    EnergyPlan,
    bw_uvp,
    energy_ot,
    gaussian_entropic_plan,
    half_sqeuclidean,
)

EPSILON, VARIANCE = 0.8, 2.0
ZERO, ONE = jnp.zeros(1), jnp.eye(1)


class Quadratic(eqx.Module):
    curvature: jax.Array

    def __call__(self, y):
        return self.curvature * jnp.sum(y**2) / 2


@pytest.fixture(scope="module")
def exact():
    """The optimal plan from N(0, 1) to N(0, VARIANCE), and its quadratic potential."""
    _, joint = gaussian_entropic_plan(ZERO, ONE, ZERO, VARIANCE * ONE, epsilon=EPSILON)
    # y given x has precision (1 - curvature) / epsilon.
    conditional = joint[1, 1] - joint[0, 1] ** 2 / joint[0, 0]
    potential = Quadratic(1 - EPSILON / conditional)
    return joint, EnergyPlan(potential, EPSILON, 0.3, half_sqeuclidean)


@pytest.fixture(scope="module")
def pairs(exact):
    x = jax.random.normal(jax.random.key(0), (20_000, 1))
    return x, exact[1].sample(jax.random.key(1), x, steps=60)


def test_density_is_that_of_the_conditional_gaussian(exact):
    joint, plan = exact
    x, y = jnp.asarray([0.7]), jnp.asarray([-0.4])
    mean = joint[0, 1] * x
    conditional = joint[1, 1] - joint[0, 1] ** 2
    slope = jax.grad(plan.log_density, argnums=1)(x, y)
    np.testing.assert_allclose(slope, (mean - y) / conditional, rtol=1e-10)


def test_samples_have_the_joint_law(exact, pairs):
    joint, _ = exact
    x, run = pairs
    assert bool(run.finite) and float(run.acceptance) > 0.8
    samples = jnp.concatenate([x, run.samples], axis=1)
    # Two moments estimated from 20 000 pairs: noise of about 100 d / n percent.
    assert float(bw_uvp(samples, jnp.zeros(2), joint)) < 0.1


def test_certificate_is_small_for_the_optimum_alone(exact, pairs):
    _, plan = exact
    x = pairs[0][:1500]
    y = VARIANCE**0.5 * jax.random.normal(jax.random.key(2), (1500, 1))
    wrong = EnergyPlan(Quadratic(jnp.asarray(-3.0)), EPSILON, 0.1, half_sqeuclidean)
    key = jax.random.key(3)
    good, bad = (p.certify(key, x, y, steps=40) for p in (plan, wrong))
    assert not good.proof
    assert abs(float(good.value)) < 0.02 < float(bad.value)
    assert 0 < float(good.details["acceptance"]) <= 1


def test_dual_is_the_optimal_value_at_the_optimum_and_below_elsewhere(exact):
    joint, plan = exact
    keys = jax.random.split(jax.random.key(4), 3)
    x = jax.random.normal(keys[0], (2000, 1))
    y = VARIANCE**0.5 * jax.random.normal(keys[1], (2000, 1))

    @jax.jit
    def dual(curvature):
        p = EnergyPlan(Quadratic(curvature), EPSILON, 0.3, half_sqeuclidean)
        return p.dual_value(keys[2], x, y, draws=2000)

    conditional = joint[1, 1] - joint[0, 1] ** 2
    cost = (1 + VARIANCE) / 2 - joint[0, 1]
    entropy = jnp.log(2 * jnp.pi * jnp.e * conditional) / 2
    best = float(cost - EPSILON * entropy)
    at = float(plan.potential.curvature)
    assert abs(float(dual(jnp.asarray(at))) - best) < 0.1
    for other in (at - 1.0, at - 0.5):
        # epsilon times the expected divergence of the conditionals, in closed form.
        p, q = 1 / conditional, (1 - other) / EPSILON
        mean = joint[0, 1] - 1 / (EPSILON * q)
        apart = (q / p - 1 + q * mean**2 + jnp.log(p / q)) / 2
        gap = best - float(dual(jnp.asarray(other)))
        np.testing.assert_allclose(gap, EPSILON * apart, atol=0.1)


# optax's Adam relies on JAX's usual promotion.
@jax.numpy_dtype_promotion("standard")
def test_training_finds_the_optimal_curvature(exact):
    _, plan = exact

    def source(key):
        return jax.random.normal(key, (128, 1))

    def target(key):
        return VARIANCE**0.5 * source(key)

    fit = energy_ot(
        jax.random.key(5),
        source,
        target,
        Quadratic(jnp.asarray(-1.0)),
        epsilon=EPSILON,
        chain_steps=10,
        buffer_size=256,
        steps=300,
        optimiser=optax.adam(optax.cosine_decay_schedule(0.05, 300)),
    )
    assert bool(fit.finite) and fit.contrast.shape == (300,)
    found, wanted = fit.plan.potential.curvature, plan.potential.curvature
    assert abs(float(found - wanted)) < 0.15
    assert abs(float(fit.contrast[-50:].mean())) < 0.2


def test_bad_settings_are_refused_in_one_sentence():
    def sampler(key, d=1):
        return jax.random.normal(key, (8, d))

    def call(**changes):
        settings = dict(epsilon=0.5, steps=1, optimiser=optax.sgd(0.1), buffer_size=8)
        target = changes.pop("target", sampler)
        return energy_ot(
            jax.random.key(0),
            sampler,
            target,
            Quadratic(jnp.zeros(())),
            **(settings | changes),
        )

    for changes, message in (
        ({"epsilon": 0.0}, "`epsilon` must be positive"),
        ({"stepsize": 2.0}, "`stepsize` must be at most twice `epsilon`"),
        ({"fresh": 0.0}, r"`fresh` must lie in \(0, 1\]"),
        ({"buffer_size": 4}, "`buffer_size` must be at least a batch"),
        ({"target": lambda key: sampler(key, 2)}, "must give batches of one shape"),
    ):
        with pytest.raises(ValueError, match=f"energy_ot: .*{message}|{message}"):
            call(**changes)
    plan = EnergyPlan(lambda y: y[0], 1.0, 0.1, lambda x, y: jnp.sum((x - y) ** 2))
    points = jnp.zeros((2, 1))
    with pytest.raises(ValueError, match="needs the cost `half_sqeuclidean`"):
        plan.dual_value(jax.random.key(0), points, points, draws=2)
