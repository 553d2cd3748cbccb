"""Orthogonal convolutions exist widely, are found by descent, and make robust networks.

Claim: with circular padding an orthogonal convolution exists for almost every form; the
loss that no image size enters is the distance from one, descent on it finds one where
there is one, the spectral error stays put as images grow; and the loss's weight trades
accuracy for orthogonality, to the benefit of robustness.

Kept: the table of existence against descent, the identity, errors against the size, the
trade-off. Given up: large images and deep networks (digits, two convolutions), the
landscape near square forms beyond one start a form.

Refuted by: a loss that stays where a convolution exists or vanishes where none does, a
matrix whose distance is not the loss, an error that grows with the image, or singular
values and robustness that the weight does not move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array

from varan.claims import Curve, Measurements
from varan.data import digit_images, split
from varan.lipschitz import (
    OrthConv2d,
    construct_orthogonal_conv,
    conv_singular_values,
    orth_conv_loss,
    orthogonal_conv_exists,
    orthogonality_errors,
)
from varan.metrics import pgd

# The largest form: all are parts of it, so that one program descends for all.
_FILTERS, _CHANNELS, _SIDE, _STRIDE = 8, 3, 3, 3
_RATE = 1e-2
_LOSS = 1e-4
_BATCH, _NET_RATE = 64, 1e-3


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures existence, the identity, stability, and the trade-off on digits."""
    forms = random_forms(scale["forms"], seed)
    numbers = existence(forms, scale["steps"], seed)
    numbers["identity_error"] = max(
        identity_error(form, seed + place) for place, form in enumerate(forms)
    )
    more, curves = stability(scale["stable"], scale["sizes"], jax.random.key(seed))
    numbers.update(more)
    more, others = trade_off(scale, seed)
    numbers.update(more)
    return Measurements(numbers, curves + others)


# Existence -------------------------------------------------------------------------


def random_forms(count: int, seed: int) -> list[tuple[int, int, int, int, int]]:
    """Filters, channels, side, stride and dimensions."""
    rng = np.random.default_rng(seed)
    highest = (_FILTERS, _CHANNELS, _SIDE, _STRIDE, 2)
    forms = rng.integers(1, np.add(highest, 1), (count, 5)).tolist()
    return [(m, c, k, s, d) for m, c, k, s, d in forms]


def existence(forms, steps: int, seed: int) -> dict[str, float]:
    """The final losses, where an orthogonal convolution exists and where none does."""
    stacked = {name: jnp.stack(v) for name, v in _masks(forms).items()}
    keys = jax.random.split(jax.random.key(seed), len(forms))
    kernels = descend(keys, stacked, steps)
    found: dict[bool, list[float]] = {True: [], False: []}
    for (m, c, k, s, d), kernel in zip(forms, kernels, strict=True):
        cut = kernel[:m, :c, :k, :k] if d == 2 else kernel[:m, :c, :k, 0]
        there = orthogonal_conv_exists(m, c, k, s, dimensions=d).exists
        found[there].append(float(orth_conv_loss(cut, s)))
    return {
        "existing_worst": max(found[True], default=-math.inf),
        "missing_least": min(found[False], default=math.inf),
        "existing_forms": float(len(found[True])),
    }


def _masks(forms):
    """Which entries, correlations and shifts a form has, within the largest."""
    shifts = np.arange(1 - _SIDE, _SIDE)
    masks = {"kernel": [], "eye": [], "shifts": [], "scale": []}
    for m, c, k, s, d in forms:
        kernel = np.zeros((_FILTERS, _CHANNELS, _SIDE, _SIDE))
        kernel[:m, :c, :k, : k if d == 2 else 1] = 1
        masks["kernel"].append(jnp.asarray(kernel))
        masks["eye"].append(jnp.diag(jnp.arange(_FILTERS) < m).astype(float))
        kept = (shifts % s == 0)[:, None] & (shifts % s == 0)[None]
        masks["shifts"].append(jnp.asarray(kept.ravel(), float))
        masks["scale"].append(jnp.asarray((c * k**d) ** -0.5))
    return masks


@eqx.filter_jit
def descend(keys, masks, steps: int) -> Any:
    """Adam on every form's loss from a normal kernel."""
    optimiser = optax.adam(optax.cosine_decay_schedule(_RATE, steps))

    def loss(kernel, mask):
        kernel = kernel * mask["kernel"]
        room = (_SIDE - 1, _SIDE - 1)
        padded = jnp.pad(kernel, [(0, 0), (0, 0), room, room])
        windows = jnp.stack(
            [
                padded[:, :, a : a + _SIDE, b : b + _SIDE].reshape(_FILTERS, -1)
                for a, b in product(range(2 * _SIDE - 1), repeat=2)
            ]
        )
        errors = jnp.einsum("mj,dlj->dml", kernel.reshape(_FILTERS, -1), windows)
        errors = errors.at[len(windows) // 2].add(-mask["eye"])
        return jnp.sum(mask["shifts"] * jnp.sum(errors**2, (1, 2)))

    def one(key, mask):
        shape = (_FILTERS, _CHANNELS, _SIDE, _SIDE)
        start = mask["scale"] * mask["kernel"] * jax.random.normal(key, shape)

        def step(carry, _):
            kernel, state = carry
            updates, state = optimiser.update(jax.grad(loss)(kernel, mask), state)
            return (optax.apply_updates(kernel, updates), state), None

        carry = (start, optimiser.init(start))
        return jax.lax.scan(step, carry, None, length=steps)[0][0]

    return jax.vmap(one)(keys, masks)


# The identity, and errors against the size ------------------------------------------


def identity_error(form, seed: int) -> float:
    """Relative difference of the loss from the whole matrix's distance."""
    m, c, k, s, d = form
    kernel = 0.5 * np.random.default_rng(seed).normal(size=(m, c, *[k] * d))
    size = -(-(2 * k - 1) // s)
    matrix = whole_matrix(kernel, size, s)
    gram = matrix.T @ matrix if m > c * s**d else matrix @ matrix.T
    distance = np.sum((gram - np.eye(len(gram))) ** 2)
    loss = float(orth_conv_loss(jnp.asarray(kernel), s))
    return abs(size**d * loss / distance - 1)


def whole_matrix(kernel: np.ndarray, size: int, stride: int) -> np.ndarray:
    """The circular layer's matrix, entry by entry."""
    m, c, k, *_ = kernel.shape
    d, image = kernel.ndim - 2, size * stride
    matrix = np.zeros((m, *[size] * d, c, *[image] * d))
    for n in product(range(size), repeat=d):
        for tap in product(range(k), repeat=d):
            place = [(stride * a + i) % image for a, i in zip(n, tap, strict=True)]
            matrix[(slice(None), *n, slice(None), *place)] += kernel[(..., *tap)]
    return matrix.reshape(m * size**d, c * image**d)


def stability(forms, sizes, key):
    """The spectral error of nearly orthogonal kernels, by the side of the image.

    Forms are filters, channels, side, stride: rows, columns, and square.
    """
    variation, ratios, curves = [], [], []
    for form in forms:
        kernel = nearly_orthogonal(form, key)
        found = [_errors(kernel, size, form[3]) for size in sizes]
        spectral = [float(e.spectral) for e in found]
        variation.append(1 - min(spectral) / max(spectral))
        ratios += [float((e.spectral / e.bound) ** 2) for e in found]
        name = f"{form[0]} filters, {form[1]} channels, stride {form[3]}"
        curves.append(
            Curve(
                list(sizes),
                spectral,
                name,
                "spectral error at a loss of 1e-4",
                "side of the output",
                "spectral error",
                log_x=True,
            )
        )
    return {"variation": max(variation), "bound_ratio": max(ratios)}, curves


_errors = eqx.filter_jit(orthogonality_errors)


@eqx.filter_jit
def nearly_orthogonal(form, key) -> Array:
    """An orthogonal kernel with normal noise, as much as makes the loss 1e-4."""
    for_kernel, for_noise = jax.random.split(jax.random.fold_in(key, form[0] + form[1]))
    exact = construct_orthogonal_conv(*form, key=for_kernel)
    noise = jax.random.normal(for_noise, exact.shape)

    # To first order the loss is quadratic in the noise.
    def rescaled(_, size):
        return size * jnp.sqrt(_LOSS / orth_conv_loss(exact + size * noise, form[3]))

    return exact + jax.lax.fori_loop(0, 3, rescaled, jnp.asarray(1e-3)) * noise


# The trade-off on digits ------------------------------------------------------------


class DigitNet(eqx.Module):
    """Two convolutions and a linear layer."""

    first: OrthConv2d
    second: OrthConv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.first = OrthConv2d(1, 8, 3, key=keys[0])
        self.second = OrthConv2d(8, 16, 3, 2, key=keys[1])
        self.head = eqx.nn.Linear(16 * 4 * 4, 10, key=keys[2])

    def __call__(self, x: Array) -> Array:
        x = jax.nn.relu(self.second(jax.nn.relu(self.first(x))))
        return self.head(x.ravel())


def spreads(nets: DigitNet) -> np.ndarray:
    """The largest less the least singular value of the worse layer, for every net."""
    first = _values(nets.first.kernel, 8, 1)
    second = _values(nets.second.kernel, 4, 2)
    ranges = [np.ptp(v.reshape(len(v), -1), axis=1) for v in (first, second)]
    return np.maximum(*ranges).astype(float)


@eqx.filter_jit
def _values(kernels, size, stride):
    return jax.lax.map(lambda k: conv_singular_values(k, size, stride), kernels)


def trade_off(scale, seed: int):
    """Spread, accuracy and accuracy under attack, for every weight of the loss."""
    images, labels = digit_images()
    data = [images[:, None].astype(np.float32), labels]
    chosen, test, train = (
        tuple(map(jnp.asarray, part)) for part in split(data, [scale["test"]] * 2, seed)
    )
    weights = jnp.asarray(scale["weights"], jnp.float32)
    keys = jax.random.split(jax.random.key(seed), 2)
    nets = trained(keys[0], weights, train, scale["network_steps"])
    epsilon = jnp.asarray(scale["epsilon"], jnp.float32)
    found = measured(nets, chosen, test, epsilon, scale["ascents"])
    spread = spreads(nets)
    accuracy, robust, by_choice = (np.asarray(v, float) for v in found)
    best = 1 + int(np.argmax(by_choice[1:]))
    numbers = {
        "spread_rank": rank_correlation(spread),
        "robust_gain": 100 * float(robust[best] - robust[0]),
        "robust_chosen": 100 * float(robust[best]),
        "robust_without": 100 * float(robust[0]),
        "accuracy_chosen": 100 * float(accuracy[best]),
        "accuracy_without": 100 * float(accuracy[0]),
        "accuracy_heaviest": 100 * float(accuracy[-1]),
        "spread_without": float(spread[0]),
        "spread_heaviest": float(spread[-1]),
        "weight_chosen": float(scale["weights"][best]),
    }
    # On a logarithmic axis, no weight stands a decade below the least.
    positions = np.asarray(scale["weights"], float)
    positions[0] = positions[1] / 10
    curves = [
        Curve(
            positions.tolist(),
            values.tolist(),
            name,
            "digits: the weight of the loss (leftmost: none)",
            "weight",
            "share, or spread",
            log_x=True,
        )
        for name, values in (
            ("accuracy", accuracy),
            ("accuracy under attack", robust),
            ("spread of singular values", spread),
        )
    ]
    return numbers, curves


def rank_correlation(values) -> float:
    """Spearman's, of values in the order of the weights; 0 if they are all equal."""
    if np.ptp(values) == 0:
        return 0.0
    ranks = np.argsort(np.argsort(values))
    return float(np.corrcoef(np.arange(len(values)), ranks)[0, 1])


@eqx.filter_jit
def trained(key, weights, data, steps: int) -> DigitNet:
    """One network a weight, from the same start and batches."""
    x, y = data
    for_net, for_order = jax.random.split(key)
    start = jtu.tree_map(
        lambda leaf: leaf.astype(x.dtype) if eqx.is_inexact_array(leaf) else leaf,
        DigitNet(for_net),
    )
    params, static = eqx.partition(start, eqx.is_inexact_array)
    optimiser = optax.adam(_NET_RATE)

    def one(weight):
        def loss(params, x, y):
            net = eqx.combine(params, static)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                jax.vmap(net)(x), y
            )
            extra = net.first.loss() + net.second.loss()
            return jnp.mean(losses) + weight * extra

        def step(carry, k):
            params, state = carry
            rows = jax.random.randint(
                jax.random.fold_in(for_order, k), (_BATCH,), 0, len(y)
            )
            slope = jax.grad(loss)(params, x[rows], y[rows])
            updates, state = optimiser.update(slope, state)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, optimiser.init(params))
        return jax.lax.scan(step, carry, jnp.arange(steps))[0][0]

    return eqx.combine(jax.lax.map(one, weights), static)


@eqx.filter_jit
def measured(nets: DigitNet, chosen, test, epsilon, ascents: int):
    """Accuracy, and accuracy under attack on test and on validation images."""
    params, static = eqx.partition(nets, eqx.is_inexact_array)

    def one(params):
        net = eqx.combine(params, static)

        def share(x, y):
            return jnp.mean((jnp.argmax(jax.vmap(net)(x), 1) == y).astype(x.dtype))

        def attacked(x, y):
            there = pgd(jax.vmap(net), x, y, epsilon, steps=ascents, bounds=(0.0, 1.0))
            return share(there, y)

        return share(*test), attacked(*test), attacked(*chosen)

    return jax.lax.map(one, params)
