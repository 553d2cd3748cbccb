"""A policy's Lipschitz constant trades generalisation for robustness.

Claim: of policies learned from an expert's demonstrations under a Lipschitz constraint,
those with a smaller constant withstand attacks on the measured state better and follow
the expert worse, and the other way round; learning error, trajectories and regret obey
bounds that need no knowledge of the task.

Kept: fits under the constraint, linear plants with quadratic cost and a nonlinear one,
bounded disturbances of the measurements chosen by an adversary, the bounds. Given up:
the paper's own plants and the constants of its bounds, which are derived anew; the
adversary is a gradient method, hence a lower estimate of the worst disturbance.

Refuted by: a slope above the constant or a measured error above its bound (the method
would be wrong); a regret that does not fall as the constant grows to the expert's, or
an attack whose damage does not grow with the constant.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg as sla
from jaxtyping import Array

from varan.claims import Curve, Measurements
from varan.lipschitz import (
    Box,
    estimate_expert_rate,
    linear_expert_rate,
    lipschitz_policy,
)
from varan.train import start_training, train_epochs

_PROBES = 448  # all pairs of them: 100128
_NOISE = 0.05  # of demonstrated inputs, in units of the expert's constant
_STEPSIZE = 0.3  # of the attack, in units of the disturbance


class LinearPlant(eqx.Module):
    """x+ = A x + B u with a quadratic cost and its optimal linear expert."""

    A: Array
    B: Array
    gain: Array
    domain: Box

    @classmethod
    def make(cls, a, b, weight):
        states, inputs = b.shape
        r = weight * np.eye(inputs)
        p = sla.solve_discrete_are(a, b, np.eye(states), r)
        gain = -np.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
        box = Box.linf(jnp.zeros(states), 1.0)
        return cls(jnp.asarray(a), jnp.asarray(b), jnp.asarray(gain), box)

    def step(self, x, u):
        return self.A @ x + self.B @ u

    def cost(self, x, u):
        return x @ x + 0.1 * u @ u

    def expert(self, x):
        return self.gain @ x

    def rate(self, key):
        del key
        return linear_expert_rate(self.A, self.B, self.gain)


class Pendulum(eqx.Module):
    """An inverted pendulum with a bounded torque.

    The expert is the linear regulator near the top and shapes the energy elsewhere.
    """

    gain: Array
    domain: Box
    interval: float = 0.05
    torque: float = 5.0

    @classmethod
    def make(cls):
        a = np.array([[1.0, 0.05], [0.05 * 9.81, 1.0]])
        plant = LinearPlant.make(a, np.array([[0.0], [0.05]]), 0.1)
        return cls(plant.gain, Box(jnp.array([-2.0, -4.0]), jnp.array([2.0, 4.0])))

    def step(self, x, u):
        speed = x[1] + self.interval * (9.81 * jnp.sin(x[0]) + self._clipped(u)[0])
        return jnp.stack([x[0] + self.interval * speed, speed])

    def cost(self, x, u):
        return 2 * (1 - jnp.cos(x[0])) + 0.1 * x[1] ** 2 + 0.01 * u @ u

    def expert(self, x):
        near = jax.nn.sigmoid((0.6 - jnp.abs(x[0])) / 0.1)
        energy = x[1] ** 2 / 2 + 9.81 * (jnp.cos(x[0]) - 1)
        return self._clipped(near * (self.gain @ x) - (1 - near) * energy * x[1:])

    def rate(self, key):
        return estimate_expert_rate(self, self.expert, self.domain, steps=60, key=key)

    def _clipped(self, u):
        return jnp.clip(u, -self.torque, self.torque)


def plant_of(name: str):
    """A plant by its name; intervals of 0.1 (linear) and 0.05 time units."""
    if name == "pendulum":
        return Pendulum.make()
    if name == "double_integrator":
        a, b = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.005], [0.1]])
        return LinearPlant.make(a, b, 0.1)
    # Two masses, coupled by springs to each other and to walls, and pushed each.
    rates = np.block(
        [
            [np.zeros((2, 2)), np.eye(2)],
            [np.array([[-2.0, 1.0], [1.0, -2.0]]), -0.1 * np.eye(2)],
        ]
    )
    push = np.concatenate([np.zeros((2, 2)), np.eye(2)])
    both = sla.expm(0.1 * np.block([[rates, push], [np.zeros((2, 6))]]))
    return LinearPlant.make(both[:4, :4], both[:4, 4:], 0.1)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Sweeps the constant and the number of demonstrations on every plant."""
    found = {
        name: one_plant(plant_of(name), scale, jax.random.fold_in(key, place))
        for place, name in enumerate(scale["plants"])
        for key in [jax.random.key(seed)]
    }
    numbers = {}
    worst = ("slope_ratio", "learning_ratio", "trajectory_ratio", "error_growth")
    for quantity in worst:
        values = [run[quantity] for run in found.values() if quantity in run]
        if values:
            numbers[quantity] = max(values)
    curves, notes = [], []
    for name, run in found.items():
        plot = name.replace("_", " ")
        for quantity in ("regret_rank", "attack_rank"):
            if quantity in run:
                numbers[f"{quantity}_{name}"] = run[quantity]
        for label in ("regret", "damage"):
            curves.append(
                Curve(
                    list(scale["ratios"]),
                    run[label],
                    label,
                    plot,
                    "constant / expert's",
                    "cost",
                    log_x=True,
                )
            )
        notes.append(note(plot, run))
    return Measurements(numbers, curves, notes)


def note(plot, run) -> str:
    regrets, damages = (lines(run[label]) for label in ("regret", "damage"))
    plain = (
        f", {lines(run['baseline'])} without constraint" if "baseline" in run else ""
    )
    return (
        f"{plot}: the medians of trajectory deviation and of learning error over their "
        f"bounds are {run['trajectory_median']:.3g} and {run['learning_median']:.3g}; "
        f"regret {regrets} and damage by the attack {damages}{plain}."
    )


def lines(values) -> str:
    return ", ".join(f"{v:.3g}" for v in values)


def one_plant(plant, scale, key) -> dict[str, Any]:
    """Everything measured on one plant."""
    keys = jax.random.split(key, 6)
    expert = plant.rate(keys[0])
    constant = float(jnp.linalg.norm(plant.gain, 2))
    noise = _NOISE * constant
    size = max(scale["demonstrations"])
    states, inputs = demonstrate(plant, size, noise, keys[1])
    probes = inside(plant.domain, _PROBES, keys[2])
    shrunk = Box(plant.domain.lower / 2, plant.domain.upper / 2)
    starts = inside(shrunk, scale["starts"], keys[3])
    setting = (plant, expert, noise, probes, starts, scale, keys[4])
    sweep = [
        measured(fit(states, inputs, scale["fixed"], ratio * constant), *setting)
        for ratio in scale["ratios"]
    ]
    run: dict[str, Any] = {
        label: [policy[label] for policy in sweep] for label in ("regret", "damage")
    }
    counts = [
        learning(fit(states, inputs, count, constant), plant, expert, noise, probes)
        for count in scale["demonstrations"]
    ]
    ratios = [p["learning"] for p in sweep] + [error / most for error, most in counts]
    run["slope_ratio"] = max(p["slope"] for p in sweep)
    run["learning_ratio"], run["learning_median"] = max(ratios), median(ratios)
    paths = [p["trajectory"] for p in sweep]
    run["trajectory_median"] = median(paths)
    if isinstance(plant, LinearPlant):
        run["trajectory_ratio"] = max(paths)
    if len(counts) > 1:
        errors = [error for error, _ in counts]
        pairs = itertools.pairwise(errors)
        run["error_growth"] = max(late / early for early, late in pairs)
    below = [r for r in scale["ratios"] if r <= 1]
    if len(below) > 2:
        run["regret_rank"] = rank(below, run["regret"][: len(below)])
        run["attack_rank"] = rank(scale["ratios"], run["damage"])
    if scale["baseline_steps"]:
        chosen = slice(None, scale["fixed"])
        network = trained(states[chosen], inputs[chosen], scale, keys[5])
        plain = attacked(network, plant, starts, scale, keys[4])
        run["baseline"] = plain[:2]
    return run


def demonstrate(plant, count, noise, key):
    """States of the domain and the expert's inputs there, off by at most `noise`."""
    for_states, for_noise, for_size = jax.random.split(key, 3)
    states = inside(plant.domain, count, for_states)
    inputs = jax.vmap(plant.expert)(states)
    away = jax.random.normal(for_noise, inputs.shape)
    away = away / jnp.linalg.norm(away, axis=1, keepdims=True)
    return states, inputs + noise * jax.random.uniform(for_size, (count, 1)) * away


def fit(states, inputs, count, alpha):
    """The policy of the first demonstrations; both extensions keep its constant."""
    extension = "mcshane" if inputs.shape[1] == 1 else "kirszbraun"
    return lipschitz_policy(states[:count], inputs[:count], alpha, extension=extension)


def inside(box, count, key):
    share = jax.random.uniform(key, (count, box.lower.size))
    return box.lower + share * (box.upper - box.lower)


def learning(policy, plant, expert, noise, probes):
    """The largest error at the probes, and its bound."""
    error = evaluate(policy, probes) - jax.vmap(plant.expert)(probes)
    bound = policy.learning_error(expert, plant.domain, noise=noise).value
    return float(jnp.max(jnp.linalg.norm(error, axis=1))), float(bound)


def measured(policy, plant, expert, noise, probes, starts, scale, key):
    """Slopes, errors, trajectories and the attack's damage for one policy."""
    error, bound = learning(policy, plant, expert, noise, probes)
    regret, damage, worst = attacked(policy, plant, starts, scale, key)
    ratios = []
    for start, per_start in zip(starts, worst, strict=True):
        path = expert_path(plant, start, scale["steps"])
        for size, deviations in zip(scale["disturbances"], per_start, strict=True):
            found = policy.certificate(
                plant, expert, path, plant.domain, disturbance=size, noise=noise
            )
            bounds = found.details["deviations"][1:]
            ratios.append(float(jnp.max(deviations[1:] / bounds)))
    return {
        "slope": float(steepest(policy, probes) / policy.lipschitz),
        "learning": error / bound,
        "trajectory": max(ratios),
        "regret": regret,
        "damage": damage,
    }


@eqx.filter_jit
def evaluate(policy, states):
    return jax.vmap(policy)(states)


@eqx.filter_jit
def steepest(policy, points):
    """The largest slope over all pairs of points."""
    values = jax.vmap(policy)(points)
    first, second = np.triu_indices(len(points), 1)
    rise = jnp.linalg.norm(values[first] - values[second], axis=1)
    return jnp.max(rise / jnp.linalg.norm(points[first] - points[second], axis=1))


@eqx.filter_jit
def expert_path(plant, start, steps):
    def step(x, _):
        u = plant.expert(x)
        return plant.step(x, u), (x, u)

    last, (states, inputs) = jax.lax.scan(step, start, None, steps)
    return jnp.concatenate([states, last[None]]), inputs


def attacked(policy, plant, starts, scale, key):
    """Mean regret, mean damage over starts and sizes, and the deviations found."""
    sizes = jnp.asarray(scale["disturbances"])
    settings = scale["steps"], scale["ascents"]
    regret, damage, deviations = _attacked(policy, plant, starts, sizes, key, *settings)
    return float(jnp.mean(regret)), float(jnp.mean(damage)), deviations


@eqx.filter_jit
def _attacked(policy, plant, starts, sizes, key, steps, ascents):
    """Projected gradients on the disturbance of every measurement, for the cost."""

    def rollout(start, noise):
        def step(x, e):
            u = policy(x + e)
            return plant.step(x, u), (x, plant.cost(x, u))

        last, (path, costs) = jax.lax.scan(step, start, noise)
        return jnp.sum(costs), jnp.concatenate([path, last[None]])

    def bounded(noise, size):
        length = jnp.linalg.norm(noise, axis=1, keepdims=True)
        return noise * jnp.minimum(1, size / jnp.maximum(length, 1e-12))

    def one(start, size, key):
        path, inputs = expert_path(plant, start, steps)
        calm, straight = rollout(start, jnp.zeros((steps, start.size)))
        optimal = jnp.sum(jax.vmap(plant.cost)(path[:-1], inputs))
        noise = bounded(jax.random.normal(key, (steps, start.size)), size)
        gradient = jax.value_and_grad(rollout, argnums=1, has_aux=True)

        def ascend(carry, _):
            noise, best, worst = carry
            (cost, there), slope = gradient(start, noise)
            apart = jnp.linalg.norm(there - path, axis=1)
            length = jnp.linalg.norm(slope, axis=1, keepdims=True)
            onward = noise + _STEPSIZE * size * slope / jnp.maximum(length, 1e-12)
            carry = bounded(onward, size), jnp.maximum(best, cost)
            return (*carry, jnp.maximum(worst, apart)), None

        begin = noise, calm, jnp.linalg.norm(straight - path, axis=1)
        (_, best, worst), _ = jax.lax.scan(ascend, begin, None, ascents)
        return calm - optimal, best - calm, worst

    keys = jax.random.split(key, (len(starts), len(sizes)))
    each = jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, 0))
    return each(starts, sizes, keys)


def trained(states, inputs, scale, key):
    """An unconstrained perceptron fitted to the same demonstrations by Adam."""
    for_network, for_order = jax.random.split(key)
    shape = states.shape[1], inputs.shape[1], 32, 2
    network = eqx.nn.MLP(*shape, jax.nn.tanh, key=for_network)
    optimiser = optax.adam(1e-2)
    state = start_training(network, optimiser, key=for_order)
    trained, _ = train_epochs(
        state,
        squares,
        (states, inputs),
        optimiser,
        epochs=scale["baseline_steps"],
        batch_size=len(states),
    )
    return trained.model


def squares(network, batch):
    states, inputs = batch
    return jnp.mean(jnp.sum((jax.vmap(network)(states) - inputs) ** 2, 1))


def rank(ratios, values) -> float:
    """Spearman's rank correlation; 0 where all values are the same."""
    from scipy.stats import spearmanr

    found = np.asarray(spearmanr(ratios, values))[0]
    return float(np.nan_to_num(found))


def median(values) -> float:
    return float(np.median(values))
