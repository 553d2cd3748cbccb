"""One-dimensional total variation against its dual conditions and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.operators import isotonic_l2, prox_tv1d

denoise = jax.jit(prox_tv1d)
LENGTH = 12


def check_optimal(x, weight, u):
    """u = x - D'z with |z| <= weight, and at the bound where u jumps."""
    flow = np.cumsum(x - u)
    assert abs(flow[-1]) < 1e-10
    flow, jumps = -flow[:-1], np.diff(u)
    assert np.all(np.abs(flow) <= weight + 1e-10)
    moving = np.abs(jumps) > 1e-12
    np.testing.assert_allclose(
        flow[moving], (np.sign(jumps) * weight)[moving], atol=1e-10
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-9, 9), min_size=LENGTH, max_size=LENGTH),
    st.lists(st.integers(0, 8), min_size=LENGTH - 1, max_size=LENGTH - 1),
)
def test_optimal_also_with_ties_and_zero_weights(values, weights):
    x, weight = np.array(values, float), np.array(weights, float) / 2
    check_optimal(x, weight, np.asarray(denoise(x, weight)))


@pytest.mark.parametrize("weight", [0.01, 1.0, 30.0])
def test_long_signals(weight):
    x = np.cumsum(np.random.default_rng(0).standard_normal(600)) + 1e3
    check_optimal(x, np.full(599, weight), np.asarray(denoise(x, weight)))


def test_extremes():
    x = jnp.array([3.0, -1.0, 2.0, 7.0])
    assert jnp.all(prox_tv1d(x, 0.0) == x)
    np.testing.assert_allclose(prox_tv1d(x, 100.0), 2.75)
    np.testing.assert_allclose(prox_tv1d(x[:1], 1.0), x[:1])


def test_falling_signal_is_the_isotonic_fit_when_rising_is_free():
    # With every jump down forbidden by its price and none up, both problems agree
    # only on a signal that falls: the mean.
    x = -jnp.arange(6.0)
    np.testing.assert_allclose(prox_tv1d(x, 50.0), isotonic_l2(x), atol=1e-12)


def test_symmetries_and_firm_nonexpansiveness():
    x, y = (jnp.array(v) for v in np.random.default_rng(1).standard_normal((2, 40)))
    u, v = denoise(x, 0.4), denoise(y, 0.4)
    np.testing.assert_allclose(denoise(x[::-1], 0.4), u[::-1], atol=1e-12)
    np.testing.assert_allclose(denoise(-x, 0.4), -u, atol=1e-12)
    np.testing.assert_allclose(denoise(4 * x + 7, 1.6), 4 * u + 7, atol=1e-12)
    assert (u - v) @ (x - y) >= (u - v) @ (u - v) - 1e-12


def test_batches_and_float32():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, 30)), jnp.float32)
    together = jax.vmap(lambda v: prox_tv1d(v, 0.5))(x)
    assert together.dtype == jnp.float32
    for row, u in zip(x, together, strict=True):
        np.testing.assert_allclose(u, prox_tv1d(row, 0.5), atol=1e-6)
        wide = prox_tv1d(row.astype(jnp.float64), 0.5)
        np.testing.assert_allclose(u, wide, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="`weight` must have shape"):
        prox_tv1d(jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match="`weight` must not be negative"):
        prox_tv1d(jnp.ones(3), -1.0)
    assert jnp.all(jnp.isnan(denoise(jnp.ones(3), -1.0)))
    assert jnp.any(jnp.isnan(denoise(jnp.array([1.0, jnp.nan, 0.0]), 1.0)))
