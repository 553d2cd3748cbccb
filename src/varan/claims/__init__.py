"""Experiments: one module a row, each from (scale settings, seed) to measurements.

An experiment contains no statistics, no plotting and no verdict; those are the lab's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Curve:
    """One measured curve, with its units, for one seed.

    Args:
        x: Abscissae, all of one length with `y`.
        y: Ordinates.
        label: The series, as it stands in the legend (a method, a setting).
        plot: The figure it belongs to; curves with the same `plot` are drawn together.
        x_label: What `x` is, with its unit.
        y_label: What `y` is, with its unit.
        log_x: Logarithmic abscissa.
        log_y: Logarithmic ordinate.
        marker: Draw points instead of a line (scattered measurements).
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str
    plot: str
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    marker: bool = False


@dataclass(frozen=True)
class Measurements:
    """What one run of an experiment measured.

    Args:
        numbers: Named numbers; the checks of `rows.toml` refer to these names.
        curves: The curves to draw.
        notes: Sentences about this run that a reader must know (an excluded run, a
            peer that was absent).
    """

    numbers: dict[str, float]
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
