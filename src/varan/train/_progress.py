"""Progress of a training on standard error: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

# Off a terminal: lines so far apart that a log of a long run stays short.
_SECONDS = 10.0


class TrainingProgress:
    """Shows epochs and losses; a context manager, called with each epoch.

    Args:
        epochs: The epoch to reach.
        console: A `rich.console.Console`; default: one on standard error.
        clock: Seconds that go by.

    Example:
        >>> from varan.train import TrainingProgress
        >>> with TrainingProgress(2) as progress:
        ...     for epoch, loss in ((1, 0.5), (2, 0.25)):
        ...         progress(epoch, loss)
    """

    def __init__(
        self,
        epochs: int,
        console: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._epochs = epochs
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._told = self._began = clock()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=32),
            TextColumn(
                "{task.completed}/{task.total} epochs, loss {task.fields[loss]}"
            ),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=epochs, loss="-")

    def __enter__(self) -> TrainingProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A bar that never began would still end its line.
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, epoch: int, loss: float) -> None:
        """Shows that `epoch` epochs are done, the last with this loss."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=epoch, loss=f"{loss:.4g}")
            return
        now = self._clock()
        if epoch == self._epochs or now - self._told >= _SECONDS:
            self._told = now
            self._console.print(
                f"epoch {epoch} of {self._epochs}: loss {loss:.4g} "
                f"({now - self._began:.0f} s)",
                markup=False,
                highlight=False,
            )
