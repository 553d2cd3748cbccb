"""Does one optimistic learner pay for noise and drift only, whatever the curvature?

Claim: with the last gradient as the guess of the next, mirror descent has regret of the
order sqrt(sum sigma_t^2) + sqrt(sum Sigma_t^2) on convex losses (single losses may be
non-convex), logarithmic in these sums on strongly convex and exp-concave ones, and with
two layers it follows moving comparators at the price of their path.

Keeps: the paper's setting with noise and drift known exactly, all three regimes and the
dynamic one, its baselines, the bounds with every constant, and what a path alone
proves. Gives up: horizons beyond 2^14 and regression streams; the paper has no
experiment.

Refuted by: mean regret above a bound in any cell, a certificate below the regret on any
path, regret on pure noise above twice the root of its variance, no gain from
predictable sign flips, growth faster than a logarithm where one is claimed, or a
dynamic regret that the bound's order does not explain.

Every learner gets the same constants: the diameter 2 and the true G and L of its
losses.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import Curve, Measurements
from ._sea_games import (
    LENGTHS,
    LOSSES,
    PERIODS,
    convex_cells,
    dynamic,
    exp_concave,
    pure_noise,
    sign_flips,
    strongly_convex,
)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    keys = jax.random.split(jax.random.key(seed), len(_PARTS))
    numbers, curves = {}, []
    for key, (name, part) in zip(keys, _PARTS.items(), strict=True):
        if name in scale["parts"]:
            measured, drawn = part(key, scale)
            numbers |= measured
            curves += drawn
    violations = [v for name, v in numbers.items() if name.endswith("_violation")]
    if violations:
        numbers["certificate_violation"] = max(violations)
    return Measurements(numbers, curves)


def _convex(key, scale):
    horizons = _horizons(scale)
    noises = tuple(scale["noises"])
    run = functools.partial(convex_cells, key, horizons, scale["paths"])
    paid, bounds, violation = run(noises, PERIODS, "optimistic")
    ratios = jnp.max(paid / bounds, axis=(1, 2, 3))
    numbers = {
        "convex_bound_ratio": float(jnp.max(ratios[:2])),
        "nonconvex_bound_ratio": float(ratios[2]),
        "convex_violation": float(jnp.max(violation)),
    }
    curves = []
    for learner in scale["compared"]:
        middle = run((noises[len(noises) // 2],), (16,), learner)[0][:, 0, 0]
        for losses, values in zip(LOSSES, middle, strict=True):
            numbers[f"{losses}_{learner}_regret"] = float(values[-1])
            curves.append(_curve(f"{losses} losses", learner, horizons, values))
    return numbers, curves


def _noise(key, scale):
    horizons = _horizons(scale)
    paid = pure_noise(key, horizons, 4 * scale["paths"])
    curve = _curve("pure noise", "optimistic", horizons, paid)
    return {"noise_ratio": float(jnp.max(paid / np.sqrt(horizons)))}, [curve]


def _flips(key, scale):
    numbers = {}
    for period in (4, 16):
        ours, descent = sign_flips(key, 4096, period)
        numbers[f"flip_regret_{period}"] = float(ours)
        numbers[f"flip_descent_regret_{period}"] = float(descent)
    excess = numbers["flip_regret_4"] - 0.2 * numbers["flip_descent_regret_4"]
    return numbers | {"flip_excess": excess}, []


def _strong(key, scale):
    horizons = _horizons(scale)
    paid = strongly_convex(key, horizons, 4 * scale["paths"], tuple(scale["noises"]))
    noisy, still = paid["noisy"], paid["still"]
    steps = jnp.diff(noisy[1:])
    numbers = {
        "strong_bound_ratio": float(jnp.max(paid["ratio"])),
        "strong_violation": float(jnp.max(paid["violation"])),
        "strong_increment_ratio": float(steps[1] / steps[0]),
        "strong_noiseless_growth": float(still[-1] / still[1]),
        "strong_noiseless_over_no_hints": float(still[-1] / paid["blind"][-1]),
        "strong_regret": float(noisy[-1]),
        "strong_descent_regret": float(paid["descent"][-1]),
    }
    curves = [
        _curve("strongly convex losses", label, horizons, values)
        for label, values in (("optimistic", noisy), ("descent", paid["descent"]))
    ]
    return numbers, curves


def _newton(key, scale):
    horizon, noises = scale["curved_horizon"], tuple(scale["noises"])
    paid = exp_concave(key, horizon, scale["paths"], noises)
    return {
        "exp_bound_ratio": float(jnp.max(paid["ratio"])),
        "exp_violation": float(jnp.max(paid["violation"])),
        "exp_regret": float(paid["ours"]),
        "exp_newton_regret": float(paid["newton"]),
    }, []


def _moving(key, scale):
    paid = dynamic(key, scale["curved_horizon"], scale["paths"])
    numbers = {
        "dynamic_bound_ratio": float(jnp.max(paid["ratio"])),
        "dynamic_normalised": float(jnp.max(paid["normalised"])),
        "dynamic_violation": float(jnp.max(paid["violation"])),
    }
    curves = []
    for label in ("two layers", "one layer"):
        values = [float(v) for v in paid[label]]
        numbers[f"dynamic_{label.replace(' ', '_')}_regret"] = values[-1]
        lengths = [1 + p for p in LENGTHS]
        axes = "moving comparator", "1 + path length", "dynamic regret"
        curves.append(Curve(lengths, values, label, *axes, log_x=True))
    return numbers, curves


_PARTS = {
    "convex": _convex,
    "noise": _noise,
    "flips": _flips,
    "strong": _strong,
    "newton": _newton,
    "moving": _moving,
}


def _horizons(scale):
    return tuple(scale["horizon"] // 4**i for i in (3, 2, 1, 0))


def _curve(plot, label, horizons, values):
    return Curve(
        horizons,
        [float(v) for v in values],
        label,
        plot,
        "rounds",
        "regret",
        log_x=True,
    )
