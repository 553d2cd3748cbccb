"""The least adversarial risk of a sample: ours, and POT's transport solver.

Both classes are Gaussian, half of the points each. The bound is one half of one minus
the cost of a transport problem. With equal classes and masses the two forms of the
problem are the same: ours is the largest matching of the pairs in conflict, POT's
(`ot.emd2`) the exact transport between the classes with cost 0 for such pairs and 1 for
all others. Both get the points; SciPy builds POT's matrix of costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import numpy as np

from varan.claims import Contestant, Heat
from varan.games import adversarial_ot_lower_bound


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a number of points."""
    for points in settings["sizes"]:
        instance = _Instance(points, settings["epsilon"])
        yield Heat(
            name=f"{points} points in the plane",
            contestants=[
                Contestant("ours", partial(_ours, instance)),
                Contestant("POT, emd2", partial(_pot, instance), package="POT"),
            ],
            error=instance.error,
            tolerance=1e-9,
            measure="difference to the risk by an assignment solver",
        )


class _Instance:
    """Two plane Gaussians one and a half deviations apart."""

    def __init__(self, points: int, epsilon: float):
        self.half, self.epsilon = points // 2, epsilon

    @cache  # noqa: B019 (an instance lives as long as its race)
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.half)
        X = rng.standard_normal((2 * self.half, 2))
        X[self.half :, 0] += 1.5
        return X, np.repeat([0, 1], self.half)

    @cache  # noqa: B019
    def exact(self) -> float:
        """A third way: the cheapest assignment of the classes to one another."""
        from scipy.optimize import linear_sum_assignment

        cost = _costs(self)
        return float(1 - cost[linear_sum_assignment(cost)].mean()) / 2

    def error(self, answer: Any) -> float:
        return abs(float(answer) - self.exact())


def _costs(instance):
    from scipy.spatial.distance import cdist

    X, half = instance.data()[0], instance.half
    return (cdist(X[:half], X[half:]) > 2 * instance.epsilon).astype(float)


def _ours(instance):
    X, y = instance.data()

    def run():
        return float(adversarial_ot_lower_bound(X, y, instance.epsilon).value)

    return run


def _pot(instance):
    import ot

    mass = np.full(instance.half, 1 / instance.half)

    def run():
        # Its iterations end at the optimum, not at a number of them.
        return (1 - ot.emd2(mass, mass, _costs(instance), numItermax=10**8)) / 2

    return run
