"""What the runner asks of those who run its jobs: processes of this machine, or Ray.

An executor starts workers. A worker works on one row, measures the seeds that it is
given, one at a time, and says what happens as messages in the runner's inbox:

- `ready`: it takes its first seed; carries the `environment` it measures in;
- `measured` or `failed`: the seed's outcome, as `varan.lab.worker` reports it;
- `ended`: it is no more; carries a `message` (why, in a sentence), a `detail` and
  whether it was `lost` through no doing of its seed;
- `refused`: it must not measure; carries the `message` and the `hint` for the user.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Mapping
from typing import Any, Protocol

from .catalogue import Row

Inbox = queue.SimpleQueue[tuple["Worker", dict[str, Any]]]


class ExecutorError(RuntimeError):
    """Jobs cannot be run there; one sentence, and what to do.

    Args:
        message: The sentence.
        hint: What to do.
    """

    def __init__(self, message: str, hint: str):
        super().__init__(message)
        self.hint = hint


class Worker(Protocol):
    """What measures seeds of one row."""

    def give(self, seed: int | None) -> None:
        """Hands it the next seed; `None` when there is no more and it may end."""
        ...

    def stop(self) -> None:
        """Ends it now, whatever it does; a message will say that it has ended."""
        ...

    def close(self) -> None:
        """Waits for its end and gives back what it holds; never raises."""
        ...


class Executor(Protocol):
    """What starts workers.

    Attributes:
        jobs: How many workers it is good for at a time.
    """

    jobs: int

    def start(self, job: Mapping[str, Any], inbox: Inbox) -> Worker:
        """Starts a worker for a row.

        Args:
            job: What `job_of` returns.
            inbox: Where its messages go.
        """
        ...


def job_of(row: Row, scale: str) -> dict[str, Any]:
    """What a worker must know of a row, as plain data.

    Args:
        row: The row.
        scale: The scale.
    """
    return {
        "row": row.id,
        "module": row.module,
        "scale": scale,
        "precision": row.precision,
        "one_thread": scale != "paper",
        "quick_compile": scale == "smoke",
        # They decide the last digits: on a cluster the caller's, not the node's own.
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "settings": dict(row.scales[scale].settings),
    }
