"""Losses for long-tailed classes: margins, scaled logits, weights for late training.

A network trained on few samples of a class scarcely learns it. These losses, each of
one formula, give such classes larger margins (`ldam`), smaller logits to begin with
(`vs`), or more weight (`drw_weights`). All are per sample; multiply by
`weights[labels]`, and divide by the sum of these.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ..core._checks import check_nonnegative, check_positive, is_traced


def ldam(
    logits: Float[Array, "samples classes"],
    labels: Int[Array, " samples"],
    counts: Int[Array, " classes"],
    *,
    max_margin: float = 0.5,
    scale: float = 30.0,
) -> Float[Array, " samples"]:
    """Cross-entropy with label-distribution-aware margins.

    The label's logit is lowered by a margin proportional to `count^(-1/4)`, and all
    are multiplied by a scale. Meant for logits that are cosines, of normalised features
    and normalised weights.

    Args:
        logits: One row a sample, in [-1, 1] as the authors have it.
        labels: 0 .. classes - 1.
        counts: Training samples of each class, positive.
        max_margin: The margin of the rarest class, not negative.
        scale: Positive.

    Returns:
        The loss of each sample.

    Raises:
        ValueError: On a class without samples, a negative margin, a scale that is not
            positive, or shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import ldam
        >>> cosines, counts = jnp.zeros((1, 2)), jnp.array([16, 1])
        >>> losses = [
        ...     float(ldam(cosines, jnp.array([c]), counts, scale=1.0)[0])
        ...     for c in (0, 1)]  # margins 1/4 and 1/2
        >>> [round(loss, 3) for loss in losses]
        [0.826, 0.974]

    Source: K. Cao, C. Wei, A. Gaidon, N. Arechiga and T. Ma, 2019, "Learning
        imbalanced datasets with label-distribution-aware margin loss",
        arXiv:1906.07413.
    """
    _check("ldam", logits, counts)
    check_nonnegative("ldam", "max_margin", max_margin)
    check_positive("ldam", "scale", scale)
    margins = jnp.asarray(counts, logits.dtype) ** -0.25
    margins = max_margin * margins / jnp.max(margins)
    is_label = labels[:, None] == jnp.arange(logits.shape[1])[None]
    lowered = jnp.where(is_label, logits - margins[None], logits)
    return _cross_entropy(scale * lowered, labels)


def vs(
    logits: Float[Array, "samples classes"],
    labels: Int[Array, " samples"],
    counts: Int[Array, " classes"],
    *,
    gamma: float | Float[Array, ""] = 0.3,
    tau: float | Float[Array, ""] = 1.0,
) -> Float[Array, " samples"]:
    """Vector scaling: cross-entropy of logits divided and shifted by class.

    Class c's logit becomes `logit / (n_max / n_c)^gamma + tau log(n_c / n)`. With both
    at zero it is cross-entropy; with `gamma = 0` the logit adjustment.

    Args:
        logits: One row a sample.
        labels: 0 .. classes - 1.
        counts: Training samples of each class, positive.
        gamma: How much rare classes' logits shrink, not negative.
        tau: How much they are lowered, not negative.

    Returns:
        The loss of each sample.

    Raises:
        ValueError: On a class without samples, negative `gamma` or `tau`, or shapes
            that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import vs
        >>> logits, labels = jnp.zeros((1, 2)), jnp.array([1])
        >>> round(float(vs(logits, labels, jnp.array([3, 1]))[0]), 3)  # -log(1 / 4)
        1.386

    Source: G. R. Kini, O. Paraskevas, S. Oymak and C. Thrampoulidis, 2021,
        "Label-imbalanced and group-sensitive classification under
        overparameterization", arXiv:2103.01550.
    """
    _check("vs", logits, counts)
    check_nonnegative("vs", "gamma", gamma)
    check_nonnegative("vs", "tau", tau)
    counts = jnp.asarray(counts, logits.dtype)
    divisors = (jnp.max(counts) / counts) ** gamma
    shifts = tau * jnp.log(counts / jnp.sum(counts))
    return _cross_entropy(logits / divisors[None] + shifts[None], labels)


def drw_weights(
    counts: Int[np.ndarray, " classes"], beta: float = 0.9999
) -> Float[Array, " classes"]:
    """Class weights by effective numbers of samples, for the last part of a training.

    `(1 - beta) / (1 - beta^n_c)`, brought to the sum C: from 1 for all (`beta = 0`) to
    the inverse of the counts (beta near 1). "Deferred": train with equal weights first.

    Args:
        counts: Training samples of each class, positive.
        beta: In [0, 1).

    Returns:
        The weights.

    Raises:
        ValueError: On a class without samples, or `beta` out of range.

    Example:
        >>> import numpy as np
        >>> from varan.sharpness import drw_weights
        >>> weights = drw_weights(np.array([900, 100]))
        >>> [round(float(weight), 2) for weight in weights]
        [0.21, 1.79]

    Source: Y. Cui, M. Jia, T.-Y. Lin, Y. Song and S. Belongie, 2019, "Class-balanced
        loss based on effective number of samples", arXiv:1901.05555; deferred:
        Cao et al., arXiv:1906.07413.
    """
    _check_counts("drw_weights", counts)
    if not 0 <= beta < 1:
        raise ValueError(f"drw_weights: `beta` must lie in [0, 1) (got {beta}).")
    sizes = jnp.asarray(counts, jnp.result_type(float))
    # Not 1 - beta^n: for beta near 1 that would be lost in rounding.
    effective = -jnp.expm1(sizes * (math.log(beta) if beta else -math.inf))
    weights = 1 / effective
    return weights * (weights.size / jnp.sum(weights))


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _check(owner, logits, counts):
    _check_counts(owner, counts)
    if logits.ndim != 2 or jnp.shape(counts) != logits.shape[1:]:
        raise ValueError(
            f"{owner}: `logits` must have one column a class, as `counts` has entries "
            f"(got shapes {logits.shape} and {jnp.shape(counts)})."
        )


def _check_counts(owner, counts):
    if is_traced(counts):
        return
    empty = np.flatnonzero(np.asarray(counts) < 1)
    if empty.size:
        raise ValueError(
            f"{owner}: every class must have samples (got none of class "
            f"{', '.join(map(str, empty))}). Leave such classes out."
        )
