"""One oracle call a step does what extragradient does with two.

The claim: past extragradient, reflected gradient and optimistic gradient keep the rates
of extragradient: linear on strongly monotone problems, `1 / t` for the gap of averages,
`1 / t` for the last iterate's squared distance with noise, and that also near solutions
of problems that are not monotone. Five parts, on the paper's family `quartic_saddle`
with weights `(e1, e2)` of the quadratic and the quartic terms, and on matrix games:

- linear, (1, 0): residual after equal calls, each method at its best constant step;
- averages, (0, 1): duality gap of the running average, in closed form;
- projected: the same on matrix games, where the three methods differ;
- noisy, (1, 0): mean squared distance against the number of steps;
- local, (1, -1): slope of single runs from within 0.1 of the solution.

Kept: functions, schedules `g / (t + b)` with `g = 2 / alpha`, `b = 4 g L`, the
comparison by calls. Given up: 50 + 50 dimensions in the noisy parts; generative
networks. Refuted by: a slope away from -1, a method that needs more calls than
extragradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from varan import State
from varan.claims import Curve, Measurements
from varan.games import (
    Extragradient,
    InverseTime,
    OptimisticGradient,
    PastExtragradient,
    ReflectedGradient,
    estimate_lipschitz,
    estimate_monotonicity,
    matrix_game,
    quartic_saddle,
)

METHODS = {
    "past": PastExtragradient,
    "reflected": ReflectedGradient,
    "optimistic": OptimisticGradient,
    "extragradient": Extragradient,
}
CALLS = {"past": 1, "reflected": 1, "optimistic": 1, "extragradient": 2}
# Constant steps that every method may choose from, times 1 / L.
STEPS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95)
NOISE = 0.05


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    parts = {
        "linear": _linear,
        "averages": _averages,
        "projected": _projected,
        "noisy": _noisy,
        "local": _local,
    }
    for name in scale["parts"]:
        parts[name](scale, jax.random.key(seed), numbers, curves)
    return Measurements(numbers, curves)


def _points(solver, game, start, steps):
    """The reported points. Exact conditions of noisy runs are not computed."""
    first = solver.init(game, start)

    def advance(carry, _):
        state = solver.step(game, State(carry[0], carry[0], carry[1]))
        return (state.x, state.memory), state.x

    return jax.lax.scan(advance, (first.x, first.memory), None, length=steps)[1]


def _constants(game, size):
    origin = (jnp.zeros((1, size)),) * 2
    return (
        estimate_lipschitz(game, origin).value,
        estimate_monotonicity(game, origin).value,
    )


def _square(z):
    return jnp.sum(z[0] ** 2, axis=-1) + jnp.sum(z[1] ** 2, axis=-1)


def _linear(scale, key, numbers, curves):
    size, budget = scale["size"], scale["calls"]
    game = quartic_saddle(key, size)
    L, _ = _constants(game, size)
    start = tuple(jax.random.normal(jax.random.fold_in(key, 1), (2, size)))
    grid = jnp.asarray(STEPS) / L
    rates = {}
    for name in scale["methods"]:
        method, calls = METHODS[name], CALLS[name]

        found = _distances(method, grid, game, start, budget // calls)
        final = jnp.where(jnp.isfinite(found[:, -1]), found[:, -1], jnp.inf)
        best = int(jnp.argmin(final))
        rates[name] = -float(jnp.log(final[best] / _square(start)) / budget)
        numbers[f"{name}_rate"] = rates[name]
        numbers[f"{name}_best_step"] = STEPS[best]
        count = np.arange(1, budget // calls + 1) * calls
        curves.append(
            _curve(count, found[best], name, "linear, equal calls", "oracle calls")
        )
    single = [rate for name, rate in rates.items() if CALLS[name] == 1]
    numbers["linear_rate_ratio"] = min(single) / rates["extragradient"]


@eqx.filter_jit
def _distances(method, grid, game, start, steps):
    """Squared distances after each step, one row a constant stepsize."""
    return jax.vmap(lambda a: _square(_points(method(a), game, start, steps)))(grid)


def _averages(scale, key, numbers, curves):
    size, steps = scale["size"], scale["average_steps"]
    game = quartic_saddle(key, size, (0.0, 1.0))
    start = tuple(jax.random.normal(jax.random.fold_in(key, 1), (2, size)))
    start = jax.tree.map(lambda v: v / jnp.sqrt(_square(start)), start)
    L = estimate_lipschitz(game, jax.tree.map(lambda v: v[None], start)).value
    slopes = {}
    for name, method in METHODS.items():
        average = _running_average(method(0.4 / L), game, start, steps)
        gap = jax.vmap(lambda z: _quartic_gap(game, z))(average)
        slopes[name] = _slope(gap)
        numbers[f"{name}_average_slope"] = slopes[name]
        count = np.arange(1, steps + 1) * CALLS[name]
        curves.append(_curve(count, gap, name, "gap of averages", "oracle calls"))
    numbers["average_gap_slope"] = max(slopes.values())


@eqx.filter_jit
def _running_average(solver, game, start, steps):
    z = _points(solver, game, start, steps)
    count = jnp.arange(1, steps + 1)[:, None]
    return jax.tree.map(lambda v: jnp.cumsum(v, axis=0) / count, z)


def _quartic_gap(game, z):
    """`max_y f(x, y) - min_x f(x, y)` for `e1 = 0`: both are attained on a line."""
    x, y = z
    _, A, _, B, C, _ = game.params

    def best(M, q):
        # max over s of s Q - s^4 Q^2 along M^-1 q, with Q = q' M^-1 q.
        Q = q @ jnp.linalg.solve(M, q)
        return 0.75 * (Q**2 / 4) ** (1 / 3)

    above = (x @ A @ x) ** 2 + best(B, 4 * C.T @ x)
    return above + (y @ B @ y) ** 2 + best(A, 4 * C @ y)


def _projected(scale, key, numbers, curves):
    size, steps = scale["size"] // 5, scale["average_steps"]
    A = jax.random.normal(key, (size, size))
    game = matrix_game(A)
    step = 0.4 / jnp.linalg.norm(A, 2)
    corner = jnp.zeros(size).at[0].set(1.0)
    slopes = {}
    for name, method in METHODS.items():
        x, y = _running_average(method(step), game, (corner, corner), steps)
        gap = jnp.max(x @ A, axis=1) - jnp.min(y @ A.T, axis=1)
        slopes[name] = _slope(gap)
        numbers[f"{name}_projected_slope"] = slopes[name]
        count = np.arange(1, steps + 1) * CALLS[name]
        curves.append(_curve(count, gap, name, "matrix game", "oracle calls"))
    numbers["projected_gap_slope"] = max(slopes.values())


def _slope(values, first=0.1):
    """Of the logarithm against that of the index, over its last decades."""
    values = np.asarray(values, np.float64)
    count = np.arange(1, len(values) + 1)
    kept = np.unique(np.geomspace(max(first * len(values), 1), len(values), 60))
    kept = kept.astype(int)
    good = kept[values[kept - 1] > 0]
    return float(np.polyfit(np.log(count[good - 1]), np.log(values[good - 1]), 1)[0])


@eqx.filter_jit
def _noisy_distances(method, game, schedule, starts, keys, steps, kept):
    """Squared distances at the kept steps, one row a run."""

    def one(start, key):
        z = _points(method(schedule, key=key), game, start, steps)
        return _square(z)[kept]

    return jax.vmap(one)(starts, keys)


def _runs(scale, key, curvature, radius, method):
    size, runs, steps = scale["noisy_size"], scale["runs"], scale["noisy_steps"]
    game = quartic_saddle(key, size, curvature)
    L, alpha = _constants(game, size)
    scale_of_step = 2 / alpha
    schedule = InverseTime(scale_of_step, 4 * scale_of_step * L)
    draw, noise = jax.random.split(jax.random.fold_in(key, 2))
    starts = tuple(jax.random.normal(draw, (2, runs, size)))
    norms = jnp.sqrt(_square(starts))[:, None]
    starts = jax.tree.map(lambda v: radius * v / norms, starts)
    kept = np.unique(np.geomspace(scale["noisy_first"], steps, 40).astype(int)) - 1
    found = _noisy_distances(
        method,
        game.with_noise(NOISE * radius),
        schedule,
        starts,
        jax.random.split(noise, runs),
        steps,
        jnp.asarray(kept),
    )
    # 6 g^2 sigma^2 / (alpha g - 1) with alpha g = 2, sigma^2 of all entries together.
    constant = 6 * scale_of_step**2 * 2 * size * (NOISE * radius) ** 2
    return np.asarray(found), kept + 1, float(constant)


def _fit(count, values):
    return float(np.polyfit(np.log(count), np.log(values), 1)[0])


def _noisy(scale, key, numbers, curves):
    constants = []
    for name in ("past", "reflected", "extragradient"):
        found, count, constant = _runs(scale, key, (1.0, 0.0), 1.0, METHODS[name])
        mean = found.mean(axis=0)
        numbers[f"{name}_noisy_slope"] = _fit(count, mean)
        if CALLS[name] == 1:
            constants.append(mean[-1] * count[-1] / constant)
        calls = count * CALLS[name]
        curves.append(
            _curve(calls, mean, name, "strongly monotone, noise", "oracle calls")
        )
    numbers["rate_constant"] = max(constants)
    # Without constraints past extragradient and optimistic gradient are one method.
    short = {**scale, "noisy_steps": 200, "noisy_first": 10, "runs": 2}
    one, two = (
        _runs(short, key, (1.0, 0.0), 1.0, METHODS[name])[0]
        for name in ("past", "optimistic")
    )
    numbers["coincidence"] = float(np.max(np.abs(one - two)))


def _local(scale, key, numbers, curves):
    fractions = []
    for name in ("past", "reflected", "extragradient"):
        found, count, _ = _runs(scale, key, (1.0, -1.0), 0.1, METHODS[name])
        slopes = np.array([_fit(count, run) for run in found])
        inside = float(np.mean((slopes >= -1.15) & (slopes <= -0.85)))
        numbers[f"{name}_local_slope"] = float(np.mean(slopes))
        numbers[f"{name}_local_fraction"] = inside
        if CALLS[name] == 1:
            fractions.append(inside)
        calls = count * CALLS[name]
        curves.append(
            _curve(
                calls, found.mean(axis=0), name, "not monotone, noise", "oracle calls"
            )
        )
    numbers["local_fraction"] = min(fractions)


def _curve(x, y, label, plot, x_label):
    x, y = np.asarray(x), np.asarray(y)
    shown = np.unique(np.geomspace(1, len(x), 80).astype(int)) - 1
    unit = (
        "duality gap"
        if plot in ("gap of averages", "matrix game")
        else ("squared distance to the solution")
    )
    log_x = plot != "linear, equal calls"
    return Curve(x[shown], y[shown], label, plot, x_label, unit, log_x, True)
