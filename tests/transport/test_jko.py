"""Variational functionals are lower bounds, tight at their critic; flows are exact."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.transport import (
    jensen_shannon,
    jko_flow,
    kl_to_density,
    kl_to_samples,
    ornstein_uhlenbeck,
    porous_medium,
)

N = 20_000
KEY = jax.random.key(0)


class Affine(eqx.Module):
    scale: jax.Array
    shift: jax.Array

    def __call__(self, x):
        return self.scale * x + self.shift


class Quadratic(eqx.Module):
    curvature: jax.Array
    slope: jax.Array
    level: jax.Array

    def __call__(self, x):
        square = self.curvature * jnp.sum(x**2) / 2
        return square + self.slope * jnp.sum(x) + self.level


def quadratic(curvature=0.0, slope=0.0, level=0.0):
    return Quadratic(*(jnp.asarray(v) for v in (curvature, slope, level)))


# P = N(1, 1) against Q = N(0, 1): log P / Q = x - 1/2, KL = 1/2.
X = 1 + jax.random.normal(KEY, (N, 1))
Z = jax.random.normal(jax.random.key(1), (N, 1))


@eqx.filter_jit
def value(functional, critic, x):
    return functional.value(critic, x, functional.fit(x), jax.random.key(2))


def test_divergence_to_samples_is_tight_at_the_ratio_and_below_elsewhere():
    functional = kl_to_samples(Z)
    best, error = value(functional, quadratic(0.0, 1.0, -0.5), X)
    assert 0 < float(error) < 0.05
    assert abs(float(best) - 0.5) < 4 * float(error)
    for other in (quadratic(0.0, 0.5, -0.5), quadratic(0.0, 1.5, -1.0), quadratic()):
        lower, error = value(functional, other, X)
        assert float(lower) <= 0.5 + 4 * float(error)


def test_divergence_to_a_density_is_tight_at_the_ratio_to_its_reference():
    functional = kl_to_density(lambda y: -jnp.sum(y**2) / 2)
    reference = functional.fit(X)
    # The reference is N(mean, (1.1 std)^2): critic log P / G for P = N(1, 1).
    mean, variance = X.mean(), 1.1**2 * X.var()
    critic = quadratic(
        1 / variance - 1.0,
        1 - mean / variance,
        (mean**2 / variance - 1 + jnp.log(variance)) / 2,
    )
    best, error = value(functional, critic, X)
    # Unnormalised: the value carries the constant -log(2 pi) / 2.
    exact = 0.5 - 0.5 * np.log(2 * np.pi)
    assert abs(float(best) - exact) < 4 * float(error) + 0.01
    worse, _ = value(functional, quadratic(), X)
    assert float(worse) < float(best)
    density = jnp.exp(reference.log_density(jnp.linspace(-20, 20, 4001)[:, None]))
    np.testing.assert_allclose(density.sum() * 0.01, 1, rtol=1e-6)


def test_jensen_shannon_lies_within_its_range():
    functional = jensen_shannon(Z)
    best, error = value(functional, quadratic(0.0, 1.0, -0.5), X)
    same, _ = value(functional, quadratic(), Z)
    assert abs(float(same)) < 1e-9
    grid = np.linspace(-8, 9, 3401)
    p, q = (np.exp(-((grid - m) ** 2) / 2) / np.sqrt(2 * np.pi) for m in (1, 0))
    middle = (p + q) / 2
    exact = ((p * np.log(p / middle) + q * np.log(q / middle)) / 2).sum() * 0.005
    assert abs(float(best) - exact) < 4 * float(error)


def test_internal_energy_of_the_uniform_law():
    # On [0, 1] the density is 1: int P^2 = 1; the box is half as large again.
    x = jax.random.uniform(KEY, (N, 1))
    ratio = float(jnp.log(jnp.expm1(1.5)))  # softplus of it is P / G

    def critic(y):
        inside = (y[0] > 0) & (y[0] < 1)
        return jnp.where(inside, ratio, -30.0)

    best, error = value(porous_medium(2.0), critic, x)
    assert abs(float(best) - 1) < 4 * float(error) + 0.01
    lower, error = value(porous_medium(2.0), lambda y: 0.0 * y[0], x)
    assert float(lower) <= 1 + 4 * float(error)


# optax's Adam relies on JAX's usual promotion.
@pytest.fixture(scope="module")
def flow():
    with jax.numpy_dtype_promotion("standard"):
        return jko_flow(
            jax.random.key(3),
            jax.random.normal(KEY, (4000, 1)),
            kl_to_density(lambda y: -jnp.sum((y - 2) ** 2) / 2 / 0.5),
            stepsize=0.1,
            steps=5,
            map_model=Affine(jnp.ones(1), jnp.zeros(1)),
            critic=quadratic(),
            iterations=60,
            batch_size=256,
            map_optimiser=optax.adam(0.01),
            critic_optimiser=optax.adam(0.02),
        )


def test_the_flow_follows_the_exact_law(flow):
    one = jnp.eye(1)
    mean, variance = ornstein_uhlenbeck(
        jnp.zeros(1), one, jnp.full(1, 2.0), 0.5 * one, time=0.5
    )
    # Steps of 0.1 at a rate of 2 contract by 1 / 1.2, not by exp(-0.2): 2 (1 - 1.2^-5).
    assert abs(float(flow.particles.mean()) - 2 * (1 - 1.2**-5)) < 0.1
    assert abs(float(flow.particles.mean() - mean[0])) < 0.2
    assert abs(float(flow.particles.var() - variance[0, 0])) < 0.15


def test_the_result_moves_new_particles_and_certifies(flow):
    start = jax.random.normal(KEY, (4000, 1))
    np.testing.assert_allclose(flow.push(start), flow.particles, rtol=1e-12)
    certificate = flow.certificate
    assert not certificate.proof
    assert float(certificate.details["descents"]) == 1
    # Above nothing: the divergence cannot be below -log of the target's total mass.
    exact_floor = -0.5 * np.log(2 * np.pi * 0.5)
    assert float(certificate.value) > exact_floor - 0.05
    assert float(certificate.value) < float(flow.values[0])


def test_bad_settings_are_refused_in_one_sentence():
    def call(**changes):
        x = changes.pop("particles", jnp.zeros((4, 1)))
        functional = changes.pop("functional", kl_to_samples(jnp.zeros((3, 1))))
        settings = dict(stepsize=0.1, steps=1, iterations=1, batch_size=2)
        return jko_flow(
            KEY,
            x,
            functional,
            map_model=Affine(jnp.ones(1), jnp.zeros(1)),
            critic=quadratic(),
            map_optimiser=optax.sgd(0.1),
            critic_optimiser=optax.sgd(0.1),
            **(settings | changes),
        )

    nowhere = kl_to_density(lambda y: jnp.log(jnp.sum(y**2)))
    for changes, message in (
        ({"stepsize": 0.0}, "`stepsize` must be positive"),
        ({"particles": jnp.zeros((0, 1))}, "`particles` must not be empty"),
        ({"particles": jnp.full((3, 1), jnp.nan)}, "`particles` must be finite"),
        ({"steps": 0}, "must be at least 1"),
        ({"inner": (3, 0)}, "must be at least 1"),
        ({"functional": nowhere}, "`functional` must be finite at the particles"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changes)
    with pytest.raises(ValueError, match="`power` must be above 1"):
        porous_medium(1.0)
    with pytest.raises(ValueError, match="`points` must not be empty"):
        jensen_shannon(jnp.zeros((0, 2)))
