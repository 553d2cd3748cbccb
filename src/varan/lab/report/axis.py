"""Axes of the drawings: where a value stands, and which values are named."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .numbers import number, power_of_ten

# What a drawing tells apart: its arithmetic stays within the range of floats.
_SMALLEST, _LARGEST = 1e-290, 1e300
_POWERS = (-300.0, 300.0)
_PADDING = 0.04
_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis between two places of a drawing.

    Args:
        low: The smallest value shown; its logarithm on a logarithmic axis.
        high: The largest value shown, likewise.
        log: Whether it is logarithmic.
        start: The place of `low`.
        end: The place of `high`.
    """

    low: float
    high: float
    log: bool
    start: float
    end: float

    def place(self, value: float) -> float | None:
        """Where a value stands; `None` when the axis cannot show it."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return None
        share = (_inner(value, self.log) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of the values that the axis names."""
        values = self._decades() if self.log else self._steps(self.low, self.high)
        found = []
        for value, text in values:
            place = self.place(value)
            if place is not None:
                found.append((place, text))
        return found

    def _steps(self, low: float, high: float) -> Iterable[tuple[float, str]]:
        rough = (high - low) / _TICKS
        size = 10 ** math.floor(math.log10(rough))
        step = next((size * n for n in (1, 2, 5) if size * n >= rough), 10 * size)
        first, last = math.ceil(low / step), math.floor(high / step)
        for turn in range(first, last + 1):
            value = turn * step
            yield value, number(value)

    def _decades(self) -> Iterable[tuple[float, str]]:
        first, last = math.ceil(self.low), math.floor(self.high)
        if last - first >= 2:
            stride = math.ceil((last - first + 1) / _TICKS)
            # Multiples of the stride, so that zero is among them where it is shown.
            for power in range(-(-first // stride) * stride, last + 1, stride):
                yield 10.0**power, power_of_ten(power)
        elif self.high - self.low > 0.7:
            for power in range(first - 1, last + 1):
                for factor in (1, 2, 5):
                    value = factor * 10.0**power
                    if self.low <= math.log10(value) <= self.high:
                        yield value, number(value)
        else:
            yield from self._steps(10**self.low, 10**self.high)


def fit(values: Iterable[float], log: bool, start: float, end: float) -> Axis | None:
    """The axis that shows all values that can be shown; `None` when none can.

    Args:
        values: The values.
        log: Whether the axis is logarithmic: then only positive values can be shown.
        start: The place of the smallest value.
        end: The place of the largest.

    Returns:
        The axis, with a little room at both ends.

    Example:
        >>> from varan.lab.report.axis import fit
        >>> fit([0.0, 10.0], False, 0.0, 100.0).ticks()[0][1]
        '0'
    """
    shown = [
        _inner(value, log)
        for value in values
        if math.isfinite(value) and (value > 0 or not log)
    ]
    if not shown:
        return None
    low, high = min(shown), max(shown)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-12 * size, _SMALLEST):
        room = 0.5 if log else (0.5 * size if size > _SMALLEST else 1.0)
    else:
        # At most one power of ten, else the room could lead beyond all floats.
        room = min(_PADDING * (high - low), 1.0 if log else _LARGEST)
    return Axis(low - room, high + room, log, start, end)


def _inner(value: float, log: bool) -> float:
    """The value, or its logarithm, that an axis is linear in."""
    if log:
        return min(max(math.log10(value), _POWERS[0]), _POWERS[1])
    return min(max(value, -_LARGEST), _LARGEST)
