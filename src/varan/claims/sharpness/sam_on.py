"""SAM-ON: perturbing only the scales and shifts of normalisation layers.

The claim: an ascent on the normalisation layers alone, a small share of all parameters,
is worth as much as one on all; an ascent on as many other parameters is not; and the
minima are not the flatter ones. MNIST-1D with 40 % label noise, a perceptron with layer
normalisation, differences of test error in points at equal numbers of gradients, each
arm with its own tuned learning rate and radius. The random masks differ from seed to
seed. Beside them, at the largest scale, everything but the norms and the adaptive
ascent on all and on the norms; and the largest Hessian eigenvalue of the training loss
at the end.

Kept: the selection, the norm of the ascent over the selected only, the controls. Given
up: CIFAR and ImageNet, batch normalisation and transformers; the norms are 2 % of this
small network, not 0.1 %. Refuted by: an interval that does not clear a margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from varan.claims import Measurements
from varan.sharpness import norm_params

from ._arms import ARMS
from ._benchmark import column, flatness, loss_curve, run_arm

LAMBDA_MAX = "lambda_max"


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Trains the arms of the scale on the noisy column for one seed."""
    data = column("noisy", seed, train=scale["train"])
    runs = {
        name: run_arm(ARMS[name], data, seed, gradients=scale["gradients"])
        for name in scale["arms"]
    }
    on = runs["sam-on"]
    numbers = {
        "perturbed_share": _share(on.params),
        "largest_budget": max(run.gradients for run in runs.values())
        / scale["gradients"],
    }
    for name, run in runs.items():
        key = name.replace("-", "_")
        numbers[f"{key}_test_error"] = run.points
        numbers[f"{key}_train_loss"] = run.train_loss
        if name != "sam-on":
            numbers[f"gain_over_{key}"] = run.points - on.points
        if name in scale["curvature"]:
            found = flatness(run, data, only=(LAMBDA_MAX,))
            numbers[f"{key}_{LAMBDA_MAX}"] = found[LAMBDA_MAX]
    curves = [loss_curve(run) for run in runs.values()]
    return Measurements(numbers, curves)


def _share(params):
    marked = jax.tree.map(
        lambda here, leaf: leaf.size if here else 0, norm_params(params), params
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    return float(np.sum(jax.tree.leaves(marked)) / np.sum(sizes))
