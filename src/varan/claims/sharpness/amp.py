"""Adversarial model perturbation: wide wells before deep ones, and label noise.

The claim: descending the largest loss in a ball prefers flat minima, and so generalises
better than plain descent. Two parts:

- two wells on a line, narrow and deep against wide and shallow: which of them the loss
  and its largest value in a ball are least in, at which radius that changes against the
  closed form, and where noisy descent from random starts ends;
- a perceptron on MNIST-1D with 40 % label noise: test error against SGD and SAM, tuned
  alike, with the same number of gradients, label smoothing beside it; how much higher
  three ascents climb than one, and how often the balls are left.

Kept: the method with a ball for each tensor as released, the theory's wells. Given up:
CIFAR and wide residual networks; dropout, which the network lacks. Refuted by: another
order of the wells, intervals that do not clear the margin.
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
from varan.sharpness import amp

from ._arms import ARMS
from ._benchmark import TRAINING_LOSS, column, loss_curve, run_arm, tuned

# Depth, width and place of the wells; the loss far from both is 1.
NARROW, WIDE = (1.0, 0.15, -2.0), (0.9, 1.0, 2.0)
EPS, SPACING, END = 0.5, 5e-5, 4.0
BATCH, BATCHES = 128, 16


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    parts = {"wells": _wells, "training": _training}
    for name in scale["parts"]:
        parts[name](scale, seed, numbers, curves)
    return Measurements(numbers, curves)


def _loss(w):
    wells = (
        depth * jnp.exp(-((w - place) ** 2) / (2 * width**2))
        for depth, width, place in (NARROW, WIDE)
    )
    return 1 - sum(wells)


def _wells(scale, seed, numbers, curves):
    grid = np.arange(-END, END + SPACING, SPACING)
    loss = np.asarray(_loss(grid))
    worst = _largest_nearby(loss, EPS)
    numbers["loss_minimiser"] = float(grid[np.argmin(loss)])
    numbers["amp_minimiser"] = float(grid[np.argmin(worst)])
    depth, width, _ = WIDE
    predicted = 1 - depth * np.exp(-(EPS**2) / (2 * width**2))
    numbers["amp_value_error"] = float(abs(np.min(worst) - predicted) / predicted)
    numbers["switch_error"] = float(abs(_observed_switch(loss, grid) / _switch() - 1))
    starts = jax.random.uniform(jax.random.key(seed), (scale["starts"],)) * 2 * END
    shares = {}
    for name, radius in (("sgd", 0.0), ("amp", EPS)):
        ends = _descend(starts - END, jax.random.key(seed + 1), radius, scale["steps"])
        shares[name] = float(jnp.mean(jnp.abs(ends - WIDE[2]) <= WIDE[1]))
        numbers[f"{name}_wide_share"] = shares[name]
    numbers["wide_share_gain"] = shares["amp"] - shares["sgd"]
    shown = slice(None, None, grid.size // 400)
    for values, label in ((loss, "loss"), (worst, f"largest within {EPS:g}")):
        curves.append(Curve(grid[shown], values[shown], label, "wells", "w", "loss"))


def _largest_nearby(loss, radius):
    from scipy.ndimage import maximum_filter1d

    return maximum_filter1d(loss, 2 * round(radius / SPACING) + 1, mode="nearest")


def _switch():
    """The radius at which both wells are as good, by the closed form."""
    (high, narrow, _), (low, wide, _) = NARROW, WIDE
    return np.sqrt(2 * np.log(high / low) / (1 / narrow**2 - 1 / wide**2))


def _observed_switch(loss, grid):
    least, most = 0.0, EPS
    while most - least > SPACING:
        middle = (least + most) / 2
        if grid[np.argmin(_largest_nearby(loss, middle))] > 0:
            most = middle
        else:
            least = middle
    return float(most)


@partial(jax.jit, static_argnums=3)
def _descend(starts, key, radius, steps):
    """Descent with gradient noise of deviation 1, the same in both evaluations."""
    method = amp(optax.sgd(0.02), radius)

    def update(w, noise, state):
        def slope(w, i=0):
            return jax.grad(_loss)(w) + noise

        updates, state = method.update(slope(w), state, w, grad_fn=slope)
        return w + updates, state

    def one(carry, key):
        w, state = carry
        noise = jax.random.normal(key, w.shape, w.dtype)
        return jax.vmap(update)(w, noise, state), None

    state = jax.vmap(method.init)(starts)
    (ends, _), _ = jax.lax.scan(one, (starts, state), jax.random.split(key, steps))
    return ends


def _training(scale, seed, numbers, curves):
    data = column("noisy", seed, train=scale["train"])
    budget = {"gradients": scale["gradients"]}
    runs = {name: run_arm(ARMS[name], data, seed, **budget) for name in scale["arms"]}
    if scale["smoothing"]:
        # The paper's smoothing, at the learning rate of the paper.
        runs["sgd-smoothing"] = run_arm(
            ARMS["sgd-smoothing"], data, seed, setting=(0.1, 0.1), **budget
        )
    for name, run in runs.items():
        key = name.replace("-", "_")
        numbers[f"{key}_test_error"] = run.points
        numbers[f"{key}_train_loss"] = run.train_loss
        curves.append(loss_curve(run))
    numbers["gain"] = runs["sgd"].points - runs["amp"].points
    if "sam" in runs:
        numbers["gain_over_sam"] = runs["sam"].points - runs["amp"].points
    numbers["budget_ratio"] = runs["amp"].gradients / runs["sgd"].gradients
    _, eps = tuned(ARMS["amp"], "noisy")
    one, active = _ascents(runs["sgd"].params, data.train, eps, 1)
    three, _ = _ascents(runs["sgd"].params, data.train, eps, 3)
    numbers["three_ascents_over_one"] = three / one
    numbers["active_share_after_sgd"] = active
    _, active = _ascents(runs["amp"].params, data.train, eps, 1)
    numbers["active_share_after_amp"] = active


@partial(jax.jit, static_argnums=3)
def _mean_ascent(params, batches, eps, ascents):
    method = amp(optax.sgd(1.0), eps, 1.0, ascents, ball="leaf", measure_gain=True)

    def one(batch):
        slope = jax.grad(TRAINING_LOSS)
        _, state = method.update(
            slope(params, batch),
            method.init(params),
            params,
            grad_fn=lambda w, i: slope(w, batch),
            value_fn=lambda w: TRAINING_LOSS(w, batch),
        )
        return state.info.actual_gain, state.rule_state.active

    gains, active = jax.lax.map(one, batches)
    return jnp.mean(gains), jnp.mean(active)


def _ascents(params, train, eps, ascents):
    """Mean rise of a batch's loss at the perturbed weights; share of balls left."""
    count = min(BATCHES, train[0].shape[0] // BATCH)
    batches = jax.tree.map(
        lambda leaf: leaf[: count * BATCH].reshape(count, BATCH, *leaf.shape[1:]), train
    )
    gain, active = _mean_ascent(params, batches, eps, ascents)
    return float(gain), float(active)
