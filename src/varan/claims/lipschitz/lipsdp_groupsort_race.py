"""LipSDP of random MaxMin and GroupSort networks: the barrier, Clarabel and SCS.

CVXPY's solvers get the paper's inequality with all its multipliers; ours the smaller
one on differences that keep the sums, whose minimum is the same. Building the model is
part of a call on both sides, as new weights make it; compiling falls into the first.
Every contestant's point is repaired in the same way. The error is the bound's relative
distance to that of the barrier at a thousandth of the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np

from varan.claims import Contestant, Heat
from varan.lipschitz import lipsdp

_SOLVERS = (("Clarabel", "clarabel"), ("SCS", "scs"))


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a network."""
    for depth, width, group in settings["networks"]:
        instance = _Instance(depth, width, group)
        yield Heat(
            name=f"{depth} hidden of {width}, groups of {group}",
            contestants=[
                Contestant("ours", partial(instance.by, "barrier")),
                *(
                    Contestant(name, partial(instance.by, solver), package="cvxpy")
                    for name, solver in _SOLVERS
                ),
            ],
            error=instance.error,
            tolerance=settings["tol"],
            measure="relative distance to the program's minimum",
        )


class _Instance:
    """A network with random weights."""

    def __init__(self, depth, width, group):
        rng = np.random.default_rng(0)
        self.weights = rng.normal(size=(depth + 1, width, width)) / np.sqrt(width)
        self.group = group

    def by(self, solver):
        if solver != "barrier":
            import cvxpy  # noqa: F401  an absent peer is skipped by name
        # The others stop a little below the tolerance asked for.
        return partial(
            lipsdp, list(self.weights), group=self.group, solver=solver, tol=1e-6
        )

    @cached_property
    def best(self) -> float:
        return float(lipsdp(list(self.weights), group=self.group, tol=1e-9).bound)

    def error(self, answer) -> float:
        return abs(float(answer.bound) / self.best - 1)
