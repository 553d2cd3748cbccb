"""One worker process: runs a row's experiment for the seeds it is given.

The job comes as one JSON line on standard input, then each seed as a line, at last a
line without a seed; what happens goes out as JSON lines on what was standard output,
which the experiment itself cannot reach: anything it or a peer prints goes to standard
error. The seeds share one process, and so its compiled functions.
"""

from __future__ import annotations

import gc
import importlib
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from varan.claims import Curve, Measurements

from . import provenance
from .channel import failure, listen, send, take_stdout

Experiment = Callable[[Mapping[str, Any], int], Measurements]


def main() -> None:
    """Reads the job, measures each seed, reports each at once."""
    channel = take_stdout()
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(orders,), daemon=True).start()
    job = orders.get()
    # Imports make hundreds of thousands of objects that stay: to look for garbage among
    # them, meanwhile and when the process ends, is a third of a short job's time.
    gc.disable()
    compiling = _CompileClock()
    try:
        experiment: Experiment | Exception
        experiment = importlib.import_module(job["module"]).experiment
    except Exception as error:
        experiment = error
    gc.freeze()
    gc.enable()
    hashes: dict[str, str] = {}
    while (seed := orders.get()["seed"]) is not None:
        if isinstance(experiment, Exception):
            event = {"event": "failed", **failure(experiment)}
        else:
            event = _measure(experiment, job, seed, hashes, compiling)
        send(channel, {**event, "seed": seed})
    gc.freeze()


def _measure(
    experiment: Experiment,
    job: Mapping[str, Any],
    seed: int,
    hashes: dict[str, str],
    compiling: _CompileClock,
) -> dict[str, Any]:
    event: dict[str, Any]
    wall, cpu = time.perf_counter(), time.process_time()
    compiling.restart()
    try:
        measured = encode(experiment(dict(job["settings"]), seed))
        event = {"event": "measured", **measured}
    except Exception as error:
        event = {"event": "failed", **failure(error)}
    event["wall_s"] = time.perf_counter() - wall
    event["cpu_s"] = time.process_time() - cpu
    event["compile_s"] = compiling.seconds()
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


class _CompileClock:
    """The seconds that JAX spends on tracing, lowering and compiling.

    JAX reports each piece of work when it is done, also a piece within another (a
    function that is traced while its caller is): time that several cover counts once.
    """

    _WORK = (
        "/jax/core/compile/jaxpr_trace_duration",
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    )

    def __init__(self):
        from jax import monitoring

        self._spans: list[tuple[float, float]] = []
        monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event in self._WORK:
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))

    def restart(self) -> None:
        self._spans.clear()

    def seconds(self) -> float:
        total, covered = 0.0, -math.inf
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, covered))
            covered = max(covered, end)
        return total


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


def _peak_memory_mib() -> float | None:
    """The largest memory this process has held so far, in MiB."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes on Linux, bytes on macOS.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
