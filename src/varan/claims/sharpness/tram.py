"""TRAM: fine-tuning in a neighbourhood as large as the predictions have moved.

The claim: sharpness-aware fine-tuning whose radius is a trust region's distance keeps
more of what the network knew, and so does better on domains that it was not fine-tuned
on, than fixed radii or penalties do. A perceptron with layer normalisation is
pretrained on a wide mixture of MNIST-1D (amplitudes, places, noise, tilts, both
directions) and fine-tuned on 500 signals of one narrow domain. Accuracy is measured
there and on five domains that differ from it in one setting each, all of them part of
the mixture. Equal numbers of gradients; each arm has its paper's strength and the best
of three learning rates on the same validation signals of the narrow domain. TRAM is the
one of its three distances that is best on them.

Kept: the method as the paper's text has it, base optimiser, baselines and their
strengths. Given up: ViT, GPT-2 and XLM-R; the paper's domains. Refuted by: an interval
that is on the wrong side of zero; distances that vanish.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims import Curve, Measurements
from varan.sharpness import Rule, asam, perturbed, sam, tram

from ._finetune import (
    Arm,
    Signals,
    draw,
    fine_tune,
    linear_decay,
    logits_of,
    percent_right,
    pretrain,
)

MIXTURE = tuple(
    {
        "scale": (0.4, 2.0),
        "correlated_noise": noise,
        "shear": (-0.75, 0.75),
        "reversal": 0.5,
    }
    for noise in (0.1, 0.25, 0.4, 0.5)
)
NARROW = {"scale": (0.8, 1.2), "shift": (0, 23), "shear": (0.2, 0.4)}
ELSEWHERE = {
    "scale": NARROW | {"scale": (1.4, 2.0)},
    "translation": NARROW | {"shift": (24, 47)},
    "noise": NARROW | {"correlated_noise": 0.5},
    "drift": NARROW | {"shear": (-0.75, -0.4)},
    "reversal": NARROW | {"reversal": 1.0},
}
RATES = (3e-4, 1e-3, 3e-3)
SIGMA, WEIGHT = 0.1, 0.1  # of the input noise and of the penalties
VARIANTS = ("prev", "init", "input")
HALVES = (slice(0, 500), slice(500, 1000))


def _adam(numbers, steps):
    return optax.adam(linear_decay(numbers["rate"], steps), b1=0.9, b2=0.99)


def _divergence(p, q):
    p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))


def _noise_penalty(base):
    """R3F: both divergences of predictions on noisy and on clean inputs."""

    def direction(g0, params, state, grad_fn, call):
        del grad_fn
        logits_fn = call.extra["logits_fn"]

        def penalty(params):
            noisy = logits_fn(
                params,
                lambda x: x + SIGMA * jax.random.normal(call.key, x.shape, x.dtype),
            )
            clean = logits_fn(params, lambda x: x)
            return WEIGHT * (_divergence(clean, noisy) + _divergence(noisy, clean))

        return jax.tree.map(jnp.add, g0, jax.grad(penalty)(params)), state, None

    return perturbed(base, Rule(direction))


def _step_penalty(base):
    """TRPO's: the divergence of the last step's predictions from the present ones."""

    def direction(g0, params, before, grad_fn, call):
        del grad_fn
        logits_fn = partial(call.extra["logits_fn"], noise=lambda x: x)
        old = logits_fn(before)

        def penalty(params):
            return WEIGHT * _divergence(old, logits_fn(params))

        return jax.tree.map(jnp.add, g0, jax.grad(penalty)(params)), params, None

    return perturbed(base, Rule(direction, init=lambda params: params))


def _tram(distance):
    return Arm(
        lambda numbers, steps: tram(_adam(numbers, steps), distance, sigma=SIGMA),
        2,
        watch=lambda state: state.rule_state.distance,
    )


ARMS = {
    "adam": Arm(_adam, 1, lambda numbers, batch: {}),
    "sam": Arm(lambda n, steps: sam(_adam(n, steps), 0.05), 2),
    "asam": Arm(lambda n, steps: asam(_adam(n, steps), 0.5), 2),
    # One backward pass through two forward passes.
    "r3f": Arm(lambda n, steps: _noise_penalty(_adam(n, steps)), 2),
    # As TRAM's, the forward pass of the other weights does not count.
    "trpo": Arm(lambda n, steps: _step_penalty(_adam(n, steps)), 1),
} | {f"tram_{name}": _tram(name) for name in VARIANTS}


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Fine-tunes the arms of the scale for one seed."""
    keys = jax.random.split(jax.random.key(seed), 5)
    mixture, scaling = draw(keys[0], scale["samples"], MIXTURE)
    start = pretrain(keys[1], mixture, scale["epochs"])
    here, _ = draw(keys[2], 1000, (NARROW,), scaling)
    train, valid = (Signals(*(v[part] for v in here)) for part in HALVES)
    test, _ = draw(keys[3], scale["samples"], (NARROW,), scaling)
    others = {
        name: draw(keys[4], scale["samples"], (domain,), scaling)[0]
        for name, domain in ELSEWHERE.items()
    }
    tuned = {
        name: fine_tune(
            ARMS[name], {"rate": RATES}, start, train, valid, seed,
            gradients=scale["gradients"],
        )
        for name in scale["arms"]
    }  # fmt: skip
    numbers = _measured("pretrained", start, start, test, others)
    for name, run in tuned.items():
        numbers |= _measured(name, run.params, start, test, others)
    found = {n: run for n, run in tuned.items() if n.startswith("tram_")}
    best = max(found, key=lambda name: found[name].validation)
    medians = {name: float(np.median(run.watched)) for name, run in found.items()}
    numbers |= {f"{name}_median_distance": value for name, value in medians.items()}
    numbers["smallest_median_distance"] = min(medians.values())
    numbers["tram_ood"] = numbers[f"{best}_ood"]
    numbers["tram_kl"] = numbers[f"{best}_kl"]
    for name in [name for name in tuned if name not in found]:
        numbers[f"gain_over_{name}"] = numbers["tram_ood"] - numbers[f"{name}_ood"]
    if "sam" in tuned:
        numbers["closer_than_sam"] = numbers["sam_kl"] - numbers["tram_kl"]
    curves = [
        Curve(
            list(range(1, run.watched.size + 1)),
            np.maximum(run.watched, 1e-9).tolist(),
            name,
            "distances, the radii of TRAM",
            "step",
            "nats",
            log_y=True,
        )
        for name, run in found.items()
    ]
    note = f"TRAM's distance with the best validation accuracy: {best.split('_')[1]}."
    return Measurements(numbers, curves, [note])


def _measured(name, params, start, test, others):
    """Accuracies in points, and how far predictions went from the pretrained ones."""
    elsewhere = {
        domain: float(percent_right(params, signals))
        for domain, signals in others.items()
    }
    numbers = {f"{name}_{domain}": right for domain, right in elsewhere.items()}
    numbers[f"{name}_in_domain"] = float(percent_right(params, test))
    numbers[f"{name}_ood"] = float(np.mean(list(elsewhere.values())))
    numbers[f"{name}_kl"] = float(_distance(start, params, test.x))
    return numbers


@jax.jit
def _distance(start, params, x):
    return _divergence(logits_of(start, x), logits_of(params, x))
