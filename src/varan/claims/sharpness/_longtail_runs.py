"""The arms of `saddle-longtail`: one network, four losses, with and without SAM."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.data import long_tail, mnist1d, standardise
from varan.nets import Conv1DNet
from varan.sharpness import drw_weights, ldam, sam, vs
from varan.train import start_training, train_epochs

from ._benchmark import momentum_sgd

CLASSES, VALIDATION = 10, 1000
# The weights come in for the last of so many equal parts of the training.
PARTS = 5
HEAD, TAIL = slice(0, 3), slice(7, 10)


class Setting(NamedTuple):
    """How one arm is trained.

    Args:
        loss: "vs", of which cross-entropy is the case of two zeros, or "ldam".
        gamma, tau: Of vector scaling.
        reweighted: Whether the last fifth has class weights.
        rate: Learning rate at the start.
        rho: Radius of SAM; None is plain SGD.
    """

    loss: str = "vs"
    gamma: float = 0.0
    tau: float = 0.0
    reweighted: bool = False
    rate: float = 0.1
    rho: float | None = None


class Data(NamedTuple):
    """Long-tailed training data, balanced validation and test data."""

    train: tuple[Any, Any]
    counts: np.ndarray
    validation: tuple[Any, Any]
    test: tuple[Any, Any]


def data(scale, seed) -> Data:
    """A long-tailed draw from the pool; the other parts are the same for all seeds."""
    (x, y), *others = _drawn(CLASSES * scale["largest"], scale["test"])
    kept = long_tail(x, y, scale["imbalance"], largest=scale["largest"], seed=seed)
    train, *signals = standardise(kept[0], *(x for x, _ in others))
    validation, test = (
        (jnp.asarray(x), jnp.asarray(y))
        for x, (_, y) in zip(signals, others, strict=True)
    )
    counts = np.bincount(kept[1], minlength=CLASSES)
    train = (jnp.asarray(train), jnp.asarray(kept[1]))
    return Data(train, counts, validation, test)


@lru_cache(maxsize=1)
def _drawn(pool, test):
    """Samples to thin out, to choose by and to test on."""
    x, y = map(np.asarray, mnist1d(jax.random.key(42), pool + VALIDATION + test))
    # Sorted and dealt out: every part is balanced.
    ends = np.cumsum([pool, VALIDATION])
    order = np.argsort(y, kind="stable").reshape(CLASSES, -1).T.ravel()
    parts = np.split(order, ends)
    return [(x[rows], y[rows]) for rows in parts]


def trained(setting: Setting, drawn: Data, scale, seed: int):
    """The network after training, and its accuracies by class on both other parts."""
    for_net, for_order = jax.random.split(jax.random.key(seed))
    model = Conv1DNet(40, CLASSES, key=for_net)
    x, y = drawn.train
    late = drw_weights(drawn.counts) if setting.reweighted else jnp.ones(CLASSES)
    numbers = {
        name: jnp.asarray(getattr(setting, name)) for name in ("gamma", "tau", "rate")
    }
    rho = None if setting.rho is None else jnp.asarray(setting.rho)
    model, accuracies = _train(
        setting.loss, numbers, rho, model, (x, y, late[y]), jnp.asarray(drawn.counts),
        (drawn.validation, drawn.test), scale["epochs"], scale["batch"], for_order,
    )  # fmt: skip
    return model, [np.asarray(a, float) for a in accuracies]


@eqx.filter_jit
def _train(loss, numbers, rho, model, train, counts, others, epochs, size, key):
    x, y, weights = train
    steps = epochs * (len(x) // size)
    schedule = optax.cosine_decay_schedule(numbers["rate"], steps)
    optimiser = momentum_sgd(schedule)
    if rho is not None:
        optimiser = sam(optimiser, rho)

    def batch_loss(model, batch):
        x, y, weights = batch
        if loss == "ldam":
            losses = ldam(cosines(model, x), y, counts)
        else:
            gamma, tau = numbers["gamma"], numbers["tau"]
            losses = vs(jax.vmap(model)(x), y, counts, gamma=gamma, tau=tau)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    def one_part(state, weights):
        state, _ = train_epochs(
            state, batch_loss, (x, y, weights), optimiser, epochs=epochs // PARTS,
            batch_size=size,
        )  # fmt: skip
        return state, None

    equal = jnp.ones((PARTS - 1, len(x)), weights.dtype)
    state, _ = jax.lax.scan(
        one_part,
        start_training(model, optimiser, key=key),
        jnp.concatenate([equal, weights[None]]),
    )
    logits = cosines if loss == "ldam" else lambda m, x: jax.vmap(m)(x)
    found = [_by_class(logits(state.model, x), y) for x, y in others]
    return state.model, found


def cosines(model: Conv1DNet, x):
    """Cosines of the angles between features and the classes' weights."""
    bare = eqx.tree_at(lambda m: m.head, model, eqx.nn.Identity())
    features, weights = jax.vmap(bare)(x), model.head.weight
    return _unit(features) @ _unit(weights).T


def _unit(rows):
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _by_class(logits, y):
    right = (jnp.argmax(logits, 1) == y).astype(logits.dtype)
    own = (y[:, None] == jnp.arange(CLASSES)[None]).astype(logits.dtype)
    return right @ own / jnp.sum(own, 0)
