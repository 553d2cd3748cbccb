"""Aggregated gradients make universal perturbations that fool more.

Claim: one step along the sign of the mean of the gradients that a search ahead meets
makes perturbations that fool more unseen samples, of the classifier they were made with
and of others, than as many gradients spent on steps along the sign of each.

Kept: the method and its settings (batches of 250 and 10, four passes, steps of a tenth
of the radius, the capped loss, 20 epochs, clean predictions as targets), fooling as a
change of prediction, few samples to make the perturbation from. Given up: ImageNet and
its networks; radii are larger, since small images need that.

Refuted by: a gain over the better baseline whose interval lies below 0, a loss of a
point in any setting, or an aggregated sign that is no closer to the gradient of all
data than a small batch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims import Curve, Measurements
from varan.data import digit_images, mnist1d, split
from varan.lipschitz import (
    aggregate_gradients,
    fooling_rate,
    universal_perturbation,
)
from varan.nets import Conv1DNet, ConvClassifier
from varan.train import start_training, train_epochs

_CLASSES, _PASSES, _SMALL, _CAP = 10, 4, 10, 9.0
_TRAIN = {"digits": 1437, "mnist1d": 2000}
_BOUNDS = {"digits": (0.0, 1.0), "mnist1d": None}
_BATCH, _OPTIMISER = 32, optax.adam(3e-3)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the fooling rates of every setting, and the mechanism."""
    numbers, gains, cosines, excess, curves = {}, [], [], -np.inf, []
    for name in scale["data"]:
        key = jax.random.fold_in(jax.random.key(seed), len(name))
        for_data, for_nets, for_attack, for_cosines = jax.random.split(key, 4)
        train, held_out = _data(name, for_data, seed)
        methods = ("sga", *scale["baselines"])
        surrogate, *targets = _classifiers(name, train, scale, for_nets)
        some = train[0][: scale["crafting"]]
        rates = {method: [] for method in methods}
        for radius in scale["radii"]:
            made = {
                method: _craft(method, surrogate, some, name, radius, scale, for_attack)
                for method in methods
            }
            sizes = [float(jnp.max(jnp.abs(one.delta))) for one in made.values()]
            excess = max(excess, max(sizes) - float(np.float32(radius)))
            fooled = {
                method: _rates(one.delta, surrogate, targets, held_out[0], name)
                for method, one in made.items()
            }
            # The better baseline, by the samples that it was made from.
            better = max(methods[1:], key=lambda m: float(made[m].certificate.value))
            for where in fooled["sga"]:
                setting = f"{name}_{radius}_{where}"
                gain = fooled["sga"][where] - fooled[better][where]
                numbers[f"gain_{setting}"] = gain
                gains.append(gain)
                for method in methods:
                    label = method.replace(" ", "_")
                    numbers[f"{label}_{setting}"] = fooled[method][where]
            for method in methods:
                rates[method].append(fooled[method]["white"])
        if scale["draws"]:
            at = (name, radius, made["sga"].delta)
            cosines.append(_cosines(surrogate, some, *at, scale, for_cosines))
        curves += [
            Curve(
                list(scale["radii"]),
                values,
                method,
                f"fooled samples of {name}",
                "radius",
                "held-out samples fooled, %",
            )
            for method, values in rates.items()
        ]
    numbers |= {"pooled_gain": float(np.mean(gains)), "excess": excess}
    if cosines:
        aggregated, single = map(float, np.mean(cosines, 0))
        numbers |= {"cosine_aggregated": aggregated, "cosine_single": single}
        numbers["cosine_gain"] = aggregated - single
    return Measurements(numbers, curves)


# Data and classifiers --------------------------------------------------------------


def _data(name, key, seed):
    """Samples to train on and samples held out, in the shape that networks take."""
    if name == "digits":
        images, labels = digit_images()
        x, y = images[:, None].astype(np.float32), labels
    else:
        x, y = map(np.asarray, mnist1d(key, _TRAIN[name] + 500))
    parts = split([x, y], [_TRAIN[name]], seed)
    return [tuple(map(jnp.asarray, part)) for part in parts]


def _classifiers(name, data, scale, key):
    """A convolutional surrogate, and perceptrons of some widths."""
    widths = scale["targets"]
    one, *others = jax.random.split(key, 1 + len(widths))
    inputs = data[0][0].size
    if name == "digits":
        surrogate = ConvClassifier(_CLASSES, widths=(8, 16), key=one)
    else:
        surrogate = Conv1DNet(inputs, _CLASSES, 16, key=one)
    targets = [_perceptron(inputs, w, k) for w, k in zip(widths, others, strict=True)]
    return [
        _trained(n, data, scale["train_epochs"], key) for n in (surrogate, *targets)
    ]


def _perceptron(inputs, width, key):
    net = eqx.nn.MLP(inputs, _CLASSES, width, 2, key=key)
    return eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), net])


def _trained(net, data, epochs, key):
    state = start_training(net, _OPTIMISER, key=key)
    state, _ = train_epochs(
        state, _loss, data, _OPTIMISER, epochs=epochs, batch_size=_BATCH
    )
    return eqx.filter_vmap(state.model)


def _loss(net, batch):
    logits = jax.vmap(net)(batch[0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
    return jnp.mean(losses)


# Perturbations ---------------------------------------------------------------------


def _craft(method, surrogate, x, name, radius, scale, key):
    """Every method spends as many gradients of single samples."""
    batch, epochs = scale["batch_size"], scale["epochs"]
    settings = {
        "sga": {"epochs": epochs, "batch_size": batch},
        "spgd 250": {"epochs": _PASSES * epochs, "batch_size": batch},
        "spgd 10": {"epochs": _PASSES * epochs, "batch_size": _SMALL},
    }[method]
    return universal_perturbation(
        surrogate,
        x,
        epsilon=radius,
        key=key,
        method=method.split()[0],
        minibatch_size=_SMALL,
        passes=_PASSES,
        cap=_CAP,
        bounds=_BOUNDS[name],
        **settings,
    )


def _rates(delta, surrogate, targets, x, name):
    """Held-out samples fooled, in percent: of the surrogate and of the targets."""
    shares = [
        100 * float(fooling_rate(net, x, delta, bounds=_BOUNDS[name]).value)
        for net in (surrogate, *targets)
    ]
    rates = {"white": shares[0]}
    return rates | {"transfer": float(np.mean(shares[1:]))} if targets else rates


# The mechanism ---------------------------------------------------------------------


def _cosines(surrogate, x, name, radius, delta, scale, key):
    """Cosines of both signs with the gradient of all samples, on the way to `delta`."""
    low, high = _BOUNDS[name] or (-np.inf, np.inf)
    found = [
        _cosines_at(
            share * delta,
            surrogate,
            x,
            (radius, low, high),
            scale["batch_size"],
            jax.random.split(key, scale["draws"]),
        )
        for share in (0.0, 0.5, 1.0)
    ]
    return np.mean(np.asarray(found), 0)


@eqx.filter_jit
def _cosines_at(delta, surrogate, x, numbers, batch_size, keys):
    radius, low, high = numbers
    targets = jnp.argmax(surrogate(x), 1)

    @jax.grad
    def ascent(delta, chosen):
        logits = surrogate(jnp.clip(x[chosen] + delta[None], low, high))
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, targets[chosen]
        )
        return jnp.mean(jnp.minimum(losses, _CAP))

    sign = optax.chain(optax.scale_by_sign(), optax.scale(radius / 10))
    ahead = aggregate_gradients(
        sign,
        _PASSES * batch_size // _SMALL,
        project=partial(jnp.clip, min=-radius, max=radius),
    )
    whole = ascent(delta, jnp.arange(len(x)))

    def cosine(direction):
        sizes = jnp.linalg.norm(direction) * jnp.linalg.norm(whole)
        return jnp.sum(direction * whole) / jnp.maximum(sizes, 1e-30)

    def one(key):
        batch = jax.random.permutation(key, len(x))[:batch_size]

        def grad_fn(delta, j):
            small = jax.random.permutation(jax.random.fold_in(key, j), batch)[:_SMALL]
            return ascent(delta, small)

        mean, _ = ahead.update(None, ahead.init(delta), delta, grad_fn=grad_fn)
        single = grad_fn(delta, 0)
        return jnp.stack([cosine(jnp.sign(mean)), cosine(jnp.sign(single))])

    return jnp.mean(jax.lax.map(one, keys), 0)
