"""Langevin chains have their targets' moments; the buffer keeps pairs together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.transport import ReplayBuffer, langevin

N, STEP = 20_000, 0.4
SCALES = np.array([1.0, 0.5])


@pytest.fixture(scope="module")
def runs():
    def run(metropolis):
        return langevin(
            jax.random.key(0),
            lambda y: -jnp.sum((y - 1) ** 2 / jnp.asarray(SCALES**2)[None], axis=1) / 2,
            jnp.zeros((N, 2)),
            stepsize=STEP,
            steps=60,
            metropolis=metropolis,
        )

    return {m: jax.jit(run, static_argnums=0)(m) for m in (False, True)}


def test_adjusted_chain_has_the_target_moments(runs):
    run = runs[True]
    # Five standard errors: of a mean scale / sqrt(N), of a variance sqrt(2 / N).
    error = 5 / np.sqrt(N)
    assert np.all(np.abs(run.samples.mean(0) - 1) < error * SCALES)
    assert np.all(np.abs(run.samples.var(0) / SCALES**2 - 1) < error * np.sqrt(2))
    assert 0.5 < float(run.acceptance) < 1
    assert bool(run.finite)


def test_unadjusted_chain_has_its_known_bias(runs):
    # On a Gaussian its law is Gaussian with variance v / (1 - s / (4 v)).
    variance = SCALES**2 / (1 - STEP / (4 * SCALES**2))
    error = 5 * np.sqrt(2 / N)
    assert np.all(np.abs(runs[False].samples.var(0) / variance - 1) < error)
    assert float(runs[False].acceptance) == 1


def test_too_long_a_step_is_seen():
    run = langevin(
        jax.random.key(0),
        lambda y: -1e3 * jnp.sum(y**2, axis=1),
        jnp.ones((3, 1)),
        stepsize=1.0,
        steps=200,
    )
    assert not bool(run.finite)


def test_buffer_draws_distinct_entries_and_keeps_pairs():
    entries = (jnp.arange(10), jnp.arange(10.0)[:, None] * 2)
    buffer = ReplayBuffer(entries)
    places, (x, y) = jax.jit(lambda b, k: b.draw(k, 6))(buffer, jax.random.key(1))
    assert len(set(np.asarray(places).tolist())) == 6
    np.testing.assert_array_equal(y[:, 0], 2.0 * x.astype(float))
    new = buffer.put(places, (x, y + 100))
    drawn = np.isin(np.arange(10), places)
    np.testing.assert_array_equal(np.asarray(new.entries[1][:, 0]) >= 100, drawn)
    np.testing.assert_array_equal(new.entries[0], entries[0])
    assert new.size == 10


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`stepsize` must be positive"):
        langevin(jax.random.key(0), jnp.sum, jnp.zeros((2, 1)), stepsize=0.0, steps=1)
    with pytest.raises(ValueError, match="`steps` be a positive integer"):
        langevin(jax.random.key(0), jnp.sum, jnp.zeros((2, 1)), stepsize=1.0, steps=0)
    with pytest.raises(ValueError, match="one leading axis"):
        ReplayBuffer((jnp.zeros(3), jnp.zeros(4)))
    with pytest.raises(ValueError, match="`count` must be within 1 and 3"):
        ReplayBuffer(jnp.zeros(3)).draw(jax.random.key(0), 4)


def test_a_log_density_of_the_whole_cloud_is_refused():
    with pytest.raises(ValueError, match="`log_density` must return one number a row"):
        langevin(
            jax.random.key(0),
            lambda y: -jnp.sum(y**2),
            jnp.zeros((3, 2)),
            stepsize=0.1,
            steps=2,
        )
