"""Hyperparameters that are tuned: ranges, perturbations, all of them as one vector.

Also the checks that every use of them shares: that a model responds to as many of them,
that data have samples.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from ..core._checks import check_positive
from ._stn_layers import responding_layers


class Hyperparameter(eqx.Module):
    """One hyperparameter: its range, its start, how it is perturbed.

    It is tuned as an unconstrained number: a stretched sigmoid maps that to an
    interval, a softplus to a half-line.

    Args:
        start: First value, strictly inside the range.
        low: Lower end of the range; minus infinity for none.
        high: Upper end of the range; infinity for none.
        scale: Standard deviation of the perturbation of the unconstrained number,
            positive; 0.5 is the authors'.
        discrete: Whether the training loss sees the value rounded down.
        per_example: Whether each example of a batch draws its own value; otherwise
            the batch has one (for what acts on weights, not on examples).

    Raises:
        ValueError: If the range is empty, or `start` is not inside it.

    Example:
        >>> from varan.bilevel import Hyperparameter
        >>> rate = Hyperparameter(0.25, low=0.0, high=1.0)
        >>> round(float(rate.value(rate.unconstrained())), 3)
        0.25
    """

    start: float = eqx.field(static=True)
    low: float = eqx.field(static=True, default=-math.inf)
    high: float = eqx.field(static=True, default=math.inf)
    scale: float = eqx.field(static=True, default=0.5)
    discrete: bool = eqx.field(static=True, default=False)
    per_example: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        if not self.low < self.start < self.high:
            raise ValueError(
                f"Hyperparameter: `start` must lie inside {self.low} .. {self.high} "
                f"(got {self.start}). Ends of the range lie at infinity and cannot be "
                "started from."
            )
        check_positive("Hyperparameter", "scale", self.scale)

    def value(self, h: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """The value, inside the range, of an unconstrained number."""
        below, above = math.isfinite(self.low), math.isfinite(self.high)
        if below and above:
            value = self.low + (self.high - self.low) * jax.nn.sigmoid(h)
        elif below:
            value = self.low + jax.nn.softplus(h)
        elif above:
            value = self.high - jax.nn.softplus(h)
        else:
            value = h
        return jnp.floor(value) if self.discrete else value

    def unconstrained(self) -> float:
        """The unconstrained number of the start."""
        below, above = math.isfinite(self.low), math.isfinite(self.high)
        if below and above:
            share = (self.start - self.low) / (self.high - self.low)
            return math.log(share / (1 - share))
        if below:
            return _inverse_softplus(self.start - self.low)
        if above:
            return _inverse_softplus(self.high - self.start)
        return self.start


class Tuned(eqx.Module):
    """The hyperparameters as one vector, in the order given."""

    names: tuple[str, ...] = eqx.field(static=True)
    specs: tuple[Hyperparameter, ...]

    def __init__(self, hyperparameters):
        # Not a dictionary: jit would sort it.
        self.names = tuple(hyperparameters)
        self.specs = tuple(hyperparameters.values())

    def start(self, dtype):
        h = jnp.array([s.unconstrained() for s in self.specs], dtype)
        raw = [_inverse_softplus(s.scale) for s in self.specs]
        return h, jnp.array(raw, dtype)

    def perturbed(self, key, h, raw, rows):
        noise = jax.random.normal(key, (rows, h.size), h.dtype)
        own = jnp.array([s.per_example for s in self.specs])
        noise = jnp.where(own[None], noise, noise[:1])
        return h[None] + jax.nn.softplus(raw)[None] * noise

    def values(self, rows):
        return {
            name: spec.value(rows[:, i] if spec.per_example else rows[0, i])
            for i, (name, spec) in enumerate(zip(self.names, self.specs, strict=True))
        }


def repeated(h, count):
    return jnp.broadcast_to(h[None], (count, h.size))


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


def count_samples(owner, name, data):
    lengths = sorted({leaf.shape[0] for leaf in jtu.tree_leaves(data)})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(
            f"{owner}: `{name}` must have one leading axis of samples, not empty (got "
            f"lengths {lengths})."
        )
    return lengths[0]


def check_responding(owner, model, names):
    if not names:
        raise ValueError(
            f"{owner}: `hyperparameters` must hold one at least (got none). Train a "
            "plain network where there is nothing to tune."
        )
    layers = responding_layers(model)
    sizes = sorted({layer.gates.shape[-1] for layer in layers})
    if sizes != [len(names)]:
        raise ValueError(
            f"{owner}: `model` must have layers that respond to {len(names)} "
            f"hyperparameters (got {len(layers)} layers for {sizes or 'none'}). Build "
            "it with HyperLinear or HyperConv."
        )


def check_counts(owner, **counts):
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{owner}: `{name}` must be at least 1 (got {value}).")
