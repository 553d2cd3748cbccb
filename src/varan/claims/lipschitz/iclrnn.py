"""A convex and Lipschitz recurrent model withstands noisy training data.

Claim: trained on noisy trajectories of a reactor, the input convex Lipschitz network
predicts clean ones better than plain and LSTM networks of its width, at fewer
operations than the LSTM; and predictive control with it has one minimum.

Kept: the reactor, the noise on the scaled targets, the two relatives with one property
each, control over the horizon. Given up: the energy system and the solar data, the
width (laptop), 1000 epochs, the relatives' own cells.

Refuted by: a clean test error above the LSTM's or the plain network's at noise of 0.4
or more, a midpoint that is not convex, a steepness above the certificate, or descents
of the control cost that end at different values.
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
from varan.data import cstr_sequences, split
from varan.lipschitz import ICLRNN
from varan.nets import TanhCell

# Every model is trained with both; noisy validation data choose.
RATES = (1e-3, 1e-2)
_BATCH, _HIGH_NOISE = 256, 0.4
_PRICE, _STARTS = 0.1, 20


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Trains all models at all levels of noise; then convexity, bounds, control."""
    noises = scale["noises"]
    train, valid, test = reactor(scale["sequences"], seed)
    draw = np.random.default_rng(seed)
    noisy = [
        np.stack([y + noise * draw.normal(size=y.shape) for noise in noises])
        for _, y in (train, valid)
    ]
    batches = np.stack(
        [
            draw.permutation(len(train[0]))[: len(train[0]) // _BATCH * _BATCH]
            for _ in range(scale["epochs"])
        ]
    ).reshape(-1, _BATCH)
    errors, chosen = {}, {}
    for name in scale["models"]:  # the first is ours
        start = eqx.filter_jit(make)(name, scale["hidden"], jax.random.key(seed))
        runs, found = trained(start, train[0], noisy[0], batches, valid[0], noisy[1])
        best = np.argmin(found, 0)
        chosen[name] = [
            jax.tree.map(lambda leaf, i=i, r=r: leaf[r, i], runs)
            for i, r in enumerate(best)
        ]
        errors[name] = [float(mean_square(net, *test)) for net in chosen[name]]
    sizes = [
        flops(eqx.filter_eval_shape(make, name, scale["hidden"], jax.random.key(0)))
        for name in ("iclrnn", "lstm")
    ]
    numbers = {"flops_over_lstm": sizes[0] / sizes[1]}
    for name in scale["models"][1:]:
        ratios = np.array(errors["iclrnn"]) / np.array(errors[name])
        high = np.array(noises) >= _HIGH_NOISE
        numbers[f"over_{name}_noisy"] = float(max(ratios[high]))
        numbers[f"over_{name}_clean"] = float(ratios[0])
    for name, each in errors.items():
        numbers |= {f"{name}_{n:g}": e for n, e in zip(noises, each, strict=True)}
    numbers |= violations(chosen["iclrnn"], test[0], seed)
    for name in scale["controlled"]:
        costs = control(chosen[name][0], test[0][0], seed, scale["control_steps"])
        numbers[f"control_spread_{name}"] = float(jnp.max(costs) - jnp.min(costs))
    curves = [
        Curve(
            list(noises),
            each,
            name,
            "clean test error after noisy training",
            "standard deviation of the noise on scaled targets",
            "mean squared error of scaled targets",
            log_y=True,
        )
        for name, each in errors.items()
    ]
    return Measurements(numbers, curves)


def reactor(sequences, seed):
    """Training, validation and test parts, inputs and targets scaled to [0, 1]."""
    parts = split(
        cstr_sequences(sequences, seed),
        [int(0.525 * sequences), int(0.175 * sequences)],
        seed,
    )

    def scaled(which):
        low = parts[0][which].min((0, 1))
        high = parts[0][which].max((0, 1))
        return [
            ((part[which] - low) / (high - low)).astype(np.float32) for part in parts
        ]

    return list(zip(scaled(0), scaled(1), strict=True))


# Models and training -----------------------------------------------------------------


class Recurrent(eqx.Module):
    """Two recurrent layers and a linear output: the baselines."""

    cells: tuple[Any, Any]
    head: eqx.nn.Linear

    def __init__(self, cell, inputs, outputs, hidden, key):
        one, two, three = jax.random.split(key, 3)
        self.cells = (cell(inputs, hidden, key=one), cell(hidden, hidden, key=two))
        self.head = eqx.nn.Linear(hidden, outputs, key=three)

    def __call__(self, x):
        for cell in self.cells:
            pair = isinstance(cell, eqx.nn.LSTMCell)
            zero = jnp.zeros(self.head.in_features, x.dtype)

            def step(state, entry, cell=cell, pair=pair):
                state = cell(entry, state)
                return state, state[0] if pair else state

            _, x = jax.lax.scan(step, (zero, zero) if pair else zero, x)
        return jax.vmap(self.head)(x)


def make(name, hidden, key):
    """One of the models, of four inputs and two outputs."""
    if name in ("rnn", "lstm"):
        cell = TanhCell if name == "rnn" else eqx.nn.LSTMCell
        return Recurrent(cell, 4, 2, hidden, key)
    return ICLRNN(
        4,
        2,
        hidden=hidden,
        convex=name != "lrnn",
        lipschitz=name != "icrnn",
        key=key,
    )


@eqx.filter_jit
def trained(start, x, noisy, batches, valid_x, noisy_valid):
    """Networks for every rate and level of noise, and their validation errors."""
    start, static = eqx.partition(start, eqx.is_inexact_array)

    def one(rate, y, valid_y):
        optimiser = optax.adam(rate)

        def step(carry, rows):
            net, state = carry
            slope = jax.grad(
                lambda net: mean_square(eqx.combine(net, static), x[rows], y[rows])
            )(net)
            change, state = optimiser.update(slope, state)
            net = optax.apply_updates(net, change)
            if isinstance(static, ICLRNN):
                whole = eqx.combine(net, static).project()
                net = eqx.filter(whole, eqx.is_inexact_array)
            return (net, state), None

        (net, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), batches)
        net = eqx.combine(net, static)
        return eqx.filter(net, eqx.is_array), mean_square(net, valid_x, valid_y)

    levels = jax.vmap(one, in_axes=(None, 0, 0))
    rates = jnp.asarray(RATES, x.dtype)
    nets, errors = jax.vmap(levels, in_axes=(0, None, None))(rates, noisy, noisy_valid)
    return eqx.combine(nets, static), errors


@eqx.filter_jit
def mean_square(net, x, y):
    return jnp.mean((jax.vmap(net)(x) - y) ** 2)


def flops(net):
    """Operations of one step: two for each entry of a matrix."""
    return 2 * sum(leaf.size for leaf in jax.tree.leaves(net) if leaf.ndim == 2)


# What is promised --------------------------------------------------------------------


def violations(nets, x, seed):
    """How far midpoints and steepness are beyond what is proved, at the worst."""
    convexity, share = 0.0, 0.0
    for net in nets:
        gap, steepness = sampled(net, x, jax.random.key(seed))
        bound = net.certify(x.shape[1]).value
        convexity = max(convexity, float(gap))
        share = max(share, float(steepness / bound))
    return {"convexity_violation": convexity, "steepness_over_bound": share}


@eqx.filter_jit
def sampled(net, x, key):
    """Largest excess of a midpoint, and the steepest of pairs near and far."""
    run = jax.vmap(net)
    one, two = jax.random.uniform(key, (2, 10_000, *x.shape[1:]), x.dtype)
    middle = run((one + two) / 2) - (run(one) + run(two)) / 2
    near = one + 1e-2 * (two - one)

    def steepness(a, b):
        size = lambda z: jnp.sqrt(jnp.sum(z**2, (1, 2)))  # noqa: E731
        return jnp.max(size(run(a) - run(b)) / size(a - b))

    steepest = jnp.maximum(steepness(one, two), steepness(one, near))
    return jnp.max(middle), steepest


@eqx.filter_jit
def control(net, x, seed, steps):
    """Costs where projected gradients end, from random controls.

    Temperature and concentration are brought down, `sum y^2`, and controls kept near
    their middle: convex for a model that is convex and never negative. The last
    stepsizes are those of a strongly convex problem, `1 / (k * 2 price)`.
    """

    def cost(u):
        y = net(jnp.concatenate([x[:, :2], u], 1))
        return jnp.sum(y**2) + _PRICE * jnp.sum((u - 0.5) ** 2)

    def descend(u):
        def one(u, k):
            stepsize = jnp.minimum(0.1, 1 / (2 * _PRICE * (k + 1)))
            return jnp.clip(u - stepsize * jax.grad(cost)(u), 0, 1), None

        u, _ = jax.lax.scan(one, u, jnp.arange(steps, dtype=x.dtype))
        return cost(u)

    shape = (_STARTS, len(x), 2)
    return jax.vmap(descend)(jax.random.uniform(jax.random.key(seed), shape, x.dtype))
