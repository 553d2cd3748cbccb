"""Learning the least Lipschitz constant on a manifold, by a reweighted Laplacian.

Claim: constraining the loss and minimising the largest gradient along the manifold is a
Laplacian penalty whose weights adapt; it learns smooth functions, and their constant,
where a fixed Laplacian penalty bounds the gradient only on average; with few labels it
generalises better than empirical risk and than smoothness in all directions.

Kept: semi-supervised two moons, navigation around obstacles from few labelled states,
the dual algorithm, the comparison with risk minimisation, weight decay, ambient
gradients and the uniform Laplacian. Given up: data of real robots; the paper's networks
and settings, which are not stated there.

Refuted by: a largest gradient, at the same loss, that is no smaller than the uniform
Laplacian's; accuracies on the moons behind it or near empirical risk's; multipliers
that leave a large duality gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.sparse.csgraph import dijkstra

from varan.claims import Curve, Measurements
from varan.lipschitz import manifold_lipschitz

WIDTH = 64
# Rates of the two multipliers: with these both settle, on seeds that are not measured.
DUAL_LR = {"moons": (0.3, 3e-4), "maze": (2.0, 1e-3)}
EPS = 0.05  # what the mean loss may be
# Strengths that the penalties are tried at.
GRID = (1e-3, 1e-2, 1e-1)
# Walls of the maze: lower and upper corners.
WALLS = (((0.25, 0.0), (0.35, 0.7)), ((0.6, 0.3), (0.7, 1.0)))
GOAL = (0.95, 0.5)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Trains every method on every task of one seed."""
    numbers: dict[str, float] = {}
    curves, notes = [], []
    for name in scale["tasks"]:
        make, loss, score = TASKS[name]
        task = make(scale, np.random.default_rng(seed))
        key = jax.random.key(seed)
        fits = {
            label: smooth(loss, task, key, name, rates, scale["steps"])
            for label, rates in (
                ("ours", DUAL_LR[name]),
                ("uniform", (DUAL_LR[name][0], 0.0)),
            )
        }
        ours, uniform = fits["ours"], fits["uniform"]
        numbers[f"gradient_ratio_{name}"] = float(ours.rho / uniform.rho)
        gap = ours.certificate.details["duality_gap"]
        numbers[f"duality_gap_{name}"] = abs(float(gap))
        numbers[f"loss_over_eps_{name}"] = float(ours.loss) / EPS
        scores = {label: score(fit.model, task) for label, fit in fits.items()}
        scores |= baselines(loss, score, task, key, scale, name)
        if name == "moons":
            numbers["over_erm"] = scores["ours"] - scores["risk"]
            if "tuned uniform" in scores:
                numbers["over_uniform"] = scores["ours"] - scores["tuned uniform"]
        for label, value in scores.items():
            numbers[f"score_{name}_{label.replace(' ', '_')}"] = value
        curves += [gradients(fit, label, name) for label, fit in fits.items()]
        notes.append(
            f"{name}: mean losses {float(ours.loss):.3g} (ours) and "
            f"{float(uniform.loss):.3g} (uniform) at {EPS} asked for; largest "
            f"gradients {float(ours.rho):.3g} and {float(uniform.rho):.3g}."
        )
    return Measurements(numbers, curves, notes)


def gradients(fit, label, name) -> Curve:
    """The gradients at the points, largest first."""
    lengths = np.sort(np.asarray(fit.gradients))[::-1]
    share = np.arange(1, len(lengths) + 1) / len(lengths)
    plot = f"gradients on the {name}"
    return Curve(list(share), list(lengths), label, plot, "share of points", "gradient")


# Tasks -----------------------------------------------------------------------------


def moons(scale, rng) -> dict[str, Any]:
    """One label a moon; validation and test points for the scores alone."""
    from sklearn.datasets import make_moons

    count, held = scale["points"], 1100
    drawn = make_moons(count + held, noise=0.05, random_state=int(rng.integers(2**31)))
    x, y = map(np.asarray, drawn)
    first = [rng.choice(np.flatnonzero(y[:count] == side)) for side in (0, 1)]
    rest = np.setdiff1d(np.arange(count), first)
    return {
        "labelled": (jnp.asarray(x[first]), jnp.asarray(y[first])),
        "unlabelled": jnp.asarray(x[rest]),
        "validation": (x[count : count + 100], y[count : count + 100]),
        "test": (x[count + 100 :], y[count + 100 :]),
        "distances": None,
    }


def maze(scale, rng) -> dict[str, Any]:
    """States around two walls; labels are directions of the shortest ways to a goal."""
    count, labelled, held = scale["states"], scale["labelled"], 100
    states = np.array([GOAL])
    while len(states) < count + held:
        drawn = rng.uniform(size=(4 * count, 2))
        states = np.concatenate([states, drawn[~inside_walls(drawn)]])
    states = states[: count + held]
    lengths = np.linalg.norm(states[:, None] - states[None], axis=2)
    apart = lengths + np.diag(np.full(len(states), np.inf))
    near = np.argsort(apart, 1)[:, :12]
    steps = np.full(lengths.shape, np.inf)
    for i, row in enumerate(near):
        along = np.linspace(0, 1, 20)[:, None, None]
        ways = states[i] + along * (states[row] - states[i])
        free = ~inside_walls(ways).any(0)
        steps[i, row[free]] = lengths[i, row[free]]
    ways = np.where(np.isfinite(steps), steps, 0)
    geodesic, before = dijkstra(ways, directed=False, return_predecessors=True)
    # The third state on the way: a direction less rough than to the next.
    ahead = before[0]
    for _ in range(2):
        ahead = np.where(ahead > 0, before[0][np.maximum(ahead, 0)], ahead)
    ahead = np.where(ahead < 0, 0, ahead)
    direction = states[ahead] - states
    size = np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-9)
    labels = direction / size
    reached = np.flatnonzero(np.isfinite(geodesic[0]) & (np.arange(len(states)) > 0))
    order = rng.permutation(reached)
    # Held-out states come last; the cloud's own unlabelled states are the test.
    cloud, out = order[: len(order) - held // 2], order[len(order) - held // 2 :]
    return {
        "labelled": tuple(jnp.asarray(a[cloud[:labelled]]) for a in (states, labels)),
        "unlabelled": jnp.asarray(states[cloud[labelled:]]),
        "validation": (states[out], labels[out]),
        "test": (states[cloud[labelled:]], labels[cloud[labelled:]]),
        "distances": jnp.asarray(geodesic[np.ix_(cloud, cloud)]),
    }


def inside_walls(points) -> np.ndarray:
    low, high = np.array(WALLS)[:, 0], np.array(WALLS)[:, 1]
    within = (points[..., None, :] > low) & (points[..., None, :] < high)
    return within.all(-1).any(-1)


def cross_entropy(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def squares(value, label):
    return jnp.sum((value - label) ** 2)


def accuracy(model, task, part="test") -> float:
    """Points of a hundred that are classified correctly."""
    x, y = task[part]
    return float(jnp.mean(jnp.argmax(evaluate(model, jnp.asarray(x)), 1) == y)) * 100


def alignment(model, task, part="test") -> float:
    """Mean cosine of the angle to the shortest way, times a hundred."""
    x, y = task[part]
    found = evaluate(model, jnp.asarray(x))
    size = jnp.maximum(jnp.linalg.norm(found, axis=1), 1e-9)
    return float(jnp.mean(jnp.sum(found * y, 1) / size)) * 100


TASKS = {
    "moons": (moons, cross_entropy, accuracy),
    "maze": (maze, squares, alignment),
}


@eqx.filter_jit
def evaluate(model, x):
    return jax.vmap(model)(x)


# Methods ---------------------------------------------------------------------------


def network(key):
    return eqx.nn.MLP(2, 2, WIDTH, 1, jax.nn.tanh, key=key)


def smooth(loss, task, key, name, rates, steps):
    """The dual algorithm; with a rate of 0 for `mu` the uniform Laplacian's."""
    return manifold_lipschitz(
        loss,
        network(key),
        task["labelled"],
        unlabeled=task["unlabelled"],
        distances=task["distances"],
        eps=EPS,
        dual_lr=rates,
        primal=optimiser(steps),
        steps=steps,
    )


@cache
def optimiser(steps):
    """All methods' own; one object for all calls, so that nothing compiles anew."""
    return optax.adam(optax.cosine_decay_schedule(5e-3, steps, 0.02))


def baselines(loss, score, task, key, scale, name) -> dict[str, float]:
    """Scores of penalties at their best strength by the validation points' labels."""
    x = jnp.concatenate([task["labelled"][0], task["unlabelled"]])
    weights = laplacian(x, task["distances"])
    setting = loss, network(key), task["labelled"], x, weights
    found = {}
    for label in scale[f"{name}_baselines"]:
        grid = (0.0,) if label == "risk" else GRID
        models = [
            penalised(*setting, label, gamma, scale["steps"])
            for gamma in map(jnp.asarray, grid)
        ]
        marks = [score(model, task, "validation") for model in models]
        found[label] = score(models[int(np.argmax(marks))], task)
    return found


def laplacian(x, distances):
    """Weights of the penalty, symmetric, their mean row the identity's scale."""
    if distances is None:
        distances = jnp.linalg.norm(x[:, None] - x[None], axis=2)
    apart = np.asarray(distances) + np.diag(np.full(len(x), np.inf))
    t = float(np.median(np.sort(apart, 1)[:, 9])) ** 2 / 4
    kernel = jnp.where(jnp.isfinite(apart), jnp.exp(-(apart**2) / (4 * t)), 0)
    return kernel / (2 * t * jnp.mean(jnp.sum(kernel, 1)))


@eqx.filter_jit
def penalised(loss, model, labelled, x, weights, kind, gamma, steps):
    """Adam on the mean loss and a penalty."""

    def objective(model):
        mean = jnp.mean(jax.vmap(loss)(jax.vmap(model)(labelled[0]), labelled[1]))
        if kind == "tuned uniform":
            values = jax.vmap(model)(x)
            inner = values @ values.T
            own = jnp.diag(inner)
            rise = own[:, None] + own[None] - 2 * inner
            return mean + gamma * jnp.sum(weights * rise) / len(x)
        if kind == "ambient":
            jacobians = jax.vmap(jax.jacrev(model))(x)
            return mean + gamma * jnp.mean(jnp.sum(jacobians**2, (1, 2)))
        leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
        return mean + gamma * sum(jnp.sum(leaf**2) for leaf in leaves)

    params, static = eqx.partition(model, eqx.is_inexact_array)

    adam = optimiser(steps)

    def step(carry, _):
        params, state = carry
        slope = jax.grad(lambda p: objective(eqx.combine(p, static)))(params)
        updates, state = adam.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = params, adam.init(params)
    (params, _), _ = jax.lax.scan(step, start, None, steps)
    return eqx.combine(params, static)
