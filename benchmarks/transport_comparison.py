"""Transport solvers side by side: how near to the least cost, in which time.

Two plane clouds of equal masses, a swiss roll and two moons, squared distances over
their largest. Every method is asked for a marginal L1 error of 1e-6 within a budget of
its iterations; its plan is then rounded to the exact marginals, and what the rounded
plan costs above the least cost (by SciPy's assignment) is shown, with processor time
after compiling (the median of three calls) and the plan's entries above a thousandth of
a mass. Methods with an epsilon or gamma are run at several.

    python benchmarks/transport_comparison.py [--points 300] [--plot transport.svg]
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from varan.data import swiss_roll, two_moons
from varan.transport import (
    SemiDualNewton,
    Sinkhorn,
    SparseNewton,
    cost_matrix,
    entropic_transport,
    round_to_polytope,
    sparse_ot,
)

jax.config.update("jax_enable_x64", True)
TOL = 1e-6
SWEEPS = 20_000
EPSILONS = (1e-1, 1e-2, 1e-3, 1e-4)
GAMMAS = (1.0, 0.1, 0.01)


def methods(cost, mass):
    """Name, setting, and a call without arguments that returns a plan."""
    ours = {
        "Sinkhorn": (Sinkhorn(), SWEEPS // 10),
        "Sinkhorn, adaptive": (Sinkhorn(relaxation="adaptive"), SWEEPS // 10),
        "SemiDualNewton": (SemiDualNewton(), 200),
        "SparseNewton": (SparseNewton(20, "mass"), 200),
    }
    for epsilon in EPSILONS:
        for name, (solver, steps) in ours.items():
            options = dict(method=solver, tol=TOL, max_steps=steps)
            call = partial(
                entropic_transport, cost, mass, mass, epsilon=epsilon, **options
            )
            yield name, epsilon, lambda call=call: call().plan
        yield "POT sinkhorn_log", epsilon, partial(_pot, cost, mass, epsilon)
        yield "ott Sinkhorn", epsilon, _ott(cost, epsilon)
    for gamma in GAMMAS:
        for limit in (4, len(mass)):
            options = dict(max_nonzeros=limit, gamma=gamma, tol=TOL, max_steps=1000)
            call = partial(sparse_ot, cost, mass, mass, **options)
            kept = "all" if limit == len(mass) else limit
            name = f"sparse_ot, k = {kept}"
            yield name, gamma, lambda call=call: call().plan
    yield "POT emd", None, partial(_emd, cost, mass)


def _pot(cost, mass, epsilon):
    import ot

    options = dict(stopThr=TOL, numItermax=SWEEPS, warn=False)
    marginals = np.asarray(mass), np.asarray(mass)
    matrix = np.asarray(cost)
    return ot.sinkhorn(*marginals, matrix, epsilon, "sinkhorn_log", **options)


def _emd(cost, mass):
    import ot

    return ot.emd(np.asarray(mass), np.asarray(mass), np.asarray(cost))


def _ott(cost, epsilon):
    from ott.geometry import geometry
    from ott.solvers import linear

    @jax.jit
    def plan(cost):
        space = geometry.Geometry(cost, epsilon=epsilon)
        return linear.solve(space, threshold=TOL, max_iterations=SWEEPS).matrix

    return partial(plan, cost)


def measure(cost, mass, least, call):
    """Processor seconds, marginal error, entries that count, excess when rounded."""
    jax.block_until_ready(call())
    spent = []
    for _ in range(3):
        start = time.process_time()
        plan = jax.block_until_ready(call())
        spent.append(time.process_time() - start)
        if spent[0] > 5:
            break
    plan = jnp.asarray(plan)
    error = float(jnp.abs(plan.sum(0) - mass).sum() + jnp.abs(plan.sum(1) - mass).sum())
    rounded = round_to_polytope(plan, mass, mass)
    excess = float(jnp.sum(cost * rounded)) / least - 1
    entries = float(jnp.mean(plan > 1e-3 * mass[0])) * len(mass)
    return float(np.median(spent)), error, entries, excess


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=300)
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    keys = jax.random.split(jax.random.key(0))
    x = swiss_roll(keys[0], arguments.points)
    y = two_moons(keys[1], arguments.points)
    cost = cost_matrix(x, y)
    cost = cost / cost.max()
    mass = jnp.full(arguments.points, 1 / arguments.points)
    matrix = np.asarray(cost)
    least = matrix[linear_sum_assignment(matrix)].mean()
    print(
        "| method | epsilon or gamma | ms | marginal error | entries a row | excess |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    points = {}
    for name, setting, call in methods(cost, mass):
        seconds, error, entries, excess = measure(cost, mass, least, call)
        points.setdefault(name, []).append((seconds, excess))
        shown = "" if setting is None else f"{setting:g}"
        print(
            f"| {name} | {shown} | {1e3 * seconds:.3g} | {error:.1e} | {entries:.1f} "
            f"| {100 * max(excess, 0):.2g} % |",
            flush=True,
        )
    if arguments.plot:
        _plot(points, arguments.plot)


def _plot(points, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, pairs) in enumerate(points.items()):
        seconds, excess = zip(*pairs, strict=True)
        marker = "osD^vPX*<>"[number % 10]
        axes.plot(seconds, np.maximum(excess, 1e-8), marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="processor seconds")
    axes.set_ylabel("cost of the rounded plan above the least, relative")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(file)


if __name__ == "__main__":
    main()
