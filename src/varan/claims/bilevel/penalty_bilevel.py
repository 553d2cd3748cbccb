"""Penalty methods: first derivatives, many lower answers, a bias of order sigma.

The claim: with `psi_s(x) = (min_y (s F + f) - min_y f) / s`, value and gradient of the
bilevel problem are met to `O(s)` under a proximal error bound, also when the lower
level has many answers or is not convex, and first-order methods reach a stationary
point of `psi_s` in `O(eps^-3)` calls without noise, in a single loop with it. Parts:

- landscape and bounds: a rank-deficient quadratic lower level, closed forms, without
  and with active bounds; the explicit gradient by the pseudo-inverse;
- control: the paper's example without error bound, where no `s` is small enough;
- rate: calls until the gradient of `psi_s` is at most `eps`, a nonconvex lower level
  with the Polyak-Lojasiewicz property;
- noise: single loop, double loop and F2SA at equal calls on the same problem;
- cleaning: digits with flipped labels, against implicit gradients at equal calls.

Kept: methods and orders. Given up: growing loops, worst-case constants. Refuted by: an
order other than one, an exponent above 3.2, a single loop that ends farther from
stationarity than the double loop, worse weights than those of second derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from varan import NewtonCG, Smooth, solve
from varan.bilevel import (
    AIDCG,
    F2SA,
    BilevelProblem,
    Penalty,
    SingleLoopPenalty,
    data_cleaning,
    hypergradient_pinv,
    penalty_hypergradient,
    trajectory,
)
from varan.claims import Curve, Measurements
from varan.data import digit_images, flip_labels, split
from varan.metrics import accuracy, roc_auc
from varan.operators import Polyhedron

SIGMAS = (1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2)
BOUND = 0.5
EPSILONS = tuple(2.0**-k for k in range(3, 8))
# Equal grids: six factors of the upper, three lower stepsizes (or values of sigma).
FACTORS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
LOWER = (0.02, 0.04, 0.07)
NOISE, NOISY_SIGMA = 0.3, 0.05
CLEANING_STEPS = (10.0, 30.0, 100.0, 300.0)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    parts = {
        "landscape": _landscape,
        "bounds": _bounds,
        "control": _control,
        "rate": _rate,
        "noise": _noise,
        "cleaning": _cleaning,
    }
    for name in scale["parts"]:
        parts[name](scale, seed, numbers, curves)
    return Measurements(numbers, curves)


# ------------------------------------------------------------------ landscape


def _quadratic_upper(x, y, G, A, t):
    return jnp.sum((y - t) ** 2) / 2 + 0.05 * jnp.sum(x**2)


def _quadratic_lower(x, y, G, A, t):
    return jnp.sum((G @ y - A @ x) ** 2) / 2


def _instance(seed):
    """Data, and a point whose lower answers meet the bounds."""
    draw = np.random.default_rng(seed)
    G, A, t = (draw.standard_normal(s) for s in ((5, 10), (5, 5), 10))
    G, A, t = (jnp.asarray(v) for v in (G, A, t))
    return (G, A, t), jnp.linalg.solve(A, G @ jnp.asarray(draw.uniform(-0.3, 0.3, 10)))


def _landscape(scale, seed, numbers, curves):
    (G, A, t), x = _instance(seed)

    def best(x):
        return t + jnp.linalg.pinv(G) @ (A @ x - G @ t)

    problem = BilevelProblem(_quadratic_upper, _quadratic_lower, G, A, t, unique=False)
    value = problem.upper_value(x, best(x))
    exact = hypergradient_pinv(problem, x, best(x)).value
    closed = _differences(lambda x: problem.upper_value(x, best(x)), x)
    numbers["pinv_error"] = float(_relative(exact, closed))
    errors = _orders(problem, x, best(x), value, exact, "", numbers)
    curves.append(_bias_curve(errors, "whole space"))


def _bounds(scale, seed, numbers, curves):
    (G, A, t), x = _instance(seed)
    sides = jnp.concatenate([jnp.eye(10), -jnp.eye(10)])
    inside = Polyhedron(G, A @ x, sides, jnp.full(20, BOUND))
    nearest = inside.project(t, tol=1e-13, max_steps=100_000)
    numbers["active_bounds"] = float(jnp.sum(nearest.multipliers[5:] > 1e-6))
    problem = BilevelProblem(
        _quadratic_upper, _quadratic_lower, G, A, t, project_y=_clip, unique=False
    )
    slope = 0.1 * x - A.T @ nearest.multipliers[:5]
    value = problem.upper_value(x, nearest.x)
    errors = _orders(problem, x, nearest.x, value, slope, "box_", numbers)
    curves.append(_bias_curve(errors, "active bounds"))


def _bias_curve(errors, label):
    return Curve(
        SIGMAS,
        np.asarray(errors),
        label,
        "bias of the gradient",
        "sigma",
        "error of the gradient",
        log_x=True,
        log_y=True,
        marker=True,
    )


def _clip(y):
    return jnp.clip(y, -BOUND, BOUND)


def _orders(problem, x, start, value, gradient, name, numbers):
    """Orders in sigma of the errors of value and gradient."""
    found = _penalised(problem, x, start, jnp.asarray(SIGMAS))
    values = jnp.abs(found.value - value)
    gradients = jnp.linalg.norm(found.gradient - gradient, axis=1)
    numbers[f"{name}value_slope"] = _slope(SIGMAS, values)
    numbers[f"{name}gradient_slope"] = _slope(SIGMAS, gradients)
    # The penalised value is never above the true one, up to the minimisers' errors.
    numbers[f"{name}value_excess"] = float(jnp.max(found.value - value))
    return gradients


@eqx.filter_jit
def _penalised(problem, x, start, sigmas):
    def one(sigma):
        return penalty_hypergradient(
            problem, x, start, sigma, tol=1e-12, max_steps=20_000
        )

    return jax.lax.map(one, sigmas)


def _control(scale, seed, numbers, curves):
    """The paper's example: `psi = x^2 + 1` for `x != 0`, and no error bound at 0."""
    problem = BilevelProblem(
        lambda x, y: x**2 + y**2,
        lambda x, y: x * y,
        project_y=lambda y: jnp.clip(y, -1.0, 1.0),
        unique=False,
    )
    xs = jnp.geomspace(1e-5, 1e-2, 16)

    @jax.jit
    def errors(sigma):
        def one(x):
            found = penalty_hypergradient(problem, x, jnp.zeros(()), sigma, tol=1e-9)
            return jnp.abs(found.value - (x**2 + 1))

        return jax.vmap(one)(xs)

    worst = [float(jnp.max(errors(s))) for s in SIGMAS]
    numbers["control_error"] = min(worst)


# ----------------------------------------------------------------------- rate


class _Noise(eqx.Module):
    """Gradients' noise; zero for the problem itself."""

    upper_x: jax.Array
    upper_y: jax.Array
    lower_x: jax.Array
    lower_y: jax.Array
    coupling: jax.Array


def _pl_upper(x, y, G, A, t, noise):
    value = jnp.sum((y - t) ** 2) / 2 + jnp.sum(jnp.cos(2 * x)) / 4
    return value + 0.05 * jnp.sum(x**2) + noise.upper_x @ x + noise.upper_y @ y


def _pl_lower(x, y, G, A, t, noise):
    u = G @ y - A @ x
    value = jnp.sum(u**2 + 3 * jnp.sin(u) ** 2)
    bilinear = y @ (noise.coupling @ x)
    return value + noise.lower_x @ x + noise.lower_y @ y + bilinear


def _draw_noise(key, G, A, t, noise):
    leaves, structure = jax.tree.flatten(noise)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        NOISE * jax.random.normal(k, v.shape, v.dtype)
        for k, v in zip(keys, leaves, strict=True)
    ]
    return G, A, t, jax.tree.unflatten(structure, drawn)


def _pl_problem(seed, sample=None):
    """`f = phi(G y - A x)`, `phi = u^2 + 3 sin^2 u`: not convex, minimal on a plane."""
    draw = np.random.default_rng([seed, 1])
    G = np.linalg.qr(draw.standard_normal((6, 3)))[0].T
    A = np.linalg.qr(draw.standard_normal((3, 3)))[0]
    t = draw.standard_normal(6)
    zeros = _Noise(*(jnp.zeros(s) for s in (3, 6, 3, 6, (6, 3))))
    problem = BilevelProblem(
        _pl_upper,
        _pl_lower,
        *map(jnp.asarray, (G, A, t)),
        zeros,
        sample=sample,
        unique=False,
    )
    return problem, problem.point(jnp.asarray(draw.uniform(1, 2, 3)), jnp.zeros(6))


def _seen(problem, iterate):
    return iterate.x, iterate.y, iterate.oracles.total


def _rate(scale, seed, numbers, curves):
    problem, start = _pl_problem(seed)
    every = 40
    calls = []
    for eps in EPSILONS:
        method = Penalty(0.3 * eps, 0.07, eps, rho=0.2, inner_steps=5)
        _, (x, y, spent) = trajectory(
            problem, method, start, _seen, steps=scale["rate_steps"], every=every
        )
        norms = np.asarray(_penalised_norms(problem, x, y, eps))
        reached = np.flatnonzero(norms <= eps)
        calls.append(float(spent[reached[0]]) if reached.size else np.inf)
    steep = (
        _slope(1 / np.asarray(EPSILONS), calls)
        if np.all(np.isfinite(calls))
        else np.inf
    )
    numbers["rate_exponent"] = steep
    numbers["calls_at_smallest_eps"] = calls[-1]
    curves.append(
        Curve(
            1 / np.asarray(EPSILONS),
            calls,
            "double loop",
            "calls to stationarity",
            "1 / eps",
            "first-order calls",
            log_x=True,
            log_y=True,
            marker=True,
        )
    )


@eqx.filter_jit
def _penalised_norms(problem, x, y, sigma):
    def one(x, y):
        found = penalty_hypergradient(problem, x, y, sigma, tol=1e-6)
        return jnp.linalg.norm(found.gradient)

    return jax.vmap(one)(x, y)


# ---------------------------------------------------------------------- noise


def _noise(scale, seed, numbers, curves):
    """Final gradient norm of `psi`, each method at the best of an equal grid."""
    budget, sigma = scale["budget"], NOISY_SIGMA
    methods = {
        "single": (6, partial(SingleLoopPenalty, sigma=sigma, rho=0.2)),
        "double": (
            30,
            partial(Penalty, sigma=sigma, rho=0.2, inner_steps=5, samples=5),
        ),
        "f2sa": (6, partial(F2SA, penalty=1 / sigma, power=0.0)),
    }
    problem, start = _pl_problem(seed, sample=_draw_noise)
    settings = [(0.3 * sigma * f, low) for f in FACTORS for low in LOWER]
    upper, lower = (jnp.asarray(v) for v in zip(*settings, strict=True))
    for name, (cost, make) in methods.items():
        steps = budget // cost

        @jax.jit
        def final(upper, lower, key, make=make, steps=steps):
            method = make(upper, lower, key=key)
            _, norms = trajectory(
                problem, method, start, _true_norm, steps=steps, every=steps // 100
            )
            return jnp.mean(norms[-20:])

        # Tuned on other draws than those that are measured.
        tuning, measured = jax.random.split(jax.random.key(seed))
        grid = jax.vmap(final, (0, 0, None))(upper, lower, tuning)
        chosen = int(jnp.nanargmin(grid))
        result = jax.vmap(final, (0, 0, None))(upper, lower, measured)[chosen]
        numbers[f"{name}_norm"] = float(result)
        numbers[f"{name}_factor"] = float(upper[chosen] / (0.3 * sigma))
    numbers["single_over_double"] = numbers["single_norm"] / numbers["double_norm"]
    numbers["single_over_f2sa"] = numbers["single_norm"] / numbers["f2sa_norm"]


def _true_norm(problem, iterate):
    """`psi` in closed form: G has orthonormal rows."""
    G, A, t, _ = problem.params
    x = iterate.x
    slope = A.T @ (A @ x - G @ t) - jnp.sin(2 * x) / 2 + 0.1 * x
    return jnp.linalg.norm(slope)


# ------------------------------------------------------------------- cleaning


def _losses(y, data):
    logits = data[0] @ y["weight"] + y["bias"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), data[1][:, None], 1)[:, 0]


def _cleaning(scale, seed, numbers, curves):
    images, labels = digit_images()
    pixels = images.reshape(len(images), -1)
    train, validation, test = split((pixels, labels), [300, 200], seed)
    noisy, flipped = flip_labels(train[1], 0.4, seed)
    train, validation, test = (
        (jnp.asarray(a), jnp.asarray(b))
        for a, b in ((train[0], noisy), validation, test)
    )
    problem = data_cleaning(_losses, train, validation, penalty=1e-3)
    zero = {"weight": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    start = problem.point(jnp.zeros(300), zero)
    calls = scale["cleaning_calls"]
    # Per round: 18 first-order calls; 5 gradients, 6 + 1 products and 1 gradient.
    runs = {
        "penalty": (
            18,
            [
                Penalty(a, 0.2, s, rho=2.0, averaging=1.0, inner_steps=5)
                for a in CLEANING_STEPS
                for s in (0.01, 0.03, 0.1)
            ],
        ),
        "implicit": (
            13,
            [
                AIDCG(a, low, inner_steps=5, adjoint_steps=5)
                for a in CLEANING_STEPS
                for low in (0.2, 0.5, 1.0)
            ],
        ),
    }
    for name, (cost, methods) in runs.items():
        steps = calls // cost
        tried = []
        for method in methods:
            last, _ = trajectory(
                problem, method, start, _seen_x, steps=steps, every=steps
            )
            y = _train(problem, last.x, zero)
            loss = float(problem.upper_value(last.x, y))
            tried.append((loss if np.isfinite(loss) else np.inf, last.x, y))
        loss, x, y = min(tried, key=lambda run: run[0])
        numbers[f"{name}_accuracy"] = _accuracy(y, test)
        numbers[f"{name}_validation_loss"] = loss
        numbers[f"{name}_weight_auc"] = float(roc_auc(x, jnp.asarray(~flipped)))
    plain = _train(problem, jnp.full(300, 10.0), zero)
    numbers["unweighted_accuracy"] = _accuracy(plain, test)
    gain = numbers["penalty_accuracy"] - numbers["implicit_accuracy"]
    numbers["accuracy_gain_implicit"] = gain


def _seen_x(problem, iterate):
    return iterate.oracles.total


@eqx.filter_jit
def _train(problem, x, start):
    """The lower level's answer for given weights."""
    loss = Smooth(lambda y, x: problem.lower_value(x, y), x, convex=True)
    return solve(loss, NewtonCG(), start, tol=1e-6, max_steps=200).x


def _accuracy(y, data):
    return float(accuracy(data[0] @ y["weight"] + y["bias"], data[1]))


def _slope(x, y):
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)[0])


def _relative(found, wanted):
    return jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)


def _differences(function, x, step=1e-5):
    """Central differences of a function of a vector."""
    shifts = step * jnp.eye(x.size)
    both = jax.jit(jax.vmap(lambda e: function(x + e) - function(x - e)))
    return both(shifts) / (2 * step)
