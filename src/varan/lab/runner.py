"""The runner: jobs, a seed of a row each, in workers; each stored as soon as measured.

A worker measures seeds of one row, one after the other, so that they share compiled
functions; when fewer rows than workers are left, several share a row's seeds. A seed
that raises, crashes or exceeds its time is recorded as failed and harms no other. Seeds
that the present code has already measured are taken from the store.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from .catalogue import Row
from .jobs import Executor, ExecutorError, Inbox, Worker, job_of
from .processes import Processes
from .store import Record, Store, new_run_id
from .verdict import fault

# Seconds for one seed, far above what it is meant to need: these end what hangs, not
# what is slow.
TIME_LIMIT_S: Mapping[str, float] = {
    "smoke": 5 * 60,
    "laptop": 60 * 60,
    "paper": 72 * 60 * 60,
}
# What a worker needs before its first seed: Python, JAX and the method imported.
_START_S = 2.0
_TICK_S = 0.2


@dataclass(frozen=True)
class Event:
    """Something that happened to a row during a run.

    Args:
        kind: A row was found measured in part (`"reused"`), its measuring `"started"`
            or `"finished"`; a seed's `"began"`, was `"measured"` or `"failed"`.
        row: The row.
        seeds: The seeds it is about.
        record: What was stored, for a seed.
    """

    kind: Literal["reused", "started", "began", "measured", "failed", "finished"]
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


def run(
    rows: Sequence[Row],
    scale: str,
    store: Store,
    *,
    seeds: int | None = None,
    jobs: int | None = None,
    fresh: bool = False,
    time_limit: float | None = None,
    executor: Executor | None = None,
    report: Callable[[Event], None] = lambda event: None,
) -> list[RowRun]:
    """Measures rows; returns when all are measured or have failed.

    Interrupted (Ctrl-C or SIGTERM) it stops its workers and raises `KeyboardInterrupt`;
    what was measured is in the store, and the same call goes on from there. How the
    seeds are shared out among workers has no influence on the numbers.

    Args:
        rows: Built rows.
        scale: The scale they run at.
        store: Where the measurements go.
        seeds: How many seeds of each row; what the row declares when left out.
        jobs: How many workers run at a time; what the executor is good for when left
            out.
        fresh: Measure again what the store already has.
        time_limit: Seconds for one seed; the scale's own when left out.
        executor: Who runs the workers; processes of this machine when left out.
        report: Called with every event, in this thread.

    Returns:
        The outcome of each row, in the order given.

    Raises:
        ValueError: A row that is not built, or a number that is not positive.
        StoreError: The store cannot be written.
        ExecutorError: The executor's machines must not measure.
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
    executor = executor or Processes()
    session = _Session(
        store,
        scale,
        executor,
        jobs or executor.jobs,
        time_limit or TIME_LIMIT_S[scale],
        report,
    )
    for one in runs:
        session.take_from_store(one, fresh)
    with _terminated_like_interrupted():
        session.work(runs)
    return runs


@dataclass
class _Work:
    """What is left to do for a row: seeds that wait, workers that are at it."""

    run: RowRun
    waiting: deque[int]
    workers: int = 0
    begun: bool = False
    # Seeds whose worker was lost through no doing of theirs, and that got another.
    again: set[int] = field(default_factory=set)

    def worth_sharing(self) -> bool:
        """Whether a further worker gains more than it costs: it compiles once more."""
        known = [
            (record.wall_s, record.compile_s)
            for record in self.run.measured.values()
            if record.wall_s is not None and record.compile_s is not None
        ]
        if not known:
            return True
        compiling = max(compile_s for _, compile_s in known)
        running = max(wall_s - compile_s for wall_s, compile_s in known)
        return len(self.waiting) * running / self.workers > _START_S + compiling


@dataclass
class _Task:
    """What a worker is at."""

    work: _Work
    seed: int | None
    began: float | None = None
    overdue: bool = False
    environment: Mapping[str, Any] = field(default_factory=dict)


class _Session:
    """One call of `run`: which seeds wait, which workers run, what comes in."""

    def __init__(
        self,
        store: Store,
        scale: str,
        executor: Executor,
        jobs: int,
        time_limit: float,
        report: Callable[[Event], None],
    ):
        self.store = store
        self.scale = scale
        self.executor = executor
        self.jobs = jobs
        self.time_limit = time_limit
        self.report = report
        self.id = new_run_id()
        self.inbox: Inbox = queue.SimpleQueue()
        self.active: dict[Worker, _Task] = {}

    def take_from_store(self, run: RowRun, fresh: bool) -> None:
        if not fresh:
            known = self.store.current(run.row, self.scale)
            run.measured = {
                seed: known[seed]
                for seed in run.seeds
                # A check may have been added since.
                if seed in known and not fault(run.row, self.scale, known[seed].numbers)
            }
            run.reused = len(run.measured)
        if run.reused:
            self.report(Event("reused", run.row, tuple(run.measured)))

    def work(self, runs: Sequence[RowRun]) -> None:
        works = [
            _Work(run, deque(seed for seed in run.seeds if seed not in run.measured))
            for run in runs
        ]
        try:
            while True:
                while work := self.next_work(works):
                    self.start(work)
                if not self.active:
                    return
                self.receive()
                self.end_overdue()
        except KeyboardInterrupt:
            self.stop()
            self.keep_the_rest()
            raise
        finally:
            self.stop()

    def next_work(self, works: Sequence[_Work]) -> _Work | None:
        """The row that a further worker would serve best; `None` when there is none."""
        if len(self.active) >= self.jobs:
            return None
        waiting = [work for work in works if work.waiting]
        shared = [work for work in waiting if not work.run.row.exclusive]
        for work in shared:
            if not work.workers:
                return work
        if shared:
            most = max(shared, key=lambda work: len(work.waiting))
            return most if most.worth_sharing() else None
        # What measures time runs alone, when everything else is through.
        return waiting[0] if waiting and not self.active else None

    def start(self, work: _Work) -> None:
        seed = work.waiting.popleft()
        worker = self.executor.start(job_of(work.run.row, self.scale), self.inbox)
        self.active[worker] = _Task(work, seed)
        work.workers += 1
        if not work.begun:
            work.begun = True
            seeds = tuple(sorted((seed, *work.waiting)))
            self.report(Event("started", work.run.row, seeds))

    def receive(self) -> None:
        try:
            worker, message = self.inbox.get(timeout=_TICK_S)
        except queue.Empty:
            return
        task = self.active.get(worker)
        kind = message["event"]
        if task is None:
            return
        if kind == "ready":
            task.environment = message["environment"]
            self.give(worker, task, task.seed)
        elif kind == "refused":
            raise ExecutorError(message["message"], message["hint"])
        elif kind == "ended":
            self.bury(worker, task, message)
        else:
            self.keep(task, message)
            more = task.work.waiting and not task.overdue
            self.give(worker, task, task.work.waiting.popleft() if more else None)

    def give(self, worker: Worker, task: _Task, seed: int | None) -> None:
        task.seed, task.began = seed, time.monotonic()
        worker.give(seed)
        if seed is not None:
            self.report(Event("began", task.work.run.row, (seed,)))

    def keep(self, task: _Task, message: Mapping[str, Any]) -> None:
        """Stores what became of a seed."""
        message = dict(message)
        outcome, seed = message.pop("event"), message.pop("seed")
        numbers = {n: float(x) for n, x in message.pop("numbers", {}).items()}
        run = task.work.run
        if outcome == "measured":
            problem = fault(run.row, self.scale, numbers)
            if problem:
                outcome, message["message"] = "failed", problem
        record = Record(
            row=run.row.id,
            scale=self.scale,
            seed=seed,
            outcome=outcome,
            run=self.id,
            settings=dict(run.row.scales[self.scale].settings),
            environment=task.environment,
            numbers=numbers,
            **message,
        )
        self.store.add(record)
        task.seed = None
        if outcome == "measured":
            run.measured[seed] = record
        else:
            run.failures.append(record)
        self.report(Event(outcome, run.row, (seed,), record))

    def bury(self, worker: Worker, task: _Task, message: Mapping[str, Any]) -> None:
        """A worker has ended: it was done, or it died, and its seed has failed."""
        work, seed = task.work, task.seed
        worker.close()
        del self.active[worker]
        work.workers -= 1
        if seed is not None:
            if message.get("lost") and not task.overdue and seed not in work.again:
                work.again.add(seed)
                work.waiting.appendleft(seed)
            else:
                reason = message["message"]
                if task.overdue:
                    reason = f"stopped after {self.time_limit:g} s, the time limit."
                failed = {"event": "failed", "seed": seed, "message": reason}
                self.keep(task, {**failed, "detail": message["detail"]})
        if not work.workers and not work.waiting:
            self.report(Event("finished", work.run.row))

    def end_overdue(self) -> None:
        now = time.monotonic()
        for worker, task in self.active.items():
            late = task.began is not None and now - task.began > self.time_limit
            if late and not task.overdue:
                task.overdue = True
                worker.stop()

    def keep_the_rest(self) -> None:
        """Stores what stopped workers had measured and nobody had received yet."""
        while not self.inbox.empty():
            worker, message = self.inbox.get()
            if worker in self.active and message["event"] in ("measured", "failed"):
                self.keep(self.active[worker], message)

    def stop(self) -> None:
        for worker in self.active:
            worker.stop()
        for worker in self.active:
            worker.close()


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Takes SIGTERM (of a batch system, a shutdown) like Ctrl-C while this lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
