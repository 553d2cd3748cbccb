"""FSAM: sharpness-aware fine-tuning that perturbs what has most Fisher information.

The claim: perturbing only the parameters with the largest Fisher information does
better than perturbing all of them, most of all with little data, and better than a
random mask of the same size. A perceptron with layer normalisation is pretrained on
domains of MNIST-1D with other amplitudes, noise and tilt, is given a new head and
fine-tuned on 200, 500 and 2000 signals of the standard domain: Adam, SAM, FSAM (a
tenth of the parameters, as in the authors' scripts; other shares beside it), SAM on a
random tenth, SAM-ON. Equal steps, one learning rate, and for each arm one of five
radii by the accuracy on the same 500 validation signals.

Kept: the method with its refreshed mask, base optimiser and comparison; the Fisher
information is estimated from the 32 samples of the step's batch. Given up: language
models, GLUE. Refuted by: an interval that does not clear a margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims import Curve, Measurements
from varan.sharpness import fisher_diagonal, fsam, norm_params, sam

from ._finetune import (
    Arm,
    Signals,
    draw,
    fine_tune,
    linear_decay,
    logits_of,
    percent_right,
    pretrain,
    with_new_head,
)

ELSEWHERE = (
    {"scale": (0.4, 0.8)},
    {"scale": (1.2, 1.6)},
    {"correlated_noise": 0.5},
    {"shear": (-0.75, 0.75)},
)
RATE, RADII = 1e-3, (0.05, 0.15, 0.5, 1.5, 4.5)
MASK_EVERY, SHARE = 100, 0.1


def _adam(steps):
    # The authors' moments and epsilon.
    return optax.adam(linear_decay(RATE, steps), b1=0.9, b2=0.98, eps=1e-6)


def _log_prob(params, sample):
    return -optax.softmax_cross_entropy_with_integer_labels(
        logits_of(params, sample.x[None])[0], sample.y
    )


def _sources(numbers, batch):
    """The Fisher information of the batch, or given scores: a random mask."""

    def scores(params):
        return jax.tree.map(
            lambda found, given: jnp.where(numbers["random"] > 0, given, found),
            fisher_diagonal(_log_prob, params, batch),
            numbers["scores"],
        )

    return {"fisher_fn": scores}


# SAM is FSAM with all parameters kept, Adam SAM without a radius: to the bit, and
# without a further compilation.
MASKED = Arm(
    lambda n, steps: fsam(
        _adam(steps), n["rho"], keep_ratio=n["share"], mask_every=MASK_EVERY
    ),
    2,
    _sources,
    lambda state: state.rule_state.share,
)
ON = Arm(lambda n, steps: sam(_adam(steps), n["rho"], mask=norm_params), 2)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures all arms at each size for one seed."""
    keys = jax.random.split(jax.random.key(seed), 5)
    before, scaling = draw(keys[0], scale["pretraining"], ELSEWHERE)
    pretrained = pretrain(keys[1], before, scale["epochs"])
    here, _ = draw(keys[2], max(scale["sizes"]) + 500, ({},), scaling)
    train, valid = _split(here, max(scale["sizes"]))
    test, _ = draw(keys[3], scale["test"], ({},), scaling)
    start = with_new_head(keys[4], pretrained)
    numbers = {"pretrained_accuracy": float(percent_right(pretrained, test))}
    curves = []
    for size in scale["sizes"]:
        found, shares = _arms(scale, seed, start, train, valid, size)
        right = {arm: float(percent_right(p, test)) for arm, p in found.items()}
        numbers |= {f"{arm}_accuracy_{size}": value for arm, value in right.items()}
        numbers[f"gain_over_sam_{size}"] = right["fsam"] - right["sam"]
        numbers[f"gain_over_adam_{size}"] = right["fsam"] - right["adam"]
        if "random" in right:
            numbers[f"gain_over_random_{size}"] = right["fsam"] - right["random"]
        curves.append(
            Curve(
                list(range(1, shares.size + 1)),
                shares.tolist(),
                f"{size} signals",
                "Fisher information on the mask",
                "step",
                "share of the trace",
            )
        )
        numbers[f"fisher_share_{size}"] = float(shares[-1])
    if scale["controls"]:
        gains = [numbers[f"gain_over_random_{size}"] for size in scale["sizes"]]
        numbers["gain_over_random"] = float(np.mean(gains))
    return Measurements(numbers, curves)


def _arms(scale, seed, start, train, valid, size):
    """Arm to fine-tuned network, and the share of the Fisher information over time."""
    draws = np.random.default_rng(seed)
    lanes = len(RADII)
    drawn = jax.tree.map(
        lambda leaf: np.stack([draws.random(leaf.shape)] * lanes), start
    )

    def tuned(share, radii=RADII, random=0.0):
        settings = {
            "rho": radii,
            "share": (share,) * lanes,
            "random": (random,) * lanes,
        }
        return fit(MASKED, settings | {"scores": drawn})

    def fit(arm, settings):
        return fine_tune(
            arm, settings, start, train, valid, seed,
            gradients=2 * scale["steps"], size=size,
        )  # fmt: skip

    masked = tuned(SHARE)
    found = {
        "adam": tuned(1.0, radii=(0.0,) * lanes).params,
        "sam": tuned(1.0).params,
        "fsam": masked.params,
    }
    if scale["controls"]:
        found["random"] = tuned(SHARE, random=1.0).params
        for share in (0.01, 0.5, 0.9):
            found[f"fsam_{share}".replace(".", "_")] = tuned(share).params
        found["sam_on"] = fit(ON, {"rho": RADII}).params
    return found, masked.watched


def _split(signals, first):
    return (
        Signals(signals.x[:first], signals.y[:first]),
        Signals(signals.x[first:], signals.y[first:]),
    )
