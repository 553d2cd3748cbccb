"""Under norm caps Muon trains steep-limited networks better than AdamW does.

Claim: with Muon and a soft cap on the spectral norms a network reaches the accuracy of
AdamW with weight decay at a much smaller Lipschitz bound, the bound holds at every
step, and transformers train under it without layer norm, at a bound of 2 already.

Kept: the optimisers, the constraints, the architecture with its bound, the comparison
by fronts of bound against accuracy over learning rates and strengths. Given up: image
and web data, the size of the networks, Shakespeare (the characters are those of
Python's standard library), and with them the accuracies.

Refuted by: a front of Muon with soft cap that is not below AdamW's, a bound above what
the caps promise at any logged step, a loss that is not finite, or a transformer of
bound 2 that predicts no better than the most frequent character.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varan.claims import Curve, Measurements
from varan.data import digit_images, split
from varan.lipschitz import lipschitz_bound

from ._capped_text import LOGS, optimiser, transformers

# Both start from these and fall to zero linearly; every pair with a strength is tried.
RATES = {"adamw": (1e-3, 3e-3, 1e-2), "muon": (0.03, 0.1, 0.3)}
_TEST = 360


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the fronts on digits, and capped and free transformers on text."""
    numbers, curves = perceptrons(scale, seed)
    if scale["text_bounds"]:
        more, drawn = transformers(scale, seed)
        numbers, curves = {**numbers, **more}, curves + drawn
    return Measurements(numbers, curves)


# Perceptrons on digits ---------------------------------------------------------------


def perceptrons(scale, seed):
    """Fronts of bound against accuracy."""
    images, labels = digit_images()
    x = images.reshape(len(images), -1).astype(np.float32)
    train, test = split([x, labels], [len(x) - _TEST], seed)
    draw = np.random.default_rng(seed)
    net = perceptron(draw, scale["width"])
    batches = draw.integers(len(train[0]), size=(scale["steps"], scale["batch"]))
    fronts, curves, overshoot = {}, [], 0.0
    for name in scale["methods"]:
        base, constraint = name.split("-")
        strengths = scale["decays" if constraint == "decay" else "caps"]
        pairs = [(r, s) for r in RATES[base] for s in strengths]
        rates, values = np.array(pairs, np.float32).T
        logged, right = train_perceptron(
            name, rates, values, net, (*train, *test), batches
        )
        bounds = np.array([[lipschitz_of(run) for run in lanes(log)] for log in logged])
        if constraint in ("soft", "normalize"):
            # What three capped matrices promise.
            overshoot = max(overshoot, float(np.max(bounds / values[None] ** 3)))
        fronts[name] = front(bounds[-1], np.asarray(right))
        curves.append(
            Curve(
                *(part.tolist() for part in fronts[name]),
                name,
                "digits: accuracy at a bound",
                "Lipschitz bound (RMS)",
                "test accuracy",
                log_x=True,
            )
        )
    numbers = {"overshoot": overshoot}
    for other in fronts:
        base, constraint = other.split("-")
        rivals = ["muon-soft", "muon-" + constraint] if base == "adamw" else []
        for rival in dict.fromkeys(rivals):
            if rival in fronts:
                ratio = bound_ratio(fronts[other], fronts[rival])
                numbers[f"{other}_over_{rival}".replace("-", "_")] = ratio
    return numbers, curves


@partial(jax.jit, static_argnums=0)
def train_perceptron(name, rates, values, net, data, batches):
    """All learning rates and strengths at once: logged weights, final accuracies."""
    x, y, test_x, test_y = data

    def one(rate, value):
        method = optimiser(name, rate, value, len(batches))

        def step(carry, chosen):
            net, state = carry
            slope = jax.grad(loss)(net, x[chosen], y[chosen])
            change, state = method.update(slope, state, net)
            return (optax.apply_updates(net, change), state), None

        def stretch(carry, batches):
            carry, _ = jax.lax.scan(step, carry, batches)
            return carry, carry[0]

        stretches = batches.reshape(LOGS, -1, batches.shape[1])
        (trained, _), logged = jax.lax.scan(stretch, (net, method.init(net)), stretches)
        right = jnp.argmax(forward(trained, test_x), -1) == test_y
        return logged, jnp.mean(right)

    logged, right = jax.vmap(one, out_axes=(1, 0))(rates, values)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], logged) for i in range(LOGS)], right


def perceptron(draw, width):
    """Three matrices without biases, orthogonal, of RMS norm one."""
    net = []
    for out, into in ((width, 64), (width, width), (10, width)):
        left, _, right = np.linalg.svd(draw.normal(size=(out, into)), False)
        net.append((left @ right * math.sqrt(out / into)).astype(np.float32))
    return net


def forward(net, x):
    """Logits of a batch; the pixels are doubled, to an RMS of about one."""
    x = 2 * x
    for weight in net[:-1]:
        x = jax.nn.relu(x @ weight.T)
    return x @ net[-1].T


def loss(net, x, y):
    logits = forward(net, x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def lanes(net):
    """The runs of one batch of networks."""
    net = [np.asarray(weight) for weight in net]
    return [[weight[i] for weight in net] for i in range(len(net[0]))]


def lipschitz_of(net):
    """The proved bound of a perceptron, doubled pixels apart."""
    if not all(np.all(np.isfinite(weight)) for weight in net):
        return math.inf
    layers = []
    for weight in net:
        out, into = weight.shape
        blank = eqx.nn.Linear(into, out, use_bias=False, key=jax.random.key(0))
        layers += [
            eqx.tree_at(lambda layer: layer.weight, blank, weight),
            eqx.nn.Lambda(jax.nn.relu),
        ]
    return float(lipschitz_bound(eqx.nn.Sequential(layers[:-1])).value)


def front(bounds, accuracies):
    """The runs that no other beats in both: bounds and accuracies, increasing.

    Runs that diverged are left out.
    """
    bounds, accuracies = bounds[kept := np.isfinite(bounds)], accuracies[kept]
    order = np.lexsort((-accuracies, bounds))
    bounds, accuracies = bounds[order], accuracies[order]
    ahead = np.maximum.accumulate(np.concatenate([[-1.0], accuracies[:-1]]))
    best = accuracies > ahead
    return bounds[best], accuracies[best]


def bound_ratio(theirs, ours):
    """Their bound over ours at the median accuracy of both fronts.

    No higher than both reach; between two runs the bound's logarithm is linear.
    """
    level = np.median(np.concatenate([theirs[1], ours[1]]))
    level = min(level, theirs[1][-1], ours[1][-1])
    logs = [np.interp(level, right, np.log(bounds)) for bounds, right in (theirs, ours)]
    return float(np.exp(logs[0] - logs[1]))
