"""The races of a row, ready to be shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from markupsafe import Markup

from .._records import RaceRecord
from ..race import RaceResult
from .strip import ratio_axis, ratio_strip

Ratio = tuple[float, float, float]


@dataclass(frozen=True)
class Contestant:
    """One contestant of a heat.

    Args:
        name: Its name.
        version: Its package and version.
        median: Its median wall-clock seconds.
        compile_s: Seconds of compiling.
        error: How far its answer is from the agreed one.
        ratio: How many times as fast as the reference, with an interval.
        strip: The ratio drawn.
    """

    name: str
    version: str
    median: float | None
    compile_s: float | None
    error: float | None
    ratio: Ratio | None
    strip: Markup | None


@dataclass(frozen=True)
class Heat:
    """One heat of a race.

    Args:
        name: The instance and setting.
        reference: The contestant that ratios are formed with.
        rounds: How many rounds were timed.
        contestants: The contestants, fastest first.
        skipped: Who did not run, and why.
        remarks: What a reader must know.
        taken: When it was run (UTC).
        machine: Where it was run.
    """

    name: str
    reference: str
    rounds: int
    contestants: Sequence[Contestant]
    skipped: Mapping[str, str]
    remarks: Sequence[str]
    taken: str
    machine: str


def heat(record: RaceRecord) -> Heat:
    """A stored heat, with medians and ratios.

    Args:
        record: The heat.
    """
    ratios = {name: _ratio(record, name) for name in record.contestants}
    axis = ratio_axis([ratio for ratio in ratios.values() if ratio])
    contestants = []
    for name, told in record.contestants.items():
        ratio, times = ratios[name], told.get("wall_s") or ()
        package, version = told.get("package"), told.get("version")
        contestants.append(
            Contestant(
                name,
                " ".join(part for part in (package, version) if part) or "not stated",
                median(times) if times else None,
                told.get("compile_s"),
                told.get("error"),
                ratio,
                ratio_strip(ratio[0], ratio[1:], axis) if ratio else None,
            )
        )
    contestants.sort(key=lambda c: (c.median is None, c.median or 0.0, c.name))
    times = [told.get("wall_s") or () for told in record.contestants.values()]
    rounds = max(map(len, times), default=0)
    return Heat(
        record.heat,
        record.reference,
        rounds,
        contestants,
        record.skipped,
        record.remarks,
        record.taken,
        machine(record.environment),
    )


def machine(environment: Mapping[str, Any]) -> str:
    """The machine of an environment, in words."""
    found = environment.get("machine") or {}
    parts = [found.get("processor"), found.get("system")]
    if found.get("cores"):
        parts.insert(1, f"{found['cores']} cores")
    if found.get("memory_gib"):
        parts.insert(2, f"{found['memory_gib']} GiB")
    return ", ".join(str(part) for part in parts if part) or "machine not recorded"


def _ratio(record: RaceRecord, name: str) -> Ratio | None:
    """The ratio to the reference; `None` where the times allow none."""
    times = {key: told.get("wall_s") or [] for key, told in record.contestants.items()}
    try:
        return RaceResult(times, times, record.reference).ratio(name)
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        return None
