"""Metrics of classifiers against scikit-learn and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from varan.metrics import (
    accuracy,
    expected_calibration_error,
    negative_log_likelihood,
    roc_auc,
)

LOGITS = jnp.asarray(np.random.default_rng(0).standard_normal((40, 3)))
LABELS = jnp.asarray(np.random.default_rng(1).integers(0, 3, 40))
area = jax.jit(lambda scores, labels: roc_auc(scores, labels))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    # Few values, so that most scores tie.
    scores=st.lists(st.integers(0, 4), min_size=12, max_size=12),
    flips=st.lists(st.booleans(), min_size=10, max_size=10),
)
def test_the_area_is_scikit_learns_also_with_ties(scores, flips):
    labels = np.array([0, 1, *flips], int)
    got = area(jnp.array(scores, float), jnp.asarray(labels))
    assert abs(float(got) - roc_auc_score(labels, scores)) < 1e-12


def test_the_area_of_one_class_and_of_nan_is_nan():
    scores = jnp.arange(12.0)
    assert bool(jnp.isnan(area(scores, jnp.ones(12, int))))
    labels = jnp.arange(12) % 2
    assert bool(jnp.isnan(area(scores.at[3].set(jnp.nan), labels)))
    assert float(area(scores, (scores > 5).astype(int))) == 1.0


def test_likelihood_is_scikit_learns_and_accuracy_by_hand():
    chances = np.asarray(jax.nn.softmax(LOGITS))
    expected = log_loss(LABELS, chances)
    assert abs(float(negative_log_likelihood(LOGITS, LABELS)) - expected) < 1e-12
    right = np.mean(np.argmax(chances, 1) == np.asarray(LABELS))
    assert abs(float(accuracy(LOGITS, LABELS)) - right) < 1e-12


@pytest.mark.parametrize("bins", [1, 7])
def test_calibration_error_by_hand(bins):
    chances = np.asarray(jax.nn.softmax(LOGITS))
    confidence = chances.max(1)
    right = chances.argmax(1) == np.asarray(LABELS)
    expected = 0.0
    for low in range(bins):
        held = (confidence > low / bins) & (confidence <= (low + 1) / bins)
        if held.any():
            gap = abs(right[held].mean() - confidence[held].mean())
            expected += held.mean() * gap
    got = expected_calibration_error(LOGITS, LABELS, bins)
    assert abs(float(got) - expected) < 1e-12


def test_nan_logits_give_nan():
    bad = LOGITS.at[0, 0].set(jnp.nan)
    for metric in (accuracy, negative_log_likelihood, expected_calibration_error):
        assert bool(jnp.isnan(metric(bad, LABELS)))


def test_float32_stays(float32):
    logits, labels = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS, jnp.int32)
    for metric in (accuracy, negative_log_likelihood, expected_calibration_error):
        assert metric(logits, labels).dtype == jnp.float32
    assert roc_auc(logits[:, 0], labels // 2).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy(jnp.zeros((0, 3)), jnp.zeros(0, int)), "must not be empty"),
        (lambda: accuracy(LOGITS, LABELS[:3]), r"`labels` must have shape \(40\)"),
        (lambda: negative_log_likelihood(LOGITS, LABELS + 1), r"in 0 \.\. 2"),
        (lambda: expected_calibration_error(LOGITS, LABELS, 0), "`bins` must be"),
        (lambda: roc_auc(LOGITS[:, 0], LABELS), r"in 0 \.\. 1"),
        (lambda: roc_auc(LOGITS, LABELS), r"`scores` must have shape \(any\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
