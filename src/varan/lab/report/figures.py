"""The plots of a row and the numbers behind them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import plots
from .chart import Chart, Series, charts
from .numbers import number

# A page shows so many points of a series; its CSV file has all.
_SHOWN = 20
_COLUMNS = ("series", "seed", "x", "y", "smallest", "largest")


@dataclass(frozen=True)
class Table:
    """Numbers of one series, as text.

    Args:
        label: The series.
        columns: The names of the columns.
        lines: The lines.
        shortened: What was left out, in words; empty when nothing was.
    """

    label: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]
    shortened: str


@dataclass(frozen=True)
class Figure:
    """A plot on a page.

    Args:
        chart: The chart.
        ident: What its ids begin with.
        file: The site's file with its numbers.
    """

    chart: Chart
    ident: str
    file: str

    @property
    def tables(self) -> list[Table]:
        """The numbers that the page shows, one table a series."""
        return [_table(series) for series in self.chart.series]

    def csv(self) -> str:
        """All that is drawn, as CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for series in self.chart.series:
            shared = series.spread
            if shared:
                seed = f"median of {shared.seeds}"
                columns = (shared.x, shared.median, shared.low, shared.high)
                for values in zip(*columns, strict=True):
                    writer.writerow((series.label, seed, *values))
            for seed, line in series.lines:
                for x, y in line:
                    writer.writerow((series.label, seed, x, y, "", ""))
        return text.getvalue()


def figures(
    row: str, scale: str, curves: Mapping[int, Sequence[Mapping[str, Any]]]
) -> list[Figure]:
    """The figures of a row at one scale.

    Args:
        row: The row's id.
        scale: The scale.
        curves: Seed to its curves, as plain data.
    """
    found = []
    for place, chart in enumerate(charts(plots.by_plot(curves)), 1):
        ident = f"{scale}-{place}"
        file = f"data/{row}/{ident}-{plots.stem(chart.name)[:60]}.csv"
        found.append(Figure(chart, ident, file))
    return found


def _table(series: Series) -> Table:
    shared = series.spread
    if shared and shared.seeds > 1:
        names = ("x", "median", "smallest", "largest")
        lines = list(zip(shared.x, shared.median, shared.low, shared.high, strict=True))
        return _shortened(series.label, names, lines)
    if shared:
        lines = list(zip(shared.x, shared.median, strict=True))
        return _shortened(series.label, ("x", "y"), lines)
    points = [(seed, x, y) for seed, line in series.lines for x, y in line]
    return _shortened(series.label, ("seed", "x", "y"), points)


def _shortened(
    label: str, columns: Sequence[str], lines: Sequence[Sequence[float]]
) -> Table:
    total, words = len(lines), ""
    if total > _SHOWN:
        # Evenly chosen, the first and the last among them.
        chosen = [round(n * (total - 1) / (_SHOWN - 1)) for n in range(_SHOWN)]
        lines = [lines[place] for place in chosen]
        words = f"{_SHOWN} of {total} points"
    return Table(label, columns, [[number(v) for v in line] for line in lines], words)
