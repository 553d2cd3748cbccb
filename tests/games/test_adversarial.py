"""The least adversarial risk: programme, matching and brute force agree."""

from itertools import product

import numpy as np
import pytest

from varan.games import adversarial_ot_lower_bound


def sample(rng, n, share=0.3):
    y = (rng.uniform(size=n) < share).astype(int)
    return rng.standard_normal((n, 2)), y


def conflicts(X, y, epsilon):
    apart = np.linalg.norm(X[:, None] - X[None], axis=2)
    return (y[:, None] != y[None]) & (apart <= 2 * epsilon)


@pytest.mark.parametrize("epsilon", [0.0, 0.2, 0.5, 3.0])
def test_it_is_the_transport_programme(epsilon):
    ot = pytest.importorskip("ot")
    X, y = sample(np.random.default_rng(0), 40)
    bound = adversarial_ot_lower_bound(X, y, epsilon)
    cost = 1.0 - conflicts(X, y, epsilon)
    uniform = np.full(40, 1 / 40)
    D = ot.emd2(uniform, uniform, cost)
    np.testing.assert_allclose(bound.value, (1 - D) / 2, atol=1e-9)
    assert bound.proof


def test_it_is_the_best_of_all_classifiers():
    rng = np.random.default_rng(1)
    for _ in range(5):
        X, y = sample(rng, 9, 0.4)
        clash = conflicts(X, y, 0.4)
        # Which points a classifier gets right, robustly: no two of them in conflict.
        best = max(
            sum(kept)
            for kept in product((0, 1), repeat=9)
            if not np.any(clash & np.outer(kept, kept).astype(bool))
        )
        bound = adversarial_ot_lower_bound(X, y, 0.4)
        np.testing.assert_allclose(bound.value, 1 - best / 9, atol=1e-12)


def test_one_class_and_touching_points():
    X = np.array([[0.0], [1.0]])
    assert adversarial_ot_lower_bound(X, np.array([1, 1]), 9.0).value == 0
    # The adversary's ball is closed: a distance of exactly twice epsilon is a conflict.
    assert adversarial_ot_lower_bound(X, np.array([0, 1]), 0.5).value == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((3, 1)), np.array([0, 1]), 0.1), "`y` must have shape"),
        ((np.ones(3), np.array([0, 1, 1]), 0.1), "`X` must have shape"),
        ((np.ones((2, 1)), np.array([0, 2]), 0.1), "labels 0 and 1"),
        ((np.ones((2, 1)), np.array([0, 1]), -0.1), "`epsilon` must not be negative"),
        ((np.full((2, 1), np.nan), np.array([0, 1]), 0.1), "`X` must be finite"),
        ((np.ones((0, 1)), np.zeros(0, int), 0.1), "must not be empty"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        adversarial_ot_lower_bound(*arguments)
