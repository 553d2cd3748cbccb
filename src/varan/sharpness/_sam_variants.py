"""Relatives of sharpness-aware minimisation: cheaper, averaged, less conflicted, wider.

All take the gradient g at the weights and the gradient p at the highest point nearby,
as `sam` does. They differ in what they make of the two: `looksam` keeps the part of p
that g lacks for some steps, `gsam` descends along p and shrinks the gap by the part of
g that p lacks, `wasam` averages the weights along the way, `lsam` looks far.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..core import _checks as checks
from ._engine import (
    EngineOptions,
    Rule,
    Schedule,
    check_count,
    check_schedule,
    perturbed,
    scheduled,
    with_engine_options,
)
from ._sam import ascent, sam
from ._vectors import minus, moved, norm, of_length, orthogonal, scaled


@with_engine_options(interval=5)
def looksam(
    base: optax.GradientTransformation,
    rho: Schedule = 0.05,
    alpha: float = 0.7,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """SAM's second gradient once in some steps, its effect remembered in between.

    On each `interval`-th step p is taken, and its part v orthogonal to g is kept; the
    steps between use `g + alpha |g| v / |v|`: that part changes slowly. A step costs
    `1 + 1 / interval` gradients.

    Args:
        base: Any optax transformation.
        rho: Radius, not negative; or a schedule.
        alpha: Length of the remembered part against the gradient's, not negative.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`; but `interval`, the steps from one look to the next, is 5
            if left out. With 1 this is `sam`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`. With microbatches,
        what is remembered is the last chunk's.

    Raises:
        ValueError: If `rho` or `alpha` is negative, or `interval` below 1.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import looksam
        >>> method, w = looksam(optax.sgd(0.1), interval=2), jnp.ones(2)
        >>> state, g = method.init(w), lambda w, i=0: jnp.array([1.0, 4.0]) * w
        >>> for _ in range(4):
        ...     update, state = method.update(g(w), state, w, grad_fn=g)
        ...     w = w + update
        >>> int(state.step), int(state.grad_evals)
        (4, 6)

    Source:
        Liu, Mai, Chen, Hsieh and You, 2022, "Towards Efficient and Scalable
        Sharpness-Aware Minimization", arXiv:2203.02714, algorithm 1.
    """
    check_schedule("looksam", "rho", rho)
    checks.check_nonnegative("looksam", "alpha", alpha)

    def direction(g0, params, state, grad_fn, call):
        e = ascent(call.restrict(g0), scheduled(rho, call.step))
        p = grad_fn(moved(params, e))
        return p, orthogonal(p, g0), e

    def between(g0, params, kept, call):
        del params, call
        return moved(g0, of_length(kept, alpha * norm(g0))), kept

    def nothing(params):
        return jtu.tree_map(jnp.zeros_like, params)

    rule = Rule(direction, nothing, between)
    return perturbed(base, rule, **{"interval": 5, **engine})


@with_engine_options()
def gsam(
    base: optax.GradientTransformation,
    rho: Schedule = 0.05,
    alpha: float = 0.4,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Surrogate-gap minimisation: SAM that also shrinks what SAM cannot see.

    The gap between the loss nearby and the loss here is a measure of sharpness. The
    direction is `p - alpha v`, with v the part of g orthogonal to p: along it the gap
    shrinks while the loss nearby, to first order, stays. Two gradients a step.

    Args:
        base: Any optax transformation.
        rho: Radius, not negative; or a schedule. The authors let it fall with the
            learning rate.
        alpha: Weight of the gap, not negative; 0 is `sam`.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`.

    Raises:
        ValueError: If `rho` or `alpha` is negative.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import gsam
        >>> g = lambda w, i=0: jnp.array([1.0, 4.0]) * w
        >>> method, w = gsam(optax.sgd(1.0), rho=0.5, alpha=0.4), jnp.ones(2)
        >>> update, _ = method.update(g(w), method.init(w), w, grad_fn=g)
        >>> p = g(w + 0.5 * g(w) / jnp.linalg.norm(g(w)))
        >>> bool(abs((update + p) @ p) < 1e-4)  # orthogonal to what SAM would do
        True

    Source:
        Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan and Liu, 2022,
        "Surrogate Gap Minimization Improves Sharpness-Aware Training",
        arXiv:2203.08065, algorithm 1.
    """
    check_schedule("gsam", "rho", rho)
    checks.check_nonnegative("gsam", "alpha", alpha)

    def direction(g0, params, state, grad_fn, call):
        e = ascent(call.restrict(g0), scheduled(rho, call.step))
        p = grad_fn(moved(params, e))
        return minus(p, scaled(orthogonal(g0, p), alpha)), state, e

    return perturbed(base, Rule(direction), **engine)


class WeightAverage(NamedTuple):
    """What `wasam` adds to the base optimiser's state.

    Args:
        step: Steps so far.
        averaged: Weights in the mean so far.
        average: Their mean, in single precision or better.
    """

    step: Int[Array, ""]
    averaged: Int[Array, ""]
    average: PyTree


@with_engine_options()
def wasam(
    base: optax.GradientTransformation,
    rho: Schedule = 0.05,
    *,
    start: int = 0,
    every: int = 1,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """SAM whose weights are averaged along the way; train it on, use the average.

    `averaged_weights(state, params)` is what to evaluate. Statistics of normalisation
    layers, if there are any, must be collected anew for it.

    Args:
        base: Any optax transformation.
        rho: Radius, not negative; or a schedule.
        start: Steps before the first weights that count, not negative.
        every: Steps from one to the next, at least 1.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`. The average is of
        the weights plus the update: it must stand last in a chain.

    Raises:
        ValueError: If `rho` or `start` is negative, or `every` below 1.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import averaged_weights, wasam
        >>> method, w = wasam(optax.sgd(1.0), rho=0.0), jnp.asarray(4.0)
        >>> state = method.init(w)
        >>> for _ in range(3):  # 3, 2, 1
        ...     update, state = method.update(
        ...         jnp.asarray(1.0), state, w, grad_fn=lambda w, i: jnp.asarray(1.0))
        ...     w = w + update
        >>> float(averaged_weights(state, w))
        2.0

    Source:
        Kaddour, Liu, Silva and Kusner, 2022, "When Do Flat Minima Optimizers Work?",
        arXiv:2202.00661; averaging: Izmailov, Podoprikhin, Garipov, Vetrov and Wilson,
        2018, arXiv:1803.05407.
    """
    if not checks.is_traced(start):
        start = check_count("wasam", "start", start, least=0)
    every = check_count("wasam", "every", every)
    return sam(optax.chain(base, _averaging(start, every)), rho, **engine)


def averaged_weights(state: PyTree, params: PyTree[Array]) -> PyTree[Float[Array, ...]]:
    """The mean of the weights that `wasam` has passed.

    Args:
        state: Of `wasam`, or one that holds it: of a chain or of `optax.MultiSteps`.
        params: The weights as they are, for the dtypes; what is returned where none
            counts yet.

    Returns:
        A tree like the weights.

    Raises:
        ValueError: If the state holds no average of `wasam`, or several.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import averaged_weights, wasam
        >>> w = jnp.ones(2)
        >>> averaged_weights(wasam(optax.sgd(0.1)).init(w), w).tolist()
        [1.0, 1.0]
    """
    nodes = jtu.tree_leaves(state, is_leaf=_is_average)
    found = [node for node in nodes if _is_average(node)]
    if len(found) != 1:
        raise ValueError(
            f"averaged_weights: `state` must be of `wasam` (got {type(state).__name__} "
            f"with {len(found)} averages)."
        )
    kept = found[0]
    return jtu.tree_map(
        lambda mean, now: jnp.where(kept.averaged > 0, mean.astype(now.dtype), now),
        kept.average,
        params,
    )


@with_engine_options()
def lsam(
    base: optax.GradientTransformation,
    rho: Schedule = 0.4,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Large-neighbourhood SAM: `sam` with a radius several times the usual one.

    It costs accuracy and makes representations that other networks share: a surrogate
    for adversarial examples that transfer, rather than a classifier to use.

    Args:
        base: Any optax transformation.
        rho: Radius, or a schedule.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`.

    Raises:
        ValueError: As `sam`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import lsam
        >>> method, w = lsam(optax.sgd(1.0)), jnp.asarray(2.0)
        >>> update, _ = method.update(w, method.init(w), w, grad_fn=lambda w, i: w)
        >>> round(float(update), 3)
        -2.4

    Source:
        Gubri, Cordy and Le Traon, 2023, "Going Further: Flatness at the Rescue of
        Early Stopping for Adversarial Example Transferability", arXiv:2304.02688.

    Differences: The default is one of the values tried here; the paper tunes it.
    """
    return sam(base, rho, **engine)


def _is_average(node):
    return isinstance(node, WeightAverage)


def _averaging(start, every):
    """Watches the weights that updates lead to, and changes nothing."""

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return WeightAverage(zero, zero, _wide(params))

    def update(updates, state, params: Any = None):
        counts = (state.step >= start) & ((state.step - start) % every == 0)
        count = state.averaged + counts.astype(jnp.int32)

        def mean(average, now):
            share = jnp.asarray(1, now.dtype) / jnp.maximum(count, 1).astype(now.dtype)
            return jnp.where(counts, average + share * (now - average), average)

        reached = _wide(optax.apply_updates(params, updates))
        average = jtu.tree_map(mean, state.average, reached)
        return updates, WeightAverage(state.step + 1, count, average)

    return optax.GradientTransformation(init, update)


def _wide(params):
    """In half precision a running mean would stop moving."""
    return jtu.tree_map(
        lambda leaf: leaf.astype(
            jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
        ),
        params,
    )
