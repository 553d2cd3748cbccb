"""The races of a row, ready to be shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .._records import RaceRecord
from ..standings import Standing, standings
from .strip import ratio_axis, ratio_strip


@dataclass(frozen=True)
class Heat:
    """One heat of a race.

    Args:
        record: The heat as it was stored.
        contestants: Its contestants in their order, each with its ratio drawn; `None`
            where there is none to draw.
    """

    record: RaceRecord
    contestants: Sequence[tuple[Standing, Markup | None]]

    @property
    def measure(self) -> str:
        """What the contestants' answers were checked by."""
        return str(self.record.settings.get("measure", "error"))

    @property
    def varan(self) -> str:
        """The version that ours were of."""
        versions = self.record.environment.get("versions") or {}
        return str(versions.get("varan") or "")

    @property
    def conditions(self) -> str:
        """Where and how it was run."""
        environment = self.record.environment
        return (
            f"{machine(environment)}, threads: {environment.get('threads', 'default')}"
        )

    @property
    def rounds(self) -> int:
        """How often the contestant was timed that was timed most."""
        return max((entry.rounds for entry, _ in self.contestants), default=0)


def heat(record: RaceRecord) -> Heat:
    """A stored heat, with its standings and their drawings.

    Args:
        record: The heat.
    """
    found = standings(record)
    axis = ratio_axis([_ends(entry) for entry in found if entry.ratio])
    drawn = []
    for entry in found:
        strip = None
        if entry.ratio and entry.name != record.reference:
            _, *ends = _ends(entry)
            strip = ratio_strip(entry.ratio, (ends[0], ends[1]), axis)
        drawn.append((entry, strip))
    return Heat(record, drawn)


def machine(environment: Mapping[str, Any]) -> str:
    """The machine of an environment, in words."""
    found = environment.get("machine") or {}
    parts = [found.get("processor"), found.get("system")]
    if found.get("cores"):
        parts.insert(1, f"{found['cores']} cores")
    if found.get("memory_gib"):
        parts.insert(-1, f"{found['memory_gib']} GiB")
    return ", ".join(str(part) for part in parts if part) or "machine not recorded"


def _ends(entry: Standing) -> tuple[float, float, float]:
    """A ratio with its interval; one that was timed once has only itself."""
    assert entry.ratio is not None
    return (entry.ratio, *(entry.interval or (entry.ratio, entry.ratio)))
