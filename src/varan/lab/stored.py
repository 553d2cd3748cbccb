"""Rows as the store has them: the newest measurements, or those of a run, judged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import provenance
from ._records import Record, present_fingerprint
from .catalogue import SCALES, Catalogue, Row
from .results import finite
from .store import Store
from .verdict import RowVerdict, judge

# Every outcome of a stored row, in the order in which they are counted.
OUTCOMES = ("held", "not held", "inconclusive", "no check", "no verdict", "failed")


@dataclass(frozen=True)
class StoredRow:
    """A row at one scale.

    Args:
        id: The row's id.
        row: The row; `None` where the catalogue has no such built row.
        scale: The scale.
        measured: Seed to measurement.
        failures: Seed to failure.
        verdict: The verdict; `None` when a seed failed or the numbers allow none.
        reason: Why there is no verdict, in a sentence.
        stale: Whether the present code and settings are others than those measured.
    """

    id: str
    row: Row | None
    scale: str
    measured: Mapping[int, Record]
    failures: Mapping[int, Record]
    verdict: RowVerdict | None
    reason: str | None
    stale: bool

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`."""
        if self.failures:
            return "failed"
        if self.verdict is None:
            return "no verdict"
        return self.verdict.outcome or "no check"

    @property
    def newest(self) -> Record:
        """Its newest record, be it a failure."""
        records = (*self.measured.values(), *self.failures.values())
        return max(records, key=lambda record: record.taken)

    @property
    def wall_s(self) -> float:
        """Seconds of all its seeds together."""
        return sum(record.wall_s or 0.0 for record in self.measured.values())

    @property
    def remarks(self) -> list[str]:
        """What a reader of the verdict must know."""
        remarks = [self.reason] if self.reason else []
        remarks.extend(self.verdict.remarks if self.verdict else ())
        if self.stale:
            remarks.append("Measured with other code or settings than the present.")
        return remarks

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON; infinities are words."""
        row, verdict = self.row, self.verdict
        return {
            "id": self.id,
            "number": row.number if row else None,
            "topic": row.topic if row else None,
            "title": row.title if row else None,
            "scale": self.scale,
            "outcome": self.outcome,
            "stale": self.stale,
            "checks": [
                finite(check.to_dict()) for check in (verdict.checks if verdict else ())
            ],
            "remarks": self.remarks,
            "measurements": {
                seed: {
                    "numbers": finite(record.numbers),
                    **origin(record),
                }
                for seed, record in self.measured.items()
            },
            "failures": {
                seed: {"message": record.message, **origin(record)}
                for seed, record in self.failures.items()
            },
        }


def stored_rows(
    catalogue: Catalogue, store: Store, run: str | None = None
) -> list[StoredRow]:
    """What the store has of every row and scale, in the order of the catalogue.

    Args:
        catalogue: The catalogue, whose checks decide.
        store: The store.
        run: The id of a run: what that run came to, whatever was measured since.

    Returns:
        The rows; those that the catalogue no longer has come last.

    Raises:
        StoreError: The store cannot be read.
    """
    if run is None:
        found = store.newest_all(curves=False)
        for key, failing in store.failing().items():
            found[key] = found.get(key, {}) | failing
    else:
        found = store.of_run(run, curves=False)
    rows = {row.id: row for row in catalogue.rows if row.state == "built"}
    hash_source = functools.cache(provenance.hash_source)
    judged = [
        _stored_row(id, rows.get(id), scale, records, hash_source)
        for (id, scale), records in found.items()
    ]
    places = {row.id: place for place, row in enumerate(catalogue.rows)}
    judged.sort(key=lambda e: (places.get(e.id, len(places)), SCALES.index(e.scale)))
    return judged


def origin(record: Record) -> dict[str, Any]:
    """Where and when a record was taken and what it cost, as plain data."""
    versions = record.environment.get("versions", {})
    return {
        "taken": record.taken,
        "run": record.run,
        "commit": record.environment.get("commit"),
        "fingerprint": record.fingerprint,
        "varan": versions.get("varan"),
        "jax": versions.get("jax"),
        "processor": record.environment.get("machine", {}).get("processor"),
        "wall_s": record.wall_s,
        "compile_s": record.compile_s,
        "cpu_s": record.cpu_s,
        "peak_memory_mib": record.peak_memory_mib,
    }


def _stored_row(
    id: str,
    row: Row | None,
    scale: str,
    records: Mapping[int, Record],
    hash_source: Callable[[str], str],
) -> StoredRow:
    measured, failures = {}, {}
    for seed, record in sorted(records.items()):
        (measured if record.outcome == "measured" else failures)[seed] = record
    stale = row is not None and any(
        record.fingerprint
        != present_fingerprint(row, scale, record.sources, hash_source)
        for record in measured.values()
    )
    verdict = reason = None
    if row is None:
        reason = "The catalogue has no such built row."
    elif failures:
        reason = _failed(failures, len(records))
    else:
        numbers = {seed: record.numbers for seed, record in measured.items()}
        try:
            verdict = judge(row, scale, numbers)
        except ValueError as error:
            # A check may have been added since.
            reason = str(error)
    return StoredRow(id, row, scale, measured, failures, verdict, reason, stale)


def _failed(failures: Mapping[int, Record], seeds: int) -> str:
    """How many seeds failed, and what the first one said."""
    seed, first = next(iter(failures.items()))
    count = f"{len(failures)} of {seeds} seeds failed"
    return f"{count}; seed {seed}: {first.message or 'no message'}"
