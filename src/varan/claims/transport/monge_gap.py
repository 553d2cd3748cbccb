"""The Monge gap: one regulariser makes a plain network an optimal transport map.

The claim: minimising a Sinkhorn divergence to the target plus the Monge gap fits
transport maps better than convex networks do, for any cost. Two parts:

- a known Brenier map, the gradient of a log-sum-exp of affine functions plus a
  quadratic, from N(0, I) in d = 2 and 8; a perceptron with a linear skip that starts at
  a random rotation, since a map that preserves the source is what the gap must rule
  out: without the gap, with it, the dual of Makkuva and others with two convex
  networks, and the optimal linear map between the Gaussians of the samples;
- the sphere with the geodesic distance, between two clouds, from a rotated start.

Batches, steps and network width are the same for all. The convex networks take two
steps of the conjugate for each of the potential, together as many steps, at the best of
three rates, chosen by the truth; ours have one rate.
Kept: method, losses, the kind of truth. Given up: the benchmark of Korotin and others
up to d = 256, single-cell data. Gaps are exact, on held-out points, by an assignment
solver.

Refuted by: a gap that hardly falls, a map no nearer to the true one than without it, a
fit that suffers, or convex networks that come nearer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from varan.claims import Curve, Measurements
from varan.data import sphere_points
from varan.nets import InputConvex
from varan.transport import (
    exact_monge_gap,
    fit_map,
    gaussian_map,
    l2_uvp,
    monge_gap,
    sinkhorn_divergence,
)

WIDTH = 64
# Of the mean cost between the samples, measured once before training.
EPSILON_SHARE = 0.05
WEIGHT = 1.0
INNER = 2
# The convex networks take the one that ends nearest to the truth.
CONVEX_RATES = (1e-3, 3e-3, 1e-2)
HELD_OUT = 512
SINKHORN = {"method": "sinkhorn", "tol": 1e-3, "max_steps": 200}


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """All parts for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    key = jax.random.key(seed)
    for d in scale["dimensions"]:
        _brenier(scale, jax.random.fold_in(key, d), d, numbers, curves)
    if scale["sphere"]:
        _sphere(scale, jax.random.fold_in(key, 3), numbers)
    return Measurements(numbers, curves)


class _Skip(eqx.Module):
    """A perceptron beside a linear map that starts at a rotation."""

    matrix: jax.Array
    net: eqx.nn.MLP
    on_sphere: bool = eqx.field(static=True, default=False)

    def __call__(self, x):
        y = self.matrix @ x + self.net(x)
        return y / jnp.linalg.norm(y) if self.on_sphere else y


def _model(key, d, on_sphere=False):
    for_matrix, for_net = jax.random.split(key)
    net = eqx.nn.MLP(d, d, WIDTH, 2, jax.nn.gelu, key=for_net)
    # The last layer starts small, so that the map starts at the rotation.
    net = eqx.tree_at(lambda n: n.layers[-1], net, replace_fn=_shrink)
    return _Skip(jax.random.orthogonal(for_matrix, d), net, on_sphere)


def _shrink(layer):
    return jax.tree.map(lambda leaf: 0.01 * leaf, layer)


def _optimiser(scale):
    schedule = optax.cosine_decay_schedule(1e-2, scale["steps"])
    return optax.adam(schedule)


def _brenier(scale, key, d, numbers, curves):
    for_truth, for_model, for_fit, for_test, for_net = jax.random.split(key, 5)
    slopes = 2 * jax.random.normal(for_truth, (4, d)) / d**0.5
    batch = scale["batch"]

    def truth(x):
        return x + jax.nn.softmax(slopes @ x) @ slopes

    def source(key):
        return jax.random.normal(key, (batch, d))

    def target(key):
        return jax.vmap(truth)(source(key))

    test = jax.random.normal(for_test, (HELD_OUT, d))
    exact = jax.vmap(truth)(test)
    model = _model(for_model, d)
    shift = jnp.mean(jnp.sum((test[:, None] - exact[None]) ** 2, -1))
    settings = dict(epsilon=EPSILON_SHARE * shift, **SINKHORN)
    fitting = Partial(sinkhorn_divergence, **settings)
    optimiser = _optimiser(scale)
    # One compilation for both: without the gap is with a weight of zero.
    arms = {"plain": 0.0, "gap": WEIGHT}
    for name, weight in arms.items():
        result = fit_map(
            for_fit,
            source,
            target,
            model,
            fitting=fitting,
            regulariser=Partial(monge_gap, **settings),
            weight=weight,
            steps=scale["steps"],
            optimiser=optimiser,
        )
        mapped = jax.vmap(result.map)(test)
        numbers[f"{name}_{d}_uvp"] = float(l2_uvp(mapped, exact))
        numbers[f"{name}_{d}_gap"] = float(exact_monge_gap(result.map, test).value)
        curves += _curve(result.fitting, f"d = {d}, {name}")
    if scale["convex"]:
        convex = float("inf")
        for rate in CONVEX_RATES:
            dual = _convex_dual(
                for_fit, for_net, source, target, d, scale["steps"], jnp.asarray(rate)
            )
            apart = float(l2_uvp(jax.vmap(dual.gradient)(test), exact))
            convex = min(convex, apart)
        numbers[f"convex_{d}_uvp"] = convex
        numbers[f"convex_ratio_{d}"] = numbers[f"gap_{d}_uvp"] / convex
    numbers[f"linear_{d}_uvp"] = float(l2_uvp(_linear(test, exact), exact))
    numbers[f"start_{d}_gap"] = float(exact_monge_gap(model, test).value)
    plain, gap = (numbers[f"{name}_{d}_gap"] for name in arms)
    numbers[f"gap_ratio_{d}"] = gap / max(plain, 1e-12)
    numbers[f"uvp_ratio_{d}"] = numbers[f"gap_{d}_uvp"] / numbers[f"plain_{d}_uvp"]


def _linear(x, y):
    """The optimal map between the Gaussians with the samples' moments."""
    matrix, shift = gaussian_map(x.mean(0), jnp.cov(x.T), y.mean(0), jnp.cov(y.T))
    return x @ matrix + shift[None]


@eqx.filter_jit
def _convex_dual(key, for_net, source, target, d, steps, rate):
    """The potential `g` with T = grad g: sup_f inf_g of the dual with convex networks.

    `f(grad g(x)) - <x, grad g(x)>` is descended in g; `f(y) - f(grad g(x))` in f.
    """
    one, two = jax.random.split(for_net)
    f, g = (InputConvex(d, (WIDTH, WIDTH), strong=0.1, key=k) for k in (one, two))
    rounds = steps // (INNER + 1)
    schedule = optax.cosine_decay_schedule(1.0, steps)
    # The momenta of that method's own experiments.
    optimiser = optax.adam(lambda count: rate * schedule(count), b1=0.5, b2=0.9)
    (f, fixed_f), (g, fixed_g) = (
        eqx.partition(n, eqx.is_inexact_array) for n in (f, g)
    )

    def conjugate(g, f, x):
        y = jax.vmap(eqx.combine(g, fixed_g).gradient)(x)
        return jnp.mean(jax.vmap(eqx.combine(f, fixed_f))(y) - jnp.sum(x * y, 1))

    def potential(f, g, x, y):
        moved = jax.vmap(eqx.combine(g, fixed_g).gradient)(x)
        value = jax.vmap(eqx.combine(f, fixed_f))
        return jnp.mean(value(y)) - jnp.mean(value(moved))

    def update(gradient, state, params):
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def one_round(carry, key):
        f, g, state_f, state_g = carry
        keys = jax.random.split(key, INNER + 2)

        def inner(carry, key):
            g, state = carry
            return update(jax.grad(conjugate)(g, f, source(key)), state, g), None

        (g, state_g), _ = jax.lax.scan(inner, (g, state_g), keys[:INNER])
        slope = jax.grad(potential)(f, g, source(keys[-2]), target(keys[-1]))
        f, state_f = update(slope, state_f, f)
        return (f, g, state_f, state_g), None

    start = f, g, optimiser.init(f), optimiser.init(g)
    (_, g, _, _), _ = jax.lax.scan(one_round, start, jax.random.split(key, rounds))
    return eqx.combine(g, fixed_g)


def _geodesic(x, y):
    # Short of the ends, where the arc cosine has no derivative.
    return jnp.arccos(jnp.clip(x @ y, -1 + 1e-6, 1 - 1e-6))


def _sphere(scale, key, numbers):
    for_model, for_fit, for_test, for_target = jax.random.split(key, 4)
    north, east = jnp.asarray([0.0, 0.0, 1.0]), jnp.asarray([1.0, 0.0, 0.0])
    batch = scale["batch"]

    def source(key, count=batch):
        return sphere_points(key, count, centre=north, spread=0.4)

    def target(key, count=batch):
        return sphere_points(key, count, centre=east, spread=0.4)

    test, goal = source(for_test, HELD_OUT), target(for_target, HELD_OUT)
    mean = jnp.mean(jnp.arccos(jnp.clip(test @ goal.T, -1, 1)))
    model = _model(for_model, 3, on_sphere=True)
    settings = dict(epsilon=EPSILON_SHARE * mean, cost=_geodesic, **SINKHORN)
    # The fit is measured with the squared distance, smooth also where points meet.
    spread = jnp.mean(jnp.sum((test[:, None] - goal[None]) ** 2, -1))
    fitting = Partial(sinkhorn_divergence, epsilon=EPSILON_SHARE * spread, **SINKHORN)
    optimiser = _optimiser(scale)
    gaps, fits = [], []
    for weight in (0.0, WEIGHT):
        result = fit_map(
            for_fit,
            source,
            target,
            model,
            fitting=fitting,
            regulariser=Partial(monge_gap, **settings),
            weight=weight,
            steps=scale["steps"],
            optimiser=optimiser,
        )
        gap = exact_monge_gap(result.map, test, cost=_geodesic)
        gaps.append(float(gap.value))
        fits.append(float(fitting(jax.vmap(result.map)(test), goal)))
    numbers["sphere_plain_gap"], numbers["sphere_gap"] = gaps
    numbers["sphere_plain_fit"], numbers["sphere_fit"] = fits
    numbers["sphere_gap_ratio"] = gaps[1] / max(gaps[0], 1e-12)
    numbers["sphere_fit_ratio"] = fits[1] / fits[0]


def _curve(losses, label):
    every = max(1, losses.shape[0] // 100)
    shown = [int(i) for i in range(0, losses.shape[0], every)]
    yield Curve(
        shown,
        # The divergence is debiased on samples and may fall below zero.
        [max(float(losses[i]), 1e-4) for i in shown],
        label,
        "fit",
        "step",
        "Sinkhorn divergence of a batch",
        log_y=True,
    )
