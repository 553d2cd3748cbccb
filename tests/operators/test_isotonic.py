"""Isotonic regression against pooling by hand, scipy, and its own blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from varan.operators import isotonic_kl, isotonic_l2

fit = jax.jit(isotonic_l2)
entropic = jax.jit(isotonic_kl)
LENGTH = 13
numbers = st.lists(st.integers(-9, 9), min_size=LENGTH, max_size=LENGTH)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(numbers, st.lists(st.integers(1, 5), min_size=LENGTH, max_size=LENGTH))
def test_agrees_with_scipy_also_with_ties(values, weights):
    x, w = np.array(values, float), np.array(weights, float)
    expected = isotonic_regression(x, weights=w).x
    np.testing.assert_allclose(fit(x, w), expected, atol=1e-13)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(numbers, numbers)
def test_entropy_is_the_weighted_mean_in_logarithms(values, logarithms):
    x, y = np.array(values, float), np.array(logarithms, float)
    expected = isotonic_regression(np.exp(x - y), weights=np.exp(y)).x
    np.testing.assert_allclose(entropic(x, y), np.log(expected), atol=1e-12)


@pytest.mark.parametrize("length", [1, 3, 64])
def test_any_length(length):
    x = np.random.default_rng(length).standard_normal(length)
    for increasing in (True, False):
        got = isotonic_l2(jnp.array(x), increasing=increasing)
        expected = isotonic_regression(x, increasing=increasing).x
        np.testing.assert_allclose(got, expected, atol=1e-13)


def test_one_low_value_pools_all_before_it():
    x = jnp.arange(32.0).at[-1].set(-1000.0)
    np.testing.assert_allclose(isotonic_l2(x), jnp.mean(x), rtol=1e-14)


def test_entropy_takes_logarithms_of_any_size():
    x = jnp.array([800.0, -900.0, -901.0, 5.0])
    v = isotonic_kl(x)
    expected = 800.0 - np.log(3.0)
    # The first entry outweighs the next by all digits; the last joins them too.
    np.testing.assert_allclose(v, expected - np.log(4 / 3), rtol=1e-14)
    v = isotonic_kl(x[1:] - 1e4)
    expected = -10900.0 + np.log((1 + np.exp(-1.0)) / 2)
    np.testing.assert_allclose(v[:2], expected, rtol=1e-14)


def test_decreasing_entropy_mirrors():
    x, y = (jnp.array(v) for v in np.random.default_rng(0).standard_normal((2, 9)))
    mirrored = isotonic_kl(x[::-1], y[::-1])[::-1]
    np.testing.assert_allclose(isotonic_kl(x, y, increasing=False), mirrored)


def test_jacobian_averages_over_blocks():
    jacobian = jax.jacrev(isotonic_l2)(jnp.array([1.0, 4.0, 2.0, 5.0]))
    expected = np.diag([1.0, 0.5, 0.5, 1.0])
    expected[1, 2] = expected[2, 1] = 0.5
    np.testing.assert_allclose(jacobian, expected, atol=1e-15)


def test_bad_input():
    with pytest.raises(ValueError, match="`weights` must be positive"):
        isotonic_l2(jnp.ones(2), jnp.zeros(2))
    with pytest.raises(ValueError, match="`x` must not be empty"):
        isotonic_kl(jnp.ones(0))
    assert jnp.any(jnp.isnan(isotonic_l2(jnp.array([1.0, jnp.nan, 0.0]))))
    assert jnp.any(jnp.isnan(isotonic_kl(jnp.array([1.0, jnp.nan, 0.0]))))
    assert jnp.any(jnp.isnan(fit(jnp.ones(2), -jnp.ones(2))))
