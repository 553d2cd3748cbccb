"""Finite sums: the residual at the last iterate for sqrt(n) instead of n.

The claim: variance-reduced Halpern iteration reaches a residual `eps` with about
`n + sqrt(n) L / eps` component calls. Three parts:

- cocoercive: `F_i(u) = s_i A u - b_i`, `A` symmetric with eigenvalues from 1e-4 to 1,
  `s` uniform in [0.7, 1.3], against deterministic Halpern (step 1 / L_F) and
  extragradient with snapshots, over sizes and accuracies;
- mixed: components with very different directions, where the average constant is much
  larger than that of their mean: there the method may lose, and the ratio is reported;
- games: sums of bilinear games on a box, the Lipschitz version, against extragradient.

Kept: step sizes, schedules, batches; component calls as the measure. Given up: nothing
but the largest sizes. Refuted by: more than half of the deterministic calls at
n = 20000, a slope above 0.75 in n or away from 1 in 1 / eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varan import solve
from varan.claims import Curve, Measurements
from varan.games import (
    EuclideanBox,
    Extragradient,
    Game,
    Halpern,
    InexactHalpern,
    VarianceReducedExtragradient,
    VarianceReducedHalpern,
)

DIM = 20


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    notes: list[str] = []
    parts = {"cocoercive": _cocoercive, "mixed": _mixed, "games": _games}
    for name in scale["parts"]:
        parts[name](scale, np.random.default_rng(seed), seed, numbers, curves, notes)
    return Measurements(numbers, curves, notes)


def _scaled(u, s, A, b):
    return jnp.mean(s) * (A @ u) - jnp.mean(b, axis=0)


def _scaled_component(i, u, s, A, b):
    return s[i] * (A @ u) - b[i]


def _scaled_sum(rng, A, target, n):
    """The game, its average constant and that of the mean."""
    s, noise = rng.uniform(0.7, 1.3, n), 0.1 * rng.standard_normal((n, DIM))
    b = s.mean() * (A @ target) + noise - noise.mean(axis=0)
    game = Game(
        _scaled,
        *(jnp.asarray(v) for v in (s, A, b)),
        components=_scaled_component,
        count=n,
        monotone=True,
    )
    return game, float((s**2).mean() / s.mean()), float(s.mean())


def _calls_to(solution, eps):
    """Component calls after which the residual is below, infinite where it never is."""
    steps = int(solution.steps)
    residual = np.asarray(solution.trace.residual)[: steps + 1]
    spent = np.asarray(solution.trace.evaluations)[: steps + 1]
    reached = np.flatnonzero(residual <= eps)
    return float(spent[reached[0]]) if reached.size else np.inf


def _run(game, solver, scale, tol, start):
    return solve(
        game,
        solver,
        start,
        tol=tol,
        max_steps=scale["passes"] * 5,
        max_evaluations=scale["calls"],
        differentiate="none",
    )


def _cocoercive(scale, rng, seed, numbers, curves, notes):
    start, least = jnp.zeros(DIM), min(scale["eps"])
    calls = {"ours": [], "halpern": []}
    ratios, ours = [], []
    reference = scale["sizes"][min(1, len(scale["sizes"]) - 1)]
    Q = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    A = (Q * np.geomspace(1e-4, 1.0, DIM)[None, :]) @ Q.T
    target = rng.standard_normal(DIM)  # one problem for all sizes
    for n in scale["sizes"]:
        game, average, mean = _scaled_sum(rng, A, target, n)
        key = jax.random.key(seed)
        runs = {
            "ours": _run(
                game, VarianceReducedHalpern(average, key), scale, least, start
            ),
            "halpern": _run(game, Halpern(1 / mean), scale, least, start),
        }
        for name, end in runs.items():
            calls[name].append(_calls_to(end, least))
        _note_error(numbers, runs["ours"])
        if n != reference:
            continue
        limit = {**scale, "calls": min(scale["calls"], 20_000 * n)}
        solver = VarianceReducedExtragradient(average, key)
        runs["extragradient with snapshots"] = _run(game, solver, limit, least, start)
        for eps in scale["eps"]:
            mine = _calls_to(runs["ours"], eps)
            ours.append(mine)
            ratios.append(mine / _calls_to(runs["halpern"], eps))
            other = _calls_to(runs["extragradient with snapshots"], eps)
            notes.append(
                f"n = {n}, eps = {eps}: {mine / 1e6:.2f} million calls, "
                f"{ratios[-1]:.3f} of Halpern's, {mine / other:.3f} of extragradient's "
                "with snapshots"
            )
        numbers["snapshot_ratio"] = mine / other
        for name, end in runs.items():
            curves.append(_trace(end, name, f"n = {n}"))
    numbers["call_ratio"] = max(ratios)
    numbers["accuracy_slope"] = _slope(1 / np.asarray(scale["eps"]), ours)
    numbers["size_slope"] = _slope(scale["sizes"], calls["ours"])
    numbers["deterministic_size_slope"] = _slope(scale["sizes"], calls["halpern"])
    for name, values in calls.items():
        curves.append(
            Curve(
                scale["sizes"],
                values,
                name,
                "calls against size",
                "number of components n",
                f"component calls to residual {least}",
                log_x=True,
                log_y=True,
            )
        )


def _note_error(numbers, end):
    """How far the residual that the solver reported is from the true one."""
    error = abs(float(end.trace.residual[int(end.steps)] - end.residual))
    name = "residual_error"
    numbers[name] = max(numbers.get(name, 0.0), error)


def _slope(x, y):
    if not np.all(np.isfinite(y)):
        return np.inf
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _trace(end, label, plot):
    steps = int(end.steps)
    shown = np.unique(np.geomspace(1, steps + 1, 120).astype(int)) - 1
    return Curve(
        np.asarray(end.trace.evaluations)[shown],
        np.asarray(end.trace.residual)[shown],
        label,
        plot,
        "component calls",
        "residual at full passes",
        log_x=True,
        log_y=True,
    )


def _rank_one(u, a, b):
    return jnp.mean(a * (a @ u)[:, None], axis=0) - b


def _rank_one_component(i, u, a, b):
    return a[i] * (a[i] @ u) - b


def _mixed(scale, rng, seed, numbers, curves, notes):
    """Rank-one components: their average constant is about `DIM` times the mean's."""
    del curves
    tol, start = scale["eps"][1], jnp.zeros(DIM)
    for n in scale["mixed_sizes"]:
        a = rng.standard_normal((n, DIM))
        a = np.sqrt(DIM) * a / np.linalg.norm(a, axis=1, keepdims=True)
        a = a * np.geomspace(0.03, 1.0, DIM)[None, :]
        M = a.T @ a / n
        b = M @ rng.standard_normal(DIM)
        game = Game(
            _rank_one,
            jnp.asarray(a),
            jnp.asarray(b),
            components=_rank_one_component,
            count=n,
            monotone=True,
        )
        # E |a|^2 (a'd)^2 <= L d'M d.
        weighted = (a * np.sum(a**2, axis=1)[:, None]).T @ a / n
        average = float(np.linalg.eigvals(np.linalg.solve(M, weighted)).real.max())
        mean = float(np.linalg.norm(M, 2))
        mine = _run(
            game,
            VarianceReducedHalpern(average, jax.random.key(seed)),
            scale,
            tol,
            start,
        )
        base = _run(game, Halpern(1 / mean), scale, tol, start)
        ratio = _calls_to(mine, tol) / _calls_to(base, tol)
        numbers[f"mixed_ratio_{n}"] = ratio
        notes.append(
            f"different components, n = {n}: average constant {average:.2f}, that of "
            f"the mean {mean:.2f}: {ratio:.2f} times Halpern's calls"
        )


def _bilinear(u, M):
    half = u.size // 2
    mean = jnp.mean(M, axis=0)
    return jnp.concatenate([mean @ u[half:], -mean.T @ u[:half]])


def _bilinear_component(i, u, M):
    half = u.size // 2
    return jnp.concatenate([M[i] @ u[half:], -M[i].T @ u[:half]])


def _games(scale, rng, seed, numbers, curves, notes):
    """Sums of bilinear games on the box [-1, 1]; the start is a corner."""
    tol, start, half = scale["game_eps"], jnp.ones(2 * DIM), DIM
    box = EuclideanBox(-jnp.ones(2 * DIM), jnp.ones(2 * DIM))
    common = rng.standard_normal((half, half))
    common = common / np.linalg.norm(common, 2)
    calls = {"ours": [], "extragradient": []}
    for n in scale["game_sizes"]:
        M = common + 0.3 * rng.standard_normal((n, half, half)) / np.sqrt(half)
        square = np.einsum("nij,nik->jk", M, M) / n, np.einsum("nji,nki->jk", M, M) / n
        average = float(np.sqrt(max(np.linalg.norm(s, 2) for s in square)))
        mean = float(np.linalg.norm(M.mean(axis=0), 2))
        game = Game(
            _bilinear,
            jnp.asarray(M),
            project=box,
            components=_bilinear_component,
            count=n,
            monotone=True,
        )
        solver = InexactHalpern(average, jax.random.key(seed))
        end = _run(game, solver, scale, tol, start)
        calls["ours"].append(_calls_to(end, tol))
        _note_error(numbers, end)
        base = _run(game, Extragradient(0.7 / mean), scale, tol, start)
        calls["extragradient"].append(_calls_to(base, tol))
        notes.append(
            f"bilinear games, n = {n}: {calls['ours'][-1]:.3g} calls, extragradient "
            f"{calls['extragradient'][-1]:.3g}"
        )
    numbers["game_size_slope"] = _slope(scale["game_sizes"], calls["ours"])
    for name, values in calls.items():
        curves.append(
            Curve(
                scale["game_sizes"],
                values,
                name,
                "bilinear games",
                "number of components n",
                f"component calls to residual {tol}",
                log_x=True,
                log_y=True,
            )
        )
