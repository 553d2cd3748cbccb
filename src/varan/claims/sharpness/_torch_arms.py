"""pytorch-optimizer's optimisers as arms of the comparison, and networks in PyTorch.

The same start, batches, schedule, momentum and weight decay as for the arms in JAX;
PyTorch trains as its users do, step by step.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from varan.nets import MLPNet

from ._benchmark import _DECAY, _MOMENTUM, _POINTS, Arm

_RADII = (0.05, 0.1, 0.3, 0.5, 0.8)


def torch_network(start: MLPNet):
    """A perceptron with layer normalisation in PyTorch, and its weights in our order.

    Args:
        start: Of two hidden layers of one width; the weights start there.

    Returns:
        The module, and its parameters in the order of `start`'s leaves.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    leaves = [torch.from_numpy(np.array(p)) for p in jax.tree.leaves(start)]
    (width, inputs), (outputs, _) = leaves[0].shape, leaves[-2].shape

    def layers():
        for size in (inputs, width):
            yield from (nn.Linear(size, width), nn.LayerNorm(width), nn.ReLU())
        yield nn.Linear(width, outputs)

    model = nn.Sequential(*layers())
    # Linear layers come first among our leaves, then the normalisations, the head last.
    ours = [model[i] for i in (0, 3, 1, 4, 6)]
    weights = [p for layer in ours for p in (layer.weight, layer.bias)]
    with torch.no_grad():
        for weight, value in zip(weights, leaves, strict=True):
            weight.copy_(value)
    return model, weights


def _train(name: str, _, start, train, order, numbers, length: int):
    """Trains with the optimiser of that name; returns what the compiled loop does."""
    import pytorch_optimizer  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    x, y = (torch.from_numpy(np.array(part)) for part in train)
    y, order = y.long(), torch.from_numpy(np.array(order)).long()
    model, weights = torch_network(start)
    loss = torch.nn.CrossEntropyLoss()
    rate, rho = (float(number) for number in numbers)
    options = {"lr": rate, "momentum": _MOMENTUM, "weight_decay": _DECAY, "rho": rho}
    if name == "WSAM":
        options["model"] = model
    make = getattr(pytorch_optimizer, name)
    optimiser = make(
        params=model.parameters(), base_optimizer=torch.optim.SGD, **options
    )
    curve, step, value = np.zeros((2, _POINTS), np.float32), 0, 0.0
    while step < length and np.isfinite(value):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 + np.cos(np.pi * step / length)) / 2
        inputs, labels = x[order[step]], y[order[step]]
        first = loss(model(inputs), labels)
        first.backward()
        optimiser.first_step(zero_grad=True)
        loss(model(inputs), labels).backward()
        optimiser.second_step(zero_grad=True)
        value = float(first.detach())
        curve[:, step * _POINTS // length] += value, 1
        step += 1
    ends = [jnp.asarray(weight.detach().numpy()) for weight in weights]
    params = jax.tree.unflatten(jax.tree.structure(start), ends)
    return params, step, 2 * step, curve


def _unused(schedule, parameter):
    raise TypeError("A peer's arm has a training of its own.")


def _arm(name: str, optimiser: str) -> Arm:
    train = partial(_train, optimiser)
    return Arm(f"torch-{name}", _unused, 2, _RADII, 0.05, train=train)


# Its SAM makes the same run as ours (row 089); these two we do not have.
_ARMS = (_arm("wsam", "WSAM"), _arm("friendly-sam", "FriendlySAM"))
TORCH_ARMS = {arm.name: arm for arm in _ARMS}
