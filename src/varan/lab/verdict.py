"""Verdicts: whether a declared check held, over seeds, with its uncertainty.

A check names a quantity, a statistic over seeds and a threshold. *Held* means that the
whole 95 % interval of the statistic satisfies the relation, *not held* that none of it
does, *inconclusive* that the threshold lies inside. For `worst` the interval is the
range of the measurements, because the check speaks of every seed. `confidence_interval`
has the intervals of `mean` and `median`, made for the few seeds that a row has, and the
rates at which they were found to err.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from scipy.special import bdtr, stdtrit

from .catalogue import Check, Row

Outcome = Literal["held", "not held", "inconclusive"]

LEVEL = 0.95
_TAIL = (1 - LEVEL) / 2
# The interval is a function of the measurements alone: the same store always gives the
# same verdict.
_BOOTSTRAP_SEED = 0
_RESAMPLES = 9998
# Up to here all resamples are enumerated (5**5 of them).
_ENUMERATED = 5
# From here on the range covers a median in about 95 of 100 cases (93.75 at least).
_FEW = 5


@dataclass(frozen=True)
class CheckVerdict:
    """What one check came to.

    Args:
        check: The check as declared.
        threshold: The threshold that was applied (a scale may have its own).
        value: The statistic over seeds; for `worst` the measurement farthest on the
            wrong side.
        interval: The interval over seeds; `None` with a single seed.
        outcome: Held, not held or inconclusive.
        values: The measurements, in the order of the seeds.
    """

    check: Check
    threshold: float | tuple[float, float]
    value: float
    interval: tuple[float, float] | None
    outcome: Outcome
    values: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {
            "name": self.check.name,
            "quantity": self.check.quantity,
            "statistic": self.check.statistic,
            "relation": self.check.relation,
            "threshold": self.threshold,
            "source": self.check.source,
            "value": self.value,
            "interval": self.interval,
            "outcome": self.outcome,
            "values": self.values,
        }


@dataclass(frozen=True)
class RowVerdict:
    """What a row came to: held when every check held, not held when one did not.

    Args:
        row: The row.
        scale: The scale it was run at.
        seeds: The seeds measured.
        outcome: The row's verdict; `None` when the scale decides no check.
        checks: The verdict of each check.
        remarks: What a reader must know: few seeds, checks left out.
    """

    row: Row
    scale: str
    seeds: tuple[int, ...]
    outcome: Outcome | None
    checks: tuple[CheckVerdict, ...]
    remarks: tuple[str, ...]


def outcome_of(verdict: RowVerdict | None) -> str:
    """`held`, `not held`, `inconclusive`, `no check`; `failed` where none came about.

    Args:
        verdict: A row's verdict; `None` when a seed failed.
    """
    if verdict is None:
        return "failed"
    return verdict.outcome or "no check"


def judge(
    row: Row, scale: str, measured: Mapping[int, Mapping[str, float]]
) -> RowVerdict:
    """Decides the checks of a row from its measurements.

    Args:
        row: A built row.
        scale: The scale the measurements were taken at.
        measured: Seed to named numbers; every checked quantity must be there and
            finite.

    Returns:
        The verdict of the row and of each of its checks.

    Raises:
        ValueError: No seed, or a checked quantity that is absent or not a number.
    """
    if not measured:
        raise ValueError(f"{row.id}: no seed was measured, so there is no verdict.")
    checks = decided_checks(row, scale)
    for seed, numbers in sorted(measured.items()):
        problem = fault(row, scale, numbers)
        if problem:
            raise ValueError(f"{row.id}, seed {seed}: {problem}")
    seeds = tuple(sorted(measured))
    verdicts = tuple(
        judge_check(
            check,
            [float(measured[seed][check.quantity]) for seed in seeds],
            check.threshold_at(scale),
        )
        for check in checks
    )
    return RowVerdict(
        row,
        scale,
        seeds,
        _together([verdict.outcome for verdict in verdicts]),
        verdicts,
        tuple(_remarks(row, scale, seeds, len(checks))),
    )


def decided_checks(row: Row, scale: str) -> tuple[Check, ...]:
    """The checks that a scale decides: all, but for those not meant for `smoke`."""
    return tuple(check for check in row.checks if scale != "smoke" or check.smoke)


def fault(row: Row, scale: str, numbers: Mapping[str, float]) -> str | None:
    """What is wrong with one seed's numbers, in a sentence; `None` when nothing is.

    A checked quantity must be a number. Infinity is one: a baseline that diverged may
    well be infinitely worse.
    """
    for check in decided_checks(row, scale):
        if check.quantity not in numbers:
            have = ", ".join(sorted(numbers)) or "nothing"
            return (
                f"the experiment did not measure {check.quantity!r}, which the check "
                f"{check.name!r} needs (it measured {have})."
            )
        if math.isnan(numbers[check.quantity]):
            return f"the measured {check.quantity!r} is not a number (NaN)."
    return None


def judge_check(
    check: Check, values: Sequence[float], threshold: float | tuple[float, float]
) -> CheckVerdict:
    """Decides one check from its measurements, one a seed."""
    measured = tuple(values)
    if check.statistic == "worst":
        value, interval = _worst(check, measured, threshold)
        # Every seed must satisfy it: one that does not refutes it.
        outcome: Outcome = "held" if _satisfies(check, value, threshold) else "not held"
    else:
        value = _centre(np.asarray(measured), check.statistic)
        interval = None
        ends = (value, value)
        if len(measured) > 1:
            interval = ends = confidence_interval(measured, check.statistic)
        outcome = _side(check, ends, threshold)
    return CheckVerdict(check, threshold, value, interval, outcome, measured)


def confidence_interval(
    values: Sequence[float], statistic: Literal["mean", "median"]
) -> tuple[float, float]:
    """The 95 % interval of a mean or a median over few independent measurements.

    **Mean**: the percentile bootstrap, scaled. Resampling n values spreads their mean
    by the standard deviation without its factor sqrt(n / (n - 1)), and percentiles
    stand for normal quantiles where Student's are due: the plain interval covers the
    mean of five normal values in 84 cases of 100. Its two distances from the mean are
    therefore multiplied by sqrt(n / (n - 1)) t / z, with the 97.5 % quantiles t of
    Student (n - 1 degrees of freedom) and z of the normal distribution. From ten values
    on this is the expanded percentile interval of Hesterberg (2015); with fewer, that
    one cannot reach beyond the range of the measurements, as an interval must.

    **Median**: the innermost pair of order statistics that, whatever the distribution,
    leaves the median on each side of it with probability 2.5 % at most. For five values
    this is their range, the most that they say: 3.1 %. For fewer the range is scaled
    about the median like the interval of the mean.

    How often the whole interval lay (above, below) the truth, in per cent of 100000
    samples; it is how often a claim ">=" or "<=" that is just false would be called
    held:

    ==================  ==========  ==========  ==========  ==========
    measurements        n = 3       n = 5       n = 10      n = 20
    ==================  ==========  ==========  ==========  ==========
    mean, normal        2.6, 2.7    2.8, 2.7    2.4, 2.5    2.6, 2.6
    mean, Student 3     2.0, 2.0    2.2, 2.2    2.4, 2.5    2.8, 2.7
    mean, lognormal     0.3, 15.0   0.1, 16.8   0.2, 14.3   0.4, 12.1
    median, normal      4.0, 4.1    3.2, 3.1    1.0, 1.1    2.1, 2.2
    median, Student 3   3.9, 3.8    3.1, 3.2    1.0, 1.1    2.1, 2.0
    median, lognormal   3.2, 5.2    3.2, 3.1    1.0, 1.1    2.1, 2.2
    ==================  ==========  ==========  ==========  ==========

    No interval of a mean is right for every distribution: few skewed values are often
    without one from the long tail (of five lognormal values none exceeds the mean in 16
    samples of 100), and then the mean lies beyond all they show. A check on what is
    skewed should name the median.

    An infinite measurement counts as one that grows without bound: it leaves the mean
    unknown, and an order statistic as it is.

    Args:
        values: At least two measurements, their order without meaning.
        statistic: The statistic.

    Returns:
        The lower and the upper end; both equal the value when all measurements agree.

    Example:
        >>> from varan.lab.verdict import confidence_interval
        >>> confidence_interval([3.0, 1.0, 5.0, 2.0, 4.0], "median")
        (1.0, 5.0)

    Source:
        Tim Hesterberg, *What Teachers Should Know About the Bootstrap*, The American
        Statistician 69 (2015), arXiv 1411.5279.
    """
    data = np.sort(np.asarray(values, dtype=float))
    if data[0] == data[-1]:
        return float(data[0]), float(data[0])
    size = len(data)
    centre = _centre(data, statistic)
    if math.isnan(centre):  # infinities of both signs
        return -math.inf, math.inf
    if statistic == "median":
        rank = _rank(size)
        ends = float(data[rank]), float(data[-1 - rank])
        if size >= _FEW:
            return ends
    elif math.isinf(centre):
        return -math.inf, math.inf
    else:
        ends = _percentiles(data - centre)
        ends = centre + ends[0], centre + ends[1]
    return (_stretched(centre, ends[0], size), _stretched(centre, ends[1], size))


def _centre(data: np.ndarray, statistic: Literal["mean", "median"]) -> float:
    with np.errstate(invalid="ignore"):
        value = float(np.mean(data) if statistic == "mean" else np.median(data))
    # A sum's rounding may carry a mean past the largest measurement.
    return value if math.isnan(value) else min(max(value, np.min(data)), np.max(data))


def _percentiles(deviations: np.ndarray) -> tuple[float, float]:
    """The bootstrap distribution's 2.5 % and 97.5 % points, rounded outwards."""
    means = np.sort(_weights(len(deviations)) @ deviations)
    place = math.floor(_TAIL * (len(means) - 1))
    return float(means[place]), float(means[-1 - place])


@cache
def _weights(size: int) -> np.ndarray:
    """The share of each measurement in each resample.

    Half of what is drawn mirrors the other half, so that mirrored measurements have the
    mirrored interval.
    """
    if size <= _ENUMERATED:
        drawn = np.indices((size,) * size).reshape(size, -1).T
    else:
        rng = np.random.default_rng(_BOOTSTRAP_SEED)
        half = rng.integers(size, size=(_RESAMPLES // 2, size))
        drawn = np.concatenate([half, size - 1 - half])
    return np.stack([np.mean(drawn == place, axis=1) for place in range(size)], axis=1)


def _rank(size: int) -> int:
    """How many measurements lie below the lower end of a median's interval."""
    rank = 0
    while bdtr(rank + 1, size, 0.5) <= _TAIL:
        rank += 1
    return rank


def _stretched(centre: float, end: float, size: int) -> float:
    """An end of an interval, moved away from its centre as few measurements ask."""
    if end == centre:
        return end
    distance = end - centre
    if math.isinf(distance):
        return math.copysign(math.inf, distance)
    student = float(stdtrit(size - 1, 1 - _TAIL))
    normal = NormalDist().inv_cdf(1 - _TAIL)
    return centre + distance * student / normal * math.sqrt(size / (size - 1))


def _worst(
    check: Check, values: tuple[float, ...], threshold: float | tuple[float, float]
) -> tuple[float, tuple[float, float] | None]:
    low, high = min(values), max(values)
    interval = (low, high) if len(values) > 1 else None
    if check.relation == ">=":
        return low, interval
    if check.relation == "<=":
        return high, interval
    lower, upper = _bounds(threshold)
    return (low if lower - low > high - upper else high), interval


def _satisfies(
    check: Check, value: float, threshold: float | tuple[float, float]
) -> bool:
    return _side(check, (value, value), threshold) == "held"


def _side(
    check: Check,
    interval: tuple[float, float],
    threshold: float | tuple[float, float],
) -> Outcome:
    """On which side of the threshold an interval lies."""
    lower, upper = _region(check, threshold)
    low, high = interval
    if lower <= low and high <= upper:
        return "held"
    if high < lower or low > upper:
        return "not held"
    return "inconclusive"


def _region(
    check: Check, threshold: float | tuple[float, float]
) -> tuple[float, float]:
    if check.relation == "in":
        return _bounds(threshold)
    assert isinstance(threshold, float)
    return (threshold, math.inf) if check.relation == ">=" else (-math.inf, threshold)


def _bounds(threshold: float | tuple[float, float]) -> tuple[float, float]:
    assert isinstance(threshold, tuple)
    return threshold


def _together(outcomes: Sequence[Outcome]) -> Outcome | None:
    if not outcomes:
        return None
    if "not held" in outcomes:
        return "not held"
    return "inconclusive" if "inconclusive" in outcomes else "held"


def _remarks(row: Row, scale: str, seeds: tuple[int, ...], decided: int):
    declared = row.scales[scale].seeds
    if len(seeds) < declared:
        yield f"Measured with {len(seeds)} of the {declared} declared seeds."
    if len(seeds) == 1:
        yield "One seed: there is no interval over seeds."
    left_out = len(row.checks) - decided
    if left_out:
        word = "check is" if left_out == 1 else "checks are"
        yield f"{left_out} {word} not decided at smoke scale."
