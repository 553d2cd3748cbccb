"""Random networks and boxes, and whether any certified number lies on the wrong side.

Every number that is called a proof is held against values at points of the box, which
are computed in float64 whatever the precision of the proof: outputs, entries of the
Jacobian, its norm, and quotients of differences, which also see the kinks. Networks
with small integers for weights and centres have activations exactly on their kinks;
those with cancelling weights have large ones in pairs that nearly undo each other, so
that rounding is large beside what is left. Boxes may be points in some entries.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from varan.lipschitz import (
    Box,
    bounds,
    exact_bounds,
    exact_lipschitz,
    local_lipschitz,
)

POINTS, INPUTS, CLASSES = 64, 4, 3
FORWARD = ("ibp", "crown", "alpha")
PROOFS = (
    ("crown", "alpha"),
    ("crown", "crown"),
    ("recurjac", "crown"),
    ("recurjac_strict", "crown"),
    ("ibp", "ibp"),
    ("naive", "ibp"),
)
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leaky relu": lambda z: jax.nn.leaky_relu(z, 0.1),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "tanh gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}
SHAPES = ("plain", "residual", "convolution")
WEIGHTS = ("normal", "integers", "cancelling")


class Count(NamedTuple):
    """Comparisons made, how many failed, and the worst failure in units of the bound.

    Args:
        networks: How many were drawn.
        comparisons: Numbers held against a bound.
        violations: How many were outside of it.
        worst: The largest excess, relative to the bound's size.
    """

    networks: int
    comparisons: int
    violations: int
    worst: float

    def __add__(self, other):
        sums = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return Count(*sums, max(self.worst, other.worst))


def network(shape: str, activation: str, weights):
    """A function of one input; the leaves of `weights` may be traced."""
    act = ACTIVATIONS[activation]

    def plain(x):
        for matrix, bias in weights[:-1]:
            x = act(matrix @ x + bias)
        matrix, bias = weights[-1]
        return matrix @ x + bias

    def residual(x):
        (first, a), (second, b), (last, c) = weights
        x = x + second @ act(first @ x + a) + b
        return last @ act(x) + c

    def convolution(x):
        kernel, bias, (last, c) = weights
        x = jax.lax.conv_general_dilated(x.reshape(1, 1, -1), kernel, (1,), "SAME")
        x = act(x[0] + bias[:, None]).reshape(-1)
        return last @ x + c

    return {"plain": plain, "residual": residual, "convolution": convolution}[shape]


def _sizes(shape: str):
    if shape == "plain":
        return [((6, INPUTS), (6,)), ((5, 6), (5,)), ((CLASSES, 5), (CLASSES,))]
    if shape == "residual":
        return [
            ((6, INPUTS), (6,)),
            ((INPUTS, 6), (INPUTS,)),
            ((CLASSES, INPUTS), (CLASSES,)),
        ]
    return [(2, 1, 3), (2,), ((CLASSES, 2 * INPUTS), (CLASSES,))]


def draw(key, shape: str, kind):
    """Weights and a box, in float32 so that either precision holds the same numbers.

    `kind` is a place in `WEIGHTS`; it may be traced.
    """
    lattice = kind == WEIGHTS.index("integers")
    cancels = kind == WEIGHTS.index("cancelling")
    for_weights, for_scale, for_centre, for_radius, for_points = jax.random.split(
        key, 5
    )
    leaves, tree = jax.tree.flatten(
        _sizes(shape), is_leaf=lambda s: isinstance(s[0], int)
    )
    scale = 4.0 ** jax.random.uniform(for_scale, (), jnp.float32, -1, 1)

    def numbers(key, size):
        fan_in = math.prod(size[1:]) if len(size) > 1 else 4
        normal = scale * jax.random.normal(key, size, jnp.float32) / fan_in**0.5
        normal = jnp.where(cancels, _paired(key, 32 * normal), normal)
        return jnp.where(lattice, _integers(key, size, 2), normal)

    keys = jax.random.split(for_weights, len(leaves))
    weights = tree.unflatten(
        [numbers(k, size) for k, size in zip(keys, leaves, strict=True)]
    )
    sides = (INPUTS,)
    normal = jax.random.normal(for_centre, sides, jnp.float32)
    centre = jnp.where(lattice, _integers(for_centre, sides, 1), normal)
    size = 10.0 ** jax.random.uniform(for_scale, (), jnp.float32, -4, 0.3)
    free = jax.random.bernoulli(for_points, 0.85, sides)
    shares = jax.random.uniform(for_radius, sides, jnp.float32)
    radius = size * jnp.where(free, shares, 0)
    halves = (1 + _integers(for_radius, sides, 1)) / 2
    radius = jnp.where(lattice, halves, radius)
    return weights, (centre - radius, centre + radius)


def _paired(key, values):
    """Half of the rows nearly equal to the others, half of the columns opposite."""
    for axis, sign in zip(range(min(values.ndim, 2)), (1, -1), strict=False):
        half = values.shape[axis] // 2
        first, rest = jnp.split(values, [half], axis)
        noise = jax.random.normal(jax.random.fold_in(key, axis), first.shape, "float32")
        second = sign * first * (1 + 1e-4 * noise)
        odd = lax.slice_in_dim(rest, half, rest.shape[axis], axis=axis)
        values = jnp.concatenate([first, second, odd], axis)
    return values


def _integers(key, size, most):
    return jax.random.randint(key, size, -most, most + 1).astype(jnp.float32)


@partial(jax.jit, static_argnames=("shape", "activation", "dtype"))
def compare(keys, *, shape: str, activation: str, kind, dtype: str):
    """Comparisons, violations and the worst one, for one network a key."""

    def one(key):
        weights, ends = draw(key, shape, kind)
        box = Box(*(end.astype(dtype) for end in ends))
        model = network(
            shape, activation, jax.tree.map(lambda w: w.astype(dtype), weights)
        )
        truth = network(
            shape, activation, jax.tree.map(lambda w: w.astype("float64"), weights)
        )
        x = _points(key, *(end.astype("float64") for end in ends))
        values, jacobians = jax.vmap(truth)(x), jax.vmap(jax.jacobian(truth))(x)
        found = [bounds(model, box, method=m) for m in FORWARD]
        checks = [_outside(values, b.lower, b.upper) for b in found]
        norms = jnp.max(jnp.sum(jnp.abs(jacobians), 2), 1)
        for method, forward in PROOFS:
            proof = local_lipschitz(
                model, box, method=method, forward=forward, samples=0
            )
            bound = proof.bound
            checks += [
                _outside(norms, -bound, bound),
                _quotients(x, values, bound.astype("float64")),
            ]
            if method != "naive":
                checks.append(_outside(jacobians, proof.jac_lower, proof.jac_upper))
        counts = [jnp.asarray(c) for c in zip(*checks, strict=True)]
        return jnp.sum(counts[0]), jnp.sum(counts[1]), jnp.max(counts[2])

    return jax.vmap(one)(keys)


def _points(key, lower, upper):
    """Uniform ones, corners and the centre."""
    inside, corner = jax.random.split(jax.random.fold_in(key, 1))
    shares = jax.random.uniform(inside, (POINTS, INPUTS), "float64")
    ends = jax.random.bernoulli(corner, 0.5, (POINTS, INPUTS)).astype("float64")
    shares = jnp.concatenate([shares, ends, jnp.full((1, INPUTS), 0.5)])
    return lower[None] + shares * (upper - lower)[None]


def _outside(values, lower, upper):
    """Comparisons, violations and the worst one; NaN violates."""
    lower, upper = (v.astype("float64")[None] for v in (lower, upper))
    excess = jnp.maximum(values - upper, lower - values)
    size = jnp.maximum(jnp.maximum(jnp.abs(lower), jnp.abs(upper)), 1e-300)
    relative = jnp.where(jnp.isnan(excess), jnp.inf, excess / size)
    return excess.size, jnp.sum(~(excess <= 0)), jnp.max(relative)


def _quotients(x, values, bound):
    """Differences between neighbours in the list against the bound's promise.

    The values are rounded themselves, by some units of their size.
    """
    moved = jnp.max(jnp.abs(jnp.diff(x, axis=0)), 1)
    gained = jnp.max(jnp.abs(jnp.diff(values, axis=0)), 1)
    rounding = 1e-13 * (1 + jnp.max(jnp.abs(values)) + bound * jnp.max(jnp.abs(x)))
    excess = gained - bound * moved - rounding
    relative = excess / jnp.maximum(bound, 1e-300)
    relative = jnp.where(jnp.isnan(relative), jnp.inf, relative)
    return excess.size, jnp.sum(~(excess <= 0)), jnp.max(relative)


def sampled(seed: int, networks: int, *, weights: str, **family) -> Count:
    """Counts over random networks of one family; needs 64-bit numbers enabled."""
    keys = jax.random.split(jax.random.key(seed), networks)
    made, wrong, worst = compare(keys, kind=WEIGHTS.index(weights), **family)
    return Count(networks, int(made.sum()), int(wrong.sum()), float(worst.max()))


def enumerated(seed: int, networks: int, *, weights: str) -> Count:
    """Counts against exact Lipschitz constants and exact ranges of ReLU networks."""
    total = Count(0, 0, 0, -np.inf)
    for key in jax.random.split(jax.random.key(seed), networks):
        layers, ends = draw(key, "plain", WEIGHTS.index(weights))
        box = Box(*(end.astype("float64") for end in ends))
        layers = jax.tree.map(lambda w: w.astype("float64"), layers)
        model = tuple(map(list, zip(*layers, strict=True)))
        total = total + _against_exact(model, box)
    return total


def _against_exact(model, box: Box) -> Count:
    found = exact_lipschitz(model, box)
    exact, reached = float(found.value), exact_bounds(model, box)
    uppers = _certified(model, box)
    # What the programs behind the exact values are solved to.
    excess = [exact - float(b) - 1e-9 * (1 + exact) for b in uppers[1]]
    size = 2e-6 * (1 + np.abs(np.asarray(reached.upper)))
    for b in uppers[0]:
        excess += (np.asarray(reached.upper) - np.asarray(b.upper) - size).tolist()
        excess += (np.asarray(b.lower) - np.asarray(reached.lower) - size).tolist()
    wrong = sum(not e <= 0 for e in excess)
    return Count(1, len(excess), wrong, max(excess))


@jax.jit
def _certified(model, box: Box):
    outputs = [bounds(model, box, method=m) for m in FORWARD]
    constants = [
        local_lipschitz(model, box, method=m, forward=f, samples=0).bound
        for m, f in PROOFS
    ]
    return outputs, constants
