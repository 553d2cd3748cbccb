"""The arms of `samformer`: forecasters trained on the same data, watched as they learn.

All are trained by Adam with one rate on the same batches in the same order; the
sharpness-aware ones take a second gradient of each batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from varan.nets import SAMformer
from varan.sharpness import sam
from varan.train import start_training, train_epochs

RATE = 1e-3


class Course(NamedTuple):
    """A model at the end, and its errors along the way.

    Args:
        model: After the last epoch.
        errors: Mean squared errors on all parts after each chunk of epochs.
    """

    model: Any
    errors: Float[np.ndarray, "chunks parts"]

    @property
    def stopped(self) -> Float[np.ndarray, " parts"]:
        """The errors where the validation error was least: early stopping."""
        return self.errors[np.argmin(self.errors[:, 1])]


class NormalisedSpectra(eqx.Module):
    """Sigma-reparametrisation: attention maps whose spectral norm is learned.

    Every weight of the attention is its own direction, scaled to spectral norm 1, times
    a gain that starts at 1.
    """

    inner: SAMformer
    gains: Float[Array, " four"]

    def __init__(self, inner: SAMformer):
        self.inner, self.gains = inner, jnp.ones(4)

    def plain(self) -> SAMformer:
        """The transformer that it stands for."""
        weights = [
            gain * weight / _spectral_norm(weight)
            for gain, weight in zip(self.gains, _maps(self.inner), strict=True)
        ]
        return eqx.tree_at(_maps, self.inner, weights)

    def __call__(self, x):
        return self.plain()(x)


class FixedScores(eqx.Module):
    """A transformer that learns all but who looks at whom: query and key stay."""

    inner: SAMformer

    def plain(self) -> SAMformer:
        """The transformer, its query and key out of the derivative's reach."""
        scores = lambda m: (m.query, m.key)  # noqa: E731
        return eqx.tree_at(
            scores, self.inner, jax.lax.stop_gradient(scores(self.inner))
        )

    def __call__(self, x):
        return self.plain()(x)


class Head(eqx.Module):
    """A linear forecaster of given features."""

    head: Float[Array, "length horizon"]

    def __call__(self, x):
        return x @ self.head


def loss(model, batch) -> Float[Array, ""]:
    """Mean squared error of a batch of pasts and futures."""
    past, future = batch
    # Once a batch, not once a sample.
    if isinstance(model, NormalisedSpectra | FixedScores):
        model = model.plain()
    return jnp.mean((jax.vmap(model)(past) - future) ** 2)


def trained(model, parts, rho, epochs, chunks, batch_size, key) -> Course:
    """Trains to the end; `rho` is None for plain Adam.

    Radii are arrays: those that follow the first compile nothing.
    """
    state, errors = start_training(model, _optimiser(rho), key=key), []
    for _ in range(chunks):
        state, seen = _chunk(state, parts, rho, epochs // chunks, batch_size)
        errors.append(np.asarray(seen, float))
    return Course(state.model, np.stack(errors))


@eqx.filter_jit
def _chunk(state, parts, rho, epochs, batch_size):
    state, _ = train_epochs(
        state, loss, parts[0], _optimiser(rho), epochs=epochs, batch_size=batch_size
    )
    return state, jnp.stack([loss(state.model, part) for part in parts])


def _optimiser(rho):
    adam = optax.adam(RATE)
    return adam if rho is None else sam(adam, rho)


@eqx.filter_jit
def attended(model: SAMformer, parts):
    """The parts with what the linear map of a model sees in place of the pasts."""
    return [(jax.vmap(model.features)(past), future) for past, future in parts]


def _maps(model):
    return [model.query, model.key, model.value, model.out]


def _spectral_norm(weight):
    thin = weight if weight.shape[0] >= weight.shape[1] else weight.T
    # The right singular vector held fixed: the derivative of the norm is exact so.
    _, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(thin.T @ thin))
    return jnp.linalg.norm(thin @ vectors[:, -1])
