"""Experiments that behave well and badly, run by the tests in real workers."""

import os
import signal
import sys
import time

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

    print("noise on standard output")
    draw = jax.random.normal(jax.random.key(seed), (scale.get("n", 3),))
    numbers = {
        "gain": 2.0 + 0.01 * seed,
        "draw": float(jnp.sum(draw)),
        "x64": float(draw.dtype == "float64"),
        "infinite": float("inf"),
    }
    return Measurements(numbers, _curves(seed), ["a note", f"seed {seed}"])


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


def _hangs(scale, seed):
    if seed == 1:
        time.sleep(600)
    return Measurements({"gain": 2.0})


def _slow(scale, seed):
    time.sleep(0.3)
    return Measurements({"gain": 2.0, "began": time.time() - 0.3, "ended": time.time()})


_KINDS = {
    "good": _good,
    "raises": _raises,
    "killed": _killed,
    "exits": _exits,
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
