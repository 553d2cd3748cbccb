"""Splitting, standardising and corrupting tables."""

import numpy as np
import pytest

from varan.data import breast_cancer, flip_labels, split, standardise


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
