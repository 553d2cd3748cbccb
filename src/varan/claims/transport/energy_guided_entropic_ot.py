"""Entropic transport between continuous measures, learned as an energy-based model.

The claim: training one potential by Langevin negatives solves entropic transport, and
on Gaussians it is competitive with other neural solvers. Parts:

- a Gaussian pair with randomly rotated covariances in d = 2 and 8, whose plan is known:
  the joint law of sampled pairs against it, for a perceptron beside a quadratic, for
  the quadratic alone (which holds the exact optimum), for the independent coupling,
  which has the right marginals too, and for the discrete plan of two samples of 500
  points, extended to new points by its potentials;
- N(0, I) to a swiss roll at epsilon 0.1: the marginal, and points to look at.

Kept: the dual, the gradient, unadjusted chains in a buffer of pairs. Given up: width
512, 100 chain steps (20, at the dual's own temperature), images, StyleGAN latents.

Refuted by: a joint law further from the truth than declared, also with the quadratic
alone, or a dual value above the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from varan.claims import Curve, Measurements
from varan.data import swiss_roll
from varan.metrics import mmd
from varan.transport import (
    bures_wasserstein,
    bw_uvp,
    cost_matrix,
    energy_ot,
    entropic_transport,
    gaussian_entropic_plan,
)

EPSILON = 1.0
WIDTH = 64
BUFFER = 2000
ROLL_RATE = 2e-3
TEST_STEPS = 200


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """All parts for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    key = jax.random.key(seed)
    for d in scale["dimensions"]:
        _gaussians(scale, jax.random.fold_in(key, d), d, numbers, curves)
    if scale["roll"]:
        _roll(scale, jax.random.fold_in(key, 100), numbers, curves)
    return Measurements(numbers, curves)


class _Potential(eqx.Module):
    """A quadratic, beside a perceptron where there is one."""

    matrix: jax.Array
    slope: jax.Array
    net: eqx.nn.MLP | None

    def __call__(self, y):
        value = y @ self.matrix @ y / 2 + self.slope @ y
        return value if self.net is None else value + self.net(y)


def _potential(key, d, perceptron):
    net = eqx.nn.MLP(d, "scalar", WIDTH, 2, jax.nn.silu, key=key)
    return _Potential(jnp.zeros((d, d)), jnp.zeros(d), net if perceptron else None)


def _covariance(key, d):
    for_turn, for_size = jax.random.split(key)
    turn = jax.random.orthogonal(for_turn, d)
    sizes = jnp.exp(jax.random.uniform(for_size, (d,), minval=-0.7, maxval=0.7))
    return (turn * sizes[None]) @ turn.T


def _train(scale, key, source, target, potential, epsilon, rate):
    schedule = optax.cosine_decay_schedule(rate, scale["steps"])
    return energy_ot(
        key,
        source,
        target,
        potential,
        epsilon=epsilon,
        chain_steps=scale["chain_steps"],
        buffer_size=BUFFER,
        steps=scale["steps"],
        # The paper's momenta.
        optimiser=optax.adam(schedule, b1=0.8, b2=0.999),
    )


def _gaussians(scale, key, d, numbers, curves):
    keys = jax.random.split(key, 8)
    zero = jnp.zeros(d)
    first, second = (_covariance(k, d) for k in keys[:2])
    mean, joint = gaussian_entropic_plan(zero, first, zero, second, epsilon=EPSILON)
    batch = scale["batch"]

    def draw(key, covariance, count=batch):
        return jax.random.multivariate_normal(key, zero, covariance, (count,))

    source, target = (partial(draw, covariance=c) for c in (first, second))
    x = draw(keys[2], first, scale["test"])
    y = draw(keys[3], second, scale["test"])

    def apart(other):
        return float(bw_uvp(jnp.concatenate([x, other], axis=1), mean, joint))

    for name in scale["potentials"]:
        potential = _potential(keys[4], d, name == "network")
        fit = _train(scale, keys[5], source, target, potential, EPSILON, scale["rate"])
        run = fit.plan.sample(keys[6], x, steps=TEST_STEPS)
        numbers[f"{name}_{d}_uvp"] = apart(run.samples)
        numbers[f"{name}_{d}_acceptance"] = float(run.acceptance)
        numbers[f"{name}_{d}_finite"] = float(fit.finite)
        if d <= 4 and "draws" in scale:
            dual = fit.plan.dual_value(keys[7], x, y, draws=scale["draws"])
            best = _optimum(joint, d)
            numbers[f"{name}_{d}_dual_gap"] = best - float(dual)
        curves.append(_contrast(fit.contrast, f"d = {d}, {name}"))
    independent = jax.scipy.linalg.block_diag(first, second)
    spread = bures_wasserstein(mean, joint, mean, independent)
    numbers[f"independent_{d}_uvp"] = float(200 * spread / jnp.trace(joint))
    if "network" in scale["potentials"]:
        ratio = numbers[f"network_{d}_uvp"] / numbers[f"independent_{d}_uvp"]
        numbers[f"independent_ratio_{d}"] = ratio
        samples = draw(keys[4], first, 500), draw(keys[5], second, 500)
        numbers[f"discrete_{d}_uvp"] = apart(_discrete(keys[7], x, *samples))
    exact = jax.random.multivariate_normal(keys[7], mean, joint, (scale["test"],))
    # What as many exact pairs score: the noise of the measure.
    numbers[f"noise_{d}_uvp"] = float(bw_uvp(exact, mean, joint))


def _optimum(joint, d):
    """The optimal value for the cost `|x - y|^2 / 2` between centred Gaussians."""
    first, second, cross = joint[:d, :d], joint[d:, d:], joint[:d, d:]
    cost = (jnp.trace(first) + jnp.trace(second)) / 2 - jnp.trace(cross)
    conditional = second - cross.T @ jnp.linalg.solve(first, cross)
    entropy = (d * jnp.log(2 * jnp.pi * jnp.e) + jnp.linalg.slogdet(conditional)[1]) / 2
    return float(cost - EPSILON * entropy)


def _discrete(key, x, sources, targets):
    """Samples of the discrete plan at new points: target points by its potentials."""
    matrix = cost_matrix(sources, targets) / 2
    run = entropic_transport(matrix, epsilon=EPSILON, method="newton")
    logits = (run.potentials[1][None] - cost_matrix(x, targets) / 2) / EPSILON
    return targets[jax.random.categorical(key, logits)]


def _roll(scale, key, numbers, curves):
    for_net, for_fit, for_x, for_y, for_run = jax.random.split(key, 5)
    batch, epsilon = scale["batch"], 0.1

    def source(key, count=batch):
        return jax.random.normal(key, (count, 2))

    def target(key, count=batch):
        return swiss_roll(key, count)

    # No quadratic beside it: where that curves more than the cost, the conditional has
    # no finite mass and the chains run away.
    net = eqx.nn.MLP(2, "scalar", WIDTH, 2, jax.nn.silu, key=for_net)
    fit = _train(scale, for_fit, source, target, net, epsilon, ROLL_RATE)
    x, y = source(for_x, 1000), target(for_y, 1000)
    pushed = fit.plan.sample(for_run, x, steps=TEST_STEPS).samples
    before, after = (float(mmd(z, y, kernel="energy")) for z in (x, pushed))
    numbers["roll_mismatch_before"], numbers["roll_mismatch"] = before, after
    numbers["roll_finite"] = float(fit.finite)
    for cloud, label in ((y, "swiss roll"), (pushed, "pushed samples")):
        shown = cloud[:300]
        curves.append(
            Curve(
                shown[:, 0].tolist(),
                shown[:, 1].tolist(),
                label,
                "swiss roll, epsilon 0.1",
                "first coordinate",
                "second coordinate",
                marker=True,
            )
        )


def _contrast(values, label):
    """The contrast over training, averaged over fiftieths of it."""
    size = max(1, values.shape[0] // 50)
    kept = values[: values.shape[0] // size * size].reshape(-1, size).mean(1)
    return Curve(
        [size * (i + 1) for i in range(kept.shape[0])],
        kept.tolist(),
        label,
        "training",
        "step",
        "mean of f on the target minus on negatives",
    )
