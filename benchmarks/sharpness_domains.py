"""Tunes row 169's optimisers on domains, by the error on those that they train on.

    python benchmarks/sharpness_domains.py [ARM ...]

All settings of an arm (three learning rates, five parameters) on one tuning seed, each
with either of two domains left out; the choice has the least mean error on the training
domains' validation signals. The domain that is left out is not looked at.
"""

import argparse
import itertools
import time

import numpy as np
from sharpness_comparison import store

from varan.claims.sharpness import _benchmark as bench
from varan.claims.sharpness import _domains as domains
from varan.claims.sharpness._arms import ARMS

SEED, STEPS, SAMPLES, LEFT_OUT = 1000, 1000, 1250, ("plain", "backwards")


def choose(arm, data):
    """The setting with the least mean validation error."""
    errors = {
        setting: float(
            np.mean(
                [
                    bench.run_arm(arm, d, SEED, steps=STEPS, setting=setting).test_error
                    for d in data
                ]
            )
        )
        for setting in itertools.product(bench.LEARNING_RATES, arm.grid)
    }
    best = min(errors, key=errors.get)
    return {
        "learning_rate": best[0],
        "parameter": float(best[1]),
        "held_out_error": round(errors[best], 4),
        "hash": bench.protocol_hash(arm),
    }


def main():
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("arms", nargs="*", default=domains.ARMS)
    names = parser.parse_args().arms
    data = [domains.left_out(name, SEED, SAMPLES, validate=True) for name in LEFT_OUT]
    for name in names:
        begin = time.perf_counter()
        choice = choose(ARMS[name], data)
        store("domains", ARMS[name], choice)
        print(f"{name:10} {choice}  {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
