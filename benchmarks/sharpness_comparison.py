"""Sharpness-aware optimisers side by side: same task, same budget, same tuning.

`src/varan/claims/sharpness/_benchmark.py` is the protocol and `_arms.py` the arms.

    python benchmarks/sharpness_comparison.py --tune sam asam
    python benchmarks/sharpness_comparison.py --run sam asam --results FILE.json
    python benchmarks/sharpness_comparison.py --results FILE.json --plot FILE.svg

Arms called torch-... are pytorch-optimizer's: `pip install pytorch-optimizer` for them.

The first form chooses, for both columns, learning rate and the arm's one parameter by
the error on 500 training points held out (labels as noisy as the rest): all settings
(three rates, five parameters) on one tuning seed, the best three of them on two more.
The second runs the stored choices and the paper's defaults, under both accountings, on
eight seeds that tuning has not seen (flatness on four of them), and adds what it
finds to the file. The third prints the tables and draws the picture.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
from scipy import stats

from varan.claims.sharpness import _benchmark as bench
from varan.claims.sharpness._arms import ARMS as OURS
from varan.claims.sharpness._torch_arms import TORCH_ARMS

ARMS = {**OURS, **TORCH_ARMS}
TUNING_SEEDS = (1000, 1001, 1002)
FINALISTS = 3
SEEDS, MEASURED = range(8), range(4)
DEFAULT_RATE = 0.1


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
    finalists = sorted(errors, key=lambda setting: errors[setting])[:FINALISTS]
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


def run(names, path):
    """Adds the arms' results to a file: errors and measures, one number a seed."""
    for name, column in itertools.product(names, bench.COLUMNS):
        if name not in bench.read_choices().get(column, {}):
            print(f"{column:6} {name:14} not tuned: left out")
            continue
        begin, found = time.perf_counter(), measured(ARMS[name], column)
        results = json.loads(path.read_text()) if path.exists() else {}
        results.setdefault(column, {})[name] = found
        path.write_text(json.dumps(results, indent=1))
        print(f"{column:6} {name:14} {time.perf_counter() - begin:.0f} s", flush=True)


def measured(arm, column):
    """Accounting to quantity to its values, one a seed."""
    found = {}
    for seed, (accounting, steps, setting) in itertools.product(SEEDS, budgets(arm)):
        data = bench.column(column, seed)
        end = bench.run_arm(arm, data, seed, steps=steps, setting=setting)
        numbers = {
            "error": end.points,
            "nll": end.test_nll,
            "train_loss": end.train_loss,
            "train_error": 100 * end.train_error,
            "gradients": end.gradients,
        }
        if accounting == "gradients" and seed in MEASURED:
            numbers |= bench.flatness(end, data)
        for key, value in numbers.items():
            found.setdefault(accounting, {}).setdefault(key, []).append(value)
    return found


def budgets(arm):
    """Accounting, steps and setting of each run of an arm; None is the tuned one."""
    affordable = bench.GRADIENTS // arm.cost
    yield "gradients", affordable, None
    # Else it is the same run.
    if affordable != bench.STEPS:
        yield "steps", bench.STEPS, None
    if arm.default is not None:
        yield "untuned", affordable, (DEFAULT_RATE, arm.default)


def interval(values):
    """Mean and half the width of its 95 % interval, from Student's t."""
    values = np.asarray(values)
    if not np.all(np.isfinite(values)):
        return np.nan, np.nan
    width = stats.t.ppf(0.975, values.size - 1) * stats.sem(values)
    return float(values.mean()), float(width)


def against_sgd(results, column, name, accounting):
    """The paired difference of the test error to SGD's under the same accounting."""
    arms = results[column]
    if name not in arms:
        return np.nan, np.nan
    other = "gradients" if accounting == "untuned" else accounting
    found = arms[name]
    if accounting == "steps" and "steps" not in found:
        found = {"steps": found["gradients"]}
    if accounting not in found:
        return np.nan, np.nan
    ours, sgd = found[accounting]["error"], arms["sgd"][other]["error"]
    return interval(np.subtract(ours, sgd))


def show(results):
    """Errors of both columns, then the measures of flatness."""
    choices = bench.read_choices()
    shown = {"gradients": "equal gradients", "steps": "equal steps"}
    itself = {("sgd", accounting) for accounting in shown}
    for column in bench.COLUMNS:
        rows = [("arm", "a step", "rate, parameter", "test error, %", *shown.values())]
        rows[0] += ("paper's default", "test NLL")
        for name, found in results[column].items():
            choice, budget = choices[column][name], found["gradients"]
            cells = [name, str(ARMS[name].cost)]
            cells.append(f"{choice['learning_rate']:g}, {choice['parameter']:g}")
            cells.append(f"{np.mean(budget['error']):.1f}")
            for accounting in (*shown, "untuned"):
                pair = against_sgd(results, column, name, accounting)
                known = not np.isnan(pair[0]) and (name, accounting) not in itself
                cells.append("{:+.1f} ± {:.1f}".format(*pair) if known else "")
            rows.append((*cells, f"{np.mean(budget['nll']):.2f}"))
        table(column, rows)
    measures = {
        "train_loss": "training loss",
        "train_error": "training error, %",
        "lambda_max": "largest eigenvalue",
        "trace_per_parameter": "trace / n",
        "sharpness": "sharpness",
        "adaptive_sharpness": "adaptive",
        "first_order_flatness": "first order",
    }
    for column in bench.COLUMNS:
        rows = [("arm", *measures.values())]
        for name, found in results[column].items():
            # A share of errors that are none may be a rounding below zero.
            means = [max(np.mean(found["gradients"][key]), 0) for key in measures]
            rows.append((name, *(f"{mean:.2g}" for mean in means)))
        table(f"{column}, flatness", rows)


def table(title, rows):
    print(f"\n{title}\n")
    for place, row in enumerate(rows):
        print("| " + " | ".join(row) + " |")
        if place == 0:
            print("| --- " * len(row) + "|")


def draw(results, path):
    """Differences to SGD with their intervals: a panel a column."""
    from matplotlib.figure import Figure

    names = [name for name in ARMS if any(name in arms for arms in results.values())]
    names.remove("sgd")
    figure = Figure(figsize=(9.0, 1.2 + 0.28 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column in zip(panels, bench.COLUMNS, strict=True):
        axes.axvline(0.0, color="grey", linewidth=1)
        for shift, accounting, marker in (
            (-0.12, "gradients", "o"),
            (0.12, "steps", "x"),
        ):
            pairs = [against_sgd(results, column, name, accounting) for name in names]
            mean, width = np.array(pairs).T
            axes.errorbar(
                mean,
                np.arange(len(names)) + shift,
                xerr=width,
                fmt=marker,
                label=f"equal {accounting}",
                capsize=2,
                linewidth=1,
            )
        axes.set(title=f"{column} labels", xlabel="test error less SGD's, points")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description="Sharpness-aware optimisers compared")
    parser.add_argument("--tune", nargs="+", default=[], metavar="ARM")
    parser.add_argument("--run", nargs="+", default=[], metavar="ARM")
    parser.add_argument("--results", type=Path, help="JSON, added to by --run")
    parser.add_argument("--plot", help="where to save the picture")
    arguments = parser.parse_args()
    unknown = sorted({*arguments.tune, *arguments.run} - set(ARMS))
    if unknown:
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(ARMS)}")
    if arguments.run and not arguments.results:
        parser.error("--run adds to a file: give --results")
    tune(arguments.tune)
    if arguments.results:
        run(arguments.run, arguments.results)
        results = json.loads(arguments.results.read_text())
        show(results)
        if arguments.plot:
            draw(results, arguments.plot)


if __name__ == "__main__":
    main()
