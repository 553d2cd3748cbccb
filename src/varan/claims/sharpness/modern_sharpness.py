"""Sharpness and generalisation: which of twelve measures tracks the test error?

The claim: none does reliably. Over a training sweep sharpness goes with
hyperparameters such as the learning rate rather than with the test error, with shifted
data the correlation is often negative, and in a model that can be solved the right
measure depends on the data. Two parts:

- 60 networks on MNIST-1D (5 learning rates, 3 SAM radii, weight decay and augmentation
  on or off), those kept that fit the training data; worst l2, worst l-infinity and
  average sharpness, adaptive or not, with normalised logits or not, averaged over
  batches of 128; Kendall's tau with test error, error on shifted data, gap and
  learning rate, over all networks and within each half of the sweep;
- diagonal linear networks that interpolate a sparse regression: the two sharpnesses
  are norms of the coefficients, and only one of them goes with the test error.

Kept: measures, ascent, radii, the two halves. Given up: ResNets and transformers, 200
models, images. Refuted by: a measure with |tau| of at least 0.7 with the test error
everywhere, or by none that goes with the learning rate more than with the test error.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varan.claims import Curve, Measurements
from varan.metrics import accuracy
from varan.nets import MLPNet
from varan.sharpness import (
    DiagonalLinear,
    correlate,
    hessian_trace,
    sam,
    sharpness,
)
from varan.train import start_training, train_epochs

from ._benchmark import TRAINING_LOSS as LOSS
from ._benchmark import column, logits_fn, momentum_sgd

RATES, RADII, DECAYS = (0.02, 0.05, 0.1, 0.2, 0.4), (0.0, 0.05, 0.1), (0.0, 5e-4)
BATCH, CHUNK, FITTED, LEAST = 64, 128, 0.01, 10
SHIFT_SCALE, SHIFT_NOISE = 1.5, 0.3
# Kind, norm, whether adaptive, radius: the middle of the paper's for each measure.
MEASURES = (
    ("avg", 2, False, 0.1),
    ("avg", 2, True, 0.2),
    ("max", 2, False, 0.5),
    ("max", 2, True, 0.5),
    ("max", np.inf, False, 2e-3),
    ("max", np.inf, True, 4e-3),
)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    numbers, curves, notes = {}, [], []
    for part in scale["parts"]:
        found, drawn, said = {"sweep": _sweep, "solvable": _solvable}[part](scale, seed)
        numbers |= found
        curves += drawn
        notes += said
    return Measurements(numbers, curves, notes)


def _sweep(scale, seed):
    settings = np.array(list(product(RATES, RADII, DECAYS, (0.0, 1.0))))
    data = column("clean", seed, train=scale["train"])
    models = _train_all(settings, data.train, seed, scale["epochs"])
    x, y = data.test[0][: scale["test"]], data.test[1][: scale["test"]]
    noise = jax.random.normal(jax.random.key(seed), x.shape, x.dtype)
    shifted = SHIFT_SCALE * x + SHIFT_NOISE * noise
    train, test, ood = (
        np.asarray(_errors(models, *pair))
        for pair in (data.train, (x, y), (shifted, y))
    )
    m = scale["measured"]
    batch = (data.train[0][:m], data.train[1][:m])
    measured = _measure_all(models, batch)
    targets = {
        "test error": test,
        "shifted error": ood,
        "gap": test - train,
        "log learning rate": np.log(settings[:, 0]),
    }
    key = jax.random.key(seed)
    everything = correlate(None, measured, targets, key=key)
    fitted, augmented = train <= FITTED, settings[:, 3] == 1
    if min(np.sum(fitted & augmented), np.sum(fitted & ~augmented)) < LEAST:
        raise ValueError(
            f"only {int(np.sum(fitted))} networks fit the training data to {FITTED}, "
            f"{int(np.sum(fitted & augmented))} of them augmented: too few."
        )
    groups = {
        "all": everything.among(fitted, key=key),
        "augmented": everything.among(fitted & augmented, key=key),
        "plain": everything.among(fitted & ~augmented, key=key),
    }
    # Groups by measures by targets; where a measure is the same for all, tau is 0.
    tau = np.nan_to_num([np.asarray(group.tau) for group in groups.values()])
    reliable = np.min(np.abs(tau[:, :, 0]), 0)
    towards_rate = np.abs(tau[0, :, 3]) - np.abs(tau[0, :, 0])
    numbers = {
        "best_reliable_tau": float(np.max(reliable)),
        "rate_over_test": float(np.max(towards_rate)),
        "share_negative_shifted": float(np.mean(tau[0, :, 1] < 0)),
        **{
            f"best_tau_{name}": float(np.max(np.abs(tau[i, :, 0])))
            for i, name in enumerate(groups)
        },
        "fitted_models": float(np.sum(fitted)),
        "fitted_augmented": float(np.sum(fitted & augmented)),
        "test_error": float(np.mean(test[fitted])),
    }
    notes = [f"Kendall's tau, {name}:\n{group}" for name, group in groups.items()]
    return numbers, _scatter(groups["augmented"], groups["plain"]), notes


@jax.jit
def _measure_all(models, batch):
    """Name to one value a model, for all twelve measures in one compilation."""

    def measure(params, kind, p, adaptive, rho, temperature):
        return sharpness(
            LOSS, params, batch, rho=rho, p=p, adaptive=adaptive, which=kind,
            microbatch=CHUNK, normalize_logits=temperature, key=jax.random.key(0),
        ).value  # fmt: skip

    def all_of(params):
        return {
            f"{kind} {'l2' if p == 2 else 'linf'}{' adaptive' * adaptive}{suffix}": (
                measure(params, kind, p, adaptive, rho, temperature)
            )
            for kind, p, adaptive, rho in MEASURES
            for suffix, temperature in (("", None), (" normalised", 1.0))
        }

    return jax.lax.map(all_of, models)


@partial(jax.jit, static_argnums=(2, 3))
def _train_all(settings, data, seed, epochs):
    x, y = data
    length = epochs * (x.shape[0] // BATCH)

    def loss(params, batch, key):
        *sample, augmented = batch
        return LOSS(params, (_augment(key, sample[0], augmented[0]), sample[1]))

    def train(inputs):
        (rate, rho, decay, augmented), key = inputs

        def schedule(step):
            share = jnp.asarray(step, x.dtype) / length
            return rate * (1 + jnp.cos(jnp.pi * share)) / 2

        optimiser = sam(momentum_sgd(schedule, decay), rho)
        model = MLPNet(x.shape[1], 10, key=key)
        state = start_training(model, optimiser, key=key)
        samples = (x, y, jnp.full(y.shape, augmented))
        state, _ = train_epochs(
            state, loss, samples, optimiser, epochs=epochs, batch_size=BATCH
        )
        return state.model

    settings = jnp.asarray(settings, x.dtype)
    keys = jax.random.split(jax.random.key(seed), len(settings))
    return jax.lax.map(train, (settings, keys))


def _augment(key, x, strength):
    """Every other signal moved cyclically by up to a point, with noise."""
    for_shift, for_noise, for_which = jax.random.split(key, 3)
    shifts = jax.random.randint(for_shift, x.shape[:1], -1, 2)
    places = (jnp.arange(x.shape[1])[None, :] + shifts[:, None]) % x.shape[1]
    moved = jnp.take_along_axis(x, places, 1)
    moved += 0.1 * jax.random.normal(for_noise, x.shape, x.dtype)
    chosen = jax.random.bernoulli(for_which, strength / 2, x.shape[:1])
    return jnp.where(chosen[:, None], moved, x)


@jax.jit
def _errors(models, x, y):
    return jax.lax.map(lambda params: 1 - accuracy(logits_fn(params, x), y), models)


def _scatter(augmented, plain):
    """The adaptive worst case in l-infinity, as in the paper's main figures."""
    return [
        Curve(
            np.asarray(table.measured[table.measures.index(name)]).tolist(),
            np.asarray(table.aimed[0]).tolist(),
            label,
            name,
            "sharpness",
            "test error",
            log_x=True,
            marker=True,
        )
        for name in plain.measures[-2:]
        for table, label in ((augmented, "augmented"), (plain, "plain"))
    ]


def _solvable(scale, seed):
    """Interpolating diagonal networks of all scales, on one sparse regression."""
    d, n, active, count = 100, 40, 5, scale["solutions"]
    keys = jax.random.split(jax.random.key(seed), 4)
    X = jax.random.normal(keys[0], (n, d))
    X = X / jnp.sqrt(jnp.mean(X**2, 0))[None, :]
    truth = jnp.zeros(d).at[:active].set(jax.random.normal(keys[1], (active,)))
    net = DiagonalLinear(X, X @ truth)
    # Scales from sparse to dense solutions, each coordinate's a little different.
    alphas = 10 ** jnp.linspace(-2, 1, count)
    spread = jnp.exp(0.3 * jax.random.normal(keys[2], (count, d)))
    betas = jax.lax.map(net.least_potential, alphas[:, None] * spread)
    found = np.flatnonzero(np.all(np.isfinite(np.asarray(betas)), 1))
    betas = betas[found]
    test = jnp.sum((betas - truth[None, :]) ** 2, 1)

    def loss(weights, data):
        u, v = weights
        return jnp.mean((data[0] @ (u * v) - data[1]) ** 2) / 2

    def identities(beta):
        root = jnp.sqrt(jnp.abs(beta))
        weights = (root, jnp.sign(beta) * root)
        rho = 0.05
        average = sharpness(
            loss, weights, (X, net.y), rho=rho, adaptive=True, which="avg",
            steps=scale["samples"], key=keys[3],
        )  # fmt: skip
        trace = hessian_trace(loss, weights, (X, net.y), key=keys[3])
        return average.value / rho**2, trace.value

    some = betas[:: max(count // 8, 1)]
    average, trace = jax.lax.map(identities, some)
    squares, sizes = jnp.sum(betas**2, 1), jnp.sum(jnp.abs(betas), 1)
    table = correlate(
        None,
        {"trace, 2 ||beta||_1": 2 * sizes, "adaptive, ||beta||_2^2": squares},
        {"test error": test},
        key=keys[3],
    )
    wrong = [
        jnp.max(jnp.abs(average / jnp.sum(some**2, 1) - 1)),
        jnp.max(jnp.abs(trace / (2 * jnp.sum(jnp.abs(some), 1)) - 1)),
    ]
    numbers = {
        "adaptive_identity_error": float(wrong[0]),
        "trace_identity_error": float(wrong[1]),
        "tau_difference": float(table.tau[0, 0] - table.tau[1, 0]),
        "tau_trace": float(table.tau[0, 0]),
        "tau_adaptive": float(table.tau[1, 0]),
        "solutions": float(len(found)),
    }
    curves = [
        Curve(
            np.asarray(values).tolist(),
            np.asarray(test).tolist(),
            label,
            "diagonal linear networks",
            "sharpness",
            "test error",
            log_x=True,
            marker=True,
        )
        for label, values in (("trace", 2 * sizes), ("adaptive", squares))
    ]
    notes = [f"Diagonal linear networks, Kendall's tau:\n{table}"]
    return numbers, curves, notes
