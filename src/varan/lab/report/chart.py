"""Charts of the stored curves as inline SVG.

Nothing in them has a colour of its own: classes do, so that one drawing serves light
and dark schemes and paper. Labels are the page's text, which wraps where a drawing
cannot. Drawn here and not by matplotlib, whose figures cost a third of a second each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from ..plots import Curves, Spread, spread
from .axis import Axis, fit
from .numbers import counted, number

_WIDTH, _HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 10, 30
_COLOURS = 7
# Longer lines are thinned to what the columns of a screen can show.
_MOST_POINTS = 2 * _WIDTH
# Up to here the measured points are marked on their line.
_DOTTED = 12

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One series of a chart.

    Args:
        label: Its name.
        style: The classes of its colour and line, as in the style sheet.
        marker: The shape of its points; `None` for a line.
        spread: Median and extremes, where all seeds share one grid.
        lines: Seeds with their own points, where they do not, or where points are
            drawn.
    """

    label: str
    style: str
    marker: int | None
    spread: Spread | None
    lines: Sequence[tuple[int, Sequence[Point]]]

    @property
    def seeds(self) -> int:
        """How many seeds it was measured with."""
        if self.spread:
            return self.spread.seeds
        return len({seed for seed, _ in self.lines})


@dataclass(frozen=True)
class Chart:
    """One plot of a row, ready to be shown.

    Args:
        name: The plot's name.
        x_label: What the abscissa is.
        y_label: What the ordinate is.
        log_x: Logarithmic abscissa.
        log_y: Logarithmic ordinate.
        series: The series.
    """

    name: str
    x_label: str
    y_label: str
    log_x: bool
    log_y: bool
    series: tuple[Series, ...]

    @property
    def caption(self) -> str:
        """How to read it."""
        seeds = max((entry.seeds for entry in self.series), default=0)
        if seeds <= 1:
            return "One seed."
        if any(entry.marker is not None for entry in self.series):
            return f"Every point of {counted(seeds, 'seed')}."
        if all(entry.spread for entry in self.series):
            return f"Median of {counted(seeds, 'seed')}; band from smallest to largest."
        return f"One line a seed, {counted(seeds, 'seed')}."

    @property
    def description(self) -> str:
        """The chart in words, for those who do not see it."""
        x = self.x_label + (" (logarithmic)" if self.log_x else "")
        y = self.y_label + (" (logarithmic)" if self.log_y else "")
        parts = [f"{y} against {x}. {self.caption}"]
        for entry in self.series:
            points = _course(entry)
            if points:
                (x0, y0), (x1, y1) = points[0], points[-1]
                parts.append(
                    f"{entry.label}: {number(y0)} at {number(x0)}, "
                    f"{number(y1)} at {number(x1)}."
                )
            else:
                parts.append(f"{entry.label}: no point that is a number.")
        return " ".join(parts)

    def swatch(self, series: Series) -> Markup:
        """The series' line or point, for the legend."""
        if series.marker is None:
            inner = '<path class="line" d="M1 7H31"/>'
        else:
            inner = f'<path class="point" d="{_shape(series.marker, 16, 7)}"/>'
        return Markup(
            f'<svg class="swatch {series.style}" viewBox="0 0 32 14" '
            f'aria-hidden="true">{inner}</svg>'
        )

    def svg(self, ident: str) -> Markup:
        """The drawing.

        Args:
            ident: What its ids begin with; unique on its page.

        Returns:
            An `svg` element with title and description.
        """
        title, words = escape(self.name), escape(self.description)
        return Markup(
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-labelledby="{ident}-title {ident}-text">'
            f'<title id="{ident}-title">{title}</title>'
            f'<desc id="{ident}-text">{words}</desc>'
            f"{self._drawing()}</svg>"
        )

    def _drawing(self) -> str:
        points = [point for entry in self.series for point in _extent(entry)]
        if self.log_x or self.log_y:
            points = [
                (x, y)
                for x, y in points
                if (x > 0 or not self.log_x) and (y > 0 or not self.log_y)
            ]
        x = fit((p[0] for p in points), self.log_x, _LEFT, _WIDTH - _RIGHT)
        y = fit((p[1] for p in points), self.log_y, _HEIGHT - _BOTTOM, _TOP)
        if x is None or y is None:
            middle = f'x="{_WIDTH / 2:g}" y="{_HEIGHT / 2:g}"'
            return f'<text class="middle" {middle}>No value that can be drawn</text>'
        drawn = [_frame(x, y)]
        # All bands lie below all lines.
        for entry in self.series:
            if entry.spread and entry.spread.seeds > 1:
                drawn.append(_band(entry, x, y))
        drawn.extend(_series(entry, x, y) for entry in self.series)
        return "".join(drawn)


def charts(plots: Mapping[str, Mapping[str, Curves]]) -> list[Chart]:
    """The charts of a row.

    Args:
        plots: Plot to label to its curves, as `plots.by_plot` groups them.

    Returns:
        One chart a plot, in their order.
    """
    return [_chart(name, series) for name, series in plots.items()]


def _chart(name: str, series: Mapping[str, Curves]) -> Chart:
    _, first = next(iter(series.values()))[0]
    return Chart(
        name,
        first["x_label"],
        first["y_label"],
        bool(first["log_x"]),
        bool(first["log_y"]),
        tuple(
            _one(label, curves, place)
            for place, (label, curves) in enumerate(series.items())
        ),
    )


def _one(label: str, curves: Curves, place: int) -> Series:
    turn = place // _COLOURS
    style = f"c{place % _COLOURS} l{(place + turn) % _COLOURS}"
    marked = bool(curves[0][1]["marker"])
    shared = None if marked else spread([curve for _, curve in curves])
    lines = [] if shared else [(seed, _points(curve)) for seed, curve in curves]
    return Series(label, style, place if marked else None, shared, lines)


def _points(curve: Mapping[str, Any]) -> list[Point]:
    # Infinities are stored as words.
    return [(float(x), float(y)) for x, y in zip(curve["x"], curve["y"], strict=True)]


def _extent(series: Series) -> Iterable[Point]:
    """Everything that must be seen of a series."""
    if series.spread is None:
        return [point for _, line in series.lines for point in line]
    shared = series.spread
    return [
        point
        for values in (shared.low, shared.high)
        for point in zip(shared.x, values, strict=True)
    ]


def _course(series: Series) -> list[Point]:
    """The points that tell how a series begins and ends."""
    if series.spread:
        points = zip(series.spread.x, series.spread.median, strict=True)
    else:
        points = next((line for _, line in series.lines), ())
    return [point for point in points if all(map(math.isfinite, point))]


# --- Drawing ------------------------------------------------------------------------


def _frame(x: Axis, y: Axis) -> str:
    grid, texts = [], []
    for place, text in y.ticks():
        grid.append(f"M{_LEFT} {place:.1f}H{_WIDTH - _RIGHT}")
        texts.append(
            f'<text class="y" x="{_LEFT - 8}" y="{place:.1f}" dy=".32em">{text}</text>'
        )
    base = _HEIGHT - _BOTTOM
    ticks = []
    for place, text in x.ticks():
        ticks.append(f"M{place:.1f} {base}v5")
        texts.append(f'<text class="x" x="{place:.1f}" y="{base + 21}">{text}</text>')
    return (
        f'<path class="grid" d="{"".join(grid)}"/>'
        f'<path class="axis" d="M{_LEFT} {base}H{_WIDTH - _RIGHT}{"".join(ticks)}"/>'
        f"{''.join(texts)}"
    )


def _band(series: Series, x: Axis, y: Axis) -> str:
    shared = series.spread
    assert shared is not None
    upper, lower = [], []
    base = y.start
    for abscissa, low, high in zip(shared.x, shared.low, shared.high, strict=True):
        column, top, foot = x.place(abscissa), y.place(high), y.place(low)
        if column is None or top is None:
            continue
        upper.append(f"{column:.1f} {top:.1f}")
        # On a logarithmic axis a band that reaches zero reaches the floor.
        lower.append(f"{column:.1f} {base if foot is None else foot:.1f}")
    if len(upper) < 2:
        return ""
    outline = "L".join(upper + lower[::-1])
    return f'<path class="band {series.style}" d="M{outline}Z"/>'


def _series(series: Series, x: Axis, y: Axis) -> str:
    if series.marker is not None:
        shapes = (
            _shape(series.marker, column, row)
            for _, line in series.lines
            for run in _runs(line, x, y)
            for column, row in run
        )
        return f'<path class="point {series.style}" d="{"".join(shapes)}"/>'
    if series.spread:
        lines = [list(zip(series.spread.x, series.spread.median, strict=True))]
    else:
        lines = [line for _, line in series.lines]
    drawn = []
    for line in lines:
        runs = [_thinned(run) for run in _runs(line, x, y)]
        path = "".join(
            "M" + "L".join(f"{column:.1f} {row:.1f}" for column, row in run)
            for run in runs
        )
        thin = " thin" if len(lines) > 1 else ""
        if path:
            drawn.append(f'<path class="line {series.style}{thin}" d="{path}"/>')
        if len(line) <= _DOTTED:
            dots = "".join(_shape(0, *place) for run in runs for place in run)
            drawn.append(f'<path class="dot {series.style}" d="{dots}"/>')
    return "".join(drawn)


def _runs(line: Iterable[Point], x: Axis, y: Axis) -> Iterable[list[Point]]:
    """The line's places, cut where a value cannot be shown."""
    run: list[Point] = []
    for abscissa, ordinate in line:
        column, row = x.place(abscissa), y.place(ordinate)
        if column is not None and row is not None:
            run.append((column, row))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _thinned(run: list[Point]) -> list[Point]:
    """At most four points a column of the drawing: first, extremes and last."""
    if len(run) <= _MOST_POINTS:
        return run
    columns: dict[int, list[Point]] = {}
    for point in run:
        columns.setdefault(int(point[0]), []).append(point)
    kept: list[Point] = []
    for points in columns.values():
        low = min(points, key=lambda point: point[1])
        high = max(points, key=lambda point: point[1])
        chosen = {points[0], low, high, points[-1]}
        kept.extend(point for point in points if point in chosen)
    return kept


def _shape(kind: int, column: float, row: float) -> str:
    """A point: circle, square, triangle, diamond, cross, plus or bar."""
    at = f"M{column:.1f} {row:.1f}"
    return at + _SHAPES[kind % len(_SHAPES)]


_SHAPES = (
    "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "m-3-3h6v6h-6z",
    "m0-4l4 7h-8z",
    "m0-4.2l4.2 4.2l-4.2 4.2l-4.2-4.2z",
    "m-3.5-2l1.5-1.5l2 2l2-2l1.5 1.5l-2 2l2 2l-1.5 1.5l-2-2l-2 2l-1.5-1.5l2-2z",
    "m-1.2-4h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8v-2.4h2.8z",
    "m-4.2-1.5h8.4v3h-8.4z",
)
