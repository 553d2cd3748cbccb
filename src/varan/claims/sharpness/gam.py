"""Gradient norm aware minimisation: first-order flatness, and what comes of seeking it.

The claim: the largest gradient norm in a ball tells minima apart that the largest loss
does not, with one minimum in the ball and with several; descending it too generalises
better than SGD and ends flatter. Two parts:

- functions on a line, their flatnesses by exhaustion and as measured by ascent;
- a perceptron on MNIST-1D, true labels: test errors of SGD, SAM, GAM and both together
  after the same number of steps, the paper's accounting, in which a step of GAM takes
  four gradients; SGD and GAM with the same number of gradients beside it; the largest
  eigenvalue and the first-order flatness where SGD and GAM end.

Kept: the released method, brought to a gradient's length. Given up: CIFAR and ImageNet,
deep networks. Refuted by: functions that both flatnesses tell apart alike, intervals
that do not clear the margins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varan.claims import Curve, Measurements
from varan.sharpness import first_order_flatness, sharpness

from ._arms import ARMS
from ._benchmark import column, flatness, loss_curve, run_arm

RHO, RIPPLE, FREQUENCY = 0.5, 1e-3, 53.407  # sin(FREQUENCY / 2) is 1
HEIGHT, FAR, NEAR = 0.1, 0.4, 0.2  # of the wall between wells, and their distances
MEASURED = ("lambda_max", "first_order_flatness")


def bowl(x):
    """One minimum of curvature 1."""
    return x**2 / 2


def rippled(x):
    """The same, its slope rippled."""
    return bowl(x) + RIPPLE * (1 - jnp.cos(FREQUENCY * x))


def wells(distance):
    """Equal wells at all multiples of a distance."""
    return lambda x: HEIGHT * jnp.sin(jnp.pi * x / distance) ** 2


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    parts = {"lines": _lines, "training": _training}
    for name in scale["parts"]:
        parts[name](scale, seed, numbers, curves)
    return Measurements(numbers, curves)


def _lines(scale, seed, numbers, curves):
    functions = {
        "bowl": bowl,
        "rippled": rippled,
        "far": wells(FAR),
        "near": wells(NEAR),
    }
    key = jax.random.key(seed)
    exact, shortfall = {}, []
    for name, function in functions.items():
        exact[name] = _flatnesses(function)
        numbers[f"{name}_zeroth"], numbers[f"{name}_first"] = exact[name]
        loss = lambda w, batch, function=function: function(w[0])  # noqa: E731
        for value, measure in zip(
            exact[name], (sharpness, first_order_flatness), strict=True
        ):
            found = measure(loss, jnp.zeros(1), None, rho=RHO, restarts=8, key=key)
            shortfall.append(1 - float(found.value) / value)
        x = np.linspace(-RHO, RHO, 401)
        curves.append(Curve(x, np.asarray(function(x)), name, "functions", "w", "loss"))
    numbers["ascent_shortfall"] = max(shortfall)
    numbers["ascent_excess"] = -min(shortfall)
    for name, plain, other in (("one", "bowl", "rippled"), ("several", "far", "near")):
        zeroth, first = np.divide(exact[other], exact[plain])
        numbers[f"{name}_zeroth_difference"] = float(abs(zeroth - 1))
        numbers[f"{name}_first_ratio"] = float(first)


def _flatnesses(function):
    """Both flatnesses at zero, by exhaustion."""
    x = np.linspace(-RHO, RHO, 200_001)
    slope = jax.vmap(jax.grad(function))(x)
    rise = np.max(np.asarray(function(x))) - float(function(0.0))
    return float(rise), RHO * float(np.max(np.abs(slope)))


def _training(scale, seed, numbers, curves):
    data = column("clean", seed, train=scale["train"])
    runs = {
        name: run_arm(ARMS[name], data, seed, steps=scale["steps"])
        for name in scale["arms"]
    }
    for name, run in runs.items():
        key = name.replace("-", "_")
        numbers[f"{key}_test_error"] = run.points
        numbers[f"{key}_train_error"] = 100 * run.train_error
        numbers[f"{key}_train_loss"] = run.train_loss
        curves.append(loss_curve(run, "training loss, equal steps"))
    sgd, gam = runs["sgd"], runs["gam"]
    numbers["gain_at_equal_steps"] = sgd.points - gam.points
    numbers["gradients_ratio"] = gam.gradients / sgd.gradients
    for name in set(runs) - {"sgd", "gam"}:
        gain = runs[name].points - gam.points
        numbers[f"gain_over_{name.replace('-', '_')}"] = gain
    if "gradients" not in scale:
        return
    equal = {
        name: run_arm(ARMS[name], data, seed, gradients=scale["gradients"])
        for name in ("sgd", "gam")
    }
    gain = equal["sgd"].points - equal["gam"].points
    numbers["gain_at_equal_gradients"] = gain
    measured = {run.arm: flatness(run, data, only=MEASURED) for run in (sgd, gam)}
    for name in MEASURED:
        of_sgd, of_gam = measured["sgd"][name], measured["gam"][name]
        numbers[f"sgd_{name}"], numbers[f"gam_{name}"] = of_sgd, of_gam
        # In this form a training that diverged counts as sharp.
        margin = of_sgd / 2 - of_gam if np.isfinite(of_gam) else -np.inf
        numbers[f"{name}_margin"] = margin
