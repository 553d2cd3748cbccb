"""Progress of a run on standard error: live bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .catalogue import Row
from .runner import Event


class RunProgress:
    """Shows the events of a run; a context manager, called with each event.

    Args:
        rows: The rows of the run.
        scale: The scale.
        seeds: How many seeds each row runs; what it declares when left out.
        console: Where to show them.

    Attributes:
        measured: The seeds measured so far in this run.
    """

    def __init__(
        self, rows: Sequence[Row], scale: str, seeds: int | None, console: Console
    ):
        self._console = console
        self._live = console.is_terminal
        self._total = sum(seeds or row.scales[scale].seeds for row in rows)
        self._done = 0
        self.measured = 0
        self._began = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("seeds"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._all = self._bars.add_task("all rows", total=self._total)
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        name = event.row.id
        if event.kind == "reused":
            self._advance(None, len(event.seeds))
            self._say(f"{name}: {_seeds(event.seeds)} measured earlier")
        elif event.kind == "started":
            self._rows[name] = self._bars.add_task(name, total=len(event.seeds))
            self._say(f"{name}: measuring {_seeds(event.seeds)}")
        elif event.kind == "finished":
            self._bars.remove_task(self._rows.pop(name))
        elif event.record is not None:
            self.measured += event.kind == "measured"
            self._advance(self._rows[name], 1)
            self._seed(name, event)

    def _seed(self, name: str, event: Event) -> None:
        record = event.record
        assert record is not None
        if event.kind == "failed":
            failed = f"{name}: seed {record.seed} failed: {record.message}"
            self._console.print(failed, markup=False, highlight=False)
        else:
            self._say(
                f"{name}: seed {record.seed} measured in {record.wall_s:.1f} s "
                f"({self._done} of {self._total} seeds, "
                f"{time.monotonic() - self._began:.0f} s)"
            )

    def _advance(self, row: TaskID | None, seeds: int) -> None:
        self._done += seeds
        self._bars.advance(self._all, seeds)
        if row is not None:
            self._bars.advance(row, seeds)

    def _say(self, line: str) -> None:
        # The bars already show it on a terminal.
        if not self._live:
            self._console.print(line, markup=False, highlight=False)


def _seeds(seeds: Sequence[int]) -> str:
    return "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
