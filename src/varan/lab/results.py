"""What a run came to: each row's verdict, failures, notes and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import plots
from .runner import RowRun
from .verdict import RowVerdict, judge, outcome_of
from .worker import encode_float


@dataclass(frozen=True)
class RowResult:
    """A row's run, judged and drawn.

    Args:
        run: The run.
        verdict: The verdict; `None` when a seed failed.
        plots: The files of its plots.
    """

    run: RowRun
    verdict: RowVerdict | None
    plots: tuple[Path, ...]

    @property
    def outcome(self) -> str:
        """`held`, `not held`, `inconclusive`, `no check` or `failed`."""
        return outcome_of(self.verdict)

    @property
    def notes(self) -> list[str]:
        """What the experiment wants a reader to know, each note once."""
        records = self.run.measured.values()
        return list(dict.fromkeys(note for record in records for note in record.notes))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON; infinities are words."""
        run, verdict = self.run, self.verdict
        return {
            "id": run.row.id,
            "number": run.row.number,
            "title": run.row.title,
            "scale": run.scale,
            "outcome": self.outcome,
            "checks": [
                finite(check.to_dict()) for check in (verdict.checks if verdict else ())
            ],
            "seeds": sorted(run.measured),
            "reused": run.reused,
            "measurements": {
                seed: finite(record.numbers)
                for seed, record in sorted(run.measured.items())
            },
            "wall_s": sum(record.wall_s or 0.0 for record in run.measured.values()),
            "failures": [
                {"seed": record.seed, "message": record.message}
                for record in sorted(run.failures, key=lambda record: record.seed)
            ],
            "remarks": list(verdict.remarks) if verdict else [],
            "notes": self.notes,
            "plots": [str(path) for path in self.plots],
        }


def conclude(runs: Sequence[RowRun], folder: Path) -> list[RowResult]:
    """Judges each run and draws its curves.

    Args:
        runs: The runs.
        folder: The folder of the plots.

    Raises:
        OSError: The folder cannot be written.
    """
    return [_conclude(run, folder) for run in runs]


def _conclude(run: RowRun, folder: Path) -> RowResult:
    verdict = None
    if not run.failures:
        numbers = {seed: record.numbers for seed, record in run.measured.items()}
        verdict = judge(run.row, run.scale, numbers)
    curves = {seed: record.curves for seed, record in run.measured.items()}
    files = plots.draw(curves, folder / run.scale / run.row.id, run.row.id)
    return RowResult(run, verdict, tuple(files))


def finite(value: Any) -> Any:
    """Plain data with infinities as words, since JSON has no number for them."""
    if isinstance(value, float):
        return encode_float(value)
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value
