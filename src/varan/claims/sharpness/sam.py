"""SAM against SGD: the gradient at the worst point nearby, at equal numbers of them.

The claim: it generalises better, most of all under label noise, and its minima are
flatter. On MNIST-1D with a small perceptron, true training labels and 40 % noise: the
differences of the test error to SGD and to early-stopped SGD, in points, all tuned
alike, all with the same number of gradients (SAM makes half the steps); SGD with SAM's
number of steps beside it. The largest Hessian eigenvalue of the training loss on true
labels, where both fit the training set. The loss curve against optax's own SAM.

Kept: the method, its comparison, the measure of flatness. Given up: CIFAR and ImageNet,
deep networks. Refuted by: intervals that do not clear the margins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from varan.claims import Measurements

from ._arms import ARMS
from ._benchmark import column, flatness, loss_curve, run_arm, tuned

PEER_STEPS = 60


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the columns of the scale for one seed."""
    numbers, curves, ratios = {}, [], []
    for name in scale["columns"]:
        data = column(name, seed, train=scale["train"])
        runs = {
            arm: run_arm(ARMS[arm], data, seed, gradients=scale["gradients"])
            for arm in scale["arms"]
        }
        sgd, sam = runs["sgd"], runs["sam"]
        for arm, run in runs.items():
            key = f"{name}_{arm.replace('-', '_')}"
            numbers[f"{key}_test_error"] = run.points
            numbers[f"{key}_train_error"] = 100 * run.train_error
            numbers[f"{key}_train_loss"] = run.train_loss
            curves.append(loss_curve(run, f"training loss, {name} labels"))
        ratios.append(sam.gradients / sgd.gradients)
        numbers[f"{name}_gain"] = sgd.points - sam.points
        if "sgd-early" in runs:
            early = runs["sgd-early"].points
            numbers[f"{name}_gain_over_early_stopping"] = early - sam.points
            same_steps = run_arm(ARMS["sgd"], data, seed, steps=sam.steps)
            numbers[f"{name}_gain_at_equal_steps"] = same_steps.points - sam.points
        if name == "clean":
            numbers |= _curvature(sgd, sam, data)
            numbers["peer_curve_difference"] = _against_optax(data, seed)
    # The one that is farthest from equal.
    numbers["budget_ratio"] = max(ratios, key=lambda ratio: abs(ratio - 1))
    return Measurements(numbers, curves)


def _curvature(sgd, sam, data):
    only = ("lambda_max",)
    of_sgd, of_sam = (flatness(run, data, only=only)[only[0]] for run in (sgd, sam))
    return {
        "sgd_lambda_max": of_sgd,
        "sam_lambda_max": of_sam,
        "lambda_max_margin": of_sgd / 2 - of_sam if np.isfinite(of_sam) else -np.inf,
        "clean_train_error": 100 * max(sgd.train_error, sam.train_error),
    }


def _against_optax(data, seed):
    """The largest difference of two loss curves, step by step."""
    setting = tuned(ARMS["sam"], data.column)
    ours, theirs = (
        run_arm(ARMS[arm], data, seed, steps=PEER_STEPS, setting=setting)
        for arm in ("sam", "optax-sam")
    )
    return float(np.max(np.abs(ours.curve[1] - theirs.curve[1])))
