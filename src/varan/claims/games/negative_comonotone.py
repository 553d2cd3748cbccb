"""Beyond monotone operators: which steps converge, how fast, and where all fail.

The claim: on `rho`-negatively comonotone operators proximal point needs exactly a step
above `2 rho`; extragradient and optimistic gradient keep a `1 / N` rate of `||F||^2`
for small `rho`, extragradient with two step sizes for all `rho < 1 / (2 L)`; from there
on every choice of its steps fails on one of two operators. Four parts:

- proximal: the factor of a step on rotations, the threshold, and the worst case against
  the bound;
- rates: all steps of all runs against the bounds, on rotations of every length up to L
  that have the same `rho`, from random starts;
- counterexample: the larger of two factors over a grid of both steps, at `rho = 1/(2L)`
  and below;
- potentials: on random affine operators and on turned nonlinear ones.

Kept: operators, intervals, constants. Given up: the semidefinite programmes that found
the proofs. Refuted by: a run above its bound, a potential that grows, a pair of steps
that converges on both operators at `rho = 1/(2L)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from varan import solve
from varan.claims import Curve, Measurements
from varan.games import (
    Extragradient,
    Game,
    GradientDescentAscent,
    OptimisticGradient,
    ProximalPoint,
    comonotone_bound,
    comonotone_potential,
    rotation_game,
)

# Steps of proximal point's worst case, and of the runs whose potentials are watched.
TIGHT_STEPS, WATCHED_STEPS = 20, 200


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    parts = {
        "proximal": _proximal,
        "rates": _rates,
        "counterexample": _counterexample,
        "potentials": _potentials,
    }
    for name in scale["parts"]:
        parts[name](scale, seed, numbers, curves)
    return Measurements(numbers, curves)


def _angle(rho, length):
    return np.arccos(-rho * length)


def _proximal(scale, seed, numbers, curves):
    del curves
    key = jax.random.key(seed)
    lengths = jnp.geomspace(0.1, 1.0, scale["lengths"])
    rhos = jax.random.uniform(key, (8,), minval=0.05, maxval=0.9)
    factors = jnp.array([0.5, 1.5, 1.9, 1.99, 2.01, 2.1, 2.5, 4.0, 20.0])

    @jax.jit
    def factor(length, rho, a):
        game = rotation_game(length, jnp.arccos(-rho * length))
        z = jnp.array([1.0, 0.0])
        solver = ProximalPoint(a)
        return jnp.linalg.norm(solver.step(game, solver.init(game, z)).x)

    table = [v.ravel() for v in jnp.meshgrid(lengths, rhos, factors, indexing="ij")]
    length, rho, a = table[0], table[1], table[2] * table[1]
    radius = jax.vmap(factor)(length, rho, a)
    exact = (1 - 2 * a * rho * length**2 + (a * length) ** 2) ** -0.5
    numbers["proximal_radius_error"] = float(jnp.max(jnp.abs(radius - exact)))
    wrong = (radius < 1) != (a > 2 * rho)
    numbers["proximal_threshold_errors"] = float(jnp.sum(wrong))

    # The worst rotation for N steps: L^2 a (a - 2 rho) (N - 1) = 1.
    N, ratios, unit = TIGHT_STEPS, [], jnp.array([1.0, 0.0])
    for r in np.asarray(rhos[:3]):
        step = 4 * r
        worst = (step * (step - 2 * r) * (N - 1)) ** -0.5
        for length in (0.5 * worst, worst, min(1 / r, 2 * worst)):
            game = rotation_game(length, _angle(r, length))
            end = solve(game, ProximalPoint(step), unit, max_steps=N, tol=1e-300)
            bound = comonotone_bound("proximal_point", N, 1.0, stepsize=step, rho=r)
            ratios.append(float(end.residual**2 / bound.value))
    numbers["proximal_bound_ratio"] = max(ratios)


def _rates(scale, seed, numbers, curves):
    steps = scale["steps"]
    lengths = jnp.geomspace(0.02, 1.0, scale["lengths"])
    start = jax.random.normal(jax.random.key(seed), (2,))
    R = jnp.linalg.norm(start)
    count = jnp.arange(1, steps + 1)
    shown = np.unique(np.geomspace(1, steps, 80).astype(int))

    squares = eqx.filter_jit(_squared_residuals)
    for method, solver, rhos in (
        ("extragradient", Extragradient(0.5), (0.0, 0.05, 0.125)),
        ("optimistic_gradient", OptimisticGradient(1 / 3.1), (0.0, 0.04, 0.08)),
    ):
        worst = 0.0
        for rho in rhos:
            found = squares(solver, jnp.asarray(rho), lengths, start, steps)
            bound = comonotone_bound(
                method, count, R, stepsize=solver.stepsize, rho=rho
            ).value
            ratio = jnp.max(found[:, 1:] / bound[None, :], axis=0)
            worst = max(worst, float(jnp.max(ratio)))
            label = f"{method.replace('_', ' ')}, rho = {rho}"
            curves.append(_curve(shown, ratio[shown - 1], label))
        numbers[f"{method.split('_')[0]}_bound_ratio"] = worst

    worst = 0.0
    for rho in (0.0, 0.2, 0.4, 0.45):
        a = (2 * rho + 1) / 2
        b = max(a - 2 * rho, 1e-9)
        solver = Extragradient(jnp.asarray(a), jnp.asarray(b))
        found = squares(solver, jnp.asarray(rho), lengths, start, steps)
        mean = jnp.cumsum(found, axis=1) / jnp.arange(1, steps + 2)[None, :]
        bound = R**2 / (a * b * (1 - a**2) * jnp.arange(1, steps + 2))
        ratio = jnp.max(mean / bound[None, :], axis=0)
        worst = max(worst, float(jnp.max(ratio)))
        curves.append(_curve(shown, ratio[shown - 1], f"best iterate, rho = {rho}"))
    numbers["best_bound_ratio"] = worst

    end = squares(
        GradientDescentAscent(jnp.asarray(0.1)), jnp.asarray(0.05), lengths, start, 200
    )
    numbers["descent_growth"] = float(jnp.max(end[:, -1] / end[:, 0]))


def _curve(x, y, label):
    return Curve(
        x,
        np.asarray(y),
        label,
        "measured over bound",
        "step N",
        "largest ||F||^2 over its bound",
        log_x=True,
        log_y=True,
    )


def _squared_residuals(solver, rho, lengths, start, steps):
    """`||F||^2` at every step, a run for each length; at the point that moves."""

    def one(length):
        game = rotation_game(length, jnp.arccos(-rho * length))
        state = _first_state(solver, game, start)

        def square(state):
            force = state.condition
            if isinstance(solver, OptimisticGradient):
                force = game.apply(state.memory.base)
            return jnp.sum(force**2)

        def advance(state, _):
            state = solver.step(game, state)
            return state, square(state)

        _, rest = jax.lax.scan(advance, state, None, length=steps)
        return jnp.concatenate([square(state)[None], rest])

    return jax.vmap(one)(lengths)


def _first_state(solver, game, start):
    """The state that the paper begins with: `x_1 = x_0 - a F(x_0)`, `half_0 = x_0`.

    Of optimistic gradient only; the solver itself begins with both points at the start.
    """
    state = solver.init(game, start)
    if not isinstance(solver, OptimisticGradient):
        return state
    moved = start - solver.stepsize * state.condition
    return eqx.tree_at(lambda s: s.memory.base, state, moved)


def _counterexample(scale, seed, numbers, curves):
    # Deterministic: every seed measures the same.
    del seed
    first = np.linspace(0.01, 2.0, scale["grid"])
    second = np.geomspace(1e-4, 10.0, scale["grid"])

    @jax.jit
    @jax.vmap
    def factor(angle, a, b):
        game = rotation_game(1.0, angle)
        solver = Extragradient(a, b)
        z = jnp.array([1.0, 0.0])
        return jnp.linalg.norm(solver.step(game, solver.init(game, z)).x)

    a, b = (jnp.asarray(v.ravel()) for v in np.meshgrid(first, second, indexing="ij"))
    for name, rho in (("counterexample_radius", 0.5), ("below_radius", 0.45)):
        turned = factor(jnp.full(a.shape, _angle(rho, 1.0)), a, b)
        straight = factor(jnp.zeros(a.shape), a, b)
        larger = jnp.maximum(turned, straight)
        numbers[name] = float(jnp.min(larger))
        best = jnp.min(larger.reshape(len(first), len(second)), axis=1)
        curves.append(
            Curve(
                first,
                np.asarray(best),
                f"rho = {rho}/L",
                "every choice of steps",
                "look-ahead step times L",
                "larger factor, best second step",
            )
        )
    inside = a <= 1
    turned = factor(jnp.full(a.shape, _angle(0.5, 1.0)), a, b)
    numbers["rotation_radius_short"] = float(
        jnp.min(jnp.where(inside, turned, jnp.inf))
    )
    numbers["rotation_radius_long"] = float(jnp.min(jnp.where(inside, jnp.inf, turned)))


def _affine(rng, size, most):
    """A random linear operator with L = 1 and `rho` at most `most`, and its `rho`."""
    S = rng.standard_normal((size, size)) / np.sqrt(size)
    K = rng.standard_normal((size, size)) / np.sqrt(size)
    inverse = 0.3 * S @ S.T + (K - K.T)
    shift = rng.uniform(0.0, 0.5)
    while True:
        B = inverse - shift * np.eye(size)
        # Of length one: the operator is the inverse over its largest singular value.
        B = B / np.linalg.svd(B, compute_uv=False)[-1]
        rho = max(-np.linalg.eigvalsh((B + B.T) / 2)[0], 0.0)
        if rho <= most:
            return np.linalg.inv(B), rho
        shift = shift / 2 - 0.01


def _potentials(scale, seed, numbers, curves):
    rng = np.random.default_rng(seed)
    size, draws = scale["size"], scale["draws"]
    increases = {}
    for method, most, highest in (
        ("extragradient", 0.125, 0.5),
        ("optimistic_gradient", 1 / 12.4, 1 / 3.1),
        ("proximal_point", 0.125, 3.0),
    ):
        operators = [_affine(rng, size, most) for _ in range(draws)]
        M = jnp.asarray(np.stack([o[0] for o in operators]))
        rho = jnp.asarray([o[1] for o in operators])
        low = 2.02 * rho + 0.01 if method == "proximal_point" else 4 * rho
        a = low + jnp.asarray(rng.uniform(size=draws)) * (highest - low)
        a = jnp.maximum(a, 1e-2)
        start = jnp.asarray(rng.standard_normal((draws, size)))
        run = jax.jit(jax.vmap(MONITORS[method]))
        affine = run(Game(_linear, M), start, a, rho)

        # Two halves in turned coordinates: rotations by more than a right angle, and
        # the gradient of a convex function.
        turn = jnp.asarray(np.stack([_orthogonal(rng, size) for _ in range(draws)]))
        curved = run(Game(_halves, turn, rho), start, a, rho)
        increases[method] = max(float(jnp.max(affine)), float(jnp.max(curved)))
        numbers[f"{method}_increase"] = increases[method]
    numbers["potential_increase"] = max(increases.values())


def _linear(z, M):
    return M @ z


def _orthogonal(rng, size):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def _halves(z, turn, rho):
    v = turn @ z
    half = v.size // 2
    pairs = v[: half - half % 2].reshape(-1, 2)
    c, s = -rho, jnp.sqrt(1 - rho**2)
    turned = jnp.stack(
        [c * pairs[:, 0] - s * pairs[:, 1], s * pairs[:, 0] + c * pairs[:, 1]], axis=1
    )
    convex = jnp.tanh(v[half - half % 2 :])
    return turn.T @ jnp.concatenate([turned.ravel(), convex])


def _watch(solver, game, start, potential):
    """The largest increase of a potential along a run, over its first value."""
    state = _first_state(solver, game, start)
    first = potential(0, state)

    def advance(carry, k):
        state, before = carry
        state = solver.step(game, state)
        now = potential(k, state)
        return (state, now), now - before

    count = jnp.arange(1, WATCHED_STEPS + 1)
    _, changes = jax.lax.scan(advance, (state, first), count)
    return jnp.max(changes) / first


def _extragradient_monitor(game, start, a, rho):
    constants = {"stepsize": a, "rho": rho, "lipschitz": 1.0}

    def potential(k, state):
        return comonotone_potential(
            "extragradient", k, state.x, state.condition, **constants
        )

    return _watch(Extragradient(a), game, start, potential)


def _optimistic_monitor(game, start, a, rho):
    constants = {"stepsize": a, "rho": rho, "lipschitz": 1.0}

    def potential(k, state):
        force = game.apply(state.memory.base)
        return comonotone_potential(
            "optimistic_gradient",
            k + 1,
            state.memory.base,
            force,
            mismatch=force - state.memory.known,
            **constants,
        )

    return _watch(OptimisticGradient(a), game, start, potential)


def _proximal_monitor(game, start, a, rho):
    del rho  # a step of proximal point is a F, whatever rho

    def potential(k, state):
        del k
        return a**2 * jnp.sum(state.condition**2)

    solver = ProximalPoint(a)
    # The start itself was not stepped to: the first length is that of the first step.
    first = solver.step(game, solver.init(game, start)).x
    return _watch(solver, game, first, potential)


MONITORS = {
    "extragradient": _extragradient_monitor,
    "optimistic_gradient": _optimistic_monitor,
    "proximal_point": _proximal_monitor,
}
