"""Sparse transport to one marginal error: ours and POT on the same semi-dual.

Both run L-BFGS on the same function: ours compiled, POT's SciPy's with NumPy gradients.
POT stops on the relative change of the value: at a threshold of 1e-8 it is still 1e-3
off, so it gets 1e-17, below rounding, which reaches the error, and enough iterations.
The other contestants are ours with other solvers. Only limits whose optimum is no tie
are raced: elsewhere no plan of the dual meets the marginals.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optimistix as optx

from varan import Newton
from varan.claims import Contestant, Heat
from varan.transport import sparse_ot

MAX_STEPS = 5000
POT_THRESHOLD = 1e-17


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a size and limit."""
    for n in settings["sizes"]:
        for k in settings["limits"]:
            instance = _Instance(n, k, settings["gamma"], settings["tol"])
            yield Heat(
                name=f"n = {n}, k = {k}",
                contestants=_contestants(instance),
                error=instance.error,
                tolerance=settings["tol"],
                measure="marginal L1 error, or the excess over the limit",
            )


class _Instance:
    """Two plane clouds of different laws, equal masses."""

    def __init__(self, n: int, k: int, gamma: float, tol: float):
        self.n, self.k, self.gamma, self.tol = n, k, gamma, tol
        self.mass = np.full(n, 1 / n)

    @property
    def cost(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(self.n, 2)), 1 + 0.7 * rng.normal(size=(self.n, 2))
        cost = ((x[:, None] - y[None]) ** 2).sum(-1)
        return cost / cost.max()

    def error(self, answer: Any) -> float:
        """Marginal error; a plan over the limit or far above the dual is no answer."""
        plan = np.asarray(answer.plan if hasattr(answer, "plan") else answer)
        excess = int((plan > 1e-12).sum(0).max()) - self.k
        marginals = np.abs(plan.sum(1) - self.mass).sum()
        marginals += np.abs(plan.sum(0) - self.mass).sum()
        value = np.sum(self.cost * plan + self.gamma / 2 * plan**2)
        gap = value - float(self.ours()().value)
        # Potentials are below 2 in units of the largest cost.
        wrong = gap > 10 * max(marginals, self.tol)
        return float(max(marginals, excess, gap * wrong))

    def ours(self, **settings) -> Any:
        cost, mass = jnp.asarray(self.cost), jnp.asarray(self.mass)
        options = dict(max_nonzeros=self.k, gamma=self.gamma, max_steps=MAX_STEPS)
        return partial(sparse_ot, cost, mass, mass, tol=self.tol, **options, **settings)


def _contestants(instance: _Instance) -> list[Contestant]:
    bfgs = optx.BFGS(rtol=1e-9, atol=1e-9)

    def pot():
        import ot

        solve = partial(
            ot.smooth.smooth_ot_semi_dual,
            instance.mass,
            instance.mass,
            instance.cost,
            instance.gamma,
            reg_type="sparsity_constrained",
            max_nz=instance.k,
            stopThr=POT_THRESHOLD,
            numItermax=MAX_STEPS,
        )

        def call():
            # It prints a shape in every evaluation.
            with contextlib.redirect_stdout(io.StringIO()):
                return solve()

        return call

    return [
        Contestant("ours, L-BFGS", instance.ours),
        Contestant("ours, BFGS", partial(instance.ours, solver=bfgs)),
        Contestant("ours, Newton", partial(instance.ours, solver=Newton())),
        Contestant("POT", pot, package="POT"),
    ]
