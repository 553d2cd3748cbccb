"""Pretraining a small network on many domains of MNIST-1D, and fine-tuning it on one.

A domain is a dictionary of settings of `varan.data.mnist1d`. Fine-tuning runs several
settings of one arm at a time, as lanes of one compiled loop; the lane with the best
validation accuracy is the arm's result, so that every arm is tuned alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from varan.data import mnist1d
from varan.metrics import accuracy
from varan.nets import MLPNet
from varan.train import start_training, train_epochs

BATCH = 32
_PRETRAINING_BATCH = 128
Domain = Mapping[str, Any]


class Signals(NamedTuple):
    """Signals of one or more domains, on one scale, with their classes."""

    x: Float[Array, "samples 40"]
    y: Int[Array, " samples"]


def draw(
    key: PRNGKeyArray,
    samples: int,
    domains: Sequence[Domain],
    scale: tuple[float, float] | None = None,
) -> tuple[Signals, tuple[float, float]]:
    """Equally many signals of each domain, standardised, with mean and deviation.

    All sets of an experiment are standardised by one of them: pass on its `scale`.
    """
    parts = [
        mnist1d(jax.random.fold_in(key, i), samples, standardise=False, **domain)
        for i, domain in enumerate(domains)
    ]
    # In NumPy: shapes differ from set to set, and each would compile anew.
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if scale is None:
        scale = float(np.mean(x)), float(np.std(x))
    x = (x - scale[0]) / scale[1]
    return Signals(jnp.asarray(x), jnp.asarray(y)), scale


def logits_of(params: MLPNet, x: Float[Array, "samples 40"]) -> Array:
    """The logits of a batch."""
    return jax.vmap(params)(x)


def mean_loss(params: MLPNet, batch: Signals) -> Float[Array, ""]:
    """The mean cross-entropy of a batch."""
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(
            logits_of(params, batch.x), batch.y
        )
    )


def pretrain(key: PRNGKeyArray, signals: Signals, epochs: int) -> MLPNet:
    """A network trained from scratch by Adam."""
    for_net, for_order = jax.random.split(key)
    net = _initial(for_net)
    steps = epochs * (signals.y.size // _PRETRAINING_BATCH)
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    state = start_training(net, optimiser, key=for_order)
    state, _ = train_epochs(
        state,
        mean_loss,
        signals,
        optimiser,
        epochs=epochs,
        batch_size=_PRETRAINING_BATCH,
    )
    return state.model


def with_new_head(key: PRNGKeyArray, params: MLPNet) -> MLPNet:
    """The network with the last layer as at the start of training."""
    return eqx.tree_at(lambda net: net.head, params, _initial(key).head)


@jax.jit
def _initial(key):
    return MLPNet(40, 10, key=key)


def _logits_fn(numbers, batch):
    del numbers
    return {"logits_fn": lambda params, noise: logits_of(params, noise(batch.x))}


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Args:
        make: `(numbers, steps) -> optax transformation`; numbers is a dictionary of
            traced scalars, one lane's settings.
        cost: Gradients of a batch that a step takes.
        extra: `(numbers, batch) -> ` what `update` is given besides gradients.
        watch: `state -> scalar`, recorded after each step.
    """

    make: Callable[[Mapping[str, Array], int], optax.GradientTransformation]
    cost: int
    extra: Callable[[Mapping[str, Array], Signals], dict[str, Any]] = _logits_fn
    watch: Callable[[PyTree], Array] = lambda state: jnp.zeros(())


class Tuned(NamedTuple):
    """The lane with the best validation accuracy."""

    params: MLPNet
    lane: int
    validation: float
    watched: np.ndarray


def fine_tune(
    arm: Arm,
    settings: Mapping[str, PyTree],
    params: MLPNet,
    train: Signals,
    valid: Signals,
    seed: int,
    *,
    gradients: int,
    size: int | None = None,
) -> Tuned:
    """Fine-tunes with each setting, and keeps the best on the validation signals.

    Args:
        arm: The arm.
        settings: Name to one value a lane, or to a tree of arrays with a first axis of
            lanes.
        params: Where to begin.
        train: What to train on.
        valid: What to choose by.
        seed: Of the batches, the same for every lane and arm.
        gradients: Budget in gradients of a batch of 32.
        size: Only so many of the signals are used, the first.

    Returns:
        The best lane.
    """
    dtype = train.x.dtype
    numbers = {
        name: np.asarray(values, dtype)
        if isinstance(values, tuple)
        else jax.tree.map(lambda leaf: leaf.astype(dtype), values)
        for name, values in settings.items()
    }
    size = train.y.size if size is None else size
    shape = (gradients // arm.cost, BATCH)
    chosen = np.random.default_rng(seed).integers(0, size, shape, np.int32)
    ends, watched, scores = _fit(arm, numbers, params, train, valid, chosen)
    best = int(np.argmax(scores))
    end = jax.tree.map(lambda leaf: np.asarray(leaf)[best], ends)
    return Tuned(end, best, float(scores[best]), np.asarray(watched)[best])


@partial(jax.jit, static_argnums=0)
def _fit(arm, numbers, params, train, valid, chosen):
    def one_lane(numbers):
        optimiser = arm.make(numbers, chosen.shape[0])

        def one_step(carry, rows):
            params, state = carry
            batch = Signals(train.x[rows], train.y[rows])
            gradient = jax.grad(mean_loss)
            updates, state = optimiser.update(
                gradient(params, batch),
                state,
                params,
                grad_fn=lambda params, _: gradient(params, batch),
                **arm.extra(numbers, batch),
            )
            return (optax.apply_updates(params, updates), state), arm.watch(state)

        start = (params, optimiser.init(params))
        (end, _), watched = jax.lax.scan(one_step, start, chosen)
        return end, watched, accuracy(logits_of(end, valid.x), valid.y)

    return jax.vmap(one_lane)(numbers)


@jax.jit
def percent_right(params: MLPNet, signals: Signals) -> Float[Array, ""]:
    """The accuracy, in points."""
    return 100 * accuracy(logits_of(params, signals.x), signals.y)


def linear_decay(rate, steps: int):
    """A schedule from a traced rate to zero."""
    return lambda step: rate * (1 - step / steps)
