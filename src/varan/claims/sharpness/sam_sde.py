"""SAM, USAM and DNSAM follow stochastic differential equations.

Claim. (1) Over a fixed time the SDEs' expectations are within O(eta) of the
algorithms', for rho proportional to sqrt(eta); SGD's SDE, without the terms in rho, is
not. (2) Around a minimum the noise depends on the Hessian: unnormalised SAM settles
with variance eta s^2 (1 + rho l) / (2 l) along curvature l. (3) Saddles attract: USAM
where rho |l| > 1, SAM where |Hx| < rho |l|.

Kept: all three, each against the optimisers themselves. (1) and the exact law of (2)
are computed without sampling. Given up: the paper's networks.

Refuted by: a slope of the error away from one; SGD's SDE doing as well; another
stationary variance; an iterate that leaves the saddle. A horizon of order one sees the
noise only at the order of the error itself, so (1) tests the drift and (2) the noise;
`noise_free_ratio` shows how little the noise matters to (1).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.linalg import expm

from varan.claims import Curve, Measurements
from varan.sharpness import SamSDE, dnsam, sam, stationary_variance, usam

from . import _sam_sde_expectations as exact

RADIUS = 0.5  # rho over sqrt(eta)
START = (2.0, 1.5)
BATCHES, SPREAD = 8, 0.3
CURVATURES, NOISE, STEPSIZE, RHO = np.array([0.5, 2.0, 8.0]), 0.3, 0.01, 0.1
SADDLE, SADDLE_STEPSIZE, SADDLE_STEPS = np.array([1.0, -0.5]), 0.05, 2000
ESCAPE_RHO, ESCAPE_NOISE, ESCAPE_STEPS, ESCAPED = 0.2, 0.1, 4000, 1.0


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures every part of the claim once."""
    keys = jax.random.split(jax.random.key(seed), 5)
    parts = [_regression(scale["stepsizes"], keys[0])]
    for variant in scale["variants"]:
        parts.append(_quartic(variant, scale["stepsizes"], keys[1]))
    parts.append(_stationary(scale["chains"], scale["stationary_steps"], keys[2]))
    parts.append(_saddle(keys[3]))
    if scale["escapes"]:
        parts.append(_escape(scale["escapes"], keys[4]))
    numbers = {name: value for part in parts for name, value in part.numbers.items()}
    return Measurements(numbers, [curve for part in parts for curve in part.curves])


def _regression(stepsizes, key, dim=5, rows=12):
    """Least squares from single samples: moments close, so nothing is approximated."""
    features, targets = jax.random.split(key)
    features = jax.random.normal(features, (rows, dim)) / np.sqrt(dim)
    batches = features, jax.random.normal(targets, (rows,))

    def loss(x, batch):
        return (batch[0] @ x - batch[1]) ** 2 / 2

    weights = jnp.concatenate([features, -batches[1][:, None]], axis=1)
    quadratic = weights.T @ weights / (2 * rows)

    start = jnp.ones(dim)

    @jax.jit
    def closed(stepsize, steps, radius):
        sde = SamSDE(loss, batches, stepsize, radius * jnp.sqrt(stepsize), "usam")
        after = exact.affine_algorithm_moments(sde, start, steps)
        return after, exact.affine_sde_generator(sde, dim)

    table = []
    for stepsize in stepsizes:
        steps = round(exact.HORIZON / stepsize)
        truth, ours = closed(stepsize, steps, RADIUS)
        _, plain = closed(stepsize, steps, 0.0)
        ends = [
            expm(exact.HORIZON * np.asarray(generator)) @ exact.augmented(start).ravel()
            for generator in (ours, plain)
        ]
        gaps = [quadratic.ravel() @ (end - truth.ravel()) for end in ends]
        table.append([abs(float(gap)) for gap in gaps])
    ours, plain = np.array(table).T
    return _weak_part("regression", stepsizes, ours, plain)


def _quartic(variant, stepsizes, key):
    """A quartic whose batches differ in slope and Hessian, followed to t = 1."""
    batches = _population(key)
    most = round(exact.HORIZON / min(stepsizes))
    start = jnp.array(START)

    @jax.jit
    def truth(stepsize, steps):
        return exact.algorithm_expectation(model(stepsize, RADIUS), start, steps, most)

    @jax.jit
    def follow(stepsize, radius, noise):
        return exact.sde_expectation(model(stepsize, radius), start, noise=noise)

    def model(stepsize, radius):
        return SamSDE(_loss, batches, stepsize, radius * jnp.sqrt(stepsize), variant)

    rows = []
    for stepsize in stepsizes:
        right = truth(stepsize, round(exact.HORIZON / stepsize))
        settings = [(RADIUS, 1.0), (0.0, 1.0), (RADIUS, 0.0)]
        rows.append([abs(float(follow(stepsize, *s) - right)) for s in settings])
    ours, plain, silent = np.array(rows).T
    part = _weak_part(variant, stepsizes, ours, plain)
    part.numbers[f"noise_free_ratio_{variant}"] = float(silent[-1] / ours[-1])
    return part


def _loss(x, batch):
    hessian, slope = batch
    return x @ hessian @ x / 2 + slope @ x + 0.1 * jnp.sum(x**4)


def _population(key):
    first, second = jax.random.split(key)
    hessians = SPREAD * jax.random.normal(first, (BATCHES, 2, 2))
    hessians = (hessians + jnp.swapaxes(hessians, 1, 2)) / 2
    slopes = SPREAD * jax.random.normal(second, (BATCHES, 2))
    hessians = hessians - jnp.mean(hessians, axis=0) + jnp.diag(jnp.array([1.0, 0.5]))
    return hessians, slopes - jnp.mean(slopes, axis=0)


def _weak_part(name, stepsizes, ours, plain):
    slope = np.polyfit(np.log(stepsizes), np.log(ours), 1)[0]
    numbers = {
        f"weak_slope_{name}": float(slope),
        f"sgd_ratio_{name}": float(plain[-1] / ours[-1]),
    }
    curves = [
        Curve(
            list(stepsizes),
            errors.tolist(),
            label,
            f"weak error, {name}",
            "stepsize",
            "error of E f at t = 1",
            log_x=True,
            log_y=True,
        )
        for label, errors in ((f"its SDE ({name})", ours), ("SGD's SDE", plain))
    ]
    return Measurements(numbers, curves)


@partial(jax.jit, static_argnames=("steps", "chains"))
def _simulate_stationary(key, chains, steps):
    method = usam(optax.sgd(STEPSIZE), RHO)
    burn = steps // 3

    def one_chain(x, noise):
        def gradient(y, i=0):
            return CURVATURES * y + noise

        return x + method.update(gradient(x), method.init(x), x, grad_fn=gradient)[0]

    def step(carry, number):
        x, squares = carry
        noise = NOISE * jax.random.normal(jax.random.fold_in(key, number), x.shape)
        x = jax.vmap(one_chain)(x, noise)
        return (x, squares + jnp.where(number >= burn, jnp.mean(x**2, 0), 0)), None

    start = (jnp.zeros((chains, 3)), jnp.zeros(3))
    (_, squares), _ = jax.lax.scan(step, start, jnp.arange(steps))
    return squares / (steps - burn)


def _stationary(chains, steps, key):
    measured = np.asarray(_simulate_stationary(key, chains, steps))
    settings = (CURVATURES, NOISE, STEPSIZE, RHO)
    laws = {
        name: np.asarray(stationary_variance(*settings, model=name))
        for name in ("iterates", "sde")
    }
    sgd = np.asarray(stationary_variance(CURVATURES, NOISE, STEPSIZE, 0.0))
    numbers = {
        f"stationary_{name}_error": float(np.max(np.abs(measured / law - 1)))
        for name, law in laws.items()
    }
    series = {"measured": measured, **laws, "SGD, exact": sgd}
    curves = [
        Curve(
            CURVATURES.tolist(),
            values.tolist(),
            label,
            "stationary variance of USAM",
            "curvature",
            "variance",
            log_x=True,
            log_y=True,
            marker=label == "measured",
        )
        for label, values in series.items()
    ]
    return Measurements(numbers, curves)


def _saddle(key):
    """Noiseless steps from beside a saddle."""
    start = 0.01 * (1 + 0.2 * jax.random.uniform(key, (2,)))
    base = optax.sgd(SADDLE_STEPSIZE)
    methods = {"GD": usam(base, 0.0), "USAM": usam(base, 3.0), "SAM": sam(base, 0.3)}
    curves, ends = [], {}
    for name, method in methods.items():

        def step(x, _, method=method):
            def gradient(y, i=0):
                return SADDLE * y

            updates, _ = method.update(gradient(x), method.init(x), x, grad_fn=gradient)
            return x + updates, jnp.abs(x[1])

        _, sizes = jax.lax.scan(step, start, length=SADDLE_STEPS)
        ends[name] = np.asarray(sizes)
        # Down to where rounding to zero would leave the logarithmic axis.
        shown = np.clip(ends[name], 1e-30, 1e6)[::10]
        steps = list(range(0, SADDLE_STEPS, 10))
        curves.append(
            Curve(
                steps,
                shown.tolist(),
                name,
                "beside a saddle",
                "step",
                "distance along the descent direction",
                log_y=True,
            )
        )
    left = np.flatnonzero(ends["GD"] > 1e3)
    numbers = {
        "saddle_gd_leaves_after": float(left[0]) if len(left) else float("inf"),
        "saddle_usam_distance": float(ends["USAM"][-1]),
        "saddle_sam_distance": float(ends["SAM"][-1]),
    }
    return Measurements(numbers, curves)


@partial(jax.jit, static_argnames=("name", "paths"))
def _escape_times(name, key, paths):
    base = optax.sgd(SADDLE_STEPSIZE)
    method = {"sgd": usam, "dnsam": dnsam, "sam": sam}[name](
        base, 0.0 if name == "sgd" else ESCAPE_RHO
    )

    def full(x):
        return SADDLE * x + 0.1 * x**3

    def one(x, noise):
        updates, _ = method.update(
            full(x) + noise,
            method.init(x),
            x,
            grad_fn=lambda y, i: full(y) + noise,
            full_grad_fn=full,
        )
        return x + updates

    def step(carry, number):
        x, times = carry
        noise = jax.random.normal(jax.random.fold_in(key, number), x.shape)
        x = jax.vmap(one)(x, ESCAPE_NOISE * noise)
        inside = jnp.isinf(times) & (jnp.abs(x[:, 1]) <= ESCAPED)
        return (x, jnp.where(inside | jnp.isfinite(times), times, number + 1.0)), None

    start = (jnp.full((paths, 2), 0.01), jnp.full(paths, jnp.inf))
    return jax.lax.scan(step, start, jnp.arange(ESCAPE_STEPS))[0][1]


def _escape(paths, key):
    numbers, curves = {}, []
    for name in ("sgd", "dnsam", "sam"):
        times = np.sort(np.asarray(_escape_times(name, key, paths)))
        numbers[f"escape_steps_{name}"] = float(np.median(times))
        left = np.isfinite(times)
        curves.append(
            Curve(
                times[left].tolist(),
                (np.arange(1, paths + 1) / paths)[left].tolist(),
                name,
                "escape from a saddle with noise",
                "step",
                "fraction that has left",
                log_x=True,
            )
        )
    return Measurements(numbers, curves)
