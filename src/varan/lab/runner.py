"""The runner: rows in worker processes, every seed stored as soon as it is measured.

One worker measures all seeds of one row, so that they share compiled functions. A
worker that crashes, hangs or raises is recorded as failed and harms no other row. Seeds
that the present code has already measured are taken from the store.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from . import provenance
from .catalogue import Row
from .store import Record, Store
from .verdict import fault

# Far above what a row is meant to need: these end what hangs, not what is slow.
TIME_LIMIT_S: Mapping[str, float] = {
    "smoke": 5 * 60,
    "laptop": 60 * 60,
    "paper": 72 * 60 * 60,
}
# One thread a worker: rows run side by side, ratios of times are fair to peers that
# have no threads, and the order of a sum does not depend on the machine.
_ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
_TICK_S = 0.2
_STDERR_TAIL = 4000


@dataclass(frozen=True)
class Event:
    """Something that happened to a row during a run.

    Args:
        kind: A row was found partly measured (`"reused"`), a worker was `"started"` or
            `"finished"`, a seed `"measured"` or `"failed"`.
        row: The row.
        seeds: The seeds it is about.
        record: What was stored, for a seed.
    """

    kind: Literal["reused", "started", "measured", "failed", "finished"]
    row: Row
    seeds: tuple[int, ...] = ()
    record: Record | None = None


@dataclass
class RowRun:
    """What is known of one row after a run.

    Args:
        row: The row.
        scale: The scale.
        seeds: The seeds that were asked for.
        measured: Seed to its measurement, old or new.
        failures: The failures of this run.
        reused: How many of the measurements were in the store already.
    """

    row: Row
    scale: str
    seeds: tuple[int, ...]
    measured: dict[int, Record] = field(default_factory=dict)
    failures: list[Record] = field(default_factory=list)
    reused: int = 0


def default_jobs() -> int:
    """Two rows at a time where there are two cores, else one."""
    return min(2, provenance.cores())


def run(
    rows: Sequence[Row],
    scale: str,
    store: Store,
    *,
    seeds: int | None = None,
    jobs: int = 1,
    fresh: bool = False,
    time_limit: float | None = None,
    report: Callable[[Event], None] = lambda event: None,
) -> list[RowRun]:
    """Measures rows; returns when all are measured or have failed.

    Interrupted by Ctrl-C it stops its workers and raises `KeyboardInterrupt`; what was
    measured is in the store, and the same call goes on from there.

    Args:
        rows: Built rows.
        scale: The scale they run at.
        store: Where the measurements go.
        seeds: How many seeds of each row; what the row declares when left out.
        jobs: How many rows run at a time.
        fresh: Measure again what the store already has.
        time_limit: Seconds for one row; the scale's own when left out.
        report: Called with every event, in this thread.

    Returns:
        The outcome of each row, in the order given.

    Raises:
        ValueError: A row that is not built, or a number that is not positive.
        StoreError: The store cannot be written.
    """
    for name, value in (("seeds", seeds), ("jobs", jobs), ("time_limit", time_limit)):
        if value is not None and value <= 0:
            raise ValueError(f"run: `{name}` must be positive (got {value}).")
    for row in rows:
        if row.state != "built":
            raise ValueError(f"run: the row {row.id!r} is planned, not built.")
    runs = [
        RowRun(row, scale, tuple(range(seeds or row.scales[scale].seeds)))
        for row in rows
    ]
    session = _Session(
        store, scale, jobs, time_limit or TIME_LIMIT_S[scale], report, runs
    )
    session.take_from_store(fresh)
    session.work()
    return runs


class _Session:
    """One call of `run`: which rows wait, which worker runs, what comes in."""

    def __init__(
        self,
        store: Store,
        scale: str,
        jobs: int,
        time_limit: float,
        report: Callable[[Event], None],
        runs: Sequence[RowRun],
    ):
        self.store = store
        self.scale = scale
        self.jobs = jobs
        self.time_limit = time_limit
        self.report = report
        self.runs = runs
        self.environment = provenance.environment()
        self.inbox: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = (
            queue.SimpleQueue()
        )
        self.active: list[_Worker] = []

    def take_from_store(self, fresh: bool) -> None:
        for run in self.runs:
            if not fresh:
                known = self.store.current(run.row, self.scale)
                run.measured = {
                    seed: known[seed]
                    for seed in run.seeds
                    # A check may have been added since.
                    if seed in known
                    and not fault(run.row, self.scale, known[seed].numbers)
                }
                run.reused = len(run.measured)
            if run.reused:
                self.report(Event("reused", run.row, tuple(run.measured)))

    def work(self) -> None:
        waiting = [run for run in self.runs if len(run.measured) < len(run.seeds)]
        # What measures time runs alone, when everything else is through.
        shared = deque(run for run in waiting if not run.row.exclusive)
        alone = deque(run for run in waiting if run.row.exclusive)
        try:
            while shared or alone or self.active:
                while shared and len(self.active) < self.jobs:
                    self.start(shared.popleft())
                if alone and not self.active:
                    self.start(alone.popleft())
                self.receive()
                self.end_overdue()
        finally:
            for worker in self.active:
                worker.stop()
                worker.close()

    def start(self, run: RowRun) -> None:
        seeds = tuple(seed for seed in run.seeds if seed not in run.measured)
        self.active.append(_Worker(run, self.scale, seeds, self.inbox))
        self.report(Event("started", run.row, seeds))

    def receive(self) -> None:
        try:
            worker, message = self.inbox.get(timeout=_TICK_S)
        except queue.Empty:
            return
        if message is None:
            self.finish(worker)
        elif message["event"] == "started":
            worker.current = message["seed"]
        else:
            self.keep(worker, message)

    def keep(self, worker: _Worker, message: dict[str, Any]) -> None:
        message = dict(message)
        outcome, seed = message.pop("event"), message.pop("seed")
        numbers = {n: float(x) for n, x in message.pop("numbers", {}).items()}
        run = worker.run
        if outcome == "measured":
            problem = fault(run.row, self.scale, numbers)
            if problem:
                outcome, message["message"] = "failed", problem
        record = Record(
            row=run.row.id,
            scale=self.scale,
            seed=seed,
            outcome=outcome,
            settings=dict(run.row.scales[self.scale].settings),
            environment=self.environment,
            numbers=numbers,
            **message,
        )
        worker.remaining.remove(seed)
        self.store.add(record)
        if outcome == "measured":
            run.measured[seed] = record
        else:
            run.failures.append(record)
        self.report(Event(outcome, run.row, (seed,), record))

    def finish(self, worker: _Worker) -> None:
        """A worker's pipe has closed: it is done, or it died and its seeds failed."""
        code = worker.wait()
        for seed in tuple(worker.remaining):
            message = worker.ended or _last_words(code, seed, worker.current)
            failure = {"event": "failed", "seed": seed, "message": message}
            self.keep(worker, {**failure, "detail": worker.stderr_tail()})
        worker.close()
        self.active.remove(worker)
        self.report(Event("finished", worker.run.row))

    def end_overdue(self) -> None:
        for worker in self.active:
            if time.monotonic() - worker.born > self.time_limit and not worker.ended:
                worker.ended = f"stopped after {self.time_limit:g} s, the time limit."
                worker.stop()


def _last_words(code: int, seed: int, current: int | None) -> str:
    if seed != current:
        return f"not measured: the worker ended at seed {current}."
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (the memory ran out?)" if name == "SIGKILL" else ""
        return f"the worker was ended by {name}{hint}."
    return f"the worker ended with exit code {code}."


class _Worker:
    """A worker process and the thread that reads what it says."""

    def __init__(
        self,
        run: RowRun,
        scale: str,
        seeds: Iterable[int],
        inbox: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]],
    ):
        self.run = run
        self.remaining = list(seeds)
        self.current: int | None = None
        self.ended: str | None = None
        self.born = time.monotonic()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "varan.lab.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env=_worker_environment(run.row.precision, scale),
            # Ctrl-C is for the parent, which stops its workers in order.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(_job(run.row, scale, seeds)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died at once: the reader sees the end of its output
        self._reader = threading.Thread(target=self._read, args=(inbox,), daemon=True)
        self._reader.start()

    def _read(self, inbox) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # A process that is killed may leave half a line.
            if line.endswith("\n"):
                inbox.put((self, json.loads(line)))
        inbox.put((self, None))

    def wait(self) -> int:
        return self._process.wait()

    def stop(self) -> None:
        """Kills the worker and whatever it has started."""
        if self._process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
            self._process.wait()

    def stderr_tail(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL))
        return self._stderr.read().decode("utf-8", "replace")

    def close(self) -> None:
        """Gives back what an ended worker still holds."""
        self._reader.join()
        self._stderr.close()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _job(row: Row, scale: str, seeds: Iterable[int]) -> dict[str, Any]:
    return {
        "row": row.id,
        "module": row.module,
        "scale": scale,
        "precision": row.precision,
        "settings": dict(row.scales[scale].settings),
        "seeds": list(seeds),
    }


def _worker_environment(precision: str, scale: str) -> dict[str, str]:
    variables = dict(os.environ)
    variables["JAX_ENABLE_X64"] = "1" if precision == "float64" else "0"
    # Several workers may share one accelerator.
    variables.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if scale != "paper":
        for name, value in _ONE_THREAD.items():
            variables.setdefault(name, value)
    return variables
