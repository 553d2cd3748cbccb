"""Flatness-aware minimisation: descent on the loss and on both of its flatnesses.

Zeroth-order flatness is how much the loss rises in a ball, first-order flatness the
radius times the steepest slope in it. Differences of four gradients approximate the
gradients of both.
"""

from __future__ import annotations

from typing import Unpack

import optax

from ..core import _checks as checks
from ._engine import (
    EngineOptions,
    Rule,
    Schedule,
    check_schedule,
    perturbed,
    scheduled,
    with_engine_options,
)
from ._four_gradients import four_gradients
from ._vectors import minus, moved, scaled


@with_engine_options()
def fad(
    base: optax.GradientTransformation,
    rho: Schedule = 0.05,
    alpha: Schedule = 1.0,
    beta: float = 0.5,
    *,
    rho_inner: Schedule | None = None,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Flatness-aware minimisation (FAD) around any optax optimiser.

    The objective is `L + alpha (beta R0 + (1 - beta) R1)`, where R0 is the largest
    rise of the loss in a ball and R1 the radius times the largest gradient norm. With
    g0 at w, g1 at `rho_inner` up the slope, g2 at `rho` along g1 - g0 and g3 at
    `rho_inner` up the slope from there, g1 - g0 stands for the gradient of R0 and
    g3 - g2 for that of R1. A step costs 4 gradients of one batch.

    Args:
        base: Any optax transformation.
        rho: Radius of the ball, positive; or a schedule, a function of the step.
        alpha: Weight of both flatnesses, not negative, or a schedule.
        beta: Share of the zeroth-order flatness, in [0, 1]. With `alpha = beta = 1`
            the direction is that of `sam(base, rho_inner)`.
        rho_inner: Length of the steps up the slope, positive, or a schedule; by default
            `rho`.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`; see `perturbed`.
        Its diagnostics are of the step to the steepest point.

    Raises:
        ValueError: If a radius is not positive, `alpha` negative, or `beta` outside
            [0, 1].

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import fad
        >>> H, w = jnp.array([1.0, 4.0]), jnp.array([1.0, 0.0])
        >>> method = fad(optax.sgd(1.0), rho=0.5, alpha=0.2)
        >>> d, state = method.update(
        ...     H * w, method.init(w), w, grad_fn=lambda w, i: H * w)
        >>> [round(float(x), 3) for x in -d]  # both differences are 0.5 H g / |g|
        [1.1, 0.0]
        >>> int(state.grad_evals)
        4

    Source:
        Zhang, Xu, Yu, Dong, Tian and Cui, 2023, "Flatness-Aware Minimization for Domain
        Generalization", arXiv:2307.11108.

    Differences:
        No code was released. Objective and differences are the paper's; how `alpha`
        and `beta` enter, the radii and the defaults are ours.
    """
    for name, radius in (("rho", rho), ("rho_inner", rho_inner)):
        if radius is not None:
            check_schedule("fad", name, radius, positive=True)
    check_schedule("fad", "alpha", alpha)
    if not checks.is_traced(beta) and not 0 <= beta <= 1:
        raise ValueError(f"fad: `beta` must lie in [0, 1] (got {beta}).")
    rho_inner = rho if rho_inner is None else rho_inner

    def direction(g0, params, state, grad_fn, call):
        radius, length = scheduled(rho, call.step), scheduled(rho_inner, call.step)
        g = four_gradients(g0, params, radius, (length, length), grad_fn, call)
        weight = scheduled(alpha, call.step)
        zeroth, first = weight * beta, weight * (1 - beta)
        # Weights, not a difference: for alpha = beta = 1 this is g1 to the last bit.
        d = moved(scaled(g.here, 1 - zeroth), scaled(g.up, zeroth))
        d = moved(d, scaled(minus(g.steep_up, g.steep), first))
        return d, state, g.e

    return perturbed(base, Rule(direction), **engine)
