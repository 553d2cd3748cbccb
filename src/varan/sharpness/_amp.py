"""Adversarial model perturbation: the gradient at the worst weights within a ball.

The same objective as sharpness-aware minimisation's, climbed by projected gradient
steps: what stays inside the ball is not stretched to its surface, so where the loss is
flat already the method is close to its base.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple, Unpack

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float

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
from ._vectors import moved, norm, norm_dtype, of_length, scaled


class AMPState(NamedTuple):
    """How often the ball mattered.

    Args:
        active: Sum over steps of the share of balls (one, or one a tensor) that the
            last ascent left and was put back on. Over the number of steps near 0, the
            method has become descent with a short look ahead.
    """

    active: Float[Array, ""]


@with_engine_options()
def amp(
    base: optax.GradientTransformation,
    eps: Schedule = 0.5,
    inner_lr: Schedule = 1.0,
    inner_iter: int = 1,
    *,
    ball: Literal["global", "leaf"] = "global",
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adversarial model perturbation (AMP) around any optax optimiser.

    Descends the largest loss within distance `eps` of the weights. From d = 0,
    `inner_iter` times: `d + inner_lr g(w + d)`, put back on the ball if it has left it;
    then the gradient at w + d goes to `base` at w. A step costs `1 + inner_iter`
    gradients of one batch.

    Args:
        base: Any optax transformation.
        eps: Radius, not negative; or a schedule, a function of the step. The default
            is the released code's, which belongs to `ball="leaf"`; one ball of all
            weights is smaller by about the square root of the number of tensors.
        inner_lr: Step of the ascent in units of the gradient, not negative, or a
            schedule.
        inner_iter: Ascents, not negative; zero is `base` alone, with a warning.
        ball: `"global"`, one ball for all weights, or `"leaf"`, one for each tensor.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`; see `perturbed`.
        `state.rule_state.active / state.step` is the share of steps at which the ball
        was left.

    Raises:
        ValueError: If a setting is negative or `ball` neither of the two.

    Warns:
        UserWarning: If `inner_iter` is zero.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import amp
        >>> method, w = amp(optax.sgd(1.0), eps=0.5), jnp.asarray(2.0)
        >>> update, state = method.update(w, method.init(w), w, grad_fn=lambda w, i: w)
        >>> float(update), float(state.rule_state.active)
        (-2.5, 1.0)
        >>> w = jnp.asarray(0.25)
        >>> update, state = method.update(w, method.init(w), w, grad_fn=lambda w, i: w)
        >>> float(update), float(state.rule_state.active)
        (-0.5, 0.0)

    Source:
        Zheng, Zhang and Mao, 2021, "Regularizing Neural Networks via Adversarial Model
        Perturbation", arXiv:2010.04925, algorithm 1.

    Differences:
        The paper has one ball, the released code one for each tensor; both are here.
    """
    checks.check_choice("amp", "ball", ball, ("global", "leaf"))
    check_schedule("amp", "eps", eps)
    check_schedule("amp", "inner_lr", inner_lr)
    inner_iter = check_count("amp", "inner_iter", inner_iter, least=0)
    if inner_iter == 0:
        warnings.warn("amp: `inner_iter` = 0 is the base alone.", stacklevel=2)
    project = _into_ball if ball == "global" else _into_balls

    def direction(g0, params, state, grad_fn, call):
        radius, step = scheduled(eps, call.step), scheduled(inner_lr, call.step)
        d, active, gradient = jtu.tree_map(jnp.zeros_like, g0), state.active, g0
        for i in range(inner_iter):
            ascended = moved(d, scaled(call.restrict(gradient), step))
            d, left = project(ascended, radius)
            gradient = grad_fn(moved(params, d))
            active = state.active + left if i == inner_iter - 1 else active
        return gradient, AMPState(active), d

    return perturbed(base, Rule(direction, _never_active), **engine)


def _never_active(params):
    return AMPState(jnp.zeros((), norm_dtype(params)))


def _into_ball(tree, radius):
    """The tree, shortened where it is too long, and whether it was."""
    length = norm(tree)
    outside = length > radius
    shortened = jtu.tree_map(
        lambda leaf, short: jnp.where(outside, short, leaf),
        tree,
        of_length(tree, radius),
    )
    return shortened, outside.astype(length.dtype)


def _into_balls(tree, radius):
    leaves, structure = jtu.tree_flatten(tree)
    leaves, outside = zip(*(_into_ball(leaf, radius) for leaf in leaves), strict=True)
    dtype = norm_dtype(tree)
    share = sum((o.astype(dtype) for o in outside), jnp.zeros((), dtype)) / len(leaves)
    return jtu.tree_unflatten(structure, leaves), share
