"""Bounds of ReLU networks and of their Jacobians: ours and auto_LiRPA.

Both get the same networks (He initialisation), inputs and radius, in float32, one
input at a time and a batch of them in one call. Three tasks: CROWN bounds of the
outputs; bounds of all entries of the Jacobian; the l_inf local Lipschitz constant of
the first output. Activation ranges are those of plain CROWN on both sides. What
auto_LiRPA does once for a network (`BoundedModule`) falls into its first call, as
compiling does into ours. Its CROWN takes the batch; its Jacobian bounds are of one
input (0.7.1 fails on more, or answers otherwise), so they go one by one.

Errors are differences to the same bounds by ours in float64, relative to their mean
width: neither side is looser than the other says, up to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varan.claims import Contestant, Heat
from varan.lipschitz import Box, bounds, jacobian_bounds, local_lipschitz

Ends = tuple[Any, Any]
# Releases on the registry neither import with a present torch nor bound Jacobians.
WHERE = "install torch and auto_LiRPA from its public repository"


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a task, network, radius and size of the batch."""
    kinds = ("tasks", "networks", "radii", "batches")
    for kind in itertools.product(*(settings[name] for name in kinds)):
        instance = _Instance(*kind)
        task, sizes, radius, batch = kind
        many = "" if batch == 1 else f", {batch} at once"
        yield Heat(
            name=f"{task}, {'-'.join(map(str, sizes))}, radius {radius:g}{many}",
            contestants=[
                Contestant("ours", partial(_ours, instance, jnp.float32)),
                Contestant(
                    "auto_LiRPA",
                    partial(_auto_lirpa, instance),
                    package="auto_LiRPA",
                    hint=WHERE,
                ),
            ],
            error=instance.error,
            tolerance=settings["tol"],
            measure="relative difference",
        )


class _Instance:
    """A task on a network with random weights, around random inputs."""

    def __init__(self, task: str, sizes: Sequence[int], radius: float, batch: int):
        self.task, self.radius, self.outputs = task, radius, sizes[-1]
        rng = np.random.default_rng(0)
        self.centres = rng.normal(size=(batch, sizes[0])).astype(np.float32)
        self.layers = [
            (
                (rng.normal(size=(n, m)) * (2 / m) ** 0.5).astype(np.float32),
                (0.1 * rng.normal(size=n)).astype(np.float32),
            )
            for m, n in itertools.pairwise(sizes)
        ]

    @cache  # noqa: B019 (an instance lives as long as its race)
    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        return _flat(_ours(self, jnp.float64)())

    def error(self, answer: Ends) -> float:
        lower, upper = self.reference()
        low, high = _flat(answer)
        # A constant is its own width: it has no lower end.
        width = np.mean(upper) if self.task == "constant" else np.mean(upper - lower)
        return float(max(np.abs(low - lower).max(), np.abs(high - upper).max()) / width)


def _flat(ends: Ends) -> tuple[np.ndarray, np.ndarray]:
    low, high = (np.asarray(end, dtype=float).reshape(-1) for end in ends)
    return low, high


def _ours(instance: _Instance, dtype: Any) -> Callable[[], Ends]:
    pairs = [[jnp.asarray(part, dtype) for part in layer] for layer in instance.layers]
    model = tuple(map(list, zip(*pairs, strict=True)))
    radius = jnp.asarray(instance.radius, dtype)
    centres = jnp.asarray(instance.centres, dtype)
    first = jnp.eye(1, instance.outputs, dtype=dtype)

    def one(centre) -> Ends:
        box = Box.linf(centre, radius)
        if instance.task == "crown":
            found = bounds(model, box)
        elif instance.task == "jacobian":
            found = jacobian_bounds(model, box, forward="crown")
        else:
            settings = {"rows": first, "forward": "crown", "samples": 0}
            bound = local_lipschitz(model, box, **settings).bound
            return bound, bound
        return found.lower, found.upper

    if len(centres) == 1:
        return lambda: one(centres[0])
    together = jax.jit(jax.vmap(one))
    return lambda: together(centres)


def _auto_lirpa(instance: _Instance) -> Callable[[], Ends]:
    import torch
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    from auto_LiRPA.jacobian import GradNorm, JacobianOP
    from torch import nn

    modules: list[nn.Module] = []
    for weight, bias in instance.layers:
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data = torch.from_numpy(weight)
        linear.bias.data = torch.from_numpy(bias)
        modules += [linear, nn.ReLU()]
    net = nn.Sequential(*modules[:-1])

    class Entries(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return JacobianOP.apply(self.net(x), x)

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.norm = net, GradNorm(norm=1)

        def forward(self, x, mask):
            return self.norm(JacobianOP.apply(self.net(x).matmul(mask), x))

    norm = PerturbationLpNorm(norm=float("inf"), eps=instance.radius)
    centres = torch.from_numpy(instance.centres)
    ball = BoundedTensor(centres, norm)
    singles = [BoundedTensor(x[None], norm) for x in centres]
    mask = torch.eye(instance.outputs)[:, :1]

    @cache
    def bounded() -> BoundedModule:
        if instance.task == "crown":
            return BoundedModule(net, centres)
        if instance.task == "jacobian":
            return BoundedModule(Entries(), centres[:1])
        return BoundedModule(Norm(), (singles[0], mask))

    def jacobian(ball) -> Ends:
        if instance.task == "jacobian":
            return bounded().compute_jacobian_bounds(ball, optimize=False)
        _, high = bounded().compute_jacobian_bounds(
            (ball, mask), optimize=False, bound_lower=False
        )
        return high, high

    def run() -> Ends:
        with torch.no_grad():
            if instance.task == "crown":
                return bounded().compute_bounds(x=(ball,), method="CROWN")
            low, high = zip(*map(jacobian, singles), strict=True)
            return torch.cat(low), torch.cat(high)

    return run
