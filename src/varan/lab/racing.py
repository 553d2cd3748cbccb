"""The race of a row: ours and its peers in a worker process, each heat kept at once."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Mapping
from typing import Any

from . import provenance
from .catalogue import Row
from .jobs import Inbox
from .processes import ProcessWorker
from .store import RaceRecord

# What every race has; the rest of its settings is its own.
_DEFAULTS = {"repeats": 5, "limit_s": 10.0}


class RaceError(RuntimeError):
    """A race that cannot be run, or has ended early; one sentence."""


class NoSuchHeat(RaceError):
    """No heat has such a name."""


def settings_of(
    row: Row, *, quick: bool = False, repeats: int | None = None
) -> dict[str, Any]:
    """The settings of a row's race, complete.

    Args:
        row: The row.
        quick: Those of the small race that shows that everything works.
        repeats: Rounds, if others than the row declares.

    Returns:
        What the row declares, `repeats` (rounds) and `limit_s` (seconds: a peer whose
        call takes longer is timed once) filled in; `quick` says so, where it is.

    Raises:
        RaceError: The row has no race.
    """
    if row.race is None:
        raise RaceError(f"The row {row.id} has no race.")
    declared = dict(row.race)
    small = declared.pop("quick", {})
    settings = {**_DEFAULTS, **declared}
    if quick:
        settings |= {**small, "quick": True}
    return settings if repeats is None else {**settings, "repeats": repeats}


def run(
    row: Row,
    settings: Mapping[str, Any],
    keep: Callable[[RaceRecord], None],
    *,
    heat: str | None = None,
    one_thread: bool = True,
    report: Callable[[Mapping[str, Any]], None] = lambda message: None,
) -> None:
    """Runs a row's race; returns when all heats are over.

    Interrupted by Ctrl-C it stops its worker, hands on what the heat under way has
    measured, and raises `KeyboardInterrupt`.

    Args:
        row: The row.
        settings: What `settings_of` returns.
        keep: Handed every heat as soon as it is over.
        heat: Only the heats with this in their name; all when left out.
        one_thread: Whether every contestant has one thread; else what the machine
            gives it.
        report: Told of every message of the worker.

    Raises:
        NoSuchHeat: No heat has `heat` in its name.
        RaceError: The race cannot be loaded, or its worker died.
    """
    job = {
        "module": f"{row.module}_race",
        "precision": row.precision,
        "one_thread": one_thread,
        "quick_compile": False,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "settings": dict(settings),
        "heat": heat,
    }
    environment = {
        **provenance.environment(),
        "threads": "1" if one_thread else "default",
    }
    inbox: Inbox = queue.SimpleQueue()
    worker = _Worker(job, inbox)
    to_come: int | None = None
    under_way: _Heat | None = None
    cut_short = "Interrupted"
    try:
        while (message := inbox.get()[1])["event"] != "ended":
            report(message)
            match message["event"]:
                case "refused":
                    raise RaceError(f"The race of {row.id}: {message['message']}")
                case "heats":
                    to_come = _chosen(message, heat)
                case "heat":
                    under_way = _Heat(row, settings, environment, message)
                case "finished":
                    assert under_way is not None and to_come is not None
                    record, under_way = under_way.record(), None
                    keep(record)
                    to_come -= 1
                case _ if under_way is not None:
                    under_way.hear(message)
        if to_come != 0:
            cut_short = f"Ended early: {message['message'].rstrip('.')}"
            raise RaceError(f"The race of {row.id}: {message['message']}")
    finally:
        worker.stop()
        worker.close()
        if under_way is not None and under_way.rounds:
            keep(under_way.record(cut_short))


class _Worker(ProcessWorker):
    module = "varan.lab._heats"


def _chosen(message: Mapping[str, Any], heat: str | None) -> int:
    if not message["chosen"]:
        names = "; ".join(message["names"]) or "it has none"
        raise NoSuchHeat(f"No heat has {heat!r} in its name ({names}).")
    return len(message["chosen"])


class _Heat:
    """What is known of the heat under way."""

    def __init__(
        self,
        row: Row,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        about: Mapping[str, Any],
    ):
        self.row = row
        self.settings = settings
        self.environment = environment
        self.about = about
        self.contestants: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        # Those that run in the rounds, and their times: by round, then by name.
        self.running: set[str] = set()
        self.times: dict[int, dict[str, Mapping[str, Any]]] = {}
        self.remarks: list[str] = list(about["notes"])
        if settings.get("quick"):
            self.remarks.append(
                "The quick race: it shows that all works, not how fast."
            )

    @property
    def rounds(self) -> list[int]:
        """The rounds that every contestant has run."""
        return [
            turn for turn, times in self.times.items() if self.running <= set(times)
        ]

    def hear(self, message: Mapping[str, Any]) -> None:
        name, event = message["name"], message["event"]
        if event == "skipped":
            self.skipped[name] = message["message"]
        elif event == "ready":
            self.enter(name, message)
        elif event == "time":
            self.times.setdefault(message["turn"], {})[name] = message
        elif event == "checked":
            self.check(name, message)
        elif event == "failed":
            self.running.discard(name)
            entry = self.contestants.setdefault(name, _entry(message))
            entry["failed"] = message["message"]
            self.remarks.append(f"{name} failed: {message['message']}")

    def enter(self, name: str, message: Mapping[str, Any]) -> None:
        entry = self.contestants[name] = _entry(message)
        self.check(name, message)
        if message["once"]:
            entry["wall_s"] = [message["wall_s"]]
            entry["cpu_s"] = [message["cpu_s"]]
            self.remarks.append(
                f"{name} was timed once: a call takes more than "
                f"{self.settings['limit_s']:g} s."
            )
        else:
            self.running.add(name)

    def check(self, name: str, message: Mapping[str, Any]) -> None:
        """Keeps the worse of the errors of a contestant's answers."""
        entry, error = self.contestants[name], float(message["error"])
        if entry["error"] is None or not error <= entry["error"]:
            entry["error"] = error
        entry["met"] = entry["error"] <= self.about["tolerance"]

    def record(self, cut_short: str | None = None) -> RaceRecord:
        rounds = self.rounds
        for name in self.running:
            for clock in ("wall_s", "cpu_s"):
                times = [self.times[turn][name][clock] for turn in rounds]
                self.contestants[name][clock] = times
        remarks = list(self.remarks)
        if cut_short:
            wanted = self.settings["repeats"]
            remarks.append(f"{cut_short} after {len(rounds)} of {wanted} rounds.")
        about = {name: self.about[name] for name in ("measure", "tolerance")}
        return RaceRecord(
            row=self.row.id,
            heat=self.about["name"],
            reference=self.about["ours"],
            contestants=self.contestants,
            environment=self.environment,
            settings={**self.settings, **about},
            skipped=self.skipped,
            remarks=remarks + self.missed(),
        )

    def missed(self) -> list[str]:
        """Whose answers are not as accurate as they were to be, in a sentence."""
        errors = [
            f"{name} {entry['error']:.1e}"
            for name, entry in self.contestants.items()
            if entry["met"] is False
        ]
        asked = f"{self.about['measure']} of {self.about['tolerance']:g}"
        return [f"Missed the {asked}: {', '.join(errors)}."] if errors else []


def _entry(message: Mapping[str, Any]) -> dict[str, Any]:
    """A contestant, before its times."""
    return {
        "wall_s": [],
        "cpu_s": [],
        "compile_s": message.get("compile_s"),
        "package": message.get("package"),
        "version": message.get("version"),
        "error": None,
        "met": None,
        "failed": None,
    }
