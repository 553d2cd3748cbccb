"""Metrics of classifiers, from logits or scores and labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core._checks import check_nonempty, check_shape, is_traced


def accuracy(
    logits: Float[Array, "samples classes"], labels: Int[Array, " samples"]
) -> Float[Array, ""]:
    """The share of samples whose largest logit is the label's.

    Args:
        logits: One row a sample; of equal entries the first is taken.
        labels: 0 .. classes - 1.

    Returns:
        A number in [0, 1]; NaN if a logit is NaN.

    Raises:
        ValueError: On empty or ill-matched arrays, or a label out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.metrics import accuracy
        >>> logits = jnp.array([[2.0, 1.0], [0.0, 3.0]])
        >>> float(accuracy(logits, jnp.array([0, 0])))
        0.5
    """
    _check_logits("accuracy", logits, labels)
    right = (jnp.argmax(logits, 1) == labels).astype(logits.dtype)
    return jnp.where(jnp.any(jnp.isnan(logits)), jnp.nan, jnp.mean(right))


def negative_log_likelihood(
    logits: Float[Array, "samples classes"], labels: Int[Array, " samples"]
) -> Float[Array, ""]:
    """The mean of `-log softmax(logits)[label]`, in nats.

    Args:
        logits: One row a sample.
        labels: 0 .. classes - 1.

    Returns:
        A number at least 0: 0 for certain and right, `log(classes)` for uniform.

    Raises:
        ValueError: On empty or ill-matched arrays, or a label out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.metrics import negative_log_likelihood
        >>> value = negative_log_likelihood(jnp.zeros((3, 2)), jnp.array([0, 1, 1]))
        >>> round(float(value), 3)
        0.693
    """
    _check_logits("negative_log_likelihood", logits, labels)
    logs = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logs, labels[:, None], 1))


def expected_calibration_error(
    logits: Float[Array, "samples classes"],
    labels: Int[Array, " samples"],
    bins: int = 15,
) -> Float[Array, ""]:
    """How far confidence is from accuracy, averaged over bins of confidence.

    `sum_b (n_b / n) |accuracy_b - mean confidence_b|`, the confidence being the
    largest entry of the softmax and the bins cutting (0, 1] evenly. The estimate is
    biased upwards on few samples.

    Args:
        logits: One row a sample.
        labels: 0 .. classes - 1.
        bins: At least 1; 15 is the source's.

    Returns:
        A number in [0, 1]; NaN if a logit is NaN.

    Raises:
        ValueError: On empty or ill-matched arrays, a label out of range, or no bins.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.metrics import expected_calibration_error
        >>> sure = jnp.array([[50.0, 0.0], [50.0, 0.0]])
        >>> round(float(expected_calibration_error(sure, jnp.array([0, 1]))), 3)
        0.5

    Source: C. Guo, G. Pleiss, Y. Sun, K. Weinberger, 2017, "On calibration of modern
        neural networks", arXiv:1706.04599, equation 3.
    """
    _check_logits("expected_calibration_error", logits, labels)
    if bins < 1:
        raise ValueError(
            f"expected_calibration_error: `bins` must be at least 1 (got {bins})."
        )
    confidence = jnp.max(jax.nn.softmax(logits), 1)
    right = (jnp.argmax(logits, 1) == labels).astype(logits.dtype)
    # Bins are open below and closed above.
    place = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    gaps = jax.ops.segment_sum(right - confidence, place, num_segments=bins)
    error = jnp.sum(jnp.abs(gaps)) / labels.shape[0]
    return jnp.where(jnp.any(jnp.isnan(logits)), jnp.nan, error)


def roc_auc(
    scores: Float[Array, " samples"], labels: Int[Array, " samples"]
) -> Float[Array, ""]:
    """The area under the ROC curve: how often a positive outscores a negative.

    Over all pairs, a tie counting one half (the Mann-Whitney statistic), in
    O(n log n): the mean rank of the positives decides.

    Args:
        scores: The larger, the more positive.
        labels: 1 (or true) for positive, 0 for negative.

    Returns:
        A number in [0, 1]; NaN where a class is absent or a score is NaN.

    Raises:
        ValueError: On empty or ill-matched arrays, or labels other than 0 and 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.metrics import roc_auc
        >>> scores = jnp.array([0.1, 0.4, 0.4, 0.8])
        >>> round(float(roc_auc(scores, jnp.array([0, 0, 1, 1]))), 3)
        0.875

    Source: J. A. Hanley, B. J. McNeil, 1982, "The meaning and use of the area under a
        receiver operating characteristic (ROC) curve", Radiology 143.
    """
    check_nonempty("roc_auc", "scores", scores)
    check_shape("roc_auc", "scores", scores, (None,))
    check_shape("roc_auc", "labels", labels, scores.shape)
    _check_range("roc_auc", labels, 2)
    positive = labels.astype(scores.dtype)
    ordered = jnp.sort(scores)
    # Tied scores share the mean of their places.
    below = jnp.searchsorted(ordered, scores, side="left")
    upto = jnp.searchsorted(ordered, scores, side="right")
    rank = (below + upto + 1).astype(scores.dtype) / 2
    count = jnp.sum(positive)
    pairs = count * (labels.shape[0] - count)
    area = (jnp.sum(positive * rank) - count * (count + 1) / 2) / pairs
    return jnp.where(jnp.any(jnp.isnan(scores)), jnp.nan, area)


def _check_logits(owner, logits, labels):
    check_nonempty(owner, "logits", logits)
    check_shape(owner, "logits", logits, (None, None))
    check_shape(owner, "labels", labels, (logits.shape[0],))
    _check_range(owner, labels, logits.shape[1])


def _check_range(owner, labels, classes):
    if is_traced(labels):
        return
    low, high = int(jnp.min(labels)), int(jnp.max(labels))
    if low < 0 or high >= classes:
        raise ValueError(
            f"{owner}: `labels` must lie in 0 .. {classes - 1} (got {low} .. {high})."
        )
