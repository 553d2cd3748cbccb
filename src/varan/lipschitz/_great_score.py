"""How robust a classifier is on average over what a generator draws: GREAT score.

A sample's score is `sqrt(pi / 2)` times the lead of its class over the next one, both
squashed into [0, 1]; the mean over a generator's samples ranks classifiers without an
attack, from their outputs alone. The mean is known up to Hoeffding's interval. That
the score bounds a sample's smallest perturbation from below is not true in general:
a classifier that is sure of everything has the highest score however near its boundary
lies. With a Lipschitz constant of the classifier there is a certified relative.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..core import Certificate
from ..core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_positive,
    check_shape,
    is_traced,
)
from ..metrics import Interval, hoeffding

Squash = Literal["softmax", "sigmoid", "softmax_of_sigmoid", "sigmoid_of_softmax"]
_SQUASHES = ("softmax", "sigmoid", "softmax_of_sigmoid", "sigmoid_of_softmax")
_MOST = math.sqrt(math.pi / 2)  # the score of a lead of 1
_COMPARED = 512  # samples whose mutual distances are computed
_GRID = (20_000, 1e-4)  # temperatures: how many, and their distance


class GreatScore(eqx.Module):
    """A GREAT score, what is known about it, and what is certified instead.

    Args:
        mean: Of the samples' scores, in [0, sqrt(pi / 2)].
        interval: Where the generator's mean lies, with probability `1 - delta`.
        per_sample: Each sample's score; 0 where misclassified.
        reach: The mean distance from a sample to the nearest drawn one with another
            prediction (0 where misclassified): the mean smallest perturbation is below.
        certificate: An estimate.
        radii: Certified l2 radius of each sample, if `lipschitz` was given.
        certified: The proof of their mean, if `lipschitz` was given.
    """

    mean: Float[Array, ""]
    interval: Interval
    per_sample: Float[Array, " samples"]
    reach: Float[Array, ""]
    certificate: Certificate
    radii: Float[Array, " samples"] | None
    certified: Certificate | None

    @property
    def kind(self) -> str:
        """Of the score itself: always `"estimate"`."""
        return "estimate"

    def __str__(self) -> str:
        lines = [str(self.certificate)]
        return "\n".join(
            lines if self.certified is None else [*lines, str(self.certified)]
        )


def great_score(
    predict: Callable[[Float[Array, "samples ..."]], Float[Array, "samples classes"]],
    sampler: Callable[[PRNGKeyArray, int], tuple[Array, Int[Array, " samples"]]],
    *,
    key: PRNGKeyArray,
    samples: int = 500,
    squash: Squash | None = "softmax",
    temperature: float = 1.0,
    delta: float = 0.05,
    lipschitz: float | Float[Array, "classes classes"] | None = None,
) -> GreatScore:
    """The mean score of a classifier over samples of a conditional generator.

    One evaluation of `predict`, which may be any Python callable, such as a service
    that shows nothing but its outputs. The score is an estimate that ranks; it is
    warned of where the samples themselves refute it as a bound.

    Args:
        predict: Outputs of a batch: logits, or numbers in [0, 1] without `squash`.
        sampler: Draws samples and the classes that they were drawn for: from a key and
            a number to `(x, y)`. `y` must not be the classifier's own prediction.
        key: Randomness of the samples.
        samples: How many, at least 1; 500 is the paper's.
        squash: How outputs come into [0, 1]: `"softmax"` or `"sigmoid"` at
            `temperature`, either of the other one at temperature 1, or `None`.
        temperature: That outputs are divided by, positive; see `calibrate_temperature`.
        delta: Probability that the interval misses, in (0, 1).
        lipschitz: An l2 Lipschitz constant of `predict` (before squashing), or one for
            each difference `z_i - z_j` of its outputs, on a convex set with all inputs
            in question: from `local_lipschitz`, or known by construction.

    Returns:
        A `GreatScore`; with `lipschitz`, each sample's certified radius besides.

    Raises:
        ValueError: Fewer than two classes or one sample, labels out of range, outputs
            that are not finite or, without `squash`, outside [0, 1], a number out of
            range.
        TypeError: Labels that are not integers.

    Warns:
        UserWarning: If the score exceeds `reach` on the same samples: there it is no
            lower bound of the smallest perturbations, not even on average.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import great_score
        >>> def sampler(key, n):
        ...     y = jnp.arange(n) % 2
        ...     return 4.0 * y[:, None] - 2 + 0.1 * jax.random.normal(key, (n, 1)), y
        >>> predict = lambda x: jnp.concatenate([-x, x], 1)
        >>> key = jax.random.key(0)
        >>> found = great_score(predict, sampler, key=key, lipschitz=2**0.5)
        >>> round(float(found.mean), 1), round(float(found.certified.value), 1)
        (1.2, 2.0)

    Source: Z. Li, P.-Y. Chen and T.-Y. Ho, 2024, "GREAT score: global robustness
        evaluation of adversarial perturbation using generative models",
        arXiv:2304.09875, equation 3 and algorithm 1; the certified radius: Y. Tsuzuku,
        I. Sato and M. Sugiyama, 2018, arXiv:1802.04034, proposition 1.

    Differences: The paper's theorem 1 states that each score is a certified radius.
        The smoothness that it draws on is of a Gaussian mean in a perturbation that
        all samples share, and says nothing of one sample: for `1[x > 0]` near 0 it is
        off by any factor. So the score is typed as an estimate here. The interval is
        Hoeffding's, shorter than by theorem 2.
    """
    owner = "great_score"
    check_positive(owner, "temperature", temperature)
    _check_share(owner, "delta", delta)
    if squash is not None:
        check_choice(owner, "squash", squash, _SQUASHES)
    if samples < 1:
        raise ValueError(f"{owner}: `samples` must be at least 1 (got {samples}).")
    x, y = (jnp.asarray(part) for part in sampler(key, samples))
    outputs = jnp.asarray(predict(x))
    _check_outputs(owner, outputs, y, samples, squash)
    y = y.astype(jnp.int32)
    numbers = [jnp.asarray(v, outputs.dtype) for v in (temperature, delta)]
    scores, mean, interval, reach, refuted = _measure(x, outputs, y, squash, *numbers)
    _warn_if_refuted(refuted, mean, reach)
    radii = certified = None
    if lipschitz is not None:
        radii, least = _radii(outputs, y, _constants(owner, lipschitz, outputs))
        certified = _certify(least)
    estimate = _estimate(mean, interval, reach)
    return GreatScore(mean, interval, scores, reach, estimate, radii, certified)


class Calibration(NamedTuple):
    """A temperature for `great_score`.

    Args:
        temperature: NaN where no temperature keeps the scores below the distances.
        correlation: Spearman's, of the classifiers' scores and distances, there.
        scores: Each classifier's score at that temperature.
        feasible: Whether there is such a temperature.
    """

    temperature: Float[Array, ""]
    correlation: Float[Array, ""]
    scores: Float[Array, " models"]
    feasible: Bool[Array, ""]


def calibrate_temperature(
    logits: Float[Array, "models samples classes"],
    labels: Int[Array, " samples"],
    distances: Float[Array, " models"],
    *,
    squash: Squash = "softmax_of_sigmoid",
    temperatures: Float[Array, " temperatures"] | None = None,
) -> Calibration:
    """The temperature at which scores rank some classifiers as an attack does.

    Of those at which no classifier's score exceeds its distance, the least with the
    highest rank correlation. Judge it on classifiers other than these. Costs the
    scores of all samples at every temperature.

    Args:
        logits: Of at least two classifiers on the same samples.
        labels: Classes that the samples were drawn for.
        distances: Mean smallest perturbation of the samples that an attack such as
            `varan.metrics.carlini_wagner` found for each classifier.
        squash: As for `great_score`; the default is the paper's choice.
        temperatures: Those tried, positive, increasing; by default 0.0001, 0.0002, ..
            2.

    Returns:
        A `Calibration`.

    Raises:
        ValueError: On a shape that does not fit, fewer than two classifiers or
            classes, numbers that are not finite or not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import calibrate_temperature
        >>> logits = jnp.array([[[1.0, 0.0]], [[3.0, 0.0]]])
        >>> found = calibrate_temperature(
        ...     logits, jnp.array([0]), jnp.array([0.7, 1.5]), squash="softmax",
        ...     temperatures=jnp.array([0.5, 0.8, 1.0]))
        >>> round(float(found.temperature), 1), float(found.correlation)
        (0.8, 1.0)

    Source: arXiv:2304.09875, section 3.5.
    """
    owner = "calibrate_temperature"
    check_shape(owner, "logits", logits, (None, None, None))
    check_shape(owner, "distances", distances, (logits.shape[0],))
    check_finite(owner, "distances", distances)
    check_choice(owner, "squash", squash, _SQUASHES)
    if logits.shape[0] < 2:
        raise ValueError(f"{owner}: `logits` must be of at least two classifiers.")
    _check_outputs(owner, logits[0], labels, logits.shape[1], squash)
    check_finite(owner, "logits", logits)
    if temperatures is None:
        count, apart = _GRID
        temperatures = apart * jnp.arange(1, count + 1, dtype=logits.dtype)
    check_nonempty(owner, "temperatures", temperatures)
    check_positive(owner, "temperatures", temperatures)
    distances, temperatures = (
        jnp.asarray(part, logits.dtype) for part in (distances, temperatures)
    )
    return _calibrate(logits, labels, distances, temperatures, squash)


def great_score_samples(
    epsilon: float,
    delta: float = 0.05,
    *,
    bound: Literal["hoeffding", "paper"] = "hoeffding",
) -> int:
    """How many samples bring the mean score within `epsilon` of the generator's.

    Args:
        epsilon: Half the length of the interval, positive, in units of the score.
        delta: Probability of a miss, in (0, 1).
        bound: `"hoeffding"`: `pi log(2 / delta) / (4 epsilon^2)`, or the paper's
            `32 e log(2 / delta) / epsilon^2`, 111 times as many.

    Returns:
        The number of samples.

    Raises:
        ValueError: On an `epsilon` that is not positive or a `delta` outside (0, 1).

    Example:
        >>> from varan.lipschitz import great_score_samples
        >>> great_score_samples(0.1), great_score_samples(0.1, bound="paper")
        (290, 32088)

    Source: arXiv:2304.09875, theorem 2; W. Hoeffding, 1963.
    """
    check_choice("great_score_samples", "bound", bound, ("hoeffding", "paper"))
    check_positive("great_score_samples", "epsilon", epsilon)
    _check_share("great_score_samples", "delta", delta)
    factor = math.pi / 4 if bound == "hoeffding" else 32 * math.e
    return math.ceil(factor * math.log(2 / delta) / epsilon**2)


# The score -------------------------------------------------------------------------


def _squashed(outputs, squash, temperature):
    if squash is None:
        return outputs
    inner = {"softmax_of_sigmoid": jax.nn.sigmoid, "sigmoid_of_softmax": jax.nn.softmax}
    outputs = inner.get(squash, lambda z: z)(outputs)
    if squash.startswith("softmax"):
        # The largest first: at a tiny temperature the rest may overflow downward only.
        outputs = outputs - jnp.max(outputs, -1, keepdims=True)
        return jax.nn.softmax(outputs / temperature)
    return jax.nn.sigmoid(outputs / temperature)


def _leads(outputs, labels):
    """The label's output less each other one; infinite at the label itself."""
    own = jax.nn.one_hot(labels, outputs.shape[-1], dtype=bool)
    mine = jnp.sum(jnp.where(own, outputs, 0), -1, keepdims=True)
    return jnp.where(own, jnp.inf, mine - outputs)


@partial(jax.jit, static_argnums=3)
def _measure(x, outputs, labels, squash, temperature, delta):
    leads = jnp.min(_leads(_squashed(outputs, squash, temperature), labels), -1)
    scores = _MOST * jnp.maximum(leads, 0)
    mean = jnp.mean(scores)
    low, high = hoeffding(mean, len(scores), width=_MOST, confidence=1 - delta)
    interval = Interval(jnp.maximum(low, 0), jnp.minimum(high, _MOST))
    some = slice(_COMPARED)
    reach = _reach(x[some], outputs[some], labels[some])
    return scores, mean, interval, reach, jnp.mean(scores[some]) > reach


def _reach(x, outputs, labels):
    """The mean distance to the nearest sample of another prediction."""
    flat, predicted = x.reshape(len(x), -1), jnp.argmax(outputs, 1).astype(jnp.int32)

    def one(point, own):
        squares = jnp.sum((flat - point[None]) ** 2, 1)
        return jnp.sqrt(jnp.min(jnp.where(predicted == own, jnp.inf, squares)))

    far = jax.lax.map(lambda a: one(*a), (flat, predicted), batch_size=32)
    return jnp.mean(jnp.where(predicted == labels, far, 0))


@partial(jax.jit, static_argnums=4)
def _calibrate(logits, labels, distances, temperatures, squash):
    def scores_at(temperature):
        squashed = _squashed(logits, squash, temperature)
        leads = jnp.min(_leads(squashed, labels[None]), -1)
        return _MOST * jnp.mean(jnp.maximum(leads, 0), 1)

    scores = jax.lax.map(scores_at, temperatures, batch_size=64)
    correlations = jax.vmap(lambda s: _spearman(s, distances))(scores)
    allowed = jnp.all(scores <= distances[None], 1) & jnp.isfinite(correlations)
    best = jnp.argmax(jnp.where(allowed, correlations, -jnp.inf))
    feasible = allowed[best]
    return Calibration(
        jnp.where(feasible, temperatures[best], jnp.nan),
        jnp.where(feasible, correlations[best], jnp.nan),
        scores[best],
        feasible,
    )


def _spearman(a, b):
    """Pearson's correlation of the ranks, equal entries sharing theirs; NaN if all."""
    ranks = [_ranks(v) - (len(v) - 1) / 2 for v in (a, b)]
    squares = [jnp.sum(rank**2) for rank in ranks]
    return jnp.sum(ranks[0] * ranks[1]) / jnp.sqrt(squares[0] * squares[1])


def _ranks(v):
    below = jnp.sum(v[None] < v[:, None], 1)
    others = jnp.sum(v[None] == v[:, None], 1) - 1
    return below.astype(v.dtype) + others.astype(v.dtype) / 2


# What is certified -----------------------------------------------------------------


def _constants(owner, lipschitz, outputs):
    """A Lipschitz constant of each difference of outputs."""
    classes = outputs.shape[1]
    given = jnp.asarray(lipschitz, outputs.dtype)
    if given.ndim == 0:
        check_positive(owner, "lipschitz", given)
        # |e_i - e_j| = sqrt(2).
        return jnp.full((classes, classes), math.sqrt(2) * given, outputs.dtype)
    check_shape(owner, "lipschitz", given, (classes, classes))
    if not is_traced(given):
        off = ~np.eye(classes, dtype=bool)
        check_positive(owner, "lipschitz", np.asarray(given)[off])
    return given


@jax.jit
def _radii(outputs, labels, constants):
    # Each of the few operations rounds by half an eps at most; inward by eight.
    inward = 1 - 8 * jnp.finfo(outputs.dtype).eps
    nearest = jnp.min(_leads(outputs, labels) / constants[labels], 1)
    radii = inward * jnp.maximum(nearest, 0)
    # Of a sum of n terms: n eps.
    return radii, (1 - len(radii) * (1 - inward) / 8) * jnp.mean(radii)


def _certify(least):
    return Certificate(
        "mean certified l2 radius",
        least,
        proof=True,
        statement="the smallest l2 perturbations of the drawn samples have at least "
        "this mean, if `lipschitz` bounds `predict` (whose rounding is not covered)",
    )


def _estimate(mean, interval, reach):
    return Certificate(
        "GREAT score",
        mean,
        proof=False,
        statement="the generator's mean score is in `interval` with probability 1 - "
        "delta; it ranks classifiers and is no lower bound of the smallest "
        "perturbations (pass `lipschitz` for one)",
        details={"low": interval.low, "high": interval.high, "reach": reach},
    )


def _warn_if_refuted(refuted, mean, reach):
    if is_traced(refuted) or not refuted:
        return
    warnings.warn(
        f"great_score: the score {float(mean):.3g} exceeds {float(reach):.3g}, the "
        "mean distance to the nearest sample that is classified otherwise: it is no "
        "lower bound of the smallest perturbations here. Pass `lipschitz` for one.",
        stacklevel=3,
    )


# Input -----------------------------------------------------------------------------


def _check_share(owner, name, value: Any) -> None:
    if not is_traced(value) and not 0 < value < 1:
        raise ValueError(f"{owner}: `{name}` must lie between 0 and 1 (got {value}).")


def _check_outputs(owner, outputs, labels, samples, squash) -> None:
    check_nonempty(owner, "labels", labels)
    check_shape(owner, "labels", labels, (samples,))
    check_shape(owner, "outputs", outputs, (samples, None))
    classes = outputs.shape[1]
    if classes < 2:
        raise ValueError(
            f"{owner}: `predict` must tell at least two classes apart (got {classes})."
        )
    check_finite(owner, "outputs", outputs)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{owner}: labels must be integers (got {labels.dtype}).")
    if not is_traced(labels):
        numbers = np.asarray(labels)
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"{owner}: labels must lie in 0 .. {classes - 1} (got {low} .. {high})."
            )
    if squash is None and not is_traced(outputs):
        numbers = np.asarray(outputs)
        low, high = float(numbers.min()), float(numbers.max())
        if low < 0 or high > 1:
            raise ValueError(
                f"{owner}: outputs must lie in [0, 1] without `squash` (got "
                f"[{low:.4g}, {high:.4g}]). Pass `squash` for logits."
            )
