"""The Monge gap's value and gradient in the images: ours and ott-jax.

Two clouds of which one is the other's image; the gap and its gradient with respect to
the images, to one accuracy of the marginals, in float32. The peer computes it as its
`monge_gap_from_samples` does, by its Sinkhorn solver and the derivative that it comes
with (the function itself asks for a neural extra); its threshold is given in the L1
norm too. Ours: the two methods that `monge_gap` offers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varan.claims import Contestant, Heat
from varan.transport import cost_matrix, entropic_cost

# Of the peer: enough for the smallest epsilon, and an end where it is not.
MAX_ITERATIONS = 5000


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a size and a share of the mean cost as epsilon."""
    for n in settings["sizes"]:
        for share in settings["shares"]:
            instance = _Instance(n, settings["dimension"], share, settings["tol"])
            yield Heat(
                name=f"n = {n}, epsilon = {share:g} of the mean cost",
                contestants=_contestants(instance),
                error=instance.error,
                tolerance=settings["accuracy"],
                measure="relative error of value and gradient",
            )


class _Instance:
    """Normal points and their images under a twisted map."""

    def __init__(self, n: int, d: int, share: float, tol: float):
        rng = np.random.default_rng(0)
        self.tol = tol
        self.x = rng.normal(size=(n, d))
        turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
        self.y = 1.5 * self.x @ turn + 0.3 * rng.normal(size=(n, d)) + 1
        self.mean = float(((self.x[:, None] - self.y[None]) ** 2).sum(-1).mean())
        self.epsilon = share * self.mean

    @cache  # noqa: B019 (an instance lives as long as its race)
    def truth(self):
        with jax.enable_x64(True):
            value, slope = self.ours(method="newton", tol=1e-11)()()
            return float(value), np.asarray(slope)

    def error(self, answer: Any) -> float:
        value, slope = answer
        exact, exact_slope = self.truth()
        size = np.linalg.norm(exact_slope)
        apart = np.linalg.norm(np.asarray(slope) - exact_slope) / size
        return float(max(abs(float(value) - exact) / self.mean, apart))

    def ours(self, **settings):
        def make():
            x, y = jnp.asarray(self.x), jnp.asarray(self.y)

            @jax.jit
            def gap(y):
                relative = entropic_cost(x, y, epsilon=self.epsilon, **settings)
                # The peer's entropy, which the public `monge_gap` has too.
                shift = 2 * self.epsilon * float(np.log(x.shape[0]))
                return jnp.mean(jnp.sum((x - y) ** 2, 1)) - relative + shift

            return partial(jax.jit(jax.value_and_grad(gap)), y)

        return make


def _contestants(instance: _Instance) -> list[Contestant]:
    def ott():
        from ott.geometry import geometry
        from ott.solvers import linear

        x, y = jnp.asarray(instance.x), jnp.asarray(instance.y)

        def gap(y):
            matrix = cost_matrix(x, y)
            run = linear.solve(
                geometry.Geometry(matrix, epsilon=instance.epsilon),
                threshold=instance.tol,
                max_iterations=MAX_ITERATIONS,
            )
            paid = jnp.mean(jnp.diagonal(matrix))
            return paid - run.ent_reg_cost  # pyright: ignore

        return partial(jax.jit(jax.value_and_grad(gap)), y)

    tol = instance.tol
    return [
        Contestant("ours, newton", instance.ours(method="newton", tol=tol)),
        Contestant("ours, sinkhorn", instance.ours(method="sinkhorn", tol=tol)),
        Contestant("ott-jax", ott, package="ott-jax"),
    ]
