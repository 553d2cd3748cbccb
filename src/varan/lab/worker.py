"""One worker process: runs a row's experiment for its seeds, one after the other.

The job comes as one JSON line on standard input; what happens goes out as JSON lines on
what was standard output, which the experiment itself cannot reach: anything it or a
peer prints goes to standard error. The seeds share one process, and so its compiled
functions.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import IO, Any

from varan.claims import Curve, Measurements

from . import provenance


def main() -> None:
    """Reads the job, measures each seed, reports each at once."""
    channel = _take_stdout()
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        experiment = importlib.import_module(job["module"]).experiment
    except Exception as error:
        for seed in job["seeds"]:
            _send(channel, {"event": "started", "seed": seed})
            _send(channel, {"event": "failed", "seed": seed, **_failure(error)})
        return
    hashes: dict[str, str] = {}
    for seed in job["seeds"]:
        _send(channel, {"event": "started", "seed": seed})
        _send(channel, _measure(experiment, job, seed, hashes))


def _measure(
    experiment: Callable[[Mapping[str, Any], int], Measurements],
    job: Mapping[str, Any],
    seed: int,
    hashes: dict[str, str],
) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        measured = encode(experiment(dict(job["settings"]), seed))
        event = {"event": "measured", "seed": seed, **measured}
    except Exception as error:
        event = {"event": "failed", "seed": seed, **_failure(error)}
    event["wall_s"] = time.perf_counter() - wall
    event["cpu_s"] = time.process_time() - cpu
    event["peak_memory_mib"] = _peak_memory_mib()
    # Hashed once, as early as they are known: an edit during a long run must not be
    # taken for what was run.
    for file in provenance.loaded_sources():
        hashes.setdefault(file, provenance.hash_source(file))
    event["sources"] = sorted(hashes)
    event["fingerprint"] = provenance.fingerprint(
        job["row"], job["scale"], job["precision"], job["settings"], hashes
    )
    return event


def encode(measured: Measurements) -> dict[str, Any]:
    """Measurements as plain data, ready for JSON, once they are found sound.

    Args:
        measured: What the experiment returned.

    Raises:
        TypeError: It is no `Measurements`, or something in it is no number.
        ValueError: A number is NaN, or a curve's `x` and `y` differ in length.
    """
    if not isinstance(measured, Measurements):
        raise TypeError(
            f"the experiment must return Measurements (got {type(measured).__name__})."
        )
    numbers = {str(name): float(value) for name, value in measured.numbers.items()}
    for name, value in numbers.items():
        if math.isnan(value):
            raise ValueError(f"the measured {name!r} is not a number (NaN).")
    return {
        "numbers": {name: encode_float(value) for name, value in numbers.items()},
        "curves": [_encode_curve(curve) for curve in measured.curves],
        "notes": [str(note) for note in measured.notes],
    }


def encode_float(value: Any) -> float | str:
    """A float; as a word where JSON has no number (`inf`, `-inf`, `nan`)."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _encode_curve(curve: Curve) -> dict[str, Any]:
    plain = dict(vars(curve))
    plain["x"] = [encode_float(value) for value in curve.x]
    plain["y"] = [encode_float(value) for value in curve.y]
    if len(plain["x"]) != len(plain["y"]):
        raise ValueError(
            f"the curve {curve.label!r} of the plot {curve.plot!r} has "
            f"{len(plain['x'])} abscissae and {len(plain['y'])} ordinates."
        )
    return plain


def _failure(error: Exception) -> dict[str, str]:
    text = str(error).strip() or "no message"
    name = type(error).__name__
    return {
        "message": f"{name}: {text.splitlines()[0]}",
        "detail": "".join(traceback.format_exception(error)),
    }


def _peak_memory_mib() -> float | None:
    """The largest memory this process has held so far, in MiB."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes on Linux, bytes on macOS.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _take_stdout() -> IO[str]:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _send(channel: IO[str], event: Mapping[str, Any]) -> None:
    channel.write(json.dumps(event, allow_nan=False) + "\n")
    channel.flush()


def _exit_with_parent() -> None:
    # The parent never closes the pipe while it lives: the end of it means that the
    # parent is gone, and nobody is left to store a measurement. Read below Python's
    # buffer, whose lock a waiting thread would hold at shutdown.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
