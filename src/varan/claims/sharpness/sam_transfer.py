"""Adversarial examples made on flat surrogates transfer better.

Claim. A surrogate trained by sharpness-aware minimisation with a large radius gives
adversarial examples that fool other networks more often than the best early-stopped
surrogate of plain descent, and than one with the usual radius.

Kept: the attack (l-infinity, 50 steps of a tenth of the radius), the step schedule, the
seven kinds of surrogate, success counted among what the target classifies correctly,
early stopping at the best of twenty checkpoints. Given up: size (small convolutional
networks on MNIST-1D, perceptrons and a wide network among the targets, instead of
ResNet-50 on CIFAR-10). All surrogates get equal gradients, so those with two a step
make half the steps. Checkpoint and large radius are both chosen on one target that does
not count.

Refuted by: large-radius surrogates that transfer less than early-stopped ones or than
those with radius 0.05; a sharper minimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from varan.claims import Curve, Measurements
from varan.metrics import accuracy, transfer_matrix
from varan.sharpness import hessian_top

from . import _transfer_runs as runs
from ._benchmark import column


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the transfer of every surrogate of one seed."""
    data = column("clean", seed, train=scale["train"])
    targets = _targets(scale["train"], scale["target_epochs"], scale["targets"])
    x, y = (part[: scale["points"]] for part in data.test)
    key = jax.random.key(seed)
    ends, along = {}, None
    for name in scale["surrogates"]:
        ends[name], passed = runs.trained(name, data.train, scale["epochs"], key)
        along = passed if name == "sgd" else along
    # Cut up on the host: each index of a device array would compile.
    passed = jax.tree.map(np.asarray, along)
    checkpoints = [
        jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), passed)
        for i in range(runs.CHUNKS)
    ]
    every = [*checkpoints, *ends.values()]
    surrogates = [eqx.filter_vmap(model) for model in every]
    found = transfer_matrix(
        surrogates, targets, x, y, scale["eps"], steps=scale["steps"]
    )
    choosing, counting = (
        100 * np.asarray(part, float)
        for part in (found.rates[:, 0], found.rates[:, 1:].mean(1))
    )
    rates = dict(zip(ends, counting[runs.CHUNKS :], strict=True))
    by = dict(zip(ends, choosing[runs.CHUNKS :], strict=True))
    early = int(np.argmax(choosing[: runs.CHUNKS]))
    large = max((name for name in ends if name.startswith("lsam")), key=by.__getitem__)

    end = surrogates[runs.CHUNKS : runs.CHUNKS + 1]
    white = transfer_matrix(end, end, x, y, scale["eps"], steps=scale["steps"])
    numbers = {f"{name.replace(' ', '_')}_transfer": r for name, r in rates.items()}
    numbers |= {
        "early_transfer": counting[early],
        "early_checkpoint": float(early + 1),
        "best_checkpoint_transfer": counting[: runs.CHUNKS].max(),
        "chosen_rho": runs.SURROGATES[large].rho,
        "lsam_gain": rates[large] - counting[early],
        "lsam_over_sam": rates[large] - rates["sam"],
        "lsam_over_sgd": rates[large] - rates["sgd"],
        "white_box": 100 * float(white.rates[0, 0]),
    }
    for name, model in ends.items():
        logits = runs.logits_fn(model, data.test[0])
        share = float(accuracy(logits, data.test[1]))
        numbers[f"{name.replace(' ', '_')}_accuracy"] = 100 * share
    if scale["curvature_samples"]:
        some = tuple(part[: scale["curvature_samples"]] for part in data.train)
        numbers |= _curvature({"sgd": ends["sgd"], "lsam": ends[large]}, some, key)
    return Measurements(numbers, _curves(counting, rates, large))


@lru_cache(maxsize=1)
def _targets(train, epochs, count):
    # The same for all seeds.
    return runs.targets(column("clean", 0, train=train).train, epochs, count)


def _curvature(models, batch, key):
    numbers = {}
    for name, model in models.items():
        top = hessian_top(runs.LOSS, model, batch, tol=1e-2, max_steps=48, key=key)
        numbers[f"{name}_lambda_max"] = float(top.values[0])
        numbers[f"{name}_lambda_residual"] = float(top.residuals[0])
        numbers[f"{name}_train_loss"] = float(runs.LOSS(model, batch))
    share = numbers["lsam_lambda_max"] / max(numbers["sgd_lambda_max"], 1e-12)
    return numbers | {"lambda_share": share}


def _curves(counting, rates, large):
    percent = [100 * (i + 1) / runs.CHUNKS for i in range(runs.CHUNKS)]
    axes = ("transfer", "plain training so far, %", "examples that transfer, %")
    flat = {"SAM, radius 0.05": rates["sam"], "large radius, its end": rates[large]}
    return [
        Curve(percent, counting[: runs.CHUNKS].tolist(), "SGD", *axes),
        *(
            Curve([percent[0], 100.0], [rate, rate], name, *axes)
            for name, rate in flat.items()
        ),
    ]
