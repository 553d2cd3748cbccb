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
