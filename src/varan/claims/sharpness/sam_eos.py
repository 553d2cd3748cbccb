"""SAM stops the largest eigenvalue at an edge of its own, below gradient descent's.

Claim. Full-batch training holds the largest eigenvalue l of the Hessian where
a l (1 + rho l) = 2 (a the stepsize; rho / |g| in the place of rho for normalised SAM),
below gradient descent's 2 / a; small real networks show it; and the regularisation acts
from the first steps on, far from minima.

Kept: the prediction without a free constant, the quadratic model, a network trained on
real images with squared loss. Given up: CIFAR-10 and its networks.

Refuted by: eigenvalues that settle elsewhere or in another order, a run above its
edge, or a kernel that grows more with SAM than without. A run whose eigenvalue never
came to its edge says nothing of where it stops, and is left out of the first, named in
the notes; it must still stay below the edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan import Status
from varan.claims import Curve, Measurements
from varan.data import digit_images
from varan.sharpness import (
    QuadraticRegression,
    hessian_top,
    normalised_eigenvalue,
    sam,
    sam_edge,
    track_top_eigs,
    usam,
)
from varan.train import gradient_update

IMAGES, WIDTH, DEPTH, CLASSES = 400, 48, 2, 10
REACHED = 1.9  # the edge is 2
OUTPUTS, EARLY = 20, 50


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures every part of the claim once."""
    keys = jax.random.split(jax.random.key(seed), 2)
    parts = [_network(scale, seed, keys[1])]
    if scale["late_stepsizes"]:
        parts.append(_quadratic(scale, keys[0]))
    numbers = {name: value for part in parts for name, value in part.numbers.items()}
    return Measurements(
        numbers,
        [curve for part in parts for curve in part.curves],
        [note for part in parts for note in part.notes],
    )


def _network(scale, seed, key):
    data = _images(seed)
    network = eqx.nn.MLP(64, CLASSES, WIDTH, DEPTH, jnp.tanh, key=key)

    def loss(network, batch):
        x, y = batch
        return jnp.mean(jnp.sum((jax.vmap(network)(x) - y) ** 2, axis=1)) / 2

    @partial(jax.jit, static_argnames="method")
    def train(method, stepsize, rho):
        track = track_top_eigs(
            loss,
            network,
            data,
            {"usam": usam, "sam": sam}[method](optax.sgd(stepsize), rho),
            steps=scale["steps"],
            every=scale["every"],
            key=key,
        )
        unit = track.grad_norms if method == "sam" else None
        eigenvalue = track.values[:, 0]
        return {
            "step": track.steps,
            "eigenvalue": eigenvalue,
            "normalised": normalised_eigenvalue(
                eigenvalue, stepsize, rho, grad_norm=unit
            ),
            "edge": sam_edge(stepsize, rho, grad_norm=unit) + 0 * eigenvalue,
            "residual": track.residuals[:, 0] / eigenvalue,
            "status": track.status,
        }

    runs = {
        (method, stepsize, rho): jax.tree.map(np.asarray, train(method, stepsize, rho))
        for method, pairs in (("usam", scale["usam"]), ("sam", scale["sam"]))
        for stepsize, rho in pairs
    }
    numbers, notes = _judge(runs)

    @jax.jit
    def kernel_after(stepsize, rho):
        """The top eigenvalue of the tangent kernel, after the first steps."""
        method = usam(optax.sgd(stepsize), rho)
        arrays, static = eqx.partition(network, eqx.is_inexact_array)

        def step(_, carry):
            arrays, state = carry
            here = lambda arrays: loss(eqx.combine(arrays, static), data)  # noqa: E731
            return gradient_update(here, arrays, state, method)[:2]

        arrays, _ = jax.lax.fori_loop(0, EARLY, step, (arrays, method.init(arrays)))

        def linearised(shift, _):
            def outputs(arrays):
                return jax.vmap(eqx.combine(arrays, static))(data[0])

            change = jax.jvp(outputs, (arrays,), (shift,))[1]
            return jnp.mean(jnp.sum(change**2, axis=1)) / 2

        return hessian_top(linearised, arrays, None, key=key).values[0]

    ratios = [
        float(kernel_after(stepsize, rho) / kernel_after(stepsize, 0.0))
        for stepsize, rho in scale["usam"]
        if rho
    ]
    numbers["network_early_kernel_ratio"] = float(np.mean(ratios))
    return Measurements(numbers, _network_curves(runs), notes)


def _images(seed):
    images, labels = digit_images()
    chosen = np.random.default_rng(seed).permutation(len(labels))[:IMAGES]
    x = jnp.asarray(images[chosen].reshape(IMAGES, -1), jnp.float32)
    return x, jax.nn.one_hot(labels[chosen], CLASSES)


def _judge(runs):
    """Where each run settled: medians over the last half, of those at their edge."""
    from scipy.stats import rankdata

    settled = {"gd": [], "usam": [], "sam": []}
    errors, ratios, predicted, observed, notes = [], [], [], [], []
    for (method, stepsize, rho), run in runs.items():
        name = f"{_label(method, rho)}, stepsize {stepsize}"
        if run["status"] != Status.CONVERGED:
            notes.append(f"{name} diverged.")
            ratios.append(np.inf)
            continue
        half = len(run["step"]) // 2
        eigenvalue, normalised, ratio = (
            float(np.median(values[half:]))
            for values in (
                run["eigenvalue"],
                run["normalised"],
                run["eigenvalue"] / run["edge"],
            )
        )
        ratios.append(ratio)
        if method == "usam":
            predicted.append(float(run["edge"][-1]))
            observed.append(eigenvalue)
        if np.max(run["normalised"]) < REACHED:
            notes.append(f"{name}: edge not reached (normalised {normalised:.2f}).")
            continue
        settled["gd" if rho == 0 else method].append(normalised)
        if method == "usam":
            errors.append(abs(ratio - 1))
    numbers = {
        "edge_ratio_max": max(ratios),
        "usam_edge_error": max(errors, default=np.inf),
        "rank_correlation": float(
            np.corrcoef(rankdata(predicted), rankdata(observed))[0, 1]
        ),
        "runs_at_edge": float(sum(map(len, settled.values()))),
        "eigenvalue_residual": float(
            max(np.nanmax(run["residual"]) for run in runs.values())
        ),
    }
    for name, values in settled.items():
        numbers[f"{name}_settled_min"] = min(values, default=np.inf)
        numbers[f"{name}_settled_max"] = max(values, default=np.inf)
    return numbers, notes


def _label(method, rho):
    if rho == 0:
        return "GD"
    return f"{'SAM' if method == 'sam' else 'USAM'}, rho {rho}"


def _network_curves(runs):
    curves = []
    for (method, stepsize, rho), run in runs.items():
        seen = np.isfinite(run["eigenvalue"])
        steps = run["step"][seen].tolist()
        plots = [("normalised", "normalised eigenvalue", f"a = {stepsize}")]
        if method == "usam":
            plots.append(("eigenvalue", "largest eigenvalue", f"a = {stepsize}"))
        for quantity, y_label, setting in plots:
            curves.append(
                Curve(
                    steps,
                    run[quantity][seen].tolist(),
                    _label(method, rho),
                    f"{y_label}, {setting}",
                    "step",
                    y_label,
                )
            )
    return curves


def _quadratic(scale, key):
    """The quadratic model: the kernel's top eigenvalue early, and where it settles."""
    early, late = jax.random.split(key)
    size, draws = scale["early_parameters"], scale["early_draws"]

    @partial(jax.jit, static_argnames="steps")
    def tops(models, stepsize, rho, steps):
        """After each step, in units of the first, for settings in the same units."""

        def one(model):
            start = jnp.zeros(model.linear.shape[1])
            first = jnp.linalg.eigvalsh(model.kernel(start))[-1]
            method = usam(optax.sgd(stepsize / first), rho / first)

            def step(theta, _):
                theta, _, _ = gradient_update(model, theta, method.init(theta), method)
                return theta, jnp.linalg.eigvalsh(model.kernel(theta))[-1] / first

            return jax.lax.scan(step, start, length=steps)[1]

        return jax.vmap(one)(models)

    make = partial(QuadraticRegression, OUTPUTS)
    models = jax.vmap(lambda k: make(size, key=k))(jax.random.split(early, draws))
    differences = []
    for stepsize in scale["early_stepsizes"]:
        plain = tops(models, stepsize, 0.0, EARLY)[:, -1]
        for rho in scale["early_radii"]:
            change = np.asarray(tops(models, stepsize, rho, EARLY)[:, -1] - plain)
            # Per unit of time, so that every setting counts alike.
            differences.append(np.mean(change) / (EARLY * stepsize))
    model = make(scale["late_parameters"], key=late)
    model = jax.tree.map(lambda leaf: leaf[None], model)
    curves, settled, notes = [], [], []
    for stepsize in scale["late_stepsizes"]:
        for rho in (0.0, *scale["late_radii"]):
            path = np.asarray(tops(model, stepsize, rho, scale["late_steps"])[0])
            finite = np.isfinite(path) & (path < 1e3)
            curves.append(
                Curve(
                    (1 + np.flatnonzero(finite)).tolist(),
                    path[finite].tolist(),
                    f"rho l0 = {rho}",
                    f"quadratic regression, a l0 = {stepsize}",
                    "step",
                    "top kernel eigenvalue / first",
                    log_x=True,
                )
            )
            if finite.all():
                settled.append(float(normalised_eigenvalue(path[-1], stepsize, rho)))
            else:
                notes.append(
                    f"quadratic regression, a l0 = {stepsize}, rho l0 = {rho} diverged."
                )
    numbers = {
        "early_kernel_difference": float(np.mean(differences)),
        "quadratic_settled_max": max(settled, default=np.inf),
        "quadratic_settled_runs": float(len(settled)),
    }
    return Measurements(numbers, curves, notes)
