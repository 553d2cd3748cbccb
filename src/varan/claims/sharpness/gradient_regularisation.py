"""Gradient regularisation: what forward, backward and exact penalties lead to and cost.

The claim: a forward difference is cheaper than differentiating twice and generalises
better than the backward one; in diagonal linear networks regularisation makes the
bias richer, forward differences most. Three parts:

- flows of diagonal linear networks, centred and non-centred inputs: the products of the
  weights against the drift that theory integrates, the row space, the order of the
  scales where all flows interpolate; distances to the true coefficients beside it;
- a perceptron on MNIST-1D, true labels: test errors of the schemes, each tuned alike,
  all with the same number of gradients;
- seconds of a compiled step, forward against exact.

Kept: the model that theory solves, the schemes. Given up: CIFAR and residual networks;
`eps` is 0.1 for both differences. Refuted by: scales in another order, a drift that
does not account for them, a backward difference that generalises better, a forward
step that is not faster.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from varan.claims import Curve, Measurements
from varan.nets import MLPNet
from varan.sharpness import DiagonalLinear, gr

from ._arms import ARMS
from ._benchmark import TRAINING_LOSS, column, loss_curve, momentum_sgd, run_arm

# Lengths of the differences; the first three are ordered by theory.
SCHEMES = {"forward": 0.1, "exact": 0.0, "backward": -0.1, "forward, long": 0.3}
ACTIVE, BATCH = 5, 128


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    notes: list[str] = []
    parts = {"flows": _flows, "training": _training, "speed": _speed}
    for name in scale["parts"]:
        parts[name](scale, seed, numbers, curves, notes)
    return Measurements(numbers, curves, notes)


def _flows(scale, seed, numbers, curves, notes):
    found = {name: [] for name in ("drift", "row space", "ordered", "decreasing")}
    collapsed = []
    with jax.enable_x64(True):
        for center, alpha in product(scale["centers"], scale["alphas"]):
            net, target, basis = _instance(scale, seed, center)
            ends = {("plain", 0.0): net.flow(alpha)}
            for (name, eps), gamma in product(SCHEMES.items(), scale["gammas"]):
                ends[name, gamma] = net.flow(alpha, gamma, eps)
            for (name, gamma), end in ends.items():
                key = f"{center:g}_{alpha:g}_{name.replace(', ', '_')}_{gamma:g}"
                numbers[f"distance_{key}"] = _distance(end, target)
                if not end.converged:
                    collapsed.append(bool(gamma > net.attracting_gamma))
                    continue
                predicted = net.predicted_scales(end, alpha, gamma)
                found["drift"].append(np.max(np.abs(np.log(end.scales / predicted))))
                dual = np.asarray(end.dual)
                beside = dual - basis @ (basis.T @ dual)
                found["row space"].append(np.linalg.norm(beside) / np.linalg.norm(dual))
            found["ordered"] += _ordered(ends, scale["gammas"])
            found["decreasing"] += _decreasing(ends, scale["gammas"])
            where = f"center {center:g}, alpha {alpha:g}"
            _draw(curves, where, scale["gammas"], ends, target)
    numbers["identity_error"] = float(max(found["drift"]))
    numbers["row_space_error"] = float(max(found["row space"]))
    numbers["ordered_share"] = float(np.mean(found["ordered"]))
    numbers["decreasing_share"] = float(np.mean(found["decreasing"]))
    numbers["flows_into_saddles"] = float(len(collapsed))
    if collapsed:
        notes.append(
            f"{len(collapsed)} flows were drawn into saddles instead of interpolating, "
            f"and are left out; in {sum(collapsed)} of them gamma was above the "
            "strength from which on the saddle at the origin attracts."
        )


def _ordered(ends, gammas):
    """For each strength at which all interpolate: forward < exact < backward."""
    trios = [
        [ends[name, gamma] for name in ("forward", "exact", "backward")]
        for gamma in gammas
    ]
    return [
        all(_scale(left) < _scale(right) for left, right in pairwise(trio))
        for trio in trios
        if all(end.converged for end in trio)
    ]


def _decreasing(ends, gammas):
    """For each step in strength: whether the scales fall, forward and exact."""
    found = []
    for name in ("forward", "exact"):
        along = [ends["plain", 0.0], *(ends[name, gamma] for gamma in gammas)]
        kept = [end for end in along if end.converged]
        found += [_scale(more) < _scale(less) for less, more in pairwise(kept)]
    return found


def _scale(end):
    return float(jnp.mean(end.scales))


def _instance(scale, seed, center):
    draw = np.random.default_rng([seed, int(center)])
    X = center + draw.standard_normal((scale["rows"], scale["columns"]))
    target = np.zeros(scale["columns"])
    target[:ACTIVE] = 1 / np.sqrt(ACTIVE)
    net = DiagonalLinear(jnp.asarray(X), jnp.asarray(X @ target))
    return net, target, np.linalg.qr(X.T)[0]


def _distance(end, target):
    return float(np.sum((np.asarray(end.beta) - target) ** 2))


def _draw(curves, where, gammas, ends, target):
    for name in SCHEMES:
        along = {0.0: ends["plain", 0.0]} | {g: ends[name, g] for g in gammas}
        kept = {gamma: end for gamma, end in along.items() if end.converged}
        for plot, label, measure in (
            ("scales", "mean scale", _scale),
            (
                "distance",
                "squared distance to the true coefficients",
                lambda end: _distance(end, target),
            ),
        ):
            values = [measure(end) for end in kept.values()]
            curves.append(
                Curve(list(kept), values, name, f"{plot}, {where}", "gamma", label)
            )


def _training(scale, seed, numbers, curves, notes):
    data = column("clean", seed, train=scale["train"])
    runs = {
        name: run_arm(ARMS[name], data, seed, gradients=scale["gradients"])
        for name in scale["arms"]
    }
    for name, run in runs.items():
        key = name.replace("-", "_")
        numbers[f"{key}_test_error"] = run.points
        numbers[f"{key}_train_loss"] = run.train_loss
        curves.append(loss_curve(run))
    ratios = [run.gradients / scale["gradients"] for run in runs.values()]
    # The one that is farthest from equal.
    numbers["budget_ratio"] = max(ratios, key=lambda ratio: abs(ratio - 1))
    points = {name: run.points for name, run in runs.items()}
    numbers["forward_minus_backward"] = points["gr-forward"] - points["gr-backward"]
    if "gr-exact" not in runs:
        return
    numbers["forward_minus_exact"] = points["gr-forward"] - points["gr-exact"]
    numbers["forward_gain_over_sgd"] = points["sgd"] - points["gr-forward"]
    for eps in (0.1, 0.01):
        error = _difference_error(runs["gr-exact"].params, data.train, eps)
        numbers[f"relative_difference_{eps:g}"] = error


def _difference_error(params, batch, eps):
    """How far the forward difference is from the product H g, relative to it."""

    @jax.jit
    def slope(params):
        return jax.grad(TRAINING_LOSS)(params, batch)

    def penalty(scheme):
        method = gr(optax.sgd(1.0), 1.0, eps, scheme=scheme)
        updates, _ = method.update(
            g, method.init(params), params, grad_fn=lambda w, i: slope(w)
        )
        return -ravel_pytree(updates)[0] - ravel_pytree(g)[0]

    g = slope(params)
    exact = penalty("exact")
    return float(jnp.linalg.norm(penalty("forward") - exact) / jnp.linalg.norm(exact))


def _speed(scale, seed, numbers, curves, notes):
    """Median seconds of a compiled step, the schemes taking turns."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = MLPNet(40, 10, key=keys[0])
    batch = (jax.random.normal(keys[1], (BATCH, 40)), jnp.arange(BATCH) % 10)
    steps = {name: _compiled(name, params, batch) for name in ("forward", "exact")}
    seconds = {name: [] for name in steps}
    for _ in range(scale["timed_steps"]):
        for name, (step, state) in steps.items():
            begin = time.perf_counter()
            state = jax.block_until_ready(step(*state))
            seconds[name].append(time.perf_counter() - begin)
            steps[name] = step, state
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    numbers["forward_step_ms"] = 1e3 * medians["forward"]
    numbers["exact_step_ms"] = 1e3 * medians["exact"]
    numbers["time_ratio"] = medians["forward"] / medians["exact"]


def _compiled(scheme, params, batch):
    method = gr(momentum_sgd(0.03), 0.1, 0.1, scheme=scheme)
    slope = jax.grad(TRAINING_LOSS)

    @jax.jit
    def step(params, state):
        updates, state = method.update(
            slope(params, batch), state, params, grad_fn=lambda w, i: slope(w, batch)
        )
        return optax.apply_updates(params, updates), state

    state = jax.block_until_ready(step(params, method.init(params)))
    return step, state
