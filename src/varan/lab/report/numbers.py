"""Numbers as a reader meets them: four digits, powers of ten, words for infinities."""

from __future__ import annotations

import math

from ..verdict import CheckVerdict

_DIGITS = 4
# Beyond these powers of ten a number is written with its power.
_SMALLEST, _LARGEST = -4, 6
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Spaces that no line breaks at.
_TIMES = "\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}"
_THOUSANDS = "\N{NARROW NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"
_RELATIONS = {">=": "at least", "<=": "at most", "in": "from"}


def number(value: float | None) -> str:
    """A number with four significant digits; as a word where it is none.

    Args:
        value: The number; `None` where nothing was measured.

    Returns:
        The number as text.

    Example:
        >>> from varan.lab.report.numbers import number
        >>> number(0.25), number(2e12), number(float("inf"))
        ('0.25', '2\xa0×\xa010¹²', 'infinite')
    """
    if value is None:
        return "not measured"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    mantissa, power = f"{value:.{_DIGITS - 1}e}".split("e")
    exponent = int(power)
    if value == 0 or _SMALLEST < exponent < _LARGEST:
        plain = f"{value:,.0f}" if exponent >= _DIGITS else f"{value:.{_DIGITS}g}"
        return _signed(plain.replace(",", _THOUSANDS))
    return f"{_signed(f'{float(mantissa):g}')}{_TIMES}{power_of_ten(exponent)}"


def power_of_ten(exponent: int) -> str:
    """The power as text: `10⁻³`."""
    return f"10{str(exponent).translate(_RAISED)}"


def interval(ends: tuple[float, float]) -> str:
    """Both ends of an interval: `0.2 to 0.7`."""
    return f"{number(ends[0])} to {number(ends[1])}"


def required(check: CheckVerdict) -> str:
    """What a check requires: `at least 50`, `from 0.9 to 1.1`."""
    relation, threshold = _RELATIONS[check.check.relation], check.threshold
    if isinstance(threshold, tuple):
        return f"{relation} {interval(threshold)}"
    return f"{relation} {number(threshold)}"


def duration(seconds: float | None) -> str:
    """A time in the unit that suits it: `350 ms`, `12 s`, `3 min 20 s`."""
    if seconds is None:
        return "not measured"
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds >= 90:
        minutes, rest = divmod(round(seconds), 60)
        if minutes >= 90:
            hours, minutes = divmod(minutes, 60)
            return f"{hours} h {minutes} min"
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def counted(count: int, noun: str) -> str:
    """The count with its noun: `1 row`, `2 rows`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _signed(text: str) -> str:
    return text.replace("-", _MINUS)
