"""The worker process of a race: prepares the contestants, runs the rounds.

The job comes and messages go as in `varan.lab.worker`; every timed call is reported as
soon as it is over, so that nothing is lost when the race is interrupted. The messages
are `heats`, then for each heat `heat`, its `preparing`, `ready`, `skipped`, `failed`,
`time` and `checked`, and `finished`; or `refused`.
"""

from __future__ import annotations

import importlib
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from typing import Any

from varan.claims import Contestant, Heat

from .channel import failure, listen, send, take_stdout
from .race import race, timed
from .worker import encode_float

# A round calls a shorter contestant until this much time is filled, and takes the mean.
_SHORT_S = 0.02
_MOST_CALLS = 50

Send = Callable[[Mapping[str, Any]], None]


def main() -> None:
    """Reads the job and runs its heats."""
    tell: Send = partial(send, take_stdout())
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(orders,), daemon=True).start()
    job = orders.get()
    try:
        heats = list(importlib.import_module(job["module"]).heats(job["settings"]))
    except Exception as error:
        tell({"event": "refused", **failure(error)})
        return
    names = [heat.name for heat in heats]
    chosen = [heat for heat in heats if (job["heat"] or "") in heat.name]
    tell({"event": "heats", "names": names, "chosen": [heat.name for heat in chosen]})
    for heat in chosen:
        run(heat, job["settings"]["repeats"], job["settings"]["limit_s"], tell)


def run(heat: Heat, repeats: int, limit_s: float, tell: Send) -> None:
    """Runs one heat.

    Args:
        heat: The heat.
        repeats: Rounds.
        limit_s: A peer whose call takes longer is not called again in the rounds.
        tell: Where the messages go.
    """
    ours = heat.contestants[0].name
    tell(
        {
            "event": "heat",
            "name": heat.name,
            "ours": ours,
            "measure": heat.measure,
            "tolerance": heat.tolerance,
            "notes": list(heat.notes),
        }
    )
    if "jax" in sys.modules:
        # What an earlier heat has compiled would else cost this one nothing.
        sys.modules["jax"].clear_caches()
    calls: dict[str, Callable[[], Any]] = {}
    counts: dict[str, int] = {}
    for contestant in heat.contestants:
        name = contestant.name
        tell({"event": "preparing", "name": name})
        call, message = _prepare(contestant, heat)
        if call is not None:
            once = name != ours and message["wall_s"] > limit_s
            message["once"] = once
            if not once:
                calls[name] = call
                short = round(_SHORT_S / max(message["wall_s"], 1e-9))
                counts[name] = min(max(short, 1), _MOST_CALLS)
        tell({"name": name, **message})
    if calls:
        _rounds(heat, calls, counts, repeats, tell)
    tell({"event": "finished"})


def _prepare(
    contestant: Contestant, heat: Heat
) -> tuple[Callable[[], Any] | None, dict[str, Any]]:
    """Makes a contestant and calls it twice: what the first call takes is compiling."""
    try:
        call = contestant.make()
    except ImportError as error:
        if contestant.package is None:
            return None, {"event": "failed", **failure(error)}
        return None, {"event": "skipped", "message": _absent(contestant, error)}
    except Exception as error:
        return None, {"event": "failed", **_package(contestant), **failure(error)}
    try:
        _, first, _ = timed(call)
        answer, wall, processor = timed(call)
        error = encode_float(heat.error(answer))
    except Exception as raised:
        return None, {"event": "failed", **_package(contestant), **failure(raised)}
    return call, {
        "event": "ready",
        **_package(contestant),
        "compile_s": max(0.0, first - wall),
        "wall_s": wall,
        "cpu_s": processor,
        "error": error,
    }


def _rounds(
    heat: Heat,
    calls: dict[str, Callable[[], Any]],
    counts: dict[str, int],
    repeats: int,
    tell: Send,
) -> None:
    broken: set[str] = set()

    def guarded(name: str) -> Any:
        # A failure ends a contestant's race, not the heat.
        answer = None
        if name not in broken:
            try:
                for _ in range(counts[name]):
                    # Waits for each answer: calls must not overlap.
                    answer, _, _ = timed(calls[name])
            except Exception as error:
                broken.add(name)
                tell({"event": "failed", "name": name, **failure(error)})
        return answer

    def report(turn: int, name: str, wall_s: float, cpu_s: float) -> None:
        if name not in broken:
            mean = {"wall_s": wall_s / counts[name], "cpu_s": cpu_s / counts[name]}
            tell({"event": "time", "name": name, "turn": turn, **mean})

    # Every contestant has been called twice already.
    result = race(
        {name: partial(guarded, name) for name in calls},
        repeats=repeats,
        warmup=0,
        report=report,
    )
    for name in calls:
        if name in broken:
            continue
        try:
            error = encode_float(heat.error(result.answers[name]))
            tell({"event": "checked", "name": name, "error": error})
        except Exception as raised:
            tell({"event": "failed", "name": name, **failure(raised)})


def _package(contestant: Contestant) -> dict[str, str | None]:
    package = contestant.package
    return {"package": package, "version": _version(package) if package else None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout on the path
        return getattr(sys.modules.get(package), "__version__", None)


def _absent(contestant: Contestant, error: ImportError) -> str:
    hint = contestant.hint or "pip install 'varan[peers]'"
    try:
        version = metadata.version(contestant.package or "")
    except metadata.PackageNotFoundError:
        return f"{contestant.package} is not installed: {hint}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return f"{contestant.package} {version} does not import ({reason}): {hint}"


if __name__ == "__main__":
    main()
