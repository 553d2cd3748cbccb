"""What the store keeps: measurements, races, and what it tells of each run."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from . import provenance
from .catalogue import Row

# Without vowels no word comes out; without l no letter looks like a digit.
_LETTERS = "bcdfghjkmnpqrstvwxz"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_run_id() -> str:
    """The id of a new run: when it began (UTC), and letters that tell it from others.

    Ids sort by time.
    """
    letters = "".join(secrets.choice(_LETTERS) for _ in range(5))
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{letters}"


@dataclass(frozen=True)
class Record:
    """One seed of one row at one scale: measured, or failed with its message.

    Args:
        row: The row's id.
        scale: The scale.
        seed: The seed.
        outcome: `"measured"` or `"failed"`.
        settings: The scale's settings.
        environment: Versions, machine and commit.
        fingerprint: What the numbers depend on, hashed; see `provenance.fingerprint`.
        sources: The files of varan that were loaded.
        numbers: The named numbers.
        curves: The curves, as plain data.
        notes: What a reader must know.
        message: Why it failed, in a sentence.
        detail: The traceback or the end of the standard error, if it failed.
        wall_s: Wall-clock seconds.
        cpu_s: Seconds of processor time.
        compile_s: Seconds of the wall clock that went into compiling.
        peak_memory_mib: The process's largest memory so far.
        run: The id of the run that took it, of `new_run_id`.
        taken: When it was stored (UTC).
    """

    row: str
    scale: str
    seed: int
    outcome: Literal["measured", "failed"]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    fingerprint: str | None = None
    sources: list[str] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    message: str | None = None
    detail: str | None = None
    wall_s: float | None = None
    cpu_s: float | None = None
    compile_s: float | None = None
    peak_memory_mib: float | None = None
    run: str | None = None
    taken: str = field(default_factory=_now)

    def is_current(self, row: Row, scale: str) -> bool:
        """Whether the row, measured now, would run the same code and settings."""
        return self.fingerprint == present_fingerprint(row, scale, self.sources)


def present_fingerprint(
    row: Row,
    scale: str,
    sources: Iterable[str],
    hash_source: Callable[[str], str] = provenance.hash_source,
) -> str:
    """The fingerprint that a measurement with these sources would get now.

    Args:
        row: The row, as the catalogue has it now.
        scale: The scale.
        sources: The files of varan that it loads.
        hash_source: What hashes one of them; a remembering one where many are asked.
    """
    hashes = {file: hash_source(file) for file in sources}
    settings = row.scales[scale].settings
    return provenance.fingerprint(row.id, scale, row.precision, settings, hashes)


@dataclass(frozen=True)
class RaceRecord:
    """One heat of a row's race: ours and the peers on one instance.

    Args:
        row: The row's id.
        heat: The instance and setting they ran on, by name.
        reference: The contestant that ratios are formed with.
        contestants: Name to its times: `wall_s` and `cpu_s` (lists, one entry a round),
            `compile_s`, `package`, `version` and `error` (how far its answer is from
            the agreed one); each but the first two may be `None`.
        environment: Versions, machine and commit.
        settings: The race's settings.
        skipped: Contestants that did not run, and why.
        remarks: What a reader must know.
        taken: When it was stored (UTC).
    """

    row: str
    heat: str
    reference: str
    contestants: dict[str, dict[str, Any]]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    skipped: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    taken: str = field(default_factory=_now)


@dataclass(frozen=True)
class RunSummary:
    """One run, as its records tell.

    Args:
        run: Its id; `None` gathers the measurements from before runs had ids.
        began: When its first record was stored (UTC).
        ended: When its last record was stored (UTC).
        covers: The rows and scales that it has records of, in alphabetical order.
        measured: How many seeds it measured.
        failed: How many seeds failed.
        wall_s: Seconds of all its seeds together.
        environment: Versions, machine and commit, of its last record.
    """

    run: str | None
    began: str
    ended: str
    covers: tuple[tuple[str, str], ...]
    measured: int
    failed: int
    wall_s: float
    environment: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """How many rows it has records of."""
        return len({row for row, _ in self.covers})

    @property
    def scales(self) -> tuple[str, ...]:
        """The scales it ran at, in alphabetical order."""
        return tuple(sorted({scale for _, scale in self.covers}))

    @property
    def commit(self) -> str | None:
        """The commit that it ran."""
        return self.environment.get("commit")
