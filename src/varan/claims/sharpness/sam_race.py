"""SAM's cost beyond its gradients: ours, optax's two, and pytorch-optimizer's.

The same network, start, batches and number of gradients for all. SAM takes two a step
and so makes half the steps of SGD: what it takes longer than SGD is its overhead. All
of JAX's run as one compiled scan; PyTorch's as its users run it, step by step. An
answer is right when the loss on the training set has fallen to the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims import Contestant, Heat
from varan.nets import MLPNet
from varan.sharpness import sam
from varan.train import epoch_batches, gradient_update

from ._benchmark import TRAINING_LOSS, column
from ._torch_arms import torch_network

RATE, MOMENTUM, RHO = 0.1, 0.9, 0.1


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a width and batch size."""
    for width, batch in settings["sizes"]:
        instance = _Instance(width, batch, settings["gradients"])
        yield Heat(
            name=f"40-{width}-{width}-10, batches of {batch}, "
            f"{instance.gradients} gradients",
            contestants=[
                Contestant("ours, SAM", partial(_jax, instance, _ours, 2)),
                Contestant("SGD", partial(_jax, instance, _sgd, 1), package="optax"),
                Contestant("SAM", partial(_jax, instance, _optax, 2), package="optax"),
                Contestant(
                    "SAM of pytorch-optimizer",
                    partial(_torch, instance),
                    package="pytorch-optimizer",
                    hint="pip install torch pytorch-optimizer",
                ),
            ],
            error=instance.error,
            tolerance=settings["tolerance"],
            measure="loss on the training set",
            notes=["SGD makes twice the steps: the number of gradients is the same."],
        )


class _Instance:
    """A network, the training set, and the order of its batches."""

    def __init__(self, width: int, batch: int, gradients: int):
        self.width, self.batch, self.gradients = width, batch, gradients

    @cache  # noqa: B019 (an instance lives as long as its race)
    def data(self):
        return column("clean", 0).train

    @cache  # noqa: B019
    def start(self) -> MLPNet:
        return MLPNet(40, 10, (self.width,) * 2, key=jax.random.key(0))

    def batches(self, steps: int) -> jax.Array:
        size = self.data()[1].shape[0]
        epochs = -(-steps // (size // self.batch))
        keys = jax.random.split(jax.random.key(1), epochs)
        orders = [epoch_batches(key, size, self.batch) for key in keys]
        return jnp.concatenate(orders)[:steps]

    def error(self, answer) -> float:
        leaves = [jnp.asarray(leaf) for leaf in answer]
        model = jax.tree.unflatten(jax.tree.structure(self.start()), leaves)
        return float(TRAINING_LOSS(model, self.data()))


def _sgd():
    return optax.sgd(RATE, momentum=MOMENTUM)


def _ours():
    return sam(_sgd(), RHO)


def _optax():
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return optax.contrib.sam(_sgd(), ascent, opaque_mode=True)


def _jax(instance, make, cost):
    optimiser, (x, y) = make(), instance.data()
    order = instance.batches(instance.gradients // cost)

    @jax.jit
    def run(model, x, y, order):
        def step(carry, chosen):
            model, state = carry
            loss = lambda model: TRAINING_LOSS(model, (x[chosen], y[chosen]))  # noqa: E731
            model, state, _ = gradient_update(loss, model, state, optimiser)
            return (model, state), None

        (model, _), _ = jax.lax.scan(step, (model, optimiser.init(model)), order)
        return jax.tree.leaves(model)

    return lambda: jax.block_until_ready(run(instance.start(), x, y, order))


def _torch(instance):
    import torch  # pyright: ignore[reportMissingImports]
    from pytorch_optimizer import SAM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    x, y = (torch.from_numpy(np.array(part)) for part in instance.data())
    y, loss = y.long(), torch.nn.CrossEntropyLoss()
    order = torch.from_numpy(np.array(instance.batches(instance.gradients // 2))).long()

    def run():
        model, weights = torch_network(instance.start())
        optimiser = SAM(
            model.parameters(), torch.optim.SGD, rho=RHO, lr=RATE, momentum=MOMENTUM
        )
        for chosen in order:
            inputs, labels = x[chosen], y[chosen]
            loss(model(inputs), labels).backward()
            optimiser.first_step(zero_grad=True)
            loss(model(inputs), labels).backward()
            optimiser.second_step(zero_grad=True)
        return [weight.detach().numpy().copy() for weight in weights]

    return run
