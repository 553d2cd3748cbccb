"""What the report says, before it says it: rows, newest results, verdicts, races.

Verdicts are `verdict.judge`'s; this module only chooses the measurements that they are
formed from.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .. import provenance
from .._records import RaceRecord, Record, present_fingerprint
from ..catalogue import Catalogue, Row
from ..store import Store
from ..verdict import CheckVerdict, RowVerdict, judge, outcome_of
from .numbers import counted

# In the order in which a page shows them; the first two can decide a row.
SHOWN = ("laptop", "paper", "smoke")
DECIDING = SHOWN[:2]
# What becomes of a row, in the order of the scoreboard.
OUTCOMES = ("held", "not held", "inconclusive", "failed", "not run", "planned")


@dataclass(frozen=True)
class ScaleResult:
    """A row at one scale.

    Args:
        scale: The scale.
        records: Seed to its newest measurement.
        failures: The failures that no newer measurement has made good.
        verdict: The verdict; `None` when a seed failed or the numbers allow none.
        reason: The verdict's reason in a sentence.
        remarks: What a reader must know.
    """

    scale: str
    records: Mapping[int, Record]
    failures: Sequence[Record]
    verdict: RowVerdict | None
    reason: str
    remarks: Sequence[str]

    @property
    def outcome(self) -> str:
        """`held`, `not held`, `inconclusive`, `no check` or `failed`."""
        return outcome_of(self.verdict)

    @property
    def unmet(self) -> list[CheckVerdict]:
        """The checks that do not hold, those that are refuted first."""
        checks = self.verdict.checks if self.verdict else ()
        return [
            check
            for outcome in ("not held", "inconclusive")
            for check in checks
            if check.outcome == outcome
        ]

    @property
    def notes(self) -> dict[str, list[int]]:
        """What the experiment wants a reader to know: each note and its seeds."""
        found: dict[str, list[int]] = {}
        for seed, record in self.records.items():
            for note in record.notes:
                found.setdefault(note, []).append(seed)
        return found

    @property
    def quantities(self) -> list[str]:
        """The names of all measured numbers, in the order of the experiment."""
        records = self.records.values()
        return list(
            dict.fromkeys(name for record in records for name in record.numbers)
        )


@dataclass(frozen=True)
class RowResult:
    """A row with all that was measured of it.

    Args:
        row: The row.
        scales: Its results, in the order in which they are shown.
        races: Its races, the newest of each heat.
    """

    row: Row
    scales: tuple[ScaleResult, ...]
    races: tuple[RaceRecord, ...]

    @property
    def headline(self) -> ScaleResult | None:
        """The result that counts: laptop scale, else paper; never smoke."""
        return next((e for e in self.scales if e.scale in DECIDING), None)

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`."""
        return self.outcome_at(self.headline.scale if self.headline else None)

    def outcome_at(self, scale: str | None) -> str:
        """What became of the row at one scale; one of `OUTCOMES`."""
        if self.row.state == "planned":
            return "planned"
        found = next((e.outcome for e in self.scales if e.scale == scale), "not run")
        # A scale that decides nothing leaves the row open.
        return found if found in OUTCOMES else "not run"


@dataclass(frozen=True)
class Results:
    """Everything the report shows.

    Args:
        rows: The rows of the catalogue, in their order.
        unknown: The ids of stored rows that the catalogue does not have as built.
        measured: When the newest measurement was taken (UTC); `None` without any.
    """

    rows: tuple[RowResult, ...]
    unknown: tuple[str, ...]
    measured: str | None

    def counts(self, scale: str | None = None) -> dict[str, int]:
        """How many rows came to each outcome: at one scale, or by their headlines."""
        return count(self.rows, scale)

    def by_topic(self) -> dict[str, list[RowResult]]:
        """The rows of each topic, topics in alphabetical order."""
        topics: dict[str, list[RowResult]] = {}
        for entry in sorted(self.rows, key=lambda entry: entry.row.topic):
            topics.setdefault(entry.row.topic, []).append(entry)
        return topics


def count(rows: Iterable[RowResult], scale: str | None = None) -> dict[str, int]:
    """How many rows came to each outcome, in the order of `OUTCOMES`.

    Args:
        rows: The rows.
        scale: The scale; each row's headline when left out.
    """
    found = Counter(
        entry.outcome_at(scale) if scale else entry.outcome for entry in rows
    )
    return {outcome: found[outcome] for outcome in OUTCOMES}


def gather(catalogue: Catalogue, store: Store | None) -> Results:
    """Reads the newest results and judges them.

    Args:
        catalogue: The catalogue.
        store: The store; `None` shows the catalogue alone.

    Returns:
        Each row with its verdicts.

    Raises:
        StoreError: The store cannot be read.
    """
    newest = store.newest_all() if store else {}
    failures: dict[tuple[str, str], list[Record]] = {}
    for record in store.records(outcome="failed") if store else ():
        failures.setdefault((record.row, record.scale), []).append(record)
    races: dict[str, list[RaceRecord]] = {}
    for race in store.races() if store else ():
        races.setdefault(race.row, []).append(race)
    hash_source = functools.cache(provenance.hash_source)
    rows = []
    for row in catalogue.rows:
        scales = [
            _scale_result(
                row,
                scale,
                newest.get((row.id, scale), {}),
                failures.get((row.id, scale), ()),
                hash_source,
            )
            for scale in SHOWN
            if row.state == "built"
        ]
        held = tuple(entry for entry in scales if entry is not None)
        rows.append(RowResult(row, held, tuple(races.get(row.id, ()))))
    built = {row.id for row in catalogue.rows if row.state == "built"}
    stored = {row for row, _ in (*newest, *failures)} | set(races)
    taken = [r.taken for seeds in newest.values() for r in seeds.values()]
    return Results(tuple(rows), tuple(sorted(stored - built)), max(taken, default=None))


def _scale_result(
    row: Row,
    scale: str,
    measured: Mapping[int, Record],
    failed: Sequence[Record],
    hash_source,
) -> ScaleResult | None:
    failures = _standing(measured, failed)
    if not measured and not failures:
        return None
    measured = dict(sorted(measured.items()))
    remarks = []
    if any(_outdated(row, scale, record, hash_source) for record in measured.values()):
        remarks.append(
            "Measured with code or settings that have changed since: "
            f"`varan run {row.id} --scale {scale}` measures it again."
        )
    if failures:
        total = len(measured) + len(failures)
        reason = f"{len(failures)} of {counted(total, 'seed')} failed."
        return ScaleResult(scale, measured, failures, None, reason, remarks)
    numbers = {seed: record.numbers for seed, record in measured.items()}
    try:
        verdict = judge(row, scale, numbers)
    except ValueError as error:
        reason = f"The stored numbers allow no verdict: {error}"
        return ScaleResult(scale, measured, failures, None, reason, remarks)
    remarks = [*verdict.remarks, *remarks]
    return ScaleResult(scale, measured, (), verdict, _reason(verdict), remarks)


def _standing(
    measured: Mapping[int, Record], failed: Sequence[Record]
) -> tuple[Record, ...]:
    """By seed, the newest failure that still says something of the newest results.

    One that a newer measurement of its seed has made good does not, nor does one from
    before the newest measurements, unless it is of the same run or the same code.
    """
    last = max((record.taken for record in measured.values()), default="")
    runs = {record.run for record in measured.values() if record.run}
    prints = {record.fingerprint for record in measured.values() if record.fingerprint}
    standing: dict[int, Record] = {}
    for record in failed:
        known = measured.get(record.seed)
        together = record.run in runs or record.fingerprint in prints
        if known is not None:
            stands = record.taken > known.taken
        else:
            stands = record.taken >= last or together
        if stands:
            standing[record.seed] = record
    return tuple(record for _, record in sorted(standing.items()))


def _outdated(row: Row, scale: str, record: Record, hash_source) -> bool:
    present = present_fingerprint(row, scale, record.sources, hash_source)
    return record.fingerprint != present


def _reason(verdict: RowVerdict) -> str:
    """Why the verdict is what it is, in a sentence."""
    total = len(verdict.checks)
    if not total:
        return "This scale decides no check."
    if verdict.outcome == "held":
        return "Its check holds." if total == 1 else f"All {total} checks hold."
    found = Counter(check.outcome for check in verdict.checks)
    parts = [
        f"{found[outcome]} {'is' if found[outcome] == 1 else 'are'} {outcome}"
        for outcome in ("not held", "inconclusive")
        if found[outcome]
    ]
    return f"Of {counted(total, 'check')} {' and '.join(parts)}."
