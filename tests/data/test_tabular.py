"""Splitting, standardising and corrupting tables."""

import numpy as np
import pytest

from varan.data import (
    breast_cancer,
    flip_labels,
    long_tail,
    split,
    standardise,
)


def test_the_parts_are_a_permutation_of_the_whole():
    values = np.arange(20)
    parts = split([values, 10 * values], [5, 6], seed=1)
    together = np.concatenate([part[0] for part in parts])
    np.testing.assert_array_equal(np.sort(together), values)
    for a, b in parts:
        np.testing.assert_array_equal(10 * a, b)


def test_standardised_training_data_have_mean_zero_and_deviation_one():
    features, _ = breast_cancer()
    train, rest = standardise(features[:200], features[200:])
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(train.std(0), 1)
    assert rest.shape == (369, 30)


def test_a_constant_column_is_only_shifted():
    (train,) = standardise(np.ones((3, 1)))
    np.testing.assert_array_equal(train, np.zeros((3, 1)))


@pytest.mark.parametrize("classes", [2, 5])
def test_flips_exactly_the_fraction_and_always_to_another_class(classes):
    labels = np.random.default_rng(0).integers(0, classes, 100)
    noisy, flipped = flip_labels(labels, 0.4, seed=3)
    assert flipped.sum() == 40
    np.testing.assert_array_equal(noisy != labels, flipped)
    again, _ = flip_labels(labels, 0.4, seed=3)
    np.testing.assert_array_equal(noisy, again)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split([np.ones(3), np.ones(2)], [1], 0), "one length"),
        (lambda: split([np.ones(3)], [3], 0), "leave samples over"),
        (lambda: standardise(np.ones((0, 2))), "must not be empty"),
        (lambda: flip_labels(np.array([0, 1]), 1.5, 0), r"must lie in \[0, 1\]"),
        (lambda: flip_labels(np.ones(3), 0.5, 0), "two classes"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_tail_falls_geometrically():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 80))
    rows = np.arange(320)
    kept, classes = long_tail(rows, labels, 0.125, largest=64, seed=1)
    np.testing.assert_array_equal(np.bincount(classes), [64, 32, 16, 8])
    np.testing.assert_array_equal(labels[kept], classes)
    assert len(set(kept)) == len(kept)
    # Without imbalance all that the smallest class allows.
    np.testing.assert_array_equal(
        np.bincount(long_tail(rows, labels, 1.0, seed=1)[1]), [80] * 4
    )


@pytest.mark.parametrize(
    ("imbalance", "largest", "message"),
    [
        (0.0, None, "must lie in"),
        (1.5, None, "must lie in"),
        (0.5, 11, "may be up to 10"),
        (0.01, 10, "at least one each"),
    ],
)
def test_tails_that_the_data_do_not_have(imbalance, largest, message):
    labels = np.repeat(np.arange(3), 10)
    with pytest.raises(ValueError, match=message):
        long_tail(labels, labels, imbalance, largest=largest, seed=0)
