"""Features held near given ones come nearer to neural collapse.

Claim. (1) Along the gradient flow of the unconstrained features model, last layer
eliminated, Tr Sigma_W / Tr Sigma_B strictly decreases from any start. (2) So does one
proximal step of it. (3) The features' response to the given ones is known to first
order, and near collapse its spectrum in closed form. (4) In trained networks the
weight decay of the feature layers moves NC1 more than that of the last layer, and
layer-wise training lowers NC1 from layer to layer.

Kept: (1) to (3) exactly as the theorems state them. Given up: (4) runs a multilayer
perceptron on the digits instead of a ResNet-18 on CIFAR-10.

Refuted by: one rise of the ratio along the flow, a proximal step above its start, a
singular value off its formula, an expansion error of another order; for (4), feature
decay moving NC1 less than twice as much as the last layer's, or in the other direction.
The frozen last layer is the control: there the ratio must be able to rise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varan.claims import Curve, Measurements
from varan.landscape import (
    HeadAndFeatures,
    UnconstrainedFeatures,
    central_path,
    collapse_metrics,
    collapse_spectrum,
    global_optimum,
    proximal_features,
    response_operator,
)

from ._near_collapse_networks import VARIANTS, train_layerwise, train_variants

CLASSES, DIM, SHIFT = 4, 10, 0.3
FROZEN_RUNS = 20
SPECTRUM_SETTINGS = ((1.414, 0.1, 100.0), (1.414, 0.4, 100.0), (0.05, 0.05, 100.0))
EXPANSION_BETAS = (100.0, 200.0, 400.0, 800.0)
RESPONSE_BETA, RESPONSE_SIZES = 10.0, np.geomspace(1e-4, 1e-1, 7)
DEPTH = 5


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures every part of the claim once."""
    labels = np.repeat(np.arange(CLASSES), scale["per_class"])
    keys = jax.random.split(jax.random.key(seed), 4)
    parts = [
        _flow(scale, labels, keys[0]),
        _spectrum(scale["per_class"], labels, keys[1]),
        _response(labels, keys[2]),
    ]
    if scale["betas"]:
        parts.append(_proximal(scale["betas"], labels, keys[3]))
    if scale["network_epochs"]:
        parts.append(_weight_decay(scale["network_epochs"], seed))
    if scale["layerwise_epochs"]:
        parts.append(_layerwise(scale["layerwise_epochs"], seed))
    numbers = {name: value for part in parts for name, value in part.numbers.items()}
    return Measurements(numbers, [curve for part in parts for curve in part.curves])


def _start(labels, key, spread=1.0):
    noise = jax.random.normal(key, (len(labels), DIM))
    return spread * noise + SHIFT


def _flow(scale, labels, key):
    times = np.concatenate([[0.0], np.geomspace(1e-3, 30, scale["flow_times"])])

    @jax.jit
    def follow(start, lam_w, lam_h):
        path = central_path(start, labels, lam_w, lam_h, times, rtol=1e-10)
        defect = path.certificate.value
        return _is_monotone(path, lam_h), defect, path.nc1_ratio

    monotone, defects, curves = [], [], []
    for draw, spread in enumerate(scale["spreads"] * scale["flow_starts"]):
        start = _start(labels, jax.random.fold_in(key, draw), spread)
        for lam_w in scale["lam_w"]:
            for lam_h in scale["lam_h"]:
                held, defect, ratio = follow(start, lam_w, lam_h)
                monotone.append(bool(held))
                defects.append(float(defect))
        ratio = np.asarray(ratio)
        curves.append(_flow_curve(times, ratio, f"spread {spread}, draw {draw}"))
    frozen = _frozen_ratios(labels, jax.random.fold_in(key, 1000), times)
    rises = np.any(np.diff(frozen, axis=1) > 0, axis=1)
    curves.append(_flow_curve(times, frozen[np.argmax(rises)], "last layer frozen"))
    numbers = {
        "flow_theorem_fraction": float(np.mean(monotone)),
        "flow_identity_defect": max(defects),
        "frozen_rise_fraction": float(np.mean(rises)),
    }
    return Measurements(numbers, curves)


def _is_monotone(path, lam_h):
    # d log = relative increment; the factor e^{2 lam_h t} cancels in the ratio.
    weight = 2 * lam_h * path.times
    return (
        jnp.all(jnp.diff(path.nc1_ratio) < 0)
        & jnp.all(jnp.diff(path.log_tr_w + weight) <= 1e-10)
        & jnp.all(jnp.diff(jnp.log(path.tr_b) + weight) > 0)
    )


def _flow_curve(times, ratio, label):
    return Curve(
        times[1:].tolist(),
        ratio[1:].tolist(),
        label,
        "central path",
        "time",
        "Tr Sigma_W / Tr Sigma_B",
        log_x=True,
        log_y=True,
    )


def _frozen_ratios(labels, key, times, lam_h=0.01):
    """The ratio along the flow whose last layer stays a random one, in closed form."""
    targets = np.eye(CLASSES)[labels]

    def run(key):
        start = _start(labels, key)
        head = jax.random.normal(key, (CLASSES, DIM))
        rates, frame = jnp.linalg.eigh(head.T @ head)
        rates = rates + lam_h
        rest = (targets @ head @ frame) / rates[None, :]
        gap = start @ frame - rest

        def at(time):
            features = rest + gap * jnp.exp(-rates * time)[None, :]
            return collapse_metrics(features, labels).nc1_ratio

        return jax.vmap(at)(jnp.asarray(times))

    return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(key, FROZEN_RUNS)))


def _proximal(betas, labels, key, lam_w=0.05, lam_h=0.05):
    start = _start(labels, key)

    def ratio(features):
        return collapse_metrics(features, labels).nc1_ratio

    plain = UnconstrainedFeatures(labels, lam_w, lam_h)
    gradient = plain.condition(HeadAndFeatures(plain.best_head(start), start)).features
    before, slope = jax.jvp(ratio, (start,), (-len(labels) * gradient,))
    after = []
    for beta in betas:
        solution = proximal_features(start, labels, lam_w, lam_h, beta, tol=1e-10)
        after.append(float(ratio(solution.require().features)))
    decrease = betas[-1] * (float(before) - after[-1])
    numbers = {
        "proximal_below_fraction": float(np.mean(np.array(after) < float(before))),
        "proximal_slope_error": abs(decrease / -float(slope) - 1),
    }
    relative = [value / float(before) for value in after]
    curve = Curve(
        list(betas),
        relative,
        "proximal step",
        "proximal step",
        "beta",
        "ratio after / before",
        log_x=True,
        marker=True,
    )
    return Measurements(numbers, [curve])


def _spectrum(per_class, labels, key):
    @jax.jit
    def matrices(lam_w, lam_h, beta):
        plain = UnconstrainedFeatures(labels, lam_w, lam_h)
        x = global_optimum(plain, DIM, key=key)
        held = UnconstrainedFeatures(labels, lam_w, lam_h, x.features, beta)
        exact, first = (
            response_operator(held, x, large_beta=large).as_matrix()
            for large in (False, True)
        )
        return first, first - exact

    worst, distances = 0.0, []
    for lam_w, lam_h, beta in SPECTRUM_SETTINGS:
        known = collapse_spectrum(CLASSES, DIM, per_class, lam_w, lam_h, beta)
        blocks = np.asarray(matrices(lam_w, lam_h, beta)[0])
        blocks = blocks.reshape(CLASSES, per_class * DIM, -1)
        worst = max(worst, _spectrum_error(blocks, known))
        gaps = [np.asarray(matrices(lam_w, lam_h, b)[1]) for b in EXPANSION_BETAS]
        distances.append([float(np.linalg.norm(gap, 2)) for gap in gaps])
    slopes = [_slope(EXPANSION_BETAS, row) for row in distances]
    numbers = {
        "spectrum_error": worst,
        "expansion_slope": max(slopes, key=lambda slope: abs(slope + 2)),
    }
    curves = [
        Curve(
            list(EXPANSION_BETAS),
            row,
            f"lam_w {lam_w}, lam_h {lam_h}",
            "large-beta response",
            "beta",
            "spectral distance to the exact response",
            log_x=True,
            log_y=True,
        )
        for (lam_w, lam_h, _), row in zip(SPECTRUM_SETTINGS, distances, strict=True)
    ]
    return Measurements(numbers, curves)


def _spectrum_error(blocks, known):
    size = blocks.shape[1]
    expected = np.sort(np.repeat(np.asarray(known.diagonal), known.multiplicities))
    single = np.zeros(size)
    single[-1] = float(known.off_diagonal)
    errors = []
    for row in range(CLASSES):
        for column in range(CLASSES):
            block = blocks[row][:, column * size : (column + 1) * size]
            values = np.sort(np.linalg.svd(block, compute_uv=False))
            errors.append(np.abs(values - (expected if row == column else single)))
    return float(np.max(errors))


def _response(labels, key, lam_w=0.05, lam_h=0.05):
    sizes = np.concatenate([[0.0], RESPONSE_SIZES])

    def solve_at(anchor):
        return proximal_features(anchor, labels, lam_w, lam_h, RESPONSE_BETA, tol=1e-13)

    @jax.jit
    def run(keys):
        plain = UnconstrainedFeatures(labels, lam_w, lam_h)
        noise = jax.random.normal(keys[0], (len(labels), DIM))
        anchor = global_optimum(plain, DIM, key=keys[1]).features + SHIFT * noise
        change = jax.random.normal(keys[2], anchor.shape)
        change = change / jnp.linalg.norm(change)
        solutions = jax.vmap(solve_at)(anchor + sizes[:, None, None] * change)
        moved = solutions.require().features
        held = UnconstrainedFeatures(labels, lam_w, lam_h, anchor, RESPONSE_BETA)
        x = jax.tree.map(lambda leaf: leaf[0], solutions.x)
        predicted = response_operator(held, x).mv(change)
        misses = moved[1:] - moved[0] - sizes[1:, None, None] * predicted
        return jnp.sqrt(jnp.sum(misses**2, axis=(1, 2)))

    errors = np.asarray(run(jax.random.split(key, 3))).tolist()
    curve = Curve(
        RESPONSE_SIZES.tolist(),
        errors,
        "first-order response",
        "response",
        "size of the change",
        "error of the predicted change",
        log_x=True,
        log_y=True,
    )
    return Measurements({"response_slope": _slope(RESPONSE_SIZES, errors)}, [curve])


def _slope(x, y):
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _weight_decay(epochs, seed):
    numbers, curves, interpolating = {}, [], []
    for loss in ("mse", "ce"):
        nc1, accuracy = train_variants(seed, epochs, loss)
        logs = {name: float(np.log(nc1[name] / nc1["base"])) for name in VARIANTS}
        sizes = {
            group: np.mean([abs(logs[f"{group}_x2"]), abs(logs[f"{group}_0"])])
            for group in ("features", "head")
        }
        numbers |= {f"{loss}_log_nc1_{name}": logs[name] for name in VARIANTS}
        numbers[f"{loss}_nc1_base"] = nc1["base"]
        numbers[f"{loss}_effect_ratio"] = float(sizes["features"] / sizes["head"])
        interpolating += [value == 1.0 for value in accuracy.values()]
        curves.append(
            Curve(
                list(range(len(VARIANTS))),
                list(logs.values()),
                loss,
                "weight decay variants",
                "variant: " + ", ".join(VARIANTS),
                "log NC1 / NC1 of base",
                marker=True,
            )
        )
    numbers["interpolating_fraction"] = float(np.mean(interpolating))
    return Measurements(numbers, curves)


def _layerwise(epochs, seed):
    ratio, pinv = train_layerwise(seed, epochs, DEPTH)
    steps = np.diff(np.log(pinv))
    numbers = {f"layerwise_log_nc1_step_{k + 1}": float(s) for k, s in enumerate(steps)}
    curves = [
        Curve(
            list(range(1, DEPTH + 1)),
            values.tolist(),
            label,
            "layer-wise training",
            "layer",
            "variability",
            log_y=True,
        )
        for label, values in (("NC1", pinv), ("Tr Sigma_W / Tr Sigma_B", ratio))
    ]
    return Measurements(numbers, curves)
