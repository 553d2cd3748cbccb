"""Intervals: known values, exact coverage by enumeration, and their order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom, binomtest

from varan.metrics import clopper_pearson, empirical_bernstein, hoeffding, wilson


def test_clopper_pearson_and_wilson_are_scipys():
    for hits, trials in ((0, 7), (3, 7), (7, 7), (120, 500)):
        for ours, name in ((clopper_pearson, "exact"), (wilson, "wilson")):
            theirs = binomtest(hits, trials).proportion_ci(0.99, method=name)
            found = ours(hits, trials, confidence=0.99)
            np.testing.assert_allclose(found, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("trials", [5, 23])
def test_clopper_pearson_covers_every_probability(trials):
    """Coverage summed over all outcomes, so no sampling is involved."""
    hits = np.arange(trials + 1)
    low, high = map(np.asarray, clopper_pearson(hits, trials, confidence=0.9))
    for p in np.linspace(0.01, 0.99, 25):
        inside = (low <= p) & (p <= high)
        assert binom.pmf(hits, trials, p)[inside].sum() >= 0.9 - 1e-9


def test_bounded_means_are_covered_and_bernstein_is_shorter_at_small_variance():
    trials, p = 400, 0.01
    hits = np.arange(trials + 1)
    mean = jnp.asarray(hits / trials)
    variance = mean * (1 - mean) * trials / (trials - 1)
    outcomes = binom.pmf(hits, trials, p)
    for found in (
        hoeffding(mean, trials, confidence=0.9),
        empirical_bernstein(mean, variance, trials, confidence=0.9),
    ):
        inside = np.asarray((found.low <= p) & (p <= found.high))
        assert outcomes[inside].sum() >= 0.9
    short = empirical_bernstein(0.5, 1e-4, 10_000)
    long = hoeffding(0.5, 10_000)
    assert short.high - short.low < (long.high - long.low) / 4


def test_closed_forms_and_the_width():
    low, high = hoeffding(2.0, 50, width=3.0, confidence=0.9)
    half = 3 * np.sqrt(np.log(20) / 100)
    np.testing.assert_allclose([low, high], [2 - half, 2 + half], rtol=1e-12)
    low, high = empirical_bernstein(2.0, 0.25, 50, width=3.0, confidence=0.9)
    half = np.sqrt(0.5 * np.log(40) / 50) + 7 * np.log(40) / 49
    np.testing.assert_allclose([low, high], [2 - half, 2 + half], rtol=1e-12)


def test_they_compile_but_for_the_exact_one():
    compiled = jax.jit(lambda k, n: wilson(k, n))(jnp.asarray(3), jnp.asarray(7))
    np.testing.assert_allclose(compiled, wilson(3, 7), rtol=1e-12)
    jax.jit(hoeffding)(0.3, 10)
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(clopper_pearson)(3, 7)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: clopper_pearson(8, 7), "between 0 and `trials`"),
        (lambda: clopper_pearson(0, 0), "`trials` must be at least 1"),
        (lambda: clopper_pearson(1, 7, confidence=1.0), "`confidence` must lie"),
        (lambda: wilson(-1, 7), "between 0 and `trials`"),
        (lambda: hoeffding(float("nan"), 7), "`mean` must be finite"),
        (lambda: hoeffding(0.5, 7, width=0.0), "`width` must be positive"),
        (lambda: hoeffding(0.5, 0), "`trials` must be at least 1"),
        (lambda: empirical_bernstein(0.5, 0.1, 1), "`trials` must be at least 2"),
        (lambda: empirical_bernstein(0.5, -0.1, 9), "`variance` must not be negative"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
