"""Verdicts: whether a declared check held, over seeds, with its uncertainty.

A check names a quantity, a statistic over seeds and a threshold. For `mean` and
`median` the interval is a 95 % bootstrap over seeds; for `worst` it is the range of the
measurements, because the check speaks of every seed. *Held* means that the whole
interval satisfies the relation, *not held* that none of it does, *inconclusive* that
the threshold lies inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .catalogue import Check, Row

Outcome = Literal["held", "not held", "inconclusive"]

LEVEL = 0.95
_RESAMPLES = 9999
# The interval is a function of the measurements alone: the same store always gives the
# same verdict.
_BOOTSTRAP_SEED = 0
_STATISTICS = {"mean": np.mean, "median": np.median}


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
        value = float(_STATISTICS[check.statistic](measured))
        interval = None
        ends = (value, value)
        if len(measured) > 1:
            interval = ends = bootstrap_interval(measured, check.statistic)
        outcome = _side(check, ends, threshold)
    return CheckVerdict(check, threshold, value, interval, outcome, measured)


def bootstrap_interval(
    values: Sequence[float], statistic: Literal["mean", "median"]
) -> tuple[float, float]:
    """The 95 % bootstrap interval of a statistic, by percentiles.

    Percentiles of order statistics, rounded outwards, stay right when a measurement is
    infinite (a baseline that diverged); bias-corrected intervals do not.

    Args:
        values: At least one measurement.
        statistic: The statistic.

    Returns:
        The lower and the upper end; both equal the value when all measurements agree.

    Example:
        >>> from varan.lab.verdict import bootstrap_interval
        >>> bootstrap_interval([2.0, 2.0, 2.0], "mean")
        (2.0, 2.0)
    """
    data = np.asarray(values, dtype=float)
    if np.all(data == data[0]):
        return float(data[0]), float(data[0])
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    resamples = rng.choice(data, size=(_RESAMPLES, data.size))
    with np.errstate(invalid="ignore"):
        statistics = _STATISTICS[statistic](resamples, axis=1)
    # A sum's rounding may carry a mean past the largest measurement.
    statistics = np.clip(statistics, np.min(data), np.max(data))
    # A resample with infinities of both signs has no mean: it counts at both ends.
    low = np.where(np.isnan(statistics), -np.inf, statistics)
    high = np.where(np.isnan(statistics), np.inf, statistics)
    tail = (1 - LEVEL) / 2
    return (
        float(np.quantile(low, tail, method="lower")),
        float(np.quantile(high, 1 - tail, method="higher")),
    )


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
