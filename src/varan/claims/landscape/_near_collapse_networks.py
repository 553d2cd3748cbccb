"""The networks of `near_collapse`: digits, weight-decay variants, layer-wise training.

Every variant starts from the same weights, sees the same batches, and differs in
nothing but the weight decay of its two groups of layers.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.landscape import collapse_metrics
from varan.train import start_training, train_epochs

CLASSES, PER_CLASS, WIDTH, HIDDEN = 10, 100, 128, 3
BATCH, LEARNING_RATE, MOMENTUM, DECAY = 100, 0.05, 0.9, 5e-4
# Multiples of DECAY for (feature layers, last layer).
VARIANTS = {
    "base": (1.0, 1.0),
    "head_x2": (1.0, 2.0),
    "head_0": (1.0, 0.0),
    "features_x2": (2.0, 1.0),
    "features_0": (0.0, 1.0),
}


def digits(seed: int):
    """A balanced sample of the UCI digits, standardised: images and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    rows = np.concatenate(
        [
            rng.permutation(np.flatnonzero(labels == k))[:PER_CLASS]
            for k in range(CLASSES)
        ]
    )
    images = (images - images.mean()) / images.std()
    return jnp.asarray(images[rows], jnp.float32), jnp.asarray(labels[rows])


def train_variants(seed: int, epochs: int, loss: str):
    """NC1 and training accuracy of each weight-decay variant, as two dicts."""
    decays = DECAY * jnp.asarray(list(VARIANTS.values()), jnp.float32)
    images, labels = digits(seed)
    nc1, accuracy = _train_variants(
        decays, images, labels, jax.random.key(seed), epochs, loss
    )
    named = [dict(zip(VARIANTS, map(float, v), strict=True)) for v in (nc1, accuracy)]
    return tuple(named)


def train_layerwise(seed: int, epochs: int, depth: int):
    """NC1 in both forms after each of `depth` layers, each trained on frozen ones."""
    features, labels = digits(seed)
    measured = []
    for key in jax.random.split(jax.random.key(seed), depth):
        features, ratio, pinv = _train_layer(features, labels, key, epochs)
        measured.append((float(ratio), float(pinv)))
    return np.array(measured).T


@eqx.filter_jit
def _train_variants(decays, images, labels, key, epochs, loss):
    def one(decay):
        network = eqx.nn.MLP(
            images.shape[1],
            CLASSES,
            WIDTH,
            HIDDEN,
            use_final_bias=loss == "ce",
            dtype=jnp.float32,
            key=key,
        )
        network = _fit(network, decay, images, labels, key, epochs, loss)
        right = jnp.argmax(jax.vmap(network)(images), axis=1) == labels
        return _nc1(_features(network, images), labels)[1], jnp.mean(right)

    return jax.vmap(one)(decays)


@eqx.filter_jit
def _train_layer(features, labels, key, epochs):
    network = eqx.nn.MLP(
        features.shape[1],
        CLASSES,
        WIDTH,
        1,
        use_final_bias=False,
        dtype=jnp.float32,
        key=key,
    )
    decay = jnp.full(2, DECAY, jnp.float32)
    network = _fit(network, decay, features, labels, key, epochs, "mse")
    features = _features(network, features)
    return features, *_nc1(features, labels)


def _fit(network, decay, inputs, labels, key, epochs, loss):
    groups = jax.tree.map(
        lambda _: "features", eqx.filter(network, eqx.is_inexact_array)
    )
    head = jax.tree.map(lambda _: "head", groups.layers[-1])
    groups = eqx.tree_at(lambda g: g.layers[-1], groups, head)
    steps = epochs * (len(inputs) // BATCH)
    drops = {steps // 3: 0.1, 2 * steps // 3: 0.1}
    optimiser = optax.chain(
        optax.partition(
            {
                "features": optax.add_decayed_weights(decay[0]),
                "head": optax.add_decayed_weights(decay[1]),
            },
            lambda _: groups,
        ),
        optax.sgd(optax.piecewise_constant_schedule(LEARNING_RATE, drops), MOMENTUM),
    )
    state = start_training(network, optimiser, key=key)
    targets = jax.nn.one_hot(labels, CLASSES, dtype=jnp.float32)
    loss = _squared if loss == "mse" else _cross_entropy
    state, _ = train_epochs(
        state, loss, (inputs, targets), optimiser, epochs=epochs, batch_size=BATCH
    )
    return state.model


def _squared(network, batch):
    inputs, targets = batch
    misfit = jax.vmap(network)(inputs) - targets
    return 0.5 * jnp.mean(jnp.sum(misfit**2, axis=1))


def _cross_entropy(network, batch):
    inputs, targets = batch
    return jnp.mean(optax.softmax_cross_entropy(jax.vmap(network)(inputs), targets))


def _features(network, inputs):
    for layer in network.layers[:-1]:
        inputs = jax.nn.relu(jax.vmap(layer)(inputs))
    return inputs


def _nc1(features, labels):
    metrics = collapse_metrics(
        features.astype(jnp.float64), labels, num_classes=CLASSES
    )
    return metrics.nc1_ratio, metrics.nc1_pinv
