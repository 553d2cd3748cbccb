"""Losses for long tails: what they are when nothing is imbalanced, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import drw_weights, ldam, vs

LOGITS = jax.random.normal(jax.random.key(0), (6, 3))
LABELS = jnp.array([0, 1, 2, 0, 2, 1])
COUNTS = np.array([160, 40, 10])


def plain(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)


def test_margins_by_hand():
    margins = 0.5 * (10 / COUNTS) ** 0.25
    lowered = np.array(LOGITS)
    lowered[np.arange(6), LABELS] -= margins[np.asarray(LABELS)]
    expected = plain(jnp.asarray(30 * lowered))
    np.testing.assert_allclose(ldam(LOGITS, LABELS, COUNTS), expected, rtol=1e-12)


def test_without_margin_it_is_cross_entropy_of_scaled_logits():
    found = ldam(LOGITS, LABELS, COUNTS, max_margin=0.0, scale=7.0)
    np.testing.assert_allclose(found, plain(7 * LOGITS), rtol=1e-12)


def test_vector_scaling_by_hand():
    found = vs(LOGITS, LABELS, COUNTS, gamma=0.3, tau=2.0)
    logits = LOGITS / (160 / COUNTS)[None] ** 0.3 + 2 * np.log(COUNTS / 210)[None]
    np.testing.assert_allclose(found, plain(logits), rtol=1e-12)


def test_vector_scaling_contains_cross_entropy():
    found = vs(LOGITS, LABELS, COUNTS, gamma=0.0, tau=0.0)
    np.testing.assert_allclose(found, plain(LOGITS), rtol=1e-12)
    # Equal classes shift all logits alike.
    even = vs(LOGITS, LABELS, np.full(3, 5))
    np.testing.assert_allclose(even, plain(LOGITS), rtol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-12])
def test_weights_sum_to_the_classes(beta):
    weights = drw_weights(COUNTS, beta)
    np.testing.assert_allclose(weights.sum(), 3)
    assert np.all(np.diff(weights) >= 0)
    np.testing.assert_allclose(drw_weights(np.full(4, 9), beta), 1)


def test_weights_between_equal_and_inverse_counts():
    np.testing.assert_allclose(drw_weights(COUNTS, 0.0), 1)
    inverse = 3 / COUNTS / np.sum(1 / COUNTS)
    np.testing.assert_allclose(drw_weights(COUNTS, 1 - 1e-12), inverse, rtol=1e-6)
    by_hand = 0.1 / (1 - 0.9**COUNTS)
    np.testing.assert_allclose(drw_weights(COUNTS, 0.9), 3 * by_hand / by_hand.sum())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ldam(LOGITS, LABELS, np.array([1, 0, 0])), "none of class 1, 2"),
        (lambda: ldam(LOGITS, LABELS, COUNTS, scale=0.0), "`scale` must be positive"),
        (lambda: ldam(LOGITS, LABELS, COUNTS, max_margin=-1.0), "`max_margin` must"),
        (lambda: vs(LOGITS, LABELS, COUNTS[:2]), "one column a class"),
        (lambda: vs(LOGITS, LABELS, COUNTS, tau=-1.0), "`tau` must not be negative"),
        (lambda: drw_weights(COUNTS, 1.0), "`beta` must lie in"),
        (lambda: drw_weights(np.array([0, 3])), "none of class 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
