"""MAID: the accuracy and the step of a hypergradient, chosen along the way.

The claim: a method that tightens the accuracy of the lower level and of the adjoint
equation only when its own bounds demand it converges whatever accuracy and step it
starts with, and spends fewer lower-level calls than HOAG, whose accuracies fall by a
sequence fixed beforehand and whose step must be guessed. Parts:

- quadratic: least squares in both levels, all constants and the answer known;
- denoising: total variation with learned weight and smoothing, two photographs;
- logistic: one penalty of a multinomial regression on digits.

Kept: method, settings, the kinds of tasks. Given up: fields of experts, larger images,
the derivative-free solver DFO-LS. Refuted by: a run that ends away from the others, an
error above its bound, more calls than HOAG's best sequence, a worse picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from varan.bilevel import HOAG, MAID, BilevelProblem, Smoothness, trajectory
from varan.claims import Curve, Measurements
from varan.data import digit_images, sample_images, split, standardise

EPSILONS, STEPSIZES = (1e1, 1e0, 1e-1, 1e-3), (1e-1, 1e-2, 1e-3, 1e-4)
# HOAG's fixed steps for the pictures and for the regression; MAID starts from the
# middle one for pictures, from each for the regression.
IMAGE_STEPS, IMAGE_EPSILONS = (10.0, 100.0, 1000.0), (1e1, 1e-1, 1e-3)
LOGISTIC_STEPS = (1e-1, 1e0, 1e1)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    parts = {
        "quadratic": _quadratic,
        "denoising": _denoising,
        "logistic": _logistic,
    }
    for name in scale["parts"]:
        parts[name](scale, seed, numbers, curves)
    return Measurements(numbers, curves)


# ------------------------------------------------------------------ quadratic


def _upper(x, y, A1, A2, A3, b1, b2):
    return jnp.sum((A1 @ y - b1) ** 2) / 2


def _lower(x, y, A1, A2, A3, b1, b2):
    return jnp.sum((A2 @ y + A3 @ x - b2) ** 2) / 2


def _quadratic(scale, seed, numbers, curves):
    draw = np.random.default_rng(seed)
    A1, A2, A3 = (draw.random((1000, 10)) for _ in range(3))
    truth, answer = draw.random(10), draw.random(10)
    b1 = A1 @ answer + 0.01 * draw.standard_normal(1000)
    b2 = A2 @ answer + A3 @ truth + 0.01 * draw.standard_normal(1000)
    # Triangular factors: the same sums of squares from 21 and 11 rows.
    above = np.linalg.qr(np.column_stack([A1, b1]), mode="r")
    below = np.linalg.qr(np.column_stack([A2, A3, b2]), mode="r")
    A1, b1 = above[:, :10], above[:, 10]
    A2, A3, b2 = below[:, :10], below[:, 10:20], below[:, 20]
    data = tuple(jnp.asarray(v) for v in (A1, A2, A3, b1, b2))
    problem = BilevelProblem(_upper, _lower, *data)
    spectrum = np.linalg.svd(A2, compute_uv=False) ** 2
    known = Smoothness(
        spectrum[-1],
        lower=spectrum[0],
        upper_y=np.linalg.norm(A1, 2) ** 2,
        mixed=np.linalg.norm(A2.T @ A3, 2),
    )
    known = jax.tree.map(jnp.asarray, known)
    # y(x) = c - S x.
    S, c = (
        np.linalg.lstsq(A2, A3, rcond=None)[0],
        np.linalg.lstsq(A2, b2, rcond=None)[0],
    )
    best = np.linalg.lstsq(A1 @ S, A1 @ c - b1, rcond=None)[0]
    exact = _Reduced(*(jnp.asarray(v) for v in (S, c, A1, b1)))
    least = float(exact.value(jnp.asarray(best)))
    gap = float(exact.value(jnp.zeros(10))) - least
    target = least + 0.01 * gap
    start = problem.point(jnp.zeros(10), jnp.zeros(10))
    settings = jnp.asarray([(e, t) for e in EPSILONS for t in STEPSIZES])

    def curve(method, rounds, look):
        _, seen = trajectory(problem, method, start, look, steps=rounds)
        return seen

    @jax.jit
    @jax.vmap
    def adaptive(setting):
        method = MAID(
            known, setting[1], setting[0], setting[0], convex=True, max_inner=500
        )
        return curve(method, scale["rounds"], partial(_look_adaptive, exact))

    values, spent, errors, bounds = (np.asarray(v) for v in adaptive(settings))
    ends = values[:, -1]
    numbers["spread_of_ends"] = float((ends.max() - ends.min()) / gap)
    numbers["excess_over_optimum"] = float((ends.max() - least) / gap)
    numbers["error_over_bound"] = float(np.nanmax(errors / bounds))
    ours = _calls_to(values, spent, target)
    numbers["maid_calls"] = float(np.median(ours))
    numbers["maid_calls_worst"] = float(ours.max())
    by_step = np.median(ours.reshape(len(EPSILONS), len(STEPSIZES)), axis=0)
    for stepsize, calls in zip(STEPSIZES, by_step, strict=True):
        numbers[f"maid_calls_from_{stepsize:g}"] = float(calls)
    rivals, tuned = [], []
    for sequence in scale["sequences"]:

        @jax.jit
        @jax.vmap
        def fixed(setting, sequence=sequence):
            method = HOAG(known, setting[1], setting[0], sequence, max_inner=500)
            return curve(method, scale["hoag_rounds"], partial(_look, exact))

        values, spent = (np.asarray(v) for v in fixed(settings))
        calls = _calls_to(values, spent, target)
        rivals.append(float(np.median(calls)))
        # By stepsize, the median over first accuracies.
        by_step = calls.reshape(len(EPSILONS), len(STEPSIZES))
        tuned.append(float(np.median(by_step, axis=0).min()))
        numbers[f"hoag_{sequence}_calls"] = rivals[-1]
        numbers[f"hoag_{sequence}_failed"] = float(np.isinf(calls).sum())
    numbers["hoag_tuned_calls"] = min(tuned)
    # Zero when no baseline got there, infinite when MAID did not.
    for name, rival in (("hoag", min(rivals)), ("tuned_hoag", min(tuned))):
        reached = np.isfinite(numbers["maid_calls"])
        ratio = numbers["maid_calls"] / rival if reached else np.inf
        numbers[f"calls_over_{name}"] = ratio


class _Reduced(eqx.Module):
    """The reduced objective and its gradient, in closed form."""

    S: jax.Array
    c: jax.Array
    A1: jax.Array
    b1: jax.Array

    def value(self, x):
        return jnp.sum((self.A1 @ (self.c - self.S @ x) - self.b1) ** 2) / 2

    def slope(self, x):
        return jax.grad(self.value)(x)


def _look(exact, problem, iterate):
    return exact.value(iterate.x), iterate.oracles.total


def _look_adaptive(exact, problem, iterate):
    search = iterate.extra
    error = jnp.linalg.norm(search.direction - exact.slope(search.at))
    return *_look(exact, problem, iterate), error, search.error


def _calls_to(values, spent, target):
    """Calls until the objective is at most the target; infinite for never."""
    reached = values <= target
    first = reached.argmax(axis=1)
    calls = np.take_along_axis(spent, first[:, None], axis=1)[:, 0].astype(float)
    return np.where(reached.any(axis=1), calls, np.inf)


# ------------------------------------------------------------------ denoising


def _differences(y):
    """Forward differences, zero across the border; pairs on the last axis."""
    down = jnp.diff(y, axis=-2, append=y[..., -1:, :])
    right = jnp.diff(y, axis=-1, append=y[..., :, -1:])
    return jnp.stack([down, right], axis=-1)


def _clean_distance(x, y, clean, noisy):
    return jnp.sum((y - clean) ** 2) / (2 * clean.size)


def _total_variation(x, y, clean, noisy):
    lengths = jnp.sqrt(jnp.sum(_differences(y) ** 2, axis=-1) + jnp.exp(2 * x[1]))
    return jnp.sum((y - noisy) ** 2) / 2 + jnp.exp(x[0]) * jnp.sum(lengths)


def _image_constants(size, x):
    """With weight w and smoothing v: `||D||^2 <= 8`, a pixel's rows of norm `3^1/2`.

    `(s^2 + v^2)^1/2` has second derivatives up to `1 / v` and third ones up to
    `0.859 / v^2`; so has its derivative in `log v`, up to `1 / v`.
    """
    weight, smoothing = jnp.exp(x[0]), jnp.exp(x[1])
    ratio = 8 * weight / smoothing
    return Smoothness(
        1.0,
        lower=1 + ratio,
        upper_y=1 / size,
        hessian=0.859 * 3**0.5 * ratio / smoothing,
        cross=2**0.5 * ratio,
    )


def _denoising(scale, seed, numbers, curves):
    clean = sample_images(64)
    noise = 0.1 * np.random.default_rng(seed).standard_normal(clean.shape)
    clean, noisy = jnp.asarray(clean), jnp.asarray(clean + noise)
    problem = BilevelProblem(_clean_distance, _total_variation, clean, noisy)
    start = problem.point(jnp.log(jnp.array([0.01, 0.1])), noisy)
    constants = Partial(_image_constants, clean.size)
    budget = scale["image_calls"]
    ours = []
    for epsilon in IMAGE_EPSILONS:
        method = MAID(
            constants, 100.0, epsilon, epsilon, shrink=0.5, convex=True, max_inner=500
        )
        loss, x = _within(problem, method, start, budget)
        ours.append(float(-10 * np.log10(2 * loss)))
        numbers[f"maid_psnr_from_{epsilon:g}"] = float(ours[-1])
    numbers["maid_log_weight"], numbers["maid_log_smoothing"] = map(float, x)
    rivals = []
    for sequence in scale["sequences"]:
        for stepsize in IMAGE_STEPS:
            method = HOAG(constants, stepsize, 0.1, sequence, max_inner=500)
            loss, _ = _within(problem, method, start, budget)
            rivals.append(float(-10 * np.log10(2 * loss)))
    numbers["noisy_psnr"] = float(-10 * np.log10(jnp.mean((noisy - clean) ** 2)))
    numbers["hoag_psnr"] = float(np.nanmax(rivals))
    numbers["psnr_gain"] = float(min(ours)) - numbers["hoag_psnr"]
    numbers["psnr_spread"] = float(max(ours) - min(ours))


def _within(problem, method, start, budget):
    """The upper loss at the last round within the budget of calls."""
    method = jax.tree.map(jnp.asarray, method)
    return _run_within(problem, method, start, budget)


@eqx.filter_jit
def _run_within(problem, method, start, budget):
    first = method.begin(problem, start)
    dynamic, static = eqx.partition(first, eqx.is_array)

    def go(carry):
        now, _, rounds = carry
        return (eqx.combine(now, static).oracles.total < budget) & (rounds < 400)

    def advance(carry):
        now, _, rounds = carry
        after = method.advance(problem, eqx.combine(now, static))
        return eqx.filter(after, eqx.is_array), now, rounds + 1

    end, before, _ = jax.lax.while_loop(go, advance, (dynamic, dynamic, 0))
    end, before = (eqx.combine(v, static) for v in (end, before))
    over = end.oracles.total > budget
    last = jax.tree.map(lambda a, b: jnp.where(over, a, b), before, end)
    return problem.upper_value(last.x, last.y), last.x


# ------------------------------------------------------------------- logistic


def _cross_entropy(y, data):
    logits = jax.nn.log_softmax(data[0] @ y)
    return -jnp.mean(jnp.take_along_axis(logits, data[1][:, None], axis=1))


def _held_out(x, y, train, validation):
    return _cross_entropy(y, validation)


def _penalised(x, y, train, validation):
    return _cross_entropy(y, train) + jnp.exp(x) * jnp.sum(y**2) / 2


def _logistic_constants(curvature, third, validation, x):
    penalty = jnp.exp(x)
    return Smoothness(
        penalty,
        lower=curvature + penalty,
        upper_y=validation,
        hessian=third,
        cross=penalty,
    )


def _logistic(scale, seed, numbers, curves):
    images, labels = digit_images()
    pixels = images.reshape(len(images), -1)
    parts = split((pixels, labels), [300, 300], seed)[:2]
    inputs = [v / 8 for v in standardise(parts[0][0], parts[1][0])]
    train, validation = (
        (jnp.asarray(z), jnp.asarray(part[1]))
        for z, part in zip(inputs, parts, strict=True)
    )
    problem = BilevelProblem(_held_out, _penalised, train, validation)
    # The softmax's covariance is at most 1/2; the third cumulant of a variable with
    # range r at most r^3 / (6 3^1/2), and here r <= 2^1/2 |u|.
    curvature = np.linalg.norm(inputs[0], 2) ** 2 / 600
    upper = np.linalg.norm(inputs[1], 2) ** 2 / 600
    third = 0.2722 * np.mean(np.linalg.norm(inputs[0], axis=1) ** 3)
    constants = Partial(_logistic_constants, curvature, third, upper)
    start = problem.point(jnp.array(0.0), jnp.zeros((64, 10)))
    budget = scale["logistic_calls"]
    ours = [
        float(
            _within(
                problem,
                MAID(constants, step, 0.1, 0.1, convex=True, max_inner=500),
                start,
                budget,
            )[0]
        )
        for step in LOGISTIC_STEPS
    ]
    rivals = [
        float(
            _within(
                problem, HOAG(constants, step, 0.1, seq, max_inner=500), start, budget
            )[0]
        )
        for seq in scale["sequences"]
        for step in LOGISTIC_STEPS
    ]
    numbers["logistic_maid_loss"] = max(ours)
    numbers["logistic_hoag_loss"] = float(np.nanmin(rivals))
    numbers["logistic_hoag_worst_loss"] = float(np.nanmax(rivals))
