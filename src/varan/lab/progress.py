"""Progress of a run on standard error: live bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .catalogue import Row
from .runner import Event

_BAR_WIDTH = 32
# What runs now is listed as far as a small window shows it.
_SHOWN = 8


class RunProgress:
    """Shows the events of a run; a context manager, called with each event.

    Args:
        rows: The rows of the run.
        scale: The scale.
        seeds: How many seeds each row runs; what it declares when left out.
        console: Where to show them.
        clock: Seconds that go by.

    Attributes:
        measured: The seeds measured so far in this run.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        scale: str,
        seeds: int | None,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.measured = 0
        self._console = console
        self._clock = clock
        self._began = clock()
        self._wanted = {row.id: seeds or row.scales[scale].seeds for row in rows}
        self._done = dict.fromkeys(self._wanted, 0)
        self._reused = self._failed = 0
        self._started: dict[str, float] = {}
        self._running: dict[tuple[str, int], float] = {}
        self._live = Live(
            get_renderable=self._picture,
            console=console,
            refresh_per_second=4,
            transient=True,
        )

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        name = event.row.id
        if event.kind == "reused":
            self._done[name] += len(event.seeds)
            self._reused += len(event.seeds)
            self._say(f"{name}: {_seeds(event.seeds)} measured earlier")
        elif event.kind == "started":
            self._started[name] = self._clock()
            self._say(f"{name}: measuring {_seeds(event.seeds)}")
        elif event.kind == "finished":
            self._finished(name)
        elif event.kind == "began":
            self._running[name, event.seeds[0]] = self._clock()
        elif event.record is not None:
            self._running.pop((name, event.record.seed), None)
            self._done[name] += 1
            self._ended(name, event)

    def _ended(self, name: str, event: Event) -> None:
        record = event.record
        assert record is not None
        if event.kind == "failed":
            self._failed += 1
            failed = f"{name}: seed {record.seed} failed: {record.message}"
            self._console.print(failed, style="red", markup=False, highlight=False)
            return
        self.measured += 1
        left = self._left()
        self._say(
            f"{name}: seed {record.seed} measured in {record.wall_s:.1f} s "
            f"({sum(self._done.values())} of {sum(self._wanted.values())} seeds, "
            f"{_span(self._clock() - self._began)}"
            + (f", about {_span(left)} left)" if left else ")")
        )

    def _finished(self, name: str) -> None:
        # In lines, each of its seeds has been told of.
        if self._console.is_terminal:
            spent = _span(self._clock() - self._started[name])
            line = f"{name}: through after {spent}"
            self._console.print(line, style="dim", markup=False, highlight=False)

    def _left(self) -> float | None:
        """Seconds left, if the seeds to come take as long as those of this run."""
        new = self.measured + self._failed
        wanting = sum(self._wanted.values()) - self._reused - new
        return (self._clock() - self._began) / new * wanting if new else None

    def _picture(self) -> Group:
        rows = sum(self._done[name] >= self._wanted[name] for name in self._wanted)
        seeds, all_seeds = sum(self._done.values()), sum(self._wanted.values())
        bars = Table.grid(padding=(0, 1))
        bars.add_row("rows", _bar(rows, len(self._wanted)), f"{rows}/{len(self._done)}")
        bars.add_row("seeds", _bar(seeds, all_seeds), f"{seeds}/{all_seeds}")
        left = self._left()
        times = Text(f"{_span(self._clock() - self._began)} elapsed")
        times.append(f", about {_span(left)} left" if left else "")
        if self._reused:
            times.append(f", {self._reused} measured earlier", style="dim")
        if self._failed:
            times.append(f", {self._failed} failed", style="red")
        return Group(bars, times, self._now())

    def _now(self) -> Table:
        """What runs at the moment, longest first."""
        now = Table.grid(padding=(0, 2))
        for (name, seed), began in list(self._running.items())[:_SHOWN]:
            since = _span(self._clock() - began)
            now.add_row(
                Text(f"  {name}", no_wrap=True, overflow="ellipsis"),
                Text(f"seed {seed}", "dim"),
                Text(since, "dim"),
            )
        more = len(self._running) - _SHOWN
        if more > 0:
            now.add_row(Text(f"  and {more} more", "dim"))
        return now

    def _say(self, line: str) -> None:
        # The bars already show it on a terminal.
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False)


def _bar(done: int, total: int) -> ProgressBar:
    return ProgressBar(total=total, completed=done, width=_BAR_WIDTH)


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


def _seeds(seeds: Sequence[int]) -> str:
    return "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
