"""Plots of the measured curves: one figure a `plot`, SVG and PNG.

Seeds measured on one grid are drawn as their median with a band from the smallest to
the largest; seeds on grids of their own (a run that stops when it has converged) as one
thin line each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's palette, without its yellow, which is faint on white: told apart with
# any kind of colour vision. Line styles go on where colours end.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LEGEND_INSIDE = 6
_STYLE: Any = {
    "svg.hashsalt": "varan",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
}


def draw(
    curves_by_seed: Mapping[int, Sequence[Mapping[str, Any]]],
    folder: Path,
    title: str,
) -> list[Path]:
    """Draws every plot that the curves name.

    Args:
        curves_by_seed: Seed to its curves, as plain data of `claims.Curve`.
        folder: Where the files go; made when absent.
        title: What stands above each figure before the plot's name.

    Returns:
        The files, in the order in which the experiment first names their plots.

    Raises:
        OSError: The folder cannot be written.
    """
    plots = by_plot(curves_by_seed)
    if not plots:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, series in plots.items():
        files.extend(_figure(name, series, folder, title))
    return files


# A seed may give one label several curves.
Curves = list[tuple[int, Mapping[str, Any]]]


def by_plot(
    curves_by_seed: Mapping[int, Sequence[Mapping[str, Any]]],
) -> dict[str, dict[str, Curves]]:
    """Groups curves, each with its seed, by their plot and then by their label.

    Args:
        curves_by_seed: Seed to its curves, as plain data of `claims.Curve`.

    Returns:
        Plots and labels in the order in which the experiment first names them.
    """
    plots: dict[str, dict[str, Curves]] = {}
    for seed in sorted(curves_by_seed):
        for curve in curves_by_seed[seed]:
            labels = plots.setdefault(curve["plot"], {})
            labels.setdefault(curve["label"], []).append((seed, curve))
    return plots


@dataclass(frozen=True)
class Spread:
    """Seeds measured on one grid, summarised at each of its points.

    Args:
        x: The grid.
        median: The median over seeds.
        low: The smallest value of any seed.
        high: The largest.
        seeds: How many seeds there are.
    """

    x: list[float]
    median: list[float]
    low: list[float]
    high: list[float]
    seeds: int


def spread(curves: Sequence[Mapping[str, Any]]) -> Spread | None:
    """Summarises the curves of one label; `None` when their grids differ.

    Args:
        curves: One curve a seed.
    """
    grids = [np.asarray(curve["x"], dtype=float) for curve in curves]
    if not all(np.array_equal(grid, grids[0], equal_nan=True) for grid in grids):
        return None
    stacked = np.stack([np.asarray(curve["y"], dtype=float) for curve in curves])
    # Between infinities of both signs there is none, nor between huge values.
    with np.errstate(invalid="ignore", over="ignore"):
        median = np.median(stacked, axis=0)
    low, high = stacked.min(axis=0), stacked.max(axis=0)
    ends = (grids[0].tolist(), median.tolist(), low.tolist(), high.tolist())
    return Spread(*ends, len(curves))


def stem(name: str) -> str:
    """A plot's name as the name of a file, without its ending."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "plot"


def _figure(
    name: str,
    series: Mapping[str, Curves],
    folder: Path,
    title: str,
) -> list[Path]:
    # Imported here: half a second that runs without curves need not pay.
    import matplotlib
    from matplotlib.figure import Figure

    _, first = next(iter(series.values()))[0]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        # Before anything is drawn: limits are found on the right scale.
        axes.set_xscale("log" if first["log_x"] else "linear")
        axes.set_yscale("log" if first["log_y"] else "linear")
        for place, (label, curves) in enumerate(series.items()):
            _series(axes, label, [curve for _, curve in curves], place)
        axes.set(xlabel=first["x_label"], ylabel=first["y_label"])
        axes.set_title(f"{title}: {name}", fontsize="medium", loc="left", wrap=True)
        if len(series) > _LEGEND_INSIDE:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        else:
            axes.legend()
        svg, png = (folder / f"{stem(name)}.{kind}" for kind in ("svg", "png"))
        # Without dates and versions the same numbers give the same files.
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
        figure.savefig(png, dpi=160, metadata={"Software": None})
    return [svg, png]


def _series(axes: Any, label: str, curves: Sequence[Mapping[str, Any]], place: int):
    colour = _COLOURS[place % len(_COLOURS)]
    turn = place // len(_COLOURS)
    style = {"color": colour, "linestyle": _STYLES[turn % len(_STYLES)]}
    if curves[0]["marker"]:
        style = {
            "color": colour,
            "linestyle": "none",
            "marker": _MARKERS[place % len(_MARKERS)],
            "markersize": 4,
            "alpha": 0.8,
        }
    shared = None if curves[0]["marker"] else spread(curves)
    if shared:
        axes.plot(shared.x, shared.median, label=label, **style)
        if shared.seeds > 1:
            axes.fill_between(
                shared.x, shared.low, shared.high, color=colour, alpha=0.18, linewidth=0
            )
        return
    width = 1.5 if len(curves) == 1 else 0.9
    for number, curve in enumerate(curves):
        grid = np.asarray(curve["x"], dtype=float)
        value = np.asarray(curve["y"], dtype=float)
        name = label if number == 0 else None
        axes.plot(grid, value, label=name, linewidth=width, **style)
