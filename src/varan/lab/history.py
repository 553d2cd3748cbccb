"""What changed between two runs: verdicts, numbers, versions, and what must not.

Both runs are judged by the present checks, so that a difference is one of measurements
and not of thresholds. The same code, settings and seed must give the same numbers:
where they do not, on the same machine and versions, the row is irreproducible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ._records import Record, RunSummary
from .catalogue import Catalogue
from .results import finite
from .store import Store
from .stored import StoredRow, stored_rows
from .verdict import CheckVerdict


class HistoryError(LookupError):
    """A reference to no run, or to nothing that could be compared; one sentence."""


@dataclass(frozen=True)
class CheckChange:
    """One check in both runs.

    Args:
        before: Its verdict in the earlier run.
        after: Its verdict in the later run.
    """

    before: CheckVerdict
    after: CheckVerdict

    @property
    def apart(self) -> bool:
        """Whether the two intervals have no point in common."""
        first, second = self.before.interval, self.after.interval
        if first is None or second is None:
            return False
        return first[1] < second[0] or second[1] < first[0]

    @property
    def outcome_changed(self) -> bool:
        """Whether it came to another verdict."""
        return self.before.outcome != self.after.outcome

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON; infinities are words."""
        check = self.after.check
        return finite(
            {
                "name": check.name,
                "quantity": check.quantity,
                "statistic": check.statistic,
                "before": _side(self.before),
                "after": _side(self.after),
                "apart": self.apart,
            }
        )


@dataclass(frozen=True)
class Difference:
    """A number that one seed of the same code and settings gave differently.

    Args:
        seed: The seed.
        quantity: The number's name.
        before: What the earlier run measured.
        after: What the later run measured.
        elsewhere: Whether machine or versions differed too, which may explain it.
    """

    seed: int
    quantity: str
    before: float
    after: float
    elsewhere: bool


@dataclass(frozen=True)
class RowChange:
    """One row and scale in both runs.

    Args:
        before: What the earlier run came to.
        after: What the later run came to.
        checks: The checks that were decided in both.
        differences: What the same code, settings and seed gave differently; nothing
            for rows that measure time, whose numbers always differ.
    """

    before: StoredRow
    after: StoredRow
    checks: tuple[CheckChange, ...]
    differences: tuple[Difference, ...]

    @property
    def outcome_changed(self) -> bool:
        """Whether the row, or one of its checks, came to another verdict."""
        checks = any(check.outcome_changed for check in self.checks)
        return checks or self.before.outcome != self.after.outcome

    @property
    def apart(self) -> bool:
        """Whether a checked quantity moved by more than its intervals."""
        return any(check.apart for check in self.checks)

    @property
    def irreproducible(self) -> bool:
        """Whether a number differs that nothing explains."""
        return any(not difference.elsewhere for difference in self.differences)

    @property
    def moved(self) -> bool:
        """Whether any number of a common seed differs, for whatever reason."""
        return any(
            self.before.measured[seed].numbers != record.numbers
            for seed, record in self.after.measured.items()
            if seed in self.before.measured
        )

    @property
    def code_changed(self) -> bool:
        """Whether they measured different code or settings."""
        return _fingerprints(self.before) != _fingerprints(self.after)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON; infinities are words."""
        return {
            "id": self.after.id,
            "number": self.after.row.number if self.after.row else None,
            "scale": self.after.scale,
            "before": _summary(self.before),
            "after": _summary(self.after),
            "code_changed": self.code_changed,
            "moved": self.moved,
            "irreproducible": self.irreproducible,
            "checks": [check.to_dict() for check in self.checks],
            "differences": [finite(dict(vars(each))) for each in self.differences],
        }


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Args:
        before: The earlier run.
        after: The later run.
        rows: What both measured, in the order of the catalogue.
        only_before: Row and scale of what only the earlier run measured.
        only_after: Row and scale of what only the later run measured.
        environment: What differs of versions, machine and commit: name, before, after.
    """

    before: RunSummary
    after: RunSummary
    rows: tuple[RowChange, ...]
    only_before: tuple[tuple[str, str], ...]
    only_after: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, Any, Any], ...]

    def only(self, wanted: Callable[[str, str], bool]) -> Comparison:
        """The same of some rows alone.

        Args:
            wanted: Whether a row's id and a scale stay in.
        """
        return replace(
            self,
            rows=tuple(r for r in self.rows if wanted(r.after.id, r.after.scale)),
            only_before=tuple(key for key in self.only_before if wanted(*key)),
            only_after=tuple(key for key in self.only_after if wanted(*key)),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON; infinities are words."""
        return {
            "before": run_dict(self.before),
            "after": run_dict(self.after),
            "environment": [
                {"name": name, "before": before, "after": after}
                for name, before, after in self.environment
            ],
            "rows": [row.to_dict() for row in self.rows],
            "only_before": [_key_dict(key) for key in self.only_before],
            "only_after": [_key_dict(key) for key in self.only_after],
        }


def run_dict(run: RunSummary) -> dict[str, Any]:
    """A run's summary as plain data, ready for JSON."""
    return {
        "run": run.run,
        "began": run.began,
        "ended": run.ended,
        "commit": run.commit,
        "scales": list(run.scales),
        "rows": run.rows,
        "measured": run.measured,
        "failed": run.failed,
        "wall_s": run.wall_s,
    }


def find_run(runs: Sequence[RunSummary], reference: str) -> RunSummary:
    """The run with an id, or with a part of one that no other has.

    Args:
        runs: The runs.
        reference: The id, or the part.

    Raises:
        HistoryError: There is none, or more than one.
    """
    found = [run for run in runs if run.run and reference in run.run]
    exact = [run for run in found if run.run == reference]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if found:
        raise HistoryError(f"{len(found)} runs have {reference!r} in their id.")
    raise HistoryError(f"There is no run {reference!r}.")


def pair(
    runs: Sequence[RunSummary], references: Sequence[str]
) -> tuple[RunSummary, RunSummary]:
    """The two runs that are to be compared, the earlier one first.

    Args:
        runs: All runs, oldest first.
        references: Two runs; or one, for it and the newest before it that measured
            something that it measured; or none, for the newest run and such a one.

    Raises:
        HistoryError: A reference to no run, or no earlier run.
    """
    chosen = [find_run(runs, reference) for reference in references]
    if len(chosen) == 2:
        if chosen[0] == chosen[1]:
            raise HistoryError("These are one and the same run.")
        first, second = sorted(chosen, key=runs.index)
        return first, second
    with_id = [run for run in runs if run.run]
    if not with_id:
        raise HistoryError("There is no run yet.")
    after = chosen[0] if chosen else with_id[-1]
    for before in reversed(with_id[: with_id.index(after)]):
        if set(before.covers) & set(after.covers):
            return before, after
    raise HistoryError(f"No earlier run measured anything that {after.run} did.")


def compare(
    catalogue: Catalogue, store: Store, before: RunSummary, after: RunSummary
) -> Comparison:
    """Compares two runs.

    Args:
        catalogue: The catalogue, whose checks decide.
        store: The store.
        before: The earlier run.
        after: The later run.

    Raises:
        StoreError: The store cannot be read.
    """
    first = {(e.id, e.scale): e for e in stored_rows(catalogue, store, before.run)}
    second = {(e.id, e.scale): e for e in stored_rows(catalogue, store, after.run)}
    return Comparison(
        before,
        after,
        tuple(_row(first[key], second[key]) for key in second if key in first),
        tuple(key for key in first if key not in second),
        tuple(key for key in second if key not in first),
        tuple(_environment(before.environment, after.environment)),
    )


def _row(before: StoredRow, after: StoredRow) -> RowChange:
    checks = ()
    if before.verdict and after.verdict:
        # Both judged the same checks at the same scale.
        both = zip(before.verdict.checks, after.verdict.checks, strict=True)
        checks = tuple(CheckChange(one, other) for one, other in both)
    differences: tuple[Difference, ...] = ()
    if not (after.row and after.row.exclusive):
        differences = tuple(_differences(before, after))
    return RowChange(before, after, checks, differences)


def _differences(before: StoredRow, after: StoredRow) -> Iterator[Difference]:
    for seed, new in after.measured.items():
        old = before.measured.get(seed)
        if old is None or old.fingerprint is None:
            continue
        if old.fingerprint == new.fingerprint:
            elsewhere = _where(old) != _where(new)
            for quantity, value in new.numbers.items():
                known = old.numbers.get(quantity, value)
                if known != value:
                    yield Difference(seed, quantity, known, value, elsewhere)


def _where(record: Record) -> list[Any]:
    """What may change numbers that the fingerprint does not see."""
    environment = record.environment
    # Varan's own files are in the fingerprint.
    versions = {**environment.get("versions", {}), "varan": None}
    machine = environment.get("machine", {})
    return [environment.get("python"), versions, machine.get("processor")]


def _fingerprints(row: StoredRow) -> set[str | None]:
    return {record.fingerprint for record in row.measured.values()}


def _environment(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    first, second = _flat(before), _flat(after)
    for name in dict.fromkeys((*first, *second)):
        if first.get(name) != second.get(name):
            yield name, first.get(name), second.get(name)


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Commit, Python, versions, machine, each under its own name."""
    return {
        "commit": environment.get("commit"),
        "python": environment.get("python"),
        **environment.get("versions", {}),
        **environment.get("machine", {}),
    }


def _side(verdict: CheckVerdict) -> dict[str, Any]:
    return {
        "value": verdict.value,
        "interval": verdict.interval,
        "outcome": verdict.outcome,
    }


def _summary(row: StoredRow) -> dict[str, Any]:
    return {
        "outcome": row.outcome,
        "seeds": list(row.measured),
        "failures": list(row.failures),
        "reason": row.reason,
        "wall_s": row.wall_s,
    }


def _key_dict(key: tuple[str, str]) -> dict[str, str]:
    return {"id": key[0], "scale": key[1]}
