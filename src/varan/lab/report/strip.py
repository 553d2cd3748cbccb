"""Small drawings that stand in a line of text: an interval against its threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping

from markupsafe import Markup

from ..verdict import CheckVerdict
from .axis import Axis, fit
from .numbers import interval, number, required

_WIDTH, _HEIGHT = 168, 24
_MIDDLE = _HEIGHT / 2
_EDGE = 6.0
# Positive values that differ by more are compared by their powers of ten.
_WIDE = 30.0


def strip(check: CheckVerdict) -> Markup:
    """A check drawn: what is required, the interval, the value.

    Args:
        check: The check's verdict.

    Returns:
        An `svg` element that says the same in words.
    """
    low, high = check.interval or (check.value, check.value)
    if isinstance(check.threshold, tuple):
        thresholds = check.threshold
    else:
        thresholds = (check.threshold,)
    axis = _axis([low, high, check.value, *thresholds])
    words = f"measured {number(check.value)}"
    if check.interval:
        words += f", interval {interval(check.interval)}"
    words += f", required {required(check)}: {check.outcome}"
    right = _WIDTH - _EDGE
    places = [_clamped(axis, value) for value in thresholds]
    if check.check.relation == ">=":
        region = (places[0], right)
    elif check.check.relation == "<=":
        region = (_EDGE, places[0])
    else:
        region = (places[0], places[-1])
    start, end, value = (_clamped(axis, x) for x in (low, high, check.value))
    marks = "".join(f"M{place:.1f} 3V{_HEIGHT - 3}" for place in places)
    return Markup(
        f'<svg class="strip {outcome_class(check.outcome)}" role="img" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="{words}">'
        f'<path class="rail" d="M{_EDGE:g} {_MIDDLE:g}H{right:g}"/>'
        f'<rect class="wanted" x="{region[0]:.1f}" y="6" '
        f'width="{region[1] - region[0]:.1f}" height="{_HEIGHT - 12}"/>'
        f'<path class="threshold" d="{marks}"/>'
        f'<path class="range" d="M{start:.1f} {_MIDDLE:g}H{end:.1f}'
        f'M{start:.1f} 8v8M{end:.1f} 8v8"/>'
        f'<circle class="value" cx="{value:.1f}" cy="{_MIDDLE:g}" r="3.6"/></svg>'
    )


def ratio_strip(value: float, ends: tuple[float, float], axis: Axis) -> Markup:
    """A ratio of times drawn on an axis that several share, against 1.

    Args:
        value: The ratio.
        ends: Its interval.
        axis: The axis, as `ratio_axis` makes it.
    """
    one = _clamped(axis, 1.0)
    start, end, middle = (_clamped(axis, x) for x in (*ends, value))
    words = f"{number(value)}, interval {interval(ends)}, against 1"
    return Markup(
        f'<svg class="strip" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'aria-label="{words}">'
        f'<path class="rail" d="M{_EDGE:g} {_MIDDLE:g}H{_WIDTH - _EDGE:g}"/>'
        f'<path class="threshold" d="M{one:.1f} 3V{_HEIGHT - 3}"/>'
        f'<path class="range" d="M{start:.1f} {_MIDDLE:g}H{end:.1f}'
        f'M{start:.1f} 8v8M{end:.1f} 8v8"/>'
        f'<circle class="value" cx="{middle:.1f}" cy="{_MIDDLE:g}" r="3.6"/></svg>'
    )


def ratio_axis(ratios: list[tuple[float, float, float]]) -> Axis:
    """A logarithmic axis that shows 1 and all ratios with their intervals."""
    values = [1.0, *(value for ratio in ratios for value in ratio)]
    axis = fit(values, True, _EDGE, _WIDTH - _EDGE)
    assert axis is not None  # it shows 1
    return axis


def share_bar(counts: Mapping[str, int]) -> Markup:
    """How a total divides into outcomes, as one bar.

    Args:
        counts: Outcome to count, in the order of the bar.
    """
    total = sum(counts.values())
    words = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    parts, start = [], 0.0
    for name, count in counts.items():
        if count:
            width = 400 * count / total
            parts.append(
                f'<rect class="{outcome_class(name)}" x="{start:.2f}" y="0" '
                f'width="{width:.2f}" height="12"/>'
            )
            start += width
    return Markup(
        f'<svg class="share" role="img" viewBox="0 0 400 12" '
        f'preserveAspectRatio="none" aria-label="{words or "nothing"}">'
        f"{''.join(parts)}</svg>"
    )


def outcome_class(outcome: str) -> str:
    """The style sheet's class of an outcome: `is-not-held`."""
    return f"is-{outcome.replace(' ', '-')}"


def _axis(values: list[float]) -> Axis | None:
    finite = [value for value in values if math.isfinite(value)]
    positive = all(value > 0 for value in finite)
    wide = bool(finite) and positive and max(finite) > _WIDE * min(finite)
    return fit(finite, wide, 3 * _EDGE, _WIDTH - 3 * _EDGE)


def _clamped(axis: Axis | None, value: float) -> float:
    """Where a value stands; what is infinite stands at the edge."""
    place = axis.place(value) if axis else None
    if place is None:
        place = math.inf if value > 0 else -math.inf
    return min(max(place, _EDGE), _WIDTH - _EDGE)
