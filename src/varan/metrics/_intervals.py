"""Confidence intervals of a mean from samples that hold at every sample size.

`clopper_pearson`, `hoeffding` and `empirical_bernstein` cover with at least their
confidence whatever the distribution, so a statement built on them is a proof up to
that confidence; `wilson` covers about as often as it says and is shorter. Several
intervals hold at once with confidence `1 - alpha` if each has `1 - alpha / number`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Int

from ..core._checks import check_finite, check_positive, is_traced


class Interval(NamedTuple):
    """Two numbers between which a mean lies, with the confidence asked for.

    Args:
        low: The lower end.
        high: The upper end.

    Example:
        >>> from varan.metrics import wilson
        >>> low, high = wilson(8, 10)
        >>> round(float(low), 2), round(float(high), 2)
        (0.49, 0.94)
    """

    low: Float[Array | np.ndarray, ...]
    high: Float[Array | np.ndarray, ...]


def clopper_pearson(
    successes: Int[Array, ...] | int,
    trials: Int[Array, ...] | int,
    *,
    confidence: float = 0.95,
) -> Interval:
    """The exact interval of a probability, from how often it happened.

    Each end leaves out half of what the confidence leaves; a one-sided bound of the
    same confidence is an end at `2 * confidence - 1`. Computed on the host and returned
    as NumPy arrays in float64: rounded to float32 an end might cover less.

    Args:
        successes: How often, 0 .. `trials`; any shape.
        trials: How often it was tried, at least 1.
        confidence: Of the interval, in (0, 1).

    Returns:
        The `Interval`, inside [0, 1].

    Raises:
        ValueError: No trials, more successes than trials, or a confidence outside
            (0, 1).
        TypeError: Under a transformation: the interval is that of observed counts.

    Example:
        >>> from varan.metrics import clopper_pearson
        >>> low, high = clopper_pearson(0, 100)
        >>> float(low), round(float(high), 4)
        (0.0, 0.0362)

    Source: C. J. Clopper and E. S. Pearson, 1934, "The use of confidence or fiducial
        limits illustrated in the case of the binomial", Biometrika 26.
    """
    from scipy.stats import beta

    if is_traced(successes) or is_traced(trials):
        raise TypeError(
            "clopper_pearson: counts must be known numbers (got a traced array). "
            "Call it outside jit and vmap; it takes whole arrays."
        )
    _check_counts("clopper_pearson", successes, trials)
    _check_confidence("clopper_pearson", confidence)
    hits, total = np.asarray(successes, float), np.asarray(trials, float)
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore"):  # a degenerate beta is NaN, replaced here
        low = np.where(hits > 0, beta.ppf(tail, hits, total - hits + 1), 0.0)
        high = np.where(hits < total, beta.isf(tail, hits + 1, total - hits), 1.0)
    return Interval(low, high)


def wilson(
    successes: Float[Array, ...] | Int[Array, ...] | int,
    trials: Float[Array, ...] | Int[Array, ...] | int,
    *,
    confidence: float = 0.95,
) -> Interval:
    """Wilson's interval of a probability: short, and right on average.

    Args:
        successes: How often, 0 .. `trials`; any shape.
        trials: How often it was tried; an interval of no trials is NaN.
        confidence: About how often such an interval covers, in (0, 1).

    Returns:
        The `Interval`.

    Raises:
        ValueError: More successes than trials, or a confidence outside (0, 1).

    Example:
        >>> from varan.metrics import wilson
        >>> [round(float(v), 3) for v in wilson(50, 100)]
        [0.404, 0.596]

    Source: E. B. Wilson, 1927, "Probable inference, the law of succession, and
        statistical inference", Journal of the American Statistical Association 22.
    """
    _check_confidence("wilson", confidence)
    _check_counts("wilson", successes, trials, least=0)
    n = jnp.asarray(trials, jnp.result_type(float))
    rate = jnp.asarray(successes, n.dtype) / n
    z = ndtri(jnp.asarray((1 + confidence) / 2, n.dtype))
    middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    spread = jnp.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    half = z * spread / (1 + z**2 / n)
    return Interval(middle - half, middle + half)


def hoeffding(
    mean: Float[Array, ...] | float,
    trials: int | Int[Array, ""],
    *,
    width: float = 1.0,
    confidence: float = 0.95,
) -> Interval:
    """Hoeffding's interval of a bounded variable's mean.

    Half its length is `width sqrt(log(2 / alpha) / (2 trials))`.

    Args:
        mean: Of the samples; any shape, one interval an entry.
        trials: Independent samples behind it, at least 1.
        width: Length of the range of the variable, positive.
        confidence: `1 - alpha`, in (0, 1).

    Returns:
        The `Interval`, not cut to the range.

    Raises:
        ValueError: A mean that is not finite, no trials, a width that is not positive,
            or a confidence outside (0, 1).

    Example:
        >>> from varan.metrics import hoeffding
        >>> [round(float(v), 3) for v in hoeffding(0.5, 1000)]
        [0.457, 0.543]

    Source: W. Hoeffding, 1963, "Probability inequalities for sums of bounded random
        variables", Journal of the American Statistical Association 58.
    """
    mean, n = _check_samples("hoeffding", mean, trials, 1, width, confidence)
    half = width * jnp.sqrt(_log_term(confidence, n) / (2 * n))
    return Interval(mean - half, mean + half)


def empirical_bernstein(
    mean: Float[Array, ...] | float,
    variance: Float[Array, ...] | float,
    trials: int | Int[Array, ""],
    *,
    width: float = 1.0,
    confidence: float = 0.95,
) -> Interval:
    """The interval of a bounded variable's mean that uses its sample variance.

    Half its length is `sqrt(2 v log(4 / alpha) / n) + 7 w log(4 / alpha) / (3 (n - 1))`
    with `v` the variance and `w` the width: far shorter than `hoeffding` where the
    variance is small. (The theorem is one-sided with `log(2 / alpha)`; either side
    gets half of what is left out.)

    Args:
        mean: Of the samples; any shape, one interval an entry.
        variance: Of the samples, with `n - 1` below; the shape of `mean`.
        trials: Independent samples behind both, at least 2.
        width: Length of the range of the variable, positive.
        confidence: `1 - alpha`, in (0, 1).

    Returns:
        The `Interval`, not cut to the range.

    Raises:
        ValueError: A mean or variance that is not finite, a negative variance, fewer
            than two trials, a width that is not positive, or a confidence outside
            (0, 1).

    Example:
        >>> from varan.metrics import empirical_bernstein
        >>> [round(float(v), 3) for v in empirical_bernstein(0.5, 0.01, 1000)]
        [0.48, 0.52]

    Source: A. Maurer and M. Pontil, 2009, "Empirical Bernstein bounds and sample
        variance penalization", arXiv:0907.3740, theorem 4.
    """
    owner = "empirical_bernstein"
    mean, n = _check_samples(owner, mean, trials, 2, width, confidence)
    check_finite(owner, "variance", variance)
    variance = jnp.asarray(variance, mean.dtype)
    if not is_traced(variance) and bool(jnp.any(variance < 0)):
        raise ValueError(f"{owner}: `variance` must not be negative.")
    log = _log_term((1 + confidence) / 2, n)
    half = jnp.sqrt(2 * variance * log / n) + 7 * width * log / (3 * (n - 1))
    return Interval(mean - half, mean + half)


def _log_term(confidence, like):
    return jnp.log(2 / (1 - jnp.asarray(confidence, like.dtype)))


def _check_confidence(owner, confidence):
    if not is_traced(confidence) and not 0 < confidence < 1:
        raise ValueError(
            f"{owner}: `confidence` must lie between 0 and 1 (got {confidence})."
        )


def _check_counts(owner, successes, trials, least=1):
    if is_traced(successes) or is_traced(trials):
        return
    hits, total = np.asarray(successes), np.asarray(trials)
    if np.any(total < least):
        raise ValueError(
            f"{owner}: `trials` must be at least {least} (got {total.min()})."
        )
    if np.any(hits < 0) or np.any(hits > total):
        raise ValueError(f"{owner}: `successes` must lie between 0 and `trials`.")


def _check_samples(owner, mean, trials, least, width, confidence):
    _check_confidence(owner, confidence)
    check_finite(owner, "mean", mean)
    check_positive(owner, "width", width)
    if not is_traced(trials) and trials < least:
        raise ValueError(f"{owner}: `trials` must be at least {least} (got {trials}).")
    mean = jnp.asarray(mean)
    if not jnp.issubdtype(mean.dtype, jnp.floating):
        mean = mean.astype(jnp.result_type(float))
    return mean, jnp.asarray(trials, mean.dtype)
