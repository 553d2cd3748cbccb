"""Bounds of local Lipschitz constants by linear relaxation of the Clarke Jacobian.

Claim: on tiny networks the bound, after branch and bound, is close to the exact
constant; on deeper ones it is far below RecurJac's and below products of norms.

Kept: the synthetic random-k data, the architectures and training of the small models,
the measures, branch and bound with the paper's splitting score. Given up: image
networks and the time limit of sixty seconds; exact constants come from enumerating
the cells instead of mixed-integer programming.

Refuted by: a bound of the chain out of order (the method would be wrong), ratios to
RecurJac or to the norms' product near 1 on the network with three hidden layers, or
ratios to the exact constant well above 1 after branch and bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims import Curve, Measurements
from varan.data import random_k
from varan.lipschitz import BaB, Box, exact_lipschitz, local_lipschitz
from varan.train import start_training, train_epochs

# Weakest last. All methods share the ranges of the activations.
METHODS = ("crown", "recurjac", "recurjac_strict", "ibp", "naive")
CHAIN = ("sampled", "exact", "branched", *METHODS)
# The authors' training; the batch size is ours.
EPOCHS, BATCH = 10, 100
OPTIMISER = optax.adam(1e-3)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures every bound on every network and box of one seed."""
    bounds: dict[tuple, dict[str, float]] = {}
    for place, shape in enumerate(scale["networks"]):
        key = jax.random.fold_in(jax.random.key(seed), place)
        network = trained(shape, scale["points"], key)
        for epsilon in scale["epsilons"]:
            box = Box.linf(jnp.full(shape[0], 0.5), epsilon)
            exact = shape in scale["exact"]
            bounds[(*shape, epsilon)] = one_box(network, box, scale, exact)
    return Measurements(summary(bounds), curves(bounds), notes(bounds))


def cross_entropy(network, batch):
    x, y = batch
    logits = jax.vmap(network)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def trained(shape: Sequence[int], points: int, key) -> eqx.nn.MLP:
    """A ReLU network trained on random-k data by Adam."""
    inputs, width, depth, classes = shape
    for_data, for_network, for_order = jax.random.split(key, 3)
    x, y = random_k(for_data, points=points, dimension=inputs, classes=classes)
    data = x[: 7 * points // 10], y[: 7 * points // 10]
    network = eqx.nn.MLP(inputs, classes, width, depth, key=for_network)
    state = start_training(network, OPTIMISER, key=for_order)
    settings = {"epochs": EPOCHS, "batch_size": BATCH}
    return train_epochs(state, cross_entropy, data, OPTIMISER, **settings)[0].model


def one_box(network, box: Box, scale, exact: bool) -> dict[str, float]:
    """Every bound of one local constant, with the seconds that branching took."""
    found: dict[str, float] = {}
    for method in scale["methods"]:
        samples = scale["samples"] if method == "crown" else 0
        result = local_lipschitz(
            network, box, method=method, forward="crown", samples=samples
        )
        found[method] = float(result.bound)
        if method == "crown":
            found["sampled"] = float(result.attained)
    rule = BaB(
        time=600, batch=scale["batch"], max_domains=scale["domains"], reforward=True
    )
    branched = local_lipschitz(network, box, forward="crown", bab=rule, samples=0)
    found["branched"] = float(branched.bound)
    found["branches"] = float(branched.domains)
    if exact:
        truth = exact_lipschitz(network, box)
        if truth.complete:
            found["exact"] = truth.value
    return found


def summary(bounds: Mapping[tuple, Mapping[str, float]]) -> dict[str, float]:
    """The checks' quantities over the instances of one seed."""
    disorder = [0.0]
    for found in bounds.values():
        values = [found[name] for name in CHAIN if name in found]
        pairs = itertools.pairwise(values)
        disorder += [low / high - 1 for low, high in pairs]
    numbers = {"ordering_violation": max(disorder)}
    deep = [f for shape, f in bounds.items() if shape[2] == 3]
    if deep:
        for name in ("recurjac", "naive"):
            numbers[f"deep_over_{name}"] = median(f["crown"] / f[name] for f in deep)
    known = [f for f in bounds.values() if "exact" in f]
    if known:
        ratios = [f["branched"] / f["exact"] for f in known]
        numbers["branched_over_exact"] = median(ratios)
        numbers["branched_over_exact_worst"] = max(ratios)
        numbers["bound_over_exact"] = median(f["crown"] / f["exact"] for f in known)
    numbers["branches"] = median(f["branches"] for f in bounds.values())
    return numbers


def median(values) -> float:
    return float(np.median(list(values)))


def curves(bounds: Mapping[tuple, Mapping[str, float]]) -> list[Curve]:
    """Every bound over the instances, in units of what some point attains."""
    places = range(1, len(bounds) + 1)
    drawn = []
    for name in CHAIN:
        points = [
            (place, found[name] / found["sampled"])
            for place, found in zip(places, bounds.values(), strict=True)
            if name in found
        ]
        if points:
            drawn.append(
                Curve(
                    *zip(*points, strict=True),
                    label=name,
                    plot="bounds",
                    x_label="network and box (number in the notes)",
                    y_label="bound / attained value",
                    log_y=True,
                    marker=True,
                )
            )
    return drawn


def notes(bounds: Mapping[tuple, Mapping[str, float]]) -> list[str]:
    """The bounds of every instance as a sentence."""
    lines = []
    for place, (instance, found) in enumerate(bounds.items(), 1):
        *shape, epsilon = instance
        values = ", ".join(f"{k} {found[k]:.4g}" for k in CHAIN if k in found)
        lines.append(
            f"{place}: network {'-'.join(map(str, shape))} (inputs, width, hidden "
            f"layers, outputs), epsilon {epsilon}: {values}."
        )
    return lines
