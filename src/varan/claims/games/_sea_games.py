"""The games of row 031: learners against losses with known noise and drift.

Each function plays one family of games in one compiled program and returns means over
paths. Learners are given the diameter 2 and the true constants of their losses.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ...games import (
    AdaGradNorm,
    DynamicOptimisticOMD,
    EuclideanBall,
    OnlineGradientDescent,
    OnlineNewtonStep,
    OptimisticFTRL,
    OptimisticOMD,
    convex_regret_bound,
    dynamic_regret_bound,
    exp_concave_regret_bound,
    linear_regret,
    play,
    regret,
    sea,
    strongly_convex_regret_bound,
)
from ...operators import minimise_quadratic_on_ball

_BALL, _DIAMETER, _SIZE = EuclideanBall(1.0), 2.0, 5
PERIODS = (2**30, 256, 16, 4)  # rounds between sign flips; the first: never
LENGTHS = (0, 1, 4, 16, 64)
_CURVED = (1.0, 0.9, 0.8, 0.65, 0.5)
# The diagonals of Q and W. The last W is not below Q: single losses are not convex.
LOSSES = {
    "linear": ((0.0,) * 5, (0.0,) * 5),
    "quadratic": ((1.0, 0.5, 0.1, 0.0, 0.0), (0.0,) * 5),
    "nonconvex": ((1.0, 0.5, 0.1, 0.0, 0.0), (-0.4, 0.0, -0.3, 0.3, -0.3)),
}


@functools.partial(
    jax.jit, static_argnames=("horizons", "paths", "noises", "periods", "label")
)
def convex_cells(key, horizons, paths, noises, periods, label):
    """Mean regret and bound by losses, noise, period and horizon; worst violation."""

    def one(losses, noise, period, key):
        diagonal, wobble = losses
        mean_key, key = jax.random.split(key)
        stream = sea.adversarial(
            key,
            horizons[-1],
            _direction(mean_key) / 2,
            period,
            curvature=jnp.diag(diagonal),
            noise=noise,
            wobble=jnp.diag(wobble),
        )
        bound, smoothness = stream.gradient_bound, jnp.max(diagonal)
        learner = _convex_learner(label, bound, smoothness)
        points, gradients, state = play(
            learner, stream.gradient, jnp.zeros(_SIZE), horizons[-1]
        )
        sums = (_at(jnp.cumsum(v), horizons) for v in _known(stream))
        limit = convex_regret_bound(_DIAMETER, bound, smoothness, *sums)
        violation = jnp.zeros(())
        if isinstance(learner, OptimisticOMD):
            truth = linear_regret(_BALL, points, gradients)[-1]
            violation = _violation(truth, learner.certificate(state).value)
        return _regrets(stream, points, horizons), limit, violation

    run = jax.vmap(one, (None, None, None, 0))
    run = jax.vmap(run, (None, None, 0, None))
    keys = jax.random.split(key, paths)
    paid, bounds, violation = jax.vmap(
        lambda losses: jax.lax.map(
            lambda noise: run(losses, noise, jnp.array(periods), keys),
            jnp.array(noises),
        )
    )(tuple(jnp.array(v) for v in zip(*LOSSES.values(), strict=True)))
    return jnp.mean(paid, 3), jnp.mean(bounds, 3), violation


def _convex_learner(label, bound, smoothness):
    """The method and its baselines, all given the same true constants."""
    if label == "descent":
        return OnlineGradientDescent(_BALL, gradient_bound=bound)
    if label == "adaptive descent":
        return AdaGradNorm(_BALL)
    if label == "optimistic FTRL":
        return OptimisticFTRL(_BALL, bound, smoothness)
    return OptimisticOMD(
        _BALL,
        gradient_bound=bound,
        smoothness=smoothness,
        optimistic=label == "optimistic",
    )


@functools.partial(jax.jit, static_argnames=("horizons", "paths"))
def pure_noise(key, horizons, paths):
    def one(key):
        stream = sea.iid(key, horizons[-1], jnp.zeros(_SIZE), noise=1.0)
        learner = OptimisticOMD(_BALL, gradient_bound=stream.gradient_bound)
        points, _, _ = play(learner, stream.gradient, jnp.zeros(_SIZE), horizons[-1])
        return _regrets(stream, points, horizons, hindsight=True)

    return jnp.mean(jax.vmap(one)(jax.random.split(key, paths)), 0)


@functools.partial(jax.jit, static_argnames=("horizon",))
def sign_flips(key, horizon, period):
    mean = _direction(key) / 2
    stream = sea.adversarial(key, horizon, mean, period)
    learners = (
        OptimisticOMD(_BALL, gradient_bound=0.5),
        OnlineGradientDescent(_BALL, gradient_bound=0.5),
    )

    def paid(learner):
        points, _, _ = play(learner, stream.gradient, jnp.zeros(_SIZE), horizon)
        return regret(stream.loss, points, stream.best_in_hindsight())[-1]

    return tuple(paid(learner) for learner in learners)


@functools.partial(jax.jit, static_argnames=("horizons", "paths", "noises"))
def strongly_convex(key, horizons, paths, noises):
    strength, smoothness = min(_CURVED), max(_CURVED)
    keys = jax.random.split(key, paths)

    def one(key, noise, learner):
        mean_key, key = jax.random.split(key)
        stream = sea.iid(
            key,
            horizons[-1],
            _direction(mean_key) / 4,
            curvature=jnp.diag(jnp.array(_CURVED)),
            noise=noise,
        )
        points, _, state = play(
            learner, stream.gradient, jnp.zeros(_SIZE), horizons[-1]
        )
        expected = _regrets(stream, points, horizons)
        realised = regret(stream.loss, points, stream.best_in_hindsight())[-1]
        bounds = jnp.stack(
            [
                strongly_convex_regret_bound(
                    _DIAMETER,
                    stream.gradient_bound,
                    smoothness,
                    strength,
                    stream.variances[:t],
                    stream.variations[:t],
                )
                for t in horizons
            ]
        )
        if not isinstance(learner, OptimisticOMD):
            return expected, bounds, jnp.zeros(())
        violation = _violation(realised, learner.certificate(state).value)
        return expected, bounds, violation

    def mean(noise, learner):
        paid, bounds, violation = jax.vmap(lambda k: one(k, noise, learner))(keys)
        return jnp.mean(paid, 0), jnp.mean(bounds, 0), jnp.max(violation)

    ours = OptimisticOMD(_BALL, "strongly_convex", strength=strength)
    blind = OptimisticOMD(_BALL, "strongly_convex", strength=strength, optimistic=False)
    descent = OnlineGradientDescent(_BALL, strength=strength)
    paid, bounds, violation = jax.lax.map(
        lambda noise: mean(noise, ours), jnp.array(noises)
    )
    noisy = len(noises) - 1 if len(noises) < 4 else 3
    return {
        "ratio": paid / bounds,
        "violation": violation,
        "still": paid[0],
        "noisy": paid[noisy],
        "blind": mean(0.0, blind)[0],
        "descent": mean(noises[noisy], descent)[0],
    }


@functools.partial(jax.jit, static_argnames=("horizon", "paths", "noises"))
def exp_concave(key, horizon, paths, noises):
    curvature = jnp.array(_CURVED)
    keys = jax.random.split(key, paths)
    reach = jnp.sqrt(max(_CURVED)) + (0.5 + max(noises)) / jnp.sqrt(min(_CURVED))
    strength = 1 / reach**2  # grad f' Q^{-1} grad f is at most reach^2 on the ball

    def one(key, noise, period, make):
        mean_key, key = jax.random.split(key)
        stream = sea.adversarial(
            key,
            horizon,
            _direction(mean_key) / 2,
            period,
            curvature=jnp.diag(curvature),
            noise=noise,
        )
        learner = make(stream.gradient_bound)
        points, _, state = play(learner, stream.gradient, jnp.zeros(_SIZE), horizon)
        paid = regret(stream.loss, points, stream.best_in_hindsight())[-1]
        bound = exp_concave_regret_bound(
            _DIAMETER,
            stream.gradient_bound,
            max(_CURVED),
            strength,
            _SIZE,
            jnp.sum(stream.variances),
            jnp.sum(stream.variations),
        )
        if not isinstance(learner, OptimisticOMD):
            return paid, bound, jnp.zeros(())
        return paid, bound, _violation(paid, learner.certificate(state).value)

    def ours(bound):
        return OptimisticOMD(
            _BALL, "exp_concave", gradient_bound=bound, strength=strength
        )

    cells = [(n, p) for n in noises for p in (horizon, 16)]
    noise, period = (jnp.array(v) for v in zip(*cells, strict=True))
    run = jax.vmap(lambda n, p: jax.vmap(lambda k: one(k, n, p, ours))(keys))
    paid, bounds, violation = run(noise, period)

    def newton(key):
        def make(bound):
            return OnlineNewtonStep(_BALL, bound, strength)

        return one(key, noises[-1], horizon, make)[0]

    return {
        "ratio": jnp.mean(paid, 1) / jnp.mean(bounds, 1),
        "violation": violation,
        "ours": jnp.mean(paid[-2]),
        "newton": jnp.mean(jax.vmap(newton)(keys)),
    }


@functools.partial(jax.jit, static_argnames=("horizon", "paths"))
def dynamic(key, horizon, paths):
    """Targets that glide on a circle and targets that jump across it, equally far."""
    rounds, noise = jnp.arange(horizon), 0.1
    matrix = jnp.diag(jnp.array(_CURVED))
    bound = max(_CURVED) + 0.5 + noise  # |Q x| + |Q u_t| + noise on the ball
    two = DynamicOptimisticOMD(_BALL, horizon, gradient_bound=bound, smoothness=1.0)
    one_layer = OptimisticOMD(_BALL, gradient_bound=bound, smoothness=1.0)

    def angle(length, jumping):
        # On a circle of radius 1/2 a jump across has length 1.
        jumps = jnp.floor(rounds * (length + 1) / horizon) * jnp.pi
        return jnp.where(jumping, jumps, rounds * 2 * length / (horizon - 1))

    def one(key, length, jumping):
        phase = angle(length, jumping)
        flat = jnp.stack([jnp.cos(phase), jnp.sin(phase)], 1) / 2
        targets = jnp.pad(flat, ((0, 0), (0, _SIZE - 2)))
        stream = sea.drift(key, targets, matrix, noise=noise)
        path = jnp.sum(jnp.linalg.norm(jnp.diff(targets, axis=0), axis=1))
        results = {}
        for label, learner in (("two layers", two), ("one layer", one_layer)):
            points, gradients, state = play(
                learner, stream.gradient, jnp.zeros(_SIZE), horizon
            )
            paid = regret(stream.expected_loss, points, targets)[-1]
            results[label] = paid
            if learner is two:
                truth = jnp.sum(gradients * (points - targets))
                value = learner.certificate(state, path).value
                results["violation"] = _violation(truth, value)
        sums = jnp.sum(stream.variances), jnp.sum(stream.variations)
        results["bound"] = dynamic_regret_bound(
            _DIAMETER, bound, 1.0, two.stepsizes.size, *sums, path
        )
        roots = jnp.sqrt(sums[0]) + jnp.sqrt(sums[1])
        results["order"] = 1 + path + jnp.sqrt(1 + path) * roots
        return results

    keys = jax.random.split(key, paths)
    lengths = jnp.array(LENGTHS, float)
    over_keys = jax.vmap(one, (0, None, None))
    over_lengths = jax.vmap(over_keys, (None, 0, None))
    results = jax.vmap(over_lengths, (None, None, 0))(
        keys, lengths, jnp.array([False, True])
    )
    means = {name: jnp.mean(value, 2) for name, value in results.items()}
    return {
        "ratio": means["two layers"] / means["bound"],
        "normalised": means["two layers"] / means["order"],
        "violation": results["violation"],
        "two layers": means["two layers"][1],
        "one layer": means["one layer"][1],
    }


def _regrets(stream, points, horizons, hindsight=False):
    """Regret at each horizon against the best fixed point until then.

    Of the expected losses, whose best point does not depend on the draw; or, in
    hindsight, of the losses as drawn, which asks for more.
    """
    loss = stream.loss if hindsight else stream.expected_loss
    slopes = stream.slopes if hindsight else stream.means
    rounds = jnp.arange(horizons[-1])
    paid = _at(jnp.cumsum(jax.vmap(loss)(rounds, points)), horizons)
    matrices = stream.curvature * jnp.array(horizons, float)[:, None, None]
    totals = _at(jnp.cumsum(slopes, axis=0), horizons)
    best = jax.vmap(minimise_quadratic_on_ball)(matrices, -totals)
    least = jax.vmap(lambda A, b, u: u @ (A @ u) / 2 + b @ u)(matrices, totals, best)
    return paid - least


def _known(stream):
    return stream.variances, stream.variations


def _at(values, horizons):
    return values[jnp.array(horizons) - 1]


def _violation(truth, bound):
    return (truth - bound) / (1 + jnp.abs(bound))


def _direction(key):
    direction = jax.random.normal(key, (_SIZE,))
    return direction / jnp.linalg.norm(direction)
