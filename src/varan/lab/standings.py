"""How a heat came out: medians, ratios to ours with intervals, errors; as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .race import ratio_interval, seconds
from .store import RaceRecord


@dataclass(frozen=True)
class Standing:
    """One contestant of a heat.

    Args:
        name: The contestant.
        package: Its distribution; `None` for ours.
        version: The distribution's version.
        rounds: How often it was timed.
        wall_s: Median of its wall-clock seconds; `None` when it failed.
        cpu_s: Median of its processor seconds.
        ratio: How many times our wall-clock time it takes: the median over rounds of
            the ratio within a round.
        interval: The 95 % interval of the ratio; `None` with fewer than two rounds.
        compile_s: What its first call took beyond a later one.
        error: The worst error of its answers.
        met: Whether that is the accuracy asked for.
        failed: Why it did not run to the end, if it did not.
    """

    name: str
    package: str | None
    version: str | None
    rounds: int
    wall_s: float | None
    cpu_s: float | None
    ratio: float | None
    interval: tuple[float, float] | None
    compile_s: float | None
    error: float | None
    met: bool | None
    failed: str | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        plain = dict(vars(self))
        if self.error is not None and not math.isfinite(self.error):
            plain["error"] = str(self.error)
        return plain


def standings(record: RaceRecord) -> list[Standing]:
    """The contestants of a heat: the right ones, the wrong ones, those that failed.

    Each group has its fastest first.

    Args:
        record: The heat.

    Example:
        >>> from varan.lab.standings import standings
        >>> from varan.lab.store import RaceRecord
        >>> times = {"ours": {"wall_s": [1.0, 2.0]}, "peer": {"wall_s": [3.0, 6.0]}}
        >>> record = RaceRecord("row", "heat", "ours", times, {}, {})
        >>> [f"{entry.name} {entry.ratio:.2f}" for entry in standings(record)]
        ['ours 1.00', 'peer 3.00']
    """
    ours = record.contestants.get(record.reference, {}).get("wall_s", [])
    found = [_standing(name, entry, ours) for name, entry in record.contestants.items()]
    return sorted(
        found, key=lambda entry: (not entry.wall_s, entry.met is False, entry.wall_s)
    )


def to_dict(record: RaceRecord) -> dict[str, Any]:
    """A heat as plain data, ready for JSON: standings, and the times they are made of.

    Args:
        record: The heat.
    """
    return {
        "heat": record.heat,
        "reference": record.reference,
        "standings": [
            {**entry.to_dict(), "times": _times(record.contestants[entry.name])}
            for entry in standings(record)
        ],
        "skipped": record.skipped,
        "remarks": record.remarks,
        "settings": dict(record.settings),
        "environment": dict(record.environment),
        "taken": record.taken,
    }


def _times(entry: Mapping[str, Any]) -> dict[str, list[float]]:
    return {clock: entry[clock] for clock in ("wall_s", "cpu_s")}


def _standing(name: str, entry: Mapping[str, Any], ours: Sequence[float]) -> Standing:
    wall, cpu = entry.get("wall_s", []), entry.get("cpu_s", [])
    ratio = interval = None
    if wall and ours:
        # What was timed once was timed outside the rounds: it has no pairs.
        paired = len(wall) == len(ours)
        base = ours if paired else [statistics.median(ours)]
        pairs = zip(wall, base, strict=True)
        ratio, *ends = ratio_interval([theirs / mine for theirs, mine in pairs])
        if len(wall) > 1:
            interval = ends[0], ends[1]
    return Standing(
        name=name,
        package=entry.get("package"),
        version=entry.get("version"),
        rounds=len(wall),
        wall_s=statistics.median(wall) if wall else None,
        cpu_s=statistics.median(cpu) if cpu else None,
        ratio=ratio,
        interval=interval,
        compile_s=entry.get("compile_s"),
        error=entry.get("error"),
        met=entry.get("met"),
        failed=entry.get("failed"),
    )


def show(console: Console, record: RaceRecord) -> None:
    """Shows a heat: its table, who was skipped, what a reader must know.

    Args:
        console: Where to show it.
        record: The heat.
    """
    console.print()
    console.print(Text(record.heat, "bold"))
    found = standings(record)
    console.print(_table(record, found))
    _say(console, _conditions(record, found))
    for name, reason in record.skipped.items():
        _say(console, f"{name} skipped: {reason}")
    for remark in record.remarks:
        _say(console, remark)


def _conditions(record: RaceRecord, found: Sequence[Standing]) -> str:
    rounds = max((entry.rounds for entry in found), default=0)
    threads = record.environment.get("threads", "default")
    peers = sorted(
        {f"{e.package} {e.version or ''}".strip() for e in found if e.package}
    )
    return (
        f"{rounds} round{'' if rounds == 1 else 's'}, threads: {threads}; "
        f"peers: {', '.join(peers) or 'none'}."
    )


def _table(record: RaceRecord, found: Sequence[Standing]) -> Table:
    table = Table(pad_edge=False, show_edge=False)
    table.add_column("contestant", overflow="fold", min_width=20)
    for name in ("wall", "processor", f"x {record.reference}", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("compiling", justify="right", no_wrap=True)
    measure = record.settings.get("measure", "error")
    table.add_column(measure, justify="right", min_width=14)
    for entry in found:
        table.add_row(
            Text(entry.name, "bold" if entry.name == record.reference else ""),
            Text("failed", "red") if entry.wall_s is None else seconds(entry.wall_s),
            "" if entry.cpu_s is None else seconds(entry.cpu_s),
            "" if entry.ratio is None else f"{entry.ratio:.3g}",
            _interval(entry),
            "" if entry.compile_s is None else seconds(entry.compile_s),
            _error(entry),
        )
    return table


def _interval(entry: Standing) -> str:
    # Ours against ours says nothing.
    if entry.interval is None or entry.interval == (1.0, 1.0):
        return ""
    low, high = entry.interval
    return f"{low:.3g} to {high:.3g}"


def _error(entry: Standing) -> Text:
    if entry.error is None:
        return Text("")
    if entry.met is False:
        return Text(f"{entry.error:.1e} missed", "red")
    return Text(f"{entry.error:.1e}")


def _say(console: Console, sentence: str) -> None:
    console.print(Padding(Text(sentence), (0, 0, 0, 2)))
