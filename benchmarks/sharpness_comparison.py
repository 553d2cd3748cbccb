"""Sharpness-aware optimisers side by side: same task, same budget, same tuning.

`src/varan/claims/sharpness/_benchmark.py` is the protocol and `_arms.py` the arms.

    python benchmarks/sharpness_comparison.py --tune sam asam
    python benchmarks/sharpness_comparison.py [ARM ...] [--seeds 8] [--plot FILE.svg]

The first form chooses, for both columns, learning rate and the arm's one parameter by
the error on 500 training points held out (labels as noisy as the rest): all settings
(three rates, five parameters) on one tuning seed, the best three of them on two more.
The second runs the stored choices and the paper's defaults, under both accountings, on
seeds that tuning has not seen, and prints the table.
"""

import argparse
import itertools
import json
import time

import numpy as np

from varan.claims.sharpness import _benchmark as bench
from varan.claims.sharpness._arms import ARMS

TUNING_SEEDS = (1000, 1001, 1002)
FINALISTS = 3


def tune(names):
    """Stores the choice for each arm and column as soon as it is made."""
    for name, column in itertools.product(names, bench.COLUMNS):
        begin, arm = time.perf_counter(), ARMS[name]
        choice = choose(arm, column)
        store(column, arm, choice)
        print(f"{column:6} {name:14} {choice}  {time.perf_counter() - begin:.0f} s")


def choose(arm, column):
    """The setting with the least mean held-out error of the finalists."""
    errors = {}

    def measure(settings, seed):
        data = bench.column(column, seed, held_out=bench.HELD_OUT)
        for setting in settings:
            run = bench.run_arm(
                arm, data, seed, gradients=bench.GRADIENTS, setting=setting
            )
            errors.setdefault(setting, []).append(run.test_error)

    measure(itertools.product(bench.LEARNING_RATES, arm.grid), TUNING_SEEDS[0])
    finalists = sorted(errors, key=errors.get)[:FINALISTS]
    for seed in TUNING_SEEDS[1:]:
        measure(finalists, seed)
    rate, parameter = min(finalists, key=lambda setting: np.mean(errors[setting]))
    return {
        "learning_rate": rate,
        "parameter": float(parameter),
        "held_out_error": round(float(np.mean(errors[rate, parameter])), 4),
        "hash": bench.protocol_hash(arm),
    }


def store(column, arm, choice):
    """Writes `_tuned.toml` anew with one more choice."""
    choices = bench.read_choices()
    choices.setdefault(column, {})[arm.name] = choice
    lines = ["# Written by benchmarks/sharpness_comparison.py --tune.\n"]
    for where in sorted(choices):
        for name, entry in sorted(choices[where].items()):
            lines.append(f"[{where}.{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in entry.items()]
            lines.append("")
    partial = bench.TUNED.with_suffix(".partial")
    partial.write_text("\n".join(lines))
    partial.replace(bench.TUNED)


def main():
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("arms", nargs="*", help="all by default")
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    names = arguments.arms or list(ARMS)
    unknown = sorted(set(names) - set(ARMS))
    if unknown:
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if arguments.tune:
        tune(names)


if __name__ == "__main__":
    main()
