"""The networks of `sam-transfer`: surrogates, watched as they train, and targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from varan.nets import Conv1DNet, MLPNet
from varan.sharpness import (
    LogitLoss,
    asam,
    averaged_weights,
    gsam,
    looksam,
    lsam,
    wasam,
)
from varan.train import start_training, train_epochs

from ._benchmark import cross_entropy, logits_fn, momentum_sgd

RATE, BATCH, CHUNKS = 0.1, 128, 20
# The radius of the other relatives that look far: with 0.4 training never starts.
LARGE = 0.2


def _last(state, model):
    del state
    return model


class Surrogate(NamedTuple):
    """One way to train a surrogate.

    Args:
        make: `(base, rho, steps) -> optax transformation`.
        cost: Gradients a step.
        rho: Radius.
        read: `(state, model) -> model` to use.
    """

    make: Callable[..., optax.GradientTransformation]
    cost: float
    rho: float = 0.0
    read: Callable[[Any, Any], Any] = _last


def _averaged(state, model):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return eqx.combine(averaged_weights(state, params), static)


def _ball(base, rho, steps):
    """The usual radius and the large ones: one function, one compilation."""
    del steps
    return lsam(base, rho)


SURROGATES = {
    "sgd": Surrogate(lambda base, rho, _: base, 1),
    "sam": Surrogate(_ball, 2, 0.05),
    "lsam 0.2": Surrogate(_ball, 2, 0.2),
    "lsam 0.4": Surrogate(_ball, 2, 0.4),
    "lsam 0.8": Surrogate(_ball, 2, 0.8),
    "asam": Surrogate(lambda base, rho, _: asam(base, rho), 2, 2.0),
    "gsam": Surrogate(lambda base, rho, _: gsam(base, rho), 2, LARGE),
    "looksam": Surrogate(lambda base, rho, _: looksam(base, rho), 1.2, LARGE),
    # The average of the last quarter, where the learning rate is least.
    "wasam": Surrogate(
        lambda base, rho, steps: wasam(base, rho, start=3 * steps // 4),
        2,
        LARGE,
        _averaged,
    ),
}
# One object: the Hessian's products compile once for it.
LOSS = LogitLoss(logits_fn)


def trained(name, data, epochs: int, key, make: Callable[..., Any] = Conv1DNet):
    """The networks after each twentieth of a training, the last one first.

    Args:
        name: Of the surrogate. It gets as many gradients as plain descent makes in so
            many epochs.
        data: Training pair.
        epochs: A multiple of 20.
        key: Of the start and the order.
        make: The network.

    Returns:
        The network to use, and those after each twentieth (of the epochs of plain
        descent), stacked.
    """
    arm = SURROGATES[name]
    per_chunk = epochs // CHUNKS
    chunks = int(CHUNKS / arm.cost)
    one, two = jax.random.split(key)
    model = make(data[0].shape[1], 10, key=one)
    # The radius is data: those of one kind share the compiled training.
    rho = jnp.asarray(arm.rho)
    return _train(arm.make, arm.read, rho, model, data, per_chunk, chunks, two)


@eqx.filter_jit
def _train(make, read, rho, model, data, per_chunk, chunks, key):
    steps = chunks * per_chunk * (len(data[0]) // BATCH)
    drops = {steps // 2: 0.1, 3 * steps // 4: 0.1}
    base = momentum_sgd(optax.piecewise_constant_schedule(RATE, drops))
    optimiser = make(base, rho, steps)

    def loss(model, batch):
        return cross_entropy(logits_fn(model, batch[0]), batch[1], None)

    def one_chunk(state, _):
        state, _ = train_epochs(
            state, loss, data, optimiser, epochs=per_chunk, batch_size=BATCH
        )
        return state, state.model

    state = start_training(model, optimiser, key=key)
    state, along = jax.lax.scan(one_chunk, state, None, length=chunks)
    return read(state.opt_state, state.model), along


def targets(data, epochs: int, count: int):
    """Networks of other starts and shapes, trained by plain descent.

    The first is for choosing and is not among those that count: then convolutional
    networks, a wide one, and perceptrons.
    """
    makes = [Conv1DNet] * 5 + [partial(Conv1DNet, channels=48), MLPNet, MLPNet]
    keys = jax.random.split(jax.random.key(1000), len(makes))
    return [
        eqx.filter_vmap(trained("sgd", data, epochs, key, make)[0])
        for make, key in zip(makes[:count], keys, strict=False)
    ]
