"""A black-box game on an image's features finds small changes, and grids prove safety.

Claim: with a helping second player the tree search finds the closest image of another
class; on digits it needs fewer pixels than random painting with as many queries; and
where a Lipschitz constant of the lead is known, a grid proves that there is no such
image.

Kept: keypoints with their mixture of densities, both players, the tree search, taking
pixels back; a greedy white box beside it; the grid with constants that are proved.
Given up: MNIST, CIFAR and traffic lights, networks beyond a small convolutional one.

Refuted by: an exact minimum that thousands of simulations miss, errors that grow with
the budget, random painting that comes close with the same queries, or one point in a
million inside a ball called safe where another class leads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims import Curve, Measurements
from varan.data import digit_images, random_k
from varan.lipschitz import Keypoints, feature_game, grid_safety
from varan.nets import ConvClassifier
from varan.train import start_training, train_epochs

from ._pixel_attacks import greedy_saliency, random_pixels

_SIDE, _TEST, _BATCH = 16, 360, 64
_OPTIMISER = optax.adam(3e-3)
_CORNERS = Keypoints(
    np.array([[0.5, 0.5], [0.5, 1.5], [1.5, 0.5], [1.5, 1.5]]),
    np.full(4, 0.3),
    np.ones(4),
)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Exactness on tiny images, digits against two baselines, grids against scans."""
    keys = jax.random.split(jax.random.key(seed), 3)
    numbers, curve = exactness(scale, keys[0])
    numbers |= grids(scale, keys[1])
    if scale["digits"]:
        numbers |= digits(scale, keys[2], seed)
    return Measurements(numbers, [curve])


@eqx.filter_jit
def perceptron(key, inputs: int, outputs: int, depth: int, activation) -> eqx.nn.MLP:
    """Of sixteen neurons a layer."""
    return eqx.nn.MLP(inputs, outputs, 16, depth, activation, key=key)


@eqx.filter_jit
def scores(model, images):
    """Class probabilities of a batch; the first axis of images becomes channels."""
    return jax.vmap(lambda x: jax.nn.softmax(model(x[None])))(images)


# Tiny images ----------------------------------------------------------------------


class _OnPixels(eqx.Module):
    """A perceptron that reads the nine pixels of a binary image as -1 and 1."""

    net: eqx.nn.MLP

    def __call__(self, x):
        return self.net(2 * jnp.ravel(x) - 1)


def exactness(scale, key):
    """The error of the game on the hardest images of a random network, by budget."""
    net = _OnPixels(perceptron(key, 9, 2, 1, jnp.tanh))
    predict = partial(scores, net)
    images = np.array(list(itertools.product([0.0, 1.0], repeat=9)), np.float32)
    images = images.reshape(-1, 3, 3)
    classes = np.argmax(np.asarray(predict(images)), 1)
    apart = np.abs(images[:, None] - images[None]).sum((2, 3))
    exact = np.where(classes[:, None] != classes[None], apart, np.inf).min(1)
    hardest = np.argsort(-np.where(np.isfinite(exact), exact, 0))
    hardest, errors = hardest[: scale["tiny_images"]], []
    for budget in scale["budgets"]:
        found = [
            feature_game(
                predict,
                images[k],
                manipulate=lambda pixels: (1 - pixels)[None],
                keypoints=_CORNERS,
                budget=budget,
                backtrack=0,  # the search alone
                key=jax.random.fold_in(key, budget),
            ).distance
            for k in hardest
        ]
        # What was not found counts as more than all pixels.
        errors.append(np.minimum(found, 10.0) - exact[hardest])
    means = [float(np.mean(error)) for error in errors]
    numbers = {
        "exact_share": float(np.mean(errors[-1] == 0)),
        "error_growth": float(max(np.diff(means))),
        "exact_distance": float(np.mean(exact[hardest])),
    }
    return numbers, Curve(
        list(scale["budgets"]),
        means,
        "cooperative",
        "pixels above the exact minimum",
        "simulations",
        "pixels",
        log_x=True,
    )


# Digits ---------------------------------------------------------------------------


def digits(scale, key, seed: int) -> dict[str, float]:
    """Mean pixels of the game, of random painting with its queries, of a white box."""
    images, labels = digit_images(_SIDE)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = images[order].clip(0, 1).astype(np.float32)
    y = labels[order]
    model = trained_on_digits(x[_TEST:], y[_TEST:], key, scale["epochs"])
    predict = partial(scores, model)
    right = np.argmax(np.asarray(predict(x[:_BATCH])), 1) == y[:_BATCH]
    chosen = np.flatnonzero(right)[: scale["digits"]]
    found = []
    for k in chosen:
        game = feature_game(
            predict, x[k], budget=scale["simulations"], key=jax.random.fold_in(key, k)
        )
        rng = np.random.default_rng([seed, k])
        painted = random_pixels(predict, x[k], int(y[k]), game.queries, rng)
        greedy = float(greedy_saliency(model, jnp.asarray(x[k]), jnp.asarray(y[k])))
        found.append((game.distance, painted, greedy, game.queries))
    game, painted, greedy, queries = np.mean(found, 0)
    return {
        "game_over_random": float(game / painted),
        "game_over_greedy": float(game / greedy),
        "game_pixels": float(game),
        "random_pixels": float(painted),
        "greedy_pixels": float(greedy),
        "queries": float(queries),
        "accuracy": float(np.mean(right)),
    }


def trained_on_digits(x, y, key, epochs: int) -> ConvClassifier:
    """A small convolutional network."""
    model = ConvClassifier(10, key=key)
    state = start_training(model, _OPTIMISER, key=key)
    data = jnp.asarray(x)[:, None], jnp.asarray(y)
    return train_epochs(
        state, cross_entropy, data, _OPTIMISER, epochs=epochs, batch_size=_BATCH
    )[0].model


def cross_entropy(model, batch):
    x, y = batch
    logits = jax.vmap(model)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


# Grids ----------------------------------------------------------------------------


def grids(scale, key) -> dict[str, float]:
    """Decisions about balls of a trained network in the plane, against dense scans."""
    for_data, for_net = jax.random.split(key)
    data = random_k(for_data, points=1000, dimension=2, classes=3, leaders=8)
    net = perceptron(for_net, 2, 3, 2, jax.nn.relu)
    state = start_training(net, _OPTIMISER, key=for_net)
    net = train_epochs(
        state, cross_entropy, data, _OPTIMISER, epochs=scale["epochs"], batch_size=50
    )[0].model
    kinds, wrong, evaluations = [], 0, []
    for x in data[0][: scale["centres"]]:
        label = jnp.argmax(net(x))
        for radius in scale["radii"]:
            found = grid_safety(net, x, radius)
            kinds.append(found.kind)
            evaluations.append(found.evaluations)
            if found.kind == "proof":
                wrong += int(lost_points(net, x, radius, label, scale["scan"]) > 0)
            elif found.kind == "counterexample":
                wrong += int(jnp.argmax(net(found.point)) == label)
    return {
        "contradictions": float(wrong),
        "proofs": float(kinds.count("proof")),
        "counterexamples": float(kinds.count("counterexample")),
        "undecided": float(kinds.count("unknown")),
        "grid_points": float(np.mean(evaluations)),
    }


@eqx.filter_jit
def lost_points(net, x, radius, label, side):
    """How many points of a square grid over the ball have another class."""
    line = jnp.linspace(-1, 1, side, dtype=x.dtype)

    def row(height):
        points = jnp.stack([line, jnp.full_like(line, height)], 1)
        logits = jax.vmap(net)(x[None] + radius * points)
        return jnp.sum(jnp.argmax(logits, 1) != label)

    return jnp.sum(jax.lax.map(row, line))
