"""RARTS: architecture search on two copies of the weights, with first derivatives.

The claim: on the solvable model the relaxation approaches the bilevel answer where
first-order DARTS does not, and it finds architectures as good as those of DARTS at
less than half the gradients of the second-order form. Two parts:

- the solvable model, in which every method's limit is known;
- the search of one cell of six operations on each of three edges, on MNIST-1D; the
  architecture that is found is trained anew on all data of the search.

Kept: the methods, their order of steps, the discretisation. Given up: CIFAR-10 and
ImageNet, stacks of cells, Adam and momentum in the search, the search of widths.
Refuted by: a limit other than the formula's, an architecture half a point worse than
that of first-order DARTS for the same number of gradients, or more than half the
gradients of second-order DARTS a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.bilevel import (
    DARTS,
    RARTS,
    BilevelProblem,
    Minibatch,
    search_example,
    trajectory,
)
from varan.claims import Curve, Measurements
from varan.data import mnist1d
from varan.metrics import accuracy, negative_log_likelihood
from varan.nets import MixedCell, Zero
from varan.train import epoch_batches

WEIGHTS = (5.0, 10.0, 20.0, 40.0)
UNROLLS = (0.1, 0.5, 0.7)
CHANNELS, NODES, BATCH, CLASSES = 8, 2, 64, 10
# Steps of the architecture that every method may choose from, by its validation loss.
STEPSIZES = (0.1, 1.0)
# The step of the weights on the training loss, the same for every method.
LOWER_STEPSIZE = 0.1
LAMBDA = BETA = 10.0
# Gradients a round: the product with the mixed derivative counts as the two gradients
# whose difference it is in the paper's implementation.
GRADIENTS = {"rarts": 4, "darts1": 2, "darts2": 5}
RETRAINING = optax.sgd(0.05, momentum=0.9)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    parts = {"model": _model, "search": _search}
    for name in scale["parts"]:
        parts[name](scale, seed, numbers, curves)
    return Measurements(numbers, curves)


# ------------------------------------------------------------------ solvable model


def _model(scale, seed, numbers, curves):
    del seed  # nothing is drawn: the start is the paper's
    problem = search_example()
    start = problem.point(jnp.array(2.0), jnp.array(-2.0))

    @jax.jit
    @jax.vmap
    def relaxed(weight, coupling):
        # Four fifths of a tenth of what the curvature of the objective allows.
        size = 0.2 / (2 * weight + 2 * coupling + 4)
        method = RARTS(size, size, weight, coupling)
        return _path(problem, method, start, scale["model_steps"])

    grid = jnp.array([(a, b) for a in WEIGHTS for b in WEIGHTS])
    paths = np.asarray(relaxed(grid[:, 0], grid[:, 1]))
    limits = 2 / (2 - 1 / (2 * grid[:, 0]) - 1 / grid[:, 1])
    ours = paths[:, -1]
    numbers["rarts_limit_error"] = float(np.max(np.abs(ours - limits)))
    middle = WEIGHTS.index(10.0) * (len(WEIGHTS) + 1)
    numbers["rarts_answer_error"] = float(abs(ours[middle] - 1))

    steps = scale["model_steps"]
    first = np.asarray(_path(problem, DARTS(0.01, 0.01), start, steps))
    numbers["darts1_answer_error"] = float(abs(first[-1] - 1))
    second = jax.jit(
        jax.vmap(
            lambda unroll: _path(
                problem, DARTS(0.01, 0.01, unroll, order=2), start, steps
            )
        )
    )(jnp.array(UNROLLS))
    ends = np.asarray(second[:, -1])
    numbers["darts2_limit_error"] = float(
        np.max(np.abs(ends - 2 / (1 + 2 * np.array(UNROLLS))))
    )
    for label, path in (
        ("RARTS, lambda = beta = 10", paths[middle]),
        ("DARTS, order 1", first),
        *(
            (f"DARTS, order 2, step {unroll}", np.asarray(one))
            for unroll, one in zip(UNROLLS, second, strict=True)
        ),
    ):
        rounds = np.arange(1, len(path) + 1) * (steps // len(path))
        curves.append(
            Curve(
                rounds.tolist(),
                path.tolist(),
                label,
                "solvable model",
                "rounds",
                "architecture (answer: 1)",
                log_x=True,
            )
        )


def _path(problem, method, start, steps):
    return trajectory(problem, method, start, _architecture, steps=steps, every=100)[1]


def _architecture(problem, iterate):
    del problem
    return iterate.x


# -------------------------------------------------------------------------- search


class _Convolution(eqx.Module):
    """A convolution that keeps the length, and an activation.

    As one matrix product on shifted copies: on such small signals that is several
    times faster, and quicker to compile, than the compiler's convolutions.
    """

    layer: eqx.nn.Linear
    kernel: int = eqx.field(static=True)
    activation: Callable = eqx.field(static=True)

    def __init__(self, inputs, outputs, kernel, activation, key):
        self.layer = eqx.nn.Linear(inputs * kernel, outputs, key=key)
        self.kernel = kernel
        self.activation = activation

    def __call__(self, x):
        columns = jnp.concatenate(_shifted(x, self.kernel))
        out = jax.vmap(self.layer, 1, 1)(columns)
        return self.activation(out)


class _MeanPool(eqx.Module):
    """The mean of three neighbours."""

    def __call__(self, x):
        return sum(_shifted(x, 3)) / 3


def _shifted(x, kernel):
    """The signal moved by each tap of a filter, zeros beyond its ends."""
    length = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (kernel // 2, kernel // 2)))
    return [padded[:, tap : tap + length] for tap in range(kernel)]


def _identity(x):
    return x


def _convolution(key, kernel, activation):
    return _Convolution(CHANNELS, CHANNELS, kernel, activation, key)


OPERATIONS = (
    lambda key: Zero(),
    lambda key: eqx.nn.Identity(),
    partial(_convolution, kernel=1, activation=_identity),
    partial(_convolution, kernel=3, activation=jnp.tanh),
    partial(_convolution, kernel=5, activation=jax.nn.relu),
    lambda key: _MeanPool(),
)


class _Network(eqx.Module):
    """A convolution, every other point, the cell, the mean, a linear layer."""

    stem: _Convolution
    cell: MixedCell
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.stem = _Convolution(1, CHANNELS, 5, jax.nn.relu, one)
        self.cell = MixedCell(OPERATIONS, nodes=NODES, key=two)
        self.head = eqx.nn.Linear(NODES * CHANNELS, CLASSES, key=three)

    def __call__(self, signal, weights):
        x = self.stem(signal[None])[:, ::2]
        return self.head(jnp.mean(self.cell.mix(x, weights), 1))


class _Loss(eqx.Module):
    """The loss of a network on one of the problem's two splits."""

    static: Any
    split: int = eqx.field(static=True)

    def __call__(self, alpha, params, *splits):
        signals, labels = splits[self.split]
        model = eqx.combine(params, self.static)
        return _loss(model, jax.nn.softmax(alpha), signals, labels)


def _loss(model: Any, weights, signals, labels):
    logits = jax.vmap(model, (0, None))(signals, weights)
    return negative_log_likelihood(logits, labels)


def _make(name, size, key):
    if name == "rarts":
        # Its steps carry the factor lambda (weights) or 1 + lambda (architecture).
        outer, inner = size / (1 + LAMBDA), LOWER_STEPSIZE / LAMBDA
        return RARTS(outer, inner, LAMBDA, BETA, key=key)
    order = int(name[-1])
    return DARTS(size, LOWER_STEPSIZE, LOWER_STEPSIZE, order=order, key=key)


def _search(scale, seed, numbers, curves):
    for_data, for_model, for_search, for_training, for_chance = jax.random.split(
        jax.random.key(seed), 5
    )
    size, test_size = scale["split"], scale["test"]
    signals, labels = mnist1d(for_data, 2 * size + test_size)
    signals = signals.astype(jnp.float32)
    train, valid, both, test = (
        (signals[part], labels[part])
        for part in (
            slice(size),
            slice(size, 2 * size),
            slice(2 * size),
            slice(2 * size, None),
        )
    )
    params, static = _parts(for_model)
    problem = BilevelProblem(
        _Loss(static, 1), _Loss(static, 0), train, valid, sample=Minibatch((BATCH,) * 2)
    )
    cell = eqx.combine(params, static).cell
    alpha = jnp.zeros(cell.alpha_shape, jnp.float32)
    start = problem.point(alpha, params)

    found, counts = {}, {}
    for name, cost in GRADIENTS.items():
        rounds = scale["gradients"] // cost
        alphas, values, spent = _searches(
            problem, start, name, jnp.array(STEPSIZES, jnp.float32), for_search, rounds
        )
        best = int(jnp.argmin(values))
        found[name] = cell.discretise(alphas[best])
        counts[name] = _gradients(spent, best) / rounds
    chance = jax.random.normal(for_chance, (scale["chance"], *cell.alpha_shape))
    masks = jnp.stack(
        [*found.values(), *(cell.discretise(a.astype(jnp.float32)) for a in chance)]
    )
    scores = np.asarray(
        _retrained(for_training, masks, both, test, scale["retraining_epochs"])
    )
    for name, score in zip(found, scores, strict=False):
        numbers[f"{name}_accuracy"] = float(score)
        numbers[f"{name}_gradients_a_round"] = counts[name]
    numbers["random_accuracy"] = float(np.mean(scores[len(found) :]))
    numbers["rarts_minus_darts1"] = float(scores[0] - scores[1])
    numbers["gradients_over_darts2"] = counts["rarts"] / counts["darts2"]


def _parts(key):
    params, static = eqx.partition(_Network(key), eqx.is_inexact_array)
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), static


def _gradients(spent, index):
    """Gradients counted by the method itself; a mixed product is two."""
    return float(spent.upper[index] + spent.lower[index] + 2 * spent.cross[index])


@eqx.filter_jit
def _searches(problem, start, name, sizes, key, rounds):
    """Architecture, validation loss and oracles for each stepsize."""

    def one(size):
        last, _ = trajectory(
            problem, _make(name, size, key), start, _nothing, steps=rounds, every=rounds
        )
        return last.x, problem.upper_value(last.x, last.y), last.oracles

    return jax.lax.map(one, sizes)


def _nothing(problem, iterate):
    del problem, iterate
    return jnp.zeros(())


@eqx.filter_jit
def _retrained(key, masks, data, test, epochs):
    """Test accuracy of each architecture, trained from one and the same start."""
    for_model, for_order = jax.random.split(key)
    params, static = _parts(for_model)

    def one(mask):
        def step(carry, rows):
            params, state = carry
            gradient = jax.grad(
                lambda p: _loss(
                    eqx.combine(p, static), mask, data[0][rows], data[1][rows]
                )
            )(params)
            updates, state = RETRAINING.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, key):
            order = epoch_batches(key, data[1].shape[0], BATCH)
            return jax.lax.scan(step, carry, order)[0], None

        (end, _), _ = jax.lax.scan(
            epoch,
            (params, RETRAINING.init(params)),
            jax.random.split(for_order, epochs),
        )
        model: Any = eqx.combine(end, static)
        return accuracy(jax.vmap(model, (0, None))(test[0], mask), test[1])

    return jax.lax.map(one, masks)
