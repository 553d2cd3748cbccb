"""Transformers forecast well once they are trained by sharpness-aware minimisation.

Claim. On a linear forecasting task a transformer trained by Adam does not reach the
solution that it can express; freezing its attention at random helps; sharpness-aware
minimisation mends it, and leaves a flatter minimum.

Kept: the architecture, the task (noisy linear forecasts of white noise), the oracle and
the baselines: a linear map alone, attention frozen at random (all four of its maps, or
those that say who looks at whom), sigma-reparametrisation. All arms share batches, rate
and steps, as in the paper, which gives the sharpness-aware ones twice the gradients;
the error at equal gradients is recorded. The radius is chosen by validation error.
Given up at laptop scale: size (a past of 96 and a horizon of 24 instead of 512 and 96,
4000 samples instead of 10 000), and the eight public series, of which one short
recording takes the place; nothing is gated on it.

Refuted by: a trained transformer as good as one with frozen attention, no gain from the
sharpness-aware step, no flatter minimum, or, for the claim in its strong form, an error
above that of frozen attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varan.claims import Curve, Measurements
from varan.data import eeg, standardise, windows
from varan.nets import SAMformer, attention_entropy
from varan.sharpness import hessian_top

from . import _samformer_runs as runs

CHANNELS, CURVATURE_SAMPLES = 7, 256
SERIES = {"length": 64, "horizon": 16, "rho": 0.5, "epochs": 60, "chunks": 12}


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the toy task, and the recording where the scale has it."""
    numbers, curves = _toy(scale, seed)
    if scale["series"]:
        numbers |= _recording(seed)
    return Measurements(numbers, curves)


def _toy(scale, seed):
    length, horizon = scale["length"], scale["horizon"]
    draw, init, order = jax.random.split(jax.random.key(seed), 3)
    parts = _draw(draw, length, horizon, (scale["train"], 1000, 1000))
    transformer = SAMformer(CHANNELS, length, horizon, revin=False, key=init)
    plan = (scale["epochs"], scale["chunks"], 64, order)

    head = runs.Head(transformer.head)
    seen = runs.attended(transformer, parts)
    frozen = runs.trained(head, seen, None, *plan)
    courses = {
        "linear": runs.trained(head, parts, None, *plan),
        "transformer": runs.trained(transformer, parts, None, *plan),
        "frozen": frozen,
        "fixed_scores": runs.trained(runs.FixedScores(transformer), parts, None, *plan),
    }
    if scale["reparametrised"]:
        normalised = runs.NormalisedSpectra(transformer)
        courses["reparametrised"] = runs.trained(normalised, parts, None, *plan)
    sharpness_aware = {
        rho: runs.trained(transformer, parts, jnp.asarray(rho), *plan)
        for rho in scale["radii"]
    }
    best = min(sharpness_aware, key=lambda rho: sharpness_aware[rho].errors[-1, 1])
    courses["sam"] = sharpness_aware[best]

    oracle = _least_squares(parts)
    numbers = {"chosen_rho": best, "oracle_mse": oracle}
    # What no head makes good: frozen attention mixes the channels for ever.
    numbers["frozen_floor"] = _least_squares(seen) - oracle
    for name, course in courses.items():
        numbers[f"{name}_excess"] = course.errors[-1, 2] - oracle
        numbers[f"{name}_stopped_excess"] = course.stopped[2] - oracle
        numbers[f"{name}_train_mse"] = course.errors[-1, 0]
    half = courses["sam"].errors[scale["chunks"] // 2 - 1, 2]
    numbers["sam_excess_at_equal_gradients"] = half - oracle
    excess = {name: numbers[f"{name}_excess"] for name in courses}
    for name in ("frozen", "fixed_scores"):
        numbers[f"excess_over_{name}"] = excess["transformer"] / excess[name]
    numbers["sam_share_of_excess"] = excess["sam"] / excess["transformer"]
    better = min(excess["frozen"], excess["fixed_scores"])
    numbers["sam_above_frozen"] = excess["sam"] - better

    some = jax.tree.map(lambda leaf: leaf[:CURVATURE_SAMPLES], parts[0])
    for name in ("transformer", "sam"):
        model = courses[name].model
        top = hessian_top(runs.loss, model, some, tol=1e-2, max_steps=48, key=order)
        numbers[f"{name}_lambda_max"] = float(top.values[0])
        numbers[f"{name}_lambda_residual"] = float(top.residuals[0])
        attention = jax.vmap(model.attention)(some[0])
        numbers[f"{name}_entropy"] = float(jnp.mean(attention_entropy(attention)))
    numbers["lambda_ratio"] = numbers["transformer_lambda_max"] / max(
        numbers["sam_lambda_max"], 1e-12
    )
    return numbers, _curves(scale, courses, oracle)


def _draw(key, length, horizon, sizes):
    """White noise, and a fixed linear map of it in white noise."""
    for_map, *keys = jax.random.split(key, len(sizes) + 1)
    W = jax.random.normal(for_map, (length, horizon))
    parts = []
    for one, size in zip(keys, sizes, strict=True):
        first, second = jax.random.split(one)
        past = jax.random.normal(first, (size, CHANNELS, length))
        noise = jax.random.normal(second, (size, CHANNELS, horizon))
        parts.append((past, past @ W + noise))
    return parts


def _least_squares(parts):
    """Test error of least squares on the training part."""
    (past, future), _, (test_past, test_future) = jax.tree.map(np.asarray, parts)
    W, *_ = np.linalg.lstsq(
        past.reshape(-1, past.shape[-1]), future.reshape(-1, future.shape[-1])
    )
    return float(np.mean((test_past @ W - test_future) ** 2))


def _curves(scale, courses, oracle):
    epochs = np.arange(1, scale["chunks"] + 1) * (scale["epochs"] // scale["chunks"])
    return [
        Curve(
            epochs,
            np.maximum(course.errors[:, 2] - oracle, 1e-4),
            name,
            "linear task",
            "epoch",
            "test error above least squares",
            log_y=True,
        )
        for name, course in courses.items()
    ]


def _recording(seed):
    """Errors on a short recording, of the model with the least validation error."""
    length, horizon = SERIES["length"], SERIES["horizon"]
    series = np.split(eeg(), [480, 640])
    parts = [
        tuple(jnp.asarray(half, jnp.result_type(float)) for half in cut)
        for cut in (windows(s, length, horizon) for s in standardise(*series))
    ]
    init, order = jax.random.split(jax.random.key(seed))
    model = SAMformer(parts[0][0].shape[1], length, horizon, key=init)
    plan = (SERIES["epochs"], SERIES["chunks"], 32, order)
    numbers = {"eeg_persistence_mse": _persistence(parts[2])}
    for name, rho in (("transformer", None), ("sam", jnp.asarray(SERIES["rho"]))):
        course = runs.trained(model, parts, rho, *plan)
        numbers[f"eeg_{name}_mse"] = float(course.stopped[2])
    return numbers


def _persistence(part):
    past, future = part
    return float(jnp.mean((past[..., -1:] - future) ** 2))
