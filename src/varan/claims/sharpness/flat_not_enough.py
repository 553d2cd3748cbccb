"""Flattest networks need not generalise, and flatness need not be why they do.

Claim. Two-layer ReLU networks on the exclusive or of two of d signs fall in three
scenarios. Without biases the flattest interpolators generalise. With biases some of the
flattest only memorise, and sharpness minimisers end as flat as possible and wrong. With
normalised hidden units flattest networks that do not generalise exist again, yet the
sharpness minimisers generalise.

Kept: the constructions, exactly; the three networks; SAM with batches of one sample and
label-noise SGD. Given up: the paper's sizes, which are not known to us.

Refuted by: a construction above the bound or with another accuracy; without biases or
with normalisation a sharpness minimiser that is wrong; with biases one that is right,
or one that is not as flat as possible. SGD is the control: it is not flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims import Curve, Measurements
from varan.sharpness import (
    TwoLayer,
    flatness_certificate,
    flattest_generalizer,
    flattest_memorizer,
    interpolation_trace,
    label_noise,
    make_xor,
    sam,
    trace_lower_bound,
)
from varan.train import start_training, train_epochs

DIM, WIDTH, UNSEEN = 30, 200, 4000
CONSTRUCTION_SAMPLES = 40
STEPSIZE, RHO = 0.005, 0.3
NOISE_STEPSIZE, NOISE = 0.01, 0.5
TITLES = {"plain": "no biases", "bias": "biases", "layernorm": "normalised"}
LOOKS = 20


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures both parts of the claim once."""
    keys = jax.random.split(jax.random.key(seed), 2)
    parts = [_constructions(keys[0]), _training(scale, keys[1])]
    numbers = {name: value for part in parts for name, value in part.numbers.items()}
    return Measurements(numbers, [curve for part in parts for curve in part.curves])


def _constructions(key):
    x, y = make_xor(DIM, CONSTRUCTION_SAMPLES, key=key)
    unseen, labels = make_xor(DIM, UNSEEN, key=jax.random.fold_in(key, 1))
    new = ~jnp.any(jnp.all(unseen[:, None, :] == x[None, :, :], axis=2), axis=1)
    memorizers = [flattest_memorizer(x, y, variant=v) for v in ("bias", "layernorm")]
    variants = ("plain", "bias", "layernorm")
    generalizers = [flattest_generalizer(DIM, variant=v) for v in variants]

    @eqx.filter_jit
    def look(net):
        certificate, outputs = flatness_certificate(net, x, y), jax.vmap(net)(unseen)
        accuracy = jnp.mean(jnp.sign(outputs) == labels)
        known = jnp.max(jnp.abs(jnp.where(new, outputs, 0)))
        return certificate.value, certificate.details["error"], known, accuracy

    found = np.array([look(net) for net in (*memorizers, *generalizers)])
    numbers = {
        "construction_excess": float(np.max(np.abs(found[:, 0] - 1))),
        "construction_error": float(np.max(found[:, 1])),
        "memorizer_output": float(np.max(found[:2, 2])),
        "generalizer_accuracy": float(np.min(found[2:, 3])),
    }
    return Measurements(numbers)


def _training(scale, key):
    keys = jax.random.split(key, 3)
    samples = scale["samples"]
    data = make_xor(DIM, samples, key=keys[0])
    test = make_xor(DIM, UNSEEN, key=keys[1])

    def loss(net, batch):
        x, y = batch
        return jnp.mean((jax.vmap(net)(x) - y) ** 2) / 2

    methods = {
        "sam": (loss, sam(optax.sgd(STEPSIZE), RHO), scale["steps"]),
        "sgd": (loss, optax.sgd(STEPSIZE), scale["steps"]),
        "noise": (
            label_noise(loss, NOISE),
            optax.sgd(NOISE_STEPSIZE),
            scale["noise_steps"],
        ),
    }

    @eqx.filter_jit
    def look(net):
        trace = interpolation_trace(net, data[0])
        bound = trace_lower_bound(DIM, net.variant)
        error = jnp.max(jnp.abs(jax.vmap(net)(data[0]) - data[1]))
        right = jnp.mean(jnp.sign(jax.vmap(net)(test[0])) == test[1])
        return trace / bound, right, error

    numbers, curves = {}, []
    for variant in scale["variants"]:
        start = TwoLayer(DIM, WIDTH, variant, key=keys[2])
        for name in scale["methods"]:
            objective, optimiser, steps = methods[name]
            path = _train(start, objective, optimiser, data, steps, look, keys[2])
            flatness, accuracy, error = path[-1]
            label = f"{name}_{variant}"
            numbers[f"flatness_{label}"] = flatness
            numbers[f"accuracy_{label}"] = accuracy
            numbers[f"training_error_{label}"] = error
            curves += _curves(name, variant, steps, path)
        if "sgd" in scale["methods"]:
            flat = numbers[f"flatness_sam_{variant}"]
            numbers[f"sgd_over_sam_{variant}"] = (
                numbers[f"flatness_sgd_{variant}"] / flat
            )
    return Measurements(numbers, curves)


def _train(net, loss, optimiser, data, steps, look, key):
    """Flatness, accuracy and error at the start and along single-sample training."""
    state = start_training(net, optimiser, key=key)
    path = [look(net)]
    for _ in range(LOOKS):
        state, _ = train_epochs(
            state,
            loss,
            data,
            optimiser,
            epochs=steps // (LOOKS * len(data[1])),
            batch_size=1,
        )
        path.append(look(state.model))
    # A run that diverged is as sharp and as wrong as can be.
    worst = np.array([np.inf, 0.0, np.inf])
    rows = np.array(path, float)
    return np.where(np.isfinite(rows), rows, worst[None, :]).tolist()


def _curves(name, variant, steps, path):
    x = np.linspace(0, steps, LOOKS + 1).tolist()
    titles = {"sam": "SAM, one sample", "sgd": "SGD", "noise": "label-noise SGD"}
    return [
        Curve(
            x,
            [row[index] for row in path],
            titles[name],
            f"{quantity}, {TITLES[variant]}",
            "step",
            unit,
            log_y=index == 0,
        )
        for index, quantity, unit in (
            (0, "flatness", "trace / least trace of an interpolator"),
            (1, "unseen inputs", "accuracy on unseen inputs"),
        )
    ]
