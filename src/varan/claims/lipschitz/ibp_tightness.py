"""Interval propagation is loose at random weights, and tight where it was trained.

Claim: the ratio of the optimal output box to that of intervals falls with width and
depth at initialisation, training with interval bounds raises it manifold, and wider
networks are certified better by it; where data lie in a subspace, a wider linear
autoencoder loses less.

Kept: the measure with its merged last layer, the law at initialisation, local against
exact tightness, the four ways to train and their order, the autoencoder. Given up:
image data and convolutional networks (digits and perceptrons), radius 0.05, exact
tightness beyond small networks.

Refuted by: a mean ratio at initialisation away from the law, networks trained with
interval bounds that are no tighter than others, or none the better for width.
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
from varan.data import digit_images
from varan.lipschitz import (
    Box,
    bounds,
    expected_tightness,
    ibp_initialise,
    ibp_loss,
    ibp_margins,
    propagation_tightness,
    sabr_loss,
)
from varan.metrics import bim

METHODS = ("standard", "pgd", "sabr", "ibp")
CLIP = (0.0, 1.0)
_BATCH, _RATE, _ASCENTS, _SHARE = 64, 1e-3, 8, 0.4
_INPUTS, _CLASSES, _TEST = 64, 10, 360


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the law, local against exact, training, and the autoencoder."""
    keys = jax.random.split(jax.random.key(seed), 4)
    numbers, curves = initial_law(scale, keys[0])
    data = digits(seed)
    if scale["exact_samples"]:
        numbers["local_gap"] = local_against_exact(scale, data, keys[1])
    for part in (training(scale, data, keys[2]), autoencoders(scale, keys[3])):
        numbers.update(part[0])
        curves += part[1]
    return Measurements(numbers, curves)


def digits(seed: int):
    """Training and test images with labels, as vectors."""
    images, labels = digit_images()
    order = np.random.default_rng(seed).permutation(len(labels))
    x = jnp.asarray(images.reshape(-1, _INPUTS)[order], jnp.result_type(float))
    y = jnp.asarray(labels[order])
    return (x[_TEST:], y[_TEST:]), (x[:_TEST], y[:_TEST])


# At initialisation -----------------------------------------------------------------


def initial_law(scale, key):
    """Mean ratios of random networks against the law."""
    errors, slopes, curves = [], [], []
    for layers in scale["layers"]:
        means = []
        for width in scale["law_widths"]:
            mode = "dln"
            ratios = random_ratios(key, width, layers, scale["draws"], mode)
            means.append(float(jnp.mean(ratios)))
            law = expected_tightness((width,) * (layers + 1))
            errors.append(abs(means[-1] / law - 1))
        line = np.polyfit(np.log(scale["law_widths"]), np.log(means), 1)
        slopes.append(line[0] / (layers - 1))
        curves.append(
            Curve(
                list(scale["law_widths"]),
                means,
                f"{layers} layers",
                "tightness of random linear networks",
                "width",
                "tightness",
                log_x=True,
                log_y=True,
            )
        )
    width = scale["law_widths"][-1]
    pattern, linear = (
        float(jnp.mean(random_ratios(key, width, 2, scale["draws"], mode)))
        for mode in ("local", "dln")
    )
    numbers = {
        "law_error": max(errors),
        "slope_low": min(slopes),
        "slope_high": max(slopes),
        "relu_ratio": pattern / linear,
    }
    return numbers, curves


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def random_ratios(key, width, layers, draws, mode):
    """Ratios of networks with normal weights at a random point."""

    def one(key):
        point, *rest = jax.random.split(key, layers + 1)
        weights = [jax.random.normal(k, (width, width)) for k in rest]

        def net(x):
            for weight in weights[:-1]:
                x = jax.nn.relu(weight @ x)
            return weights[-1] @ x

        x = jax.random.normal(point, (width,))
        return jnp.mean(propagation_tightness(net, x, 1.0, mode=mode))

    return jax.lax.map(one, jax.random.split(key, draws))


# Local and exact -------------------------------------------------------------------


def local_against_exact(scale, data, key) -> float:
    """Median relative difference on a small trained network."""
    (x, y), (points, _) = data
    net = trained("standard", 16, (x, y), scale, key)
    gaps = []
    for point in points[: scale["exact_samples"]]:
        local, exact = (
            propagation_tightness(
                net, point, scale["exact_epsilon"], mode=mode, clip=CLIP
            )
            for mode in ("local", "true")
        )
        gaps += (jnp.abs(local - exact) / exact).tolist()
    return float(np.median(gaps))


# Training --------------------------------------------------------------------------


def training(scale, data, key):
    """Tightness and certified accuracy of every method at every width."""
    train, (points, labels) = data
    epsilon, widths = scale["epsilon"], scale["widths"]
    tightness, certified, curves = {}, {}, []
    for method in scale["methods"]:
        for place, width in enumerate(widths):
            net = trained(method, width, train, scale, jax.random.fold_in(key, place))
            found = evaluate(net, points, labels, epsilon)
            tightness[method, width], certified[method, width] = map(float, found)
        for plot, values in (
            ("tightness", tightness),
            ("certified accuracy", certified),
        ):
            curves.append(
                Curve(
                    list(widths),
                    [values[method, width] for width in widths],
                    method,
                    f"{plot} after training",
                    "width",
                    plot,
                    log_x=True,
                    marker=False,
                )
            )
    mean = {
        m: float(np.mean([tightness[m, w] for w in widths])) for m in scale["methods"]
    }
    numbers = {
        "ibp_over_standard": mean["ibp"] / mean["standard"],
        "gain_of_width": 100
        * (certified["ibp", widths[-1]] - certified["ibp", widths[0]]),
    }
    for method in scale["methods"]:
        numbers[f"certified_{method}"] = 100 * certified[method, widths[-1]]
    if set(METHODS) == set(mean):
        numbers["ibp_minus_sabr"] = mean["ibp"] - mean["sabr"]
        numbers["sabr_minus_pgd"] = mean["sabr"] - mean["pgd"]
    return numbers, curves


@eqx.filter_jit
def evaluate(net, points, labels, epsilon):
    """Mean tightness of the leads, and the share that intervals certify."""

    def one(x, label):
        eye = jnp.eye(_CLASSES, dtype=x.dtype)
        others = jnp.argsort(jnp.arange(_CLASSES) == label)[: _CLASSES - 1]
        rows = eye[label][None] - eye[others]
        return jnp.mean(
            propagation_tightness(net, x, epsilon, mode="local", rows=rows, clip=CLIP)
        )

    leads = ibp_margins(net, points, labels, epsilon, clip=CLIP)
    sound = jnp.sum(leads > 0, 1) == _CLASSES - 1
    return jnp.mean(jax.vmap(one)(points, labels)), jnp.mean(sound)


def trained(method: str, width: int, data, scale, key) -> eqx.nn.MLP:
    """A perceptron with two hidden layers, trained in one compiled loop."""
    net = eqx.nn.MLP(_INPUTS, _CLASSES, width, 2, key=key)
    if method in ("ibp", "sabr"):
        net = ibp_initialise(net, key=key)
    return _train(net, data, key, method, scale["epsilon"], scale["steps"])


@eqx.filter_jit
def _train(net, data, key, method, epsilon, steps):
    x, y = data
    params, static = eqx.partition(net, eqx.is_inexact_array)
    optimiser = optax.adam(_RATE)

    def loss(params, x, y, radius):
        net = eqx.combine(params, static)
        if method == "ibp":
            return ibp_loss(net, x, y, radius, clip=CLIP)
        if method == "sabr":
            return sabr_loss(net, x, y, radius, share=_SHARE, steps=_ASCENTS, clip=CLIP)
        if method == "pgd":
            stepsize = 2.5 * radius / _ASCENTS
            x = bim(
                jax.vmap(net),
                x,
                y,
                radius,
                steps=_ASCENTS,
                stepsize=stepsize,
                bounds=CLIP,
            )
            x = jax.lax.stop_gradient(x)
        return ibp_loss(net, x, y, 0.0, kappa=1.0)

    def step(carry, k):
        params, state = carry
        chosen = jax.random.randint(jax.random.fold_in(key, k), (_BATCH,), 0, len(x))
        # The radius grows over the first half.
        radius = epsilon * jnp.minimum(2 * k.astype(x.dtype) / steps, 1)
        slope = jax.grad(loss)(params, x[chosen], y[chosen], radius)
        updates, state = optimiser.update(slope, state)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimiser.init(params))
    (params, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
    return eqx.combine(params, static)


# The autoencoder -------------------------------------------------------------------


def autoencoders(scale, key):
    """The worst reconstruction that intervals allow, against the width."""
    widths = scale["autoencoder_widths"]
    losses = [float(autoencoder(key, width, scale)) for width in widths]
    curve = Curve(
        list(widths),
        losses,
        "interval training",
        "linear autoencoder of a subspace",
        "width",
        "worst-case squared error by intervals",
        log_x=True,
        log_y=True,
    )
    from scipy.stats import spearmanr

    return {"autoencoder_rank": float(spearmanr(widths, losses)[0])}, [curve]


def autoencoder(key, width, scale):
    """Trained by intervals on data of ten dimensions among fifty."""
    dimension, rank = 50, 10
    for_basis, for_data, *for_net = jax.random.split(key, 4)
    basis, _ = jnp.linalg.qr(jax.random.normal(for_basis, (dimension, rank)))
    data = jax.random.normal(for_data, (512, rank)) @ basis.T
    size = 1 / np.sqrt(dimension)
    net = (
        size * jax.random.normal(for_net[0], (width, dimension)),
        size * jax.random.normal(for_net[1], (dimension, width)),
    )
    return _train_autoencoder(net, data, scale["autoencoder_epsilon"], scale["steps"])


@partial(jax.jit, static_argnums=3)
def _train_autoencoder(net, data, epsilon, steps):
    def worst(net, x):
        encode, decode = net
        out = bounds(
            lambda x: decode @ (encode @ x), Box.linf(x, epsilon), method="ibp"
        )
        far = jnp.maximum(jnp.abs(out.lower - x), jnp.abs(out.upper - x))
        return jnp.sum(far**2)

    def loss(net):
        return jnp.mean(jax.vmap(partial(worst, net))(data))

    optimiser = optax.adam(1e-2)

    def step(carry, _):
        net, state = carry
        updates, state = optimiser.update(jax.grad(loss)(net), state)
        return (optax.apply_updates(net, updates), state), None

    (net, _), _ = jax.lax.scan(step, (net, optimiser.init(net)), None, length=steps)
    return loss(net)
