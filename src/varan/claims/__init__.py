"""Experiments and races: one module of each a row, from settings to what is measured.

An experiment has `experiment(scale, seed)`, which returns measurements. A race has
`heats(settings)`, which returns its heats. Neither contains statistics, printing,
plotting or a verdict; those are the lab's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


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


@dataclass(frozen=True)
class Contestant:
    """One way to solve the instance of a heat.

    Args:
        name: As it stands in the table.
        make: Imports what it needs, hands the instance over in the form that suits it
            best, and returns the function without arguments that is timed. Nothing of
            this is timed; what a user would wait for once (compiling, building a model)
            belongs into that function's first call.
        package: The distribution that it comes from; `None` for ours.
        hint: How to get the package, where it is not in `varan[peers]`.
    """

    name: str
    make: Callable[[], Callable[[], Any]]
    package: str | None = None
    hint: str | None = None


@dataclass(frozen=True)
class Heat:
    """One instance of a race and who solves it. Making one must cost next to nothing.

    Args:
        name: The instance and its setting, unique in the race.
        contestants: Ours first: the others are compared with it.
        error: How far an answer is from solving the instance, computed from the answer
            alone and in the same way for every contestant. What solves another problem
            must not come out as right.
        tolerance: The largest error of an answer that counts as solved.
        measure: What `error` measures, as it stands in the table.
        notes: Sentences that a reader must know.
    """

    name: str
    contestants: Sequence[Contestant]
    error: Callable[[Any], float]
    tolerance: float
    measure: str
    notes: Sequence[str] = ()
