"""Progress of a race on standard error: a live line on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)


class RaceProgress:
    """Shows the messages of a race; a context manager, called with each message.

    Args:
        repeats: The rounds of each heat.
        console: Where to show them.
    """

    def __init__(self, repeats: int, console: Console):
        self._console = console
        self._repeats = repeats
        self._heats = self._heat = 0
        self._name = ""
        self._turn: int | None = None
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=repeats)

    def __enter__(self) -> RaceProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, message: Mapping[str, Any]) -> None:
        match message["event"]:
            case "heats":
                self._heats = len(message["chosen"])
            case "heat":
                self._heat += 1
                self._turn = None
                self._name = f"heat {self._heat} of {self._heats}: {message['name']}"
                self._bar.reset(self._task, description=self._name)
                self._say(self._name)
            case "preparing":
                task = f"{self._name}, preparing {message['name']}"
                self._bar.update(self._task, description=task)
                self._say(f"  preparing {message['name']}")
            case "time":
                self._round(message["turn"])

    def _round(self, turn: int) -> None:
        if turn != self._turn:
            self._turn = turn
            self._bar.update(self._task, completed=turn + 1, description=self._name)
            self._say(f"  round {turn + 1} of {self._repeats}")

    def _say(self, line: str) -> None:
        # The bar already shows it on a terminal.
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False)
