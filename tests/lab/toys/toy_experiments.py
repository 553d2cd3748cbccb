"""Experiments that behave well and badly, run by the tests in real workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from varan.claims import Curve, Measurements


def _curves(seed):
    grid = [1.0, 2.0, 3.0]
    return [
        Curve(grid, [x + seed for x in grid], "ours", "error", "steps", "error"),
        Curve(grid, [2 * x for x in grid], "peer", "error", "steps", "error"),
        Curve([seed, 4.0], [1.0, 0.1], "ours", "trace", "steps", "gap", log_y=True),
    ]


def _good(scale, seed):
    import jax
    import jax.numpy as jnp

    @jax.jit
    def walk(key):
        steps = jax.random.normal(key, (scale.get("n", 300), 3))
        return jnp.cumsum(jnp.tanh(steps), 0) / jnp.linalg.norm(steps)

    print("noise on standard output")
    path = walk(jax.random.key(seed))
    numbers = {
        "gain": 2.0 + 0.01 * seed,
        "walk": float(jnp.sum(path)),
        "x64": float(path.dtype == "float64"),
        "infinite": float("inf"),
        "process": os.getpid(),
    }
    curves = [*_curves(seed), Curve(range(300), path[:, 0], "walk", "walk", "x", "y")]
    return Measurements(numbers, curves, ["a note", f"seed {seed}"])


def _raises(scale, seed):
    if seed == 1:
        raise RuntimeError("the second seed is bad\nsecond line")
    return Measurements({"gain": 2.0})


def _killed(scale, seed):
    if seed == 1:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return Measurements({"gain": 2.0})


def _exits(scale, seed):
    os._exit(3)


def _hungry(scale, seed):
    import resource

    if seed == 1:
        # What it has, and a little: what is asked for below is not there.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, hard))
        try:
            bytearray(2**30)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return Measurements({"gain": 2.0})


def _hangs(scale, seed):
    if seed == 1 and "TOYS_ARE_CURED" not in os.environ:
        # What an experiment starts must end with it.
        child = subprocess.Popen(["sleep", "600"])
        print(f"child {child.pid}", file=sys.stderr, flush=True)
        child.wait()
    return Measurements({"gain": 2.0, "process": os.getpid()}, _curves(seed))


def _slow(scale, seed):
    time.sleep(0.3)
    return Measurements({"gain": 2.0, "began": time.time() - 0.3, "ended": time.time()})


_KINDS = {
    "good": _good,
    "raises": _raises,
    "killed": _killed,
    "exits": _exits,
    "hungry": _hungry,
    "hangs": _hangs,
    "slow": _slow,
    "nan": lambda scale, seed: Measurements({"gain": float("nan")}),
    "absent": lambda scale, seed: Measurements({"other": 1.0}),
    "nothing": lambda scale, seed: None,
    "ragged": lambda scale, seed: Measurements(
        {"gain": 2.0}, [Curve([1.0], [], "ours", "error", "x", "y")]
    ),
}


def experiment(scale, seed):
    return _KINDS[scale["kind"]](scale, seed)
