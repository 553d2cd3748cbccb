"""Adversarial examples by the basic iterative method: ours and foolbox.

Both attack the same classifier with random weights on the same samples in float32:
steps of a tenth of the radius, no random start. foolbox gets the classifier compiled;
what it loops over in Python is its own. An answer's error is what it lacks of the rise
in loss that ours reaches in float64, or how far it leaves the ball, relative to the
radius, whichever is more: a weaker attack and a wider ball both count as unsolved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims import Contestant, Heat
from varan.metrics import bim
from varan.nets import MLPNet


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a number of samples."""
    for samples in settings["samples"]:
        instance = _Instance(samples, settings["eps"], settings["steps"])
        yield Heat(
            name=f"{samples} samples, {settings['steps']} steps",
            contestants=[
                Contestant("ours", partial(_ours, instance)),
                Contestant(
                    "foolbox",
                    partial(_foolbox, instance),
                    package="foolbox",
                    hint="pip install foolbox",
                ),
            ],
            error=instance.error,
            tolerance=settings["tol"],
            measure="share of the rise in loss that is missing, or of the radius "
            "that is left",
        )


class _Instance:
    """A classifier, samples and their labels by the classifier."""

    def __init__(self, samples: int, eps: float, steps: int):
        self.samples, self.eps, self.steps = samples, eps, steps
        self.reference = None

    @cached_property
    def drawn(self):
        """Model and samples; in double precision other numbers would be drawn."""
        one, two = jax.random.split(jax.random.key(0))
        with jax.enable_x64(False):
            drawn = MLPNet(40, 10, key=one), jax.random.normal(two, (self.samples, 40))
        return jax.tree.map(np.asarray, drawn)

    def parts(self, dtype=jnp.float32):
        """Logits of a batch, the samples and their labels."""
        model, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), self.drawn)
        logits = eqx.filter_vmap(model)
        return logits, x, jnp.argmax(logits(x), 1)

    def error(self, answer) -> float:
        """What is missing of the rise in loss, or outside of the ball."""
        # In double precision, so that no contestant's rounding is the measure.
        with jax.enable_x64(True):
            logits, x, labels = self.parts(jnp.float64)

            def rise(there):
                losses = optax.softmax_cross_entropy_with_integer_labels
                gain = losses(logits(there), labels) - losses(logits(x), labels)
                return float(jnp.mean(gain))

            if self.reference is None:
                best = bim(logits, x, labels, self.eps, steps=self.steps)
                self.reference = rise(best)
            there = jnp.asarray(np.asarray(answer), jnp.float64)
            outside = float(jnp.max(jnp.abs(there - x))) / self.eps - 1
            return max(1 - rise(there) / self.reference, outside)


def _ours(instance):
    logits, x, labels = instance.parts()

    def attack():
        found = bim(logits, x, labels, instance.eps, steps=instance.steps)
        return jax.block_until_ready(found)

    return attack


def _foolbox(instance):
    from foolbox.attacks import LinfBasicIterativeAttack
    from foolbox.models import JAXModel

    logits, x, labels = instance.parts()
    model = JAXModel(jax.jit(lambda x: logits(x)), bounds=(-100, 100))
    method = LinfBasicIterativeAttack(
        abs_stepsize=instance.eps / 10, steps=instance.steps, random_start=False
    )

    def attack():
        _, found, _ = method(model, x, labels, epsilons=instance.eps)
        return jax.block_until_ready(found)

    return attack
