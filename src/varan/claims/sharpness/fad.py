"""Flatness-aware minimisation on domains that were never seen.

The claim: Adam is not the best optimiser for domain generalisation, seeking both
flatnesses is better, and it ends where the loss is flatter than where optimisers end
that seek one of them or none. Four domains of MNIST-1D by the generator's settings, one
left out at a time: its accuracy for SGD, Adam, SAM, GAM and FAD, each tuned by the
error on the other domains, after the same number of steps, and Adam with as many
gradients as FAD; both flatnesses of the training loss at the end.

Kept: leave one domain out, training-domain validation. Given up: images, DomainBed's
algorithms besides the plain mean loss. Refuted by: Adam the best, FAD worse than Adam
or sharper than SGD or SAM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from varan.claims import Measurements

from ._arms import ARMS
from ._benchmark import flatness, loss_curve, run_arm
from ._domains import left_out

MEASURED = {"sharpness": "zeroth", "first_order_flatness": "first"}


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the arms on the left-out domains of the scale for one seed."""
    steps, arms = scale["steps"], scale["arms"]
    accuracies = {name: [] for name in arms}
    flat = {(name, measure): [] for name in arms for measure in MEASURED}
    longer, ratios, numbers, curves = [], [], {}, []
    for target in scale["targets"]:
        data = left_out(target, seed, scale["samples"])
        runs = {name: run_arm(ARMS[name], data, seed, steps=steps) for name in arms}
        for name, run in runs.items():
            accuracies[name].append(100 - run.points)
            numbers[f"{_key(name)}_{target}_accuracy"] = 100 - run.points
            measured = flatness(run, data, only=scale["measured"])
            for measure, value in measured.items():
                flat[name, measure].append(value)
            curves.append(loss_curve(run, f"training loss, without {target}"))
        ratios.append(runs["fad"].gradients / runs["adam"].gradients)
        if scale["equal_gradients"]:
            more = run_arm(ARMS["adam"], data, seed, steps=4 * steps)
            longer.append(100 - more.points)
    means = {name: float(np.mean(values)) for name, values in accuracies.items()}
    numbers |= {f"{_key(name)}_accuracy": mean for name, mean in means.items()}
    numbers["gain_over_adam"] = means["fad"] - means["adam"]
    others = max(mean for name, mean in means.items() if name != "adam")
    numbers["best_other_over_adam"] = others - means["adam"]
    numbers["gradients_ratio"] = float(np.mean(ratios))
    if longer:
        numbers["adam_accuracy_at_equal_gradients"] = float(np.mean(longer))
        gain = means["fad"] - float(np.mean(longer))
        numbers["gain_over_adam_at_equal_gradients"] = gain
    for measure in scale["measured"]:
        _compare(numbers, MEASURED[measure], measure, flat, arms)
    return Measurements(numbers, curves)


def _compare(numbers, short, measure, flat, arms):
    found = {name: float(np.mean(flat[name, measure])) for name in arms}
    numbers |= {f"{_key(name)}_{short}": value for name, value in found.items()}
    for name in ("sgd-decay", "sam"):
        # A training of FAD that diverged counts as sharp.
        finite = np.isfinite(found["fad"])
        margin = found[name] - found["fad"] if finite else -np.inf
        numbers[f"{short}_margin_to_{_key(name)}"] = margin


def _key(name):
    return name.removesuffix("-decay").replace("-", "_")
