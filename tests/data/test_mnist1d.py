"""MNIST-1D: the recipe's parts, its moments, and how hard it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from varan.data import _mnist1d, mnist1d

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def drawn():
    signals, labels = mnist1d(KEY, 3000)
    return np.asarray(signals), np.asarray(labels)


def test_standardised_balanced_and_shuffled(drawn):
    signals, labels = drawn
    assert signals.shape == (3000, 40) and signals.dtype == np.float64
    assert abs(signals.mean()) < 1e-10 and abs(signals.std() - 1) < 1e-10
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 300))
    assert len(set(labels[:20].tolist())) > 3


def test_the_key_decides(drawn):
    again, _ = mnist1d(KEY, 3000)
    other, _ = mnist1d(jax.random.key(1), 3000)
    np.testing.assert_array_equal(again, drawn[0])
    assert not np.array_equal(other, drawn[0])


def test_as_hard_as_published(drawn):
    # Table 1: a linear model 32 %; a nearest neighbour is far better than chance.
    signals, labels = drawn
    linear = LogisticRegression(max_iter=2000).fit(signals[:2400], labels[:2400])
    assert 0.25 < linear.score(signals[2400:], labels[2400:]) < 0.42
    near = KNeighborsClassifier(1).fit(signals[:2400], labels[:2400])
    assert near.score(signals[2400:], labels[2400:]) > 0.42


def test_curves_begin_and_end_at_zero_with_one_deviation():
    curves = _mnist1d._templates()
    np.testing.assert_allclose(curves[:, [0, -1]], 0, atol=1e-15)
    np.testing.assert_allclose(curves.std(1), 1 / 6)


def test_the_blur_is_scipys_gaussian_filter():
    noise = np.random.default_rng(0).standard_normal(72)
    expected = gaussian_filter1d(noise, 2.0, mode="reflect")
    np.testing.assert_allclose(_mnist1d._blur(jnp.asarray(noise)), expected, atol=1e-12)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="`samples` must be at least 1"):
        mnist1d(KEY, 0)


@pytest.fixture(scope="module")
def plain():
    return domain()


def domain(**settings):
    return np.asarray(mnist1d(KEY, 3000, standardise=False, **settings)[0])


def test_the_recipe_is_the_default():
    # To the last bit: the range's width must not become 0.3999...
    assert _mnist1d._centre_and_width("scale", (0.8, 1.2)) == (1.0, 0.4)
    assert _mnist1d._centre_and_width("shear", (-0.375, 0.375)) == (0.0, 0.75)


def test_without_standardising_the_same_up_to_two_numbers(drawn, plain):
    np.testing.assert_allclose(drawn[0], (plain - plain.mean()) / plain.std())
    assert plain.std() < 0.5


def test_domains_differ_in_what_they_name(plain):
    # Without noise and tilt the scale is a factor, and backwards is backwards.
    bare = {"correlated_noise": 0.0, "independent_noise": 0.0, "shear": (0, 0)}
    one, two = (domain(scale=(s, s), **bare) for s in (1, 2))
    np.testing.assert_allclose(two, 2 * one, atol=1e-12)
    # 18 of 72 points are 10 of 40 but for the ends that meet in the middle.
    still, moved = (domain(scale=(1, 1), shift=(s, s), **bare) for s in (0, 18))
    near = np.abs(np.roll(still, 10, axis=1) - moved).max(1)
    assert np.median(near) < 0.1 < np.abs(still - moved).max()
    np.testing.assert_array_equal(domain(reversal=1.0), plain[:, ::-1])
    flipped = np.any(domain(reversal=0.3) != plain, axis=1)
    assert 0.2 < flipped.mean() < 0.4  # three deviations are 0.1
    noisy = domain(independent_noise=1.0) - plain
    assert 0.5 < noisy.std() < 1.0
    # A tilt falls from the first point to the last.
    tilted = domain(shear=(1, 1)) - domain(shear=(0, 0))
    np.testing.assert_allclose(tilted[0], -np.linspace(-0.5, 0.5, 40), atol=1e-12)


def test_other_values_compile_nothing(plain):
    compiled = _mnist1d._draw._cache_size()
    domain(scale=(1.5, 2.0), shift=(10, 60), correlated_noise=0.1, shear=(0.5, 1.0))
    assert _mnist1d._draw._cache_size() == compiled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (1.2, 0.8)}, "`scale` must be"),
        ({"shift": (3, 1)}, "`shift` must be"),
        ({"correlated_noise": -0.1}, "`correlated_noise` must not be negative"),
        ({"reversal": 1.5}, "`reversal` must be a probability"),
    ],
)
def test_impossible_domains_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mnist1d(KEY, 10, **settings)
