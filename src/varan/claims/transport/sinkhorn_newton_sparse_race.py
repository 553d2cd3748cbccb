"""Entropic transport to one marginal error: ours, POT, ott-jax and regot.

Instances: two centred plane clouds of different laws under squared distances (moving
one changes no plan, only the largest cost), and random assignment costs; costs divided
by their maximum, equal masses. Ours is the public call, with its input checks and its
certificate.

Every peer is given its best case. POT tests its own error rarely and in another norm,
so it is stopped at exactly the sweeps that plain Sinkhorn needs. The over-relaxed one
knows the best of five relaxations beforehand. regot is run to the same tolerance with
at most 300 iterations. What sweeps runs where sweeps can arrive, from `sweeps_from` on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from varan import solve
from varan.claims import Contestant, Heat
from varan.transport import (
    EntropicTransport,
    SemiDualNewton,
    Sinkhorn,
    SparseNewton,
    entropic_transport,
)

RELAXATIONS = (1.7, 1.8, 1.85, 1.9, 1.95)
RELAXED_SWEEPS = 1500
REGOT_ITERATIONS = 300
# An answer this far (in nats) above the optimal value solves another problem.
AGREEMENT = 1e-3


def heats(settings: Mapping[str, Any]) -> Iterator[Heat]:
    """One heat a kind of instance, size and epsilon."""
    for n in settings["sizes"]:
        for kind in settings["kinds"]:
            for epsilon in settings["epsilons"]:
                instance = _Instance(kind, n, epsilon, settings)
                sweeping = epsilon >= settings["sweeps_from"]
                yield Heat(
                    name=f"{kind}, n = {n}, epsilon = {epsilon:g}",
                    contestants=[*_newton(instance), *_sweeping(instance) * sweeping],
                    error=instance.error,
                    tolerance=settings["tol"],
                    measure="marginal L1 error",
                )


class _Instance:
    """Costs with largest entry 1, equal masses, and what is known of their plan."""

    def __init__(self, kind: str, n: int, epsilon: float, settings: Mapping[str, Any]):
        self.kind, self.n, self.epsilon = kind, n, epsilon
        self.tol, self.longest = settings["tol"], settings["longest"]
        self.mass = np.full(n, 1 / n)

    @property
    def cost(self) -> np.ndarray:
        return _cost(self.kind, self.n)

    @cache  # noqa: B019 (an instance lives as long as its race)
    def sweeps(self) -> int:
        """The sweeps that plain Sinkhorn needs."""
        problem = EntropicTransport(jnp.asarray(self.cost), epsilon=self.epsilon)
        steps = self.longest // 10
        run = solve(problem, Sinkhorn(), problem.start(), tol=self.tol, max_steps=steps)
        return int(run.evaluations)

    @cache  # noqa: B019
    def lower_bound(self) -> float:
        """A value that no plan is below: that of the dual at an accurate answer."""
        answer = _ours(self, tol=self.tol / 10)()
        f, g = map(np.asarray, answer.potentials)
        plan = np.exp((f[:, None] + g[None, :] - self.cost) / self.epsilon)
        return float((f + g) @ self.mass - self.epsilon * plan.sum())

    def error(self, answer: Any) -> float:
        """L1 error of both marginals; or the excess in value, if that is too large."""
        plan = self.plan(answer)
        marginals = np.abs(plan.sum(1) - self.mass).sum()
        marginals += np.abs(plan.sum(0) - self.mass).sum()
        logs = np.log(plan, out=np.zeros_like(plan), where=plan > 0)
        value = np.sum(plan * (self.cost + self.epsilon * (logs - 1)))
        excess = (value - self.lower_bound()) / self.epsilon
        return float(marginals if excess <= AGREEMENT else max(marginals, excess))

    def plan(self, answer: Any) -> np.ndarray:
        if isinstance(answer, tuple):  # potentials
            f, g = map(np.asarray, answer)
            return np.exp((f[:, None] + g[None, :] - self.cost) / self.epsilon)
        return np.asarray(answer.plan if hasattr(answer, "plan") else answer)


@cache
def _cost(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "assignment":
        cost = rng.uniform(size=(n, n))
    else:
        x = rng.normal(size=(n, 2))
        angle = rng.uniform(0, 2 * np.pi, size=n)
        ring = np.stack([2 * np.cos(angle), np.sin(angle)], axis=1)
        y = ring + 0.3 * rng.normal(size=(n, 2))
        cost = ((x[:, None] - y[None]) ** 2).sum(-1)
    return cost / cost.max()


def _ours(instance: _Instance, tol: float | None = None, **settings) -> Callable:
    cost, mass = jnp.asarray(instance.cost), jnp.asarray(instance.mass)
    options = {"epsilon": instance.epsilon, "tol": tol or instance.tol, **settings}
    return partial(entropic_transport, cost, mass, mass, **options)


def _newton(instance: _Instance) -> list[Contestant]:
    """Those for which a small epsilon is no obstacle."""

    def ours(**settings) -> Callable[[], Callable]:
        return partial(_ours, instance, **settings)

    def regot(name: str) -> Contestant:
        def make():
            import regot

            cost, mass = np.asfortranarray(instance.cost), instance.mass
            call = getattr(regot, f"sinkhorn_{name}")
            options = {"tol": instance.tol, "max_iter": REGOT_ITERATIONS}
            return partial(call, cost, mass, mass, instance.epsilon, **options)

        return Contestant(f"regot {name}", make, package="regot")

    return [
        Contestant("ours", ours()),
        Contestant("ours, SemiDualNewton", ours(method=SemiDualNewton())),
        Contestant(
            "ours, SparseNewton",
            ours(method=SparseNewton(20, "mass"), max_steps=150),
        ),
        regot("ssns"),
        regot("splr"),
        regot("sparse_newton"),
    ]


def _sweeping(instance: _Instance) -> list[Contestant]:
    """Those that sweep, as many times as it takes."""
    adaptive = Sinkhorn(relaxation="adaptive")

    def plain():
        steps = instance.longest // 10
        return _ours(instance, method=Sinkhorn(), max_steps=steps)

    def pot():
        import ot

        sweeps, mass = instance.sweeps(), instance.mass
        options = {"numItermax": sweeps, "stopThr": 0, "warn": False}
        return partial(
            ot.sinkhorn, mass, mass, instance.cost, instance.epsilon, **options
        )

    return [
        Contestant(
            "ours, adaptive Sinkhorn",
            partial(_ours, instance, method=adaptive, max_steps=200),
        ),
        Contestant("ours, plain Sinkhorn", plain),
        Contestant(
            "over-relaxed (oracle)",
            partial(_best_relaxed, instance),
            package="numpy",
        ),
        Contestant("POT sinkhorn", pot, package="POT"),
        Contestant(
            "ott, log domain", partial(_ott_log_domain, instance), package="ott-jax"
        ),
    ]


def _ott_log_domain(instance: _Instance) -> Callable:
    import jax
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    mass = jnp.asarray(instance.mass)
    solver = sinkhorn.Sinkhorn(
        lse_mode=True,
        threshold=instance.tol,
        norm_error=1,
        inner_iterations=10,
        max_iterations=instance.longest,
    )

    @jax.jit
    def run(cost):
        points = geometry.Geometry(cost_matrix=cost, epsilon=instance.epsilon)
        out = solver(linear_problem.LinearProblem(points, mass, mass))
        return out.f, out.g

    return partial(run, jnp.asarray(instance.cost))


def _best_relaxed(instance: _Instance) -> Callable:
    """The quickest of the relaxations that arrive."""
    runs = {w: _relaxed(instance, w) for w in RELAXATIONS}
    arrived = {
        w: sweeps
        for w, (plan, sweeps) in runs.items()
        if instance.error(plan) <= 1.1 * instance.tol
    }
    if not arrived:
        raise RuntimeError(f"no relaxation arrives within {RELAXED_SWEEPS} sweeps")
    best = min(arrived, key=lambda w: arrived[w])
    return lambda: _relaxed(instance, best)[0]


def _relaxed(instance: _Instance, relaxation: float) -> tuple[np.ndarray, int]:
    """Over-relaxed sweeps on the kernel; the error is looked at every ten."""
    cost, mass = instance.cost, instance.mass
    kernel = np.exp(-(cost - cost.min(axis=1, keepdims=True)) / instance.epsilon)
    u, v = np.ones_like(mass), np.ones_like(mass)
    sweep = 0
    with np.errstate(all="ignore"):
        for sweep in range(RELAXED_SWEEPS):
            rows = kernel @ v
            if sweep and sweep % 10 == 0:
                columns = v * (u @ kernel)
                error = np.abs(u * rows - mass).sum() + np.abs(columns - mass).sum()
                if not error >= instance.tol:
                    break
            u = u ** (1 - relaxation) * (mass / rows) ** relaxation
            v = v ** (1 - relaxation) * (mass / (u @ kernel)) ** relaxation
        return u[:, None] * kernel * v[None, :], sweep
