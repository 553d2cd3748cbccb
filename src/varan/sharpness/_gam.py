"""Gradient norm aware minimisation: descent on the loss and the steepest slope nearby.

First-order flatness is the radius times the largest gradient norm in the ball. It
bounds the rise of the loss there, and at a minimum the largest eigenvalue of the
Hessian. Its gradient is a Hessian-vector product at the steepest point; two gradients
a short step apart give it at lower cost.
"""

from __future__ import annotations

from typing import Literal, Unpack

import jax.numpy as jnp
import jax.tree_util as jtu
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
from ._sam import ascent
from ._vectors import minus, moved, of_length, orthogonal, scaled


@with_engine_options()
def gam(
    base: optax.GradientTransformation,
    rho: Schedule = 0.2,
    rho_inner: Schedule = 0.02,
    *,
    betas: tuple[float, float, float] = (1.0, 1.0, 1.0),
    gamma: float = 0.03,
    mode: Literal["fd", "hvp"] = "fd",
    alpha: float = 1.0,
    adaptive: bool = False,
    normalize_scale: bool = False,
    sam_rho: Schedule | None = None,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Gradient norm aware minimisation (GAM) around any optax optimiser.

    The objective is `L + alpha rho max ||g(w + d)||` over `||d|| <= rho`. Mode `"hvp"`
    follows it: one step of length `rho` along `H g / ||g||` to the steepest point, and
    `g + alpha rho H g_steep / ||g_steep||` with H taken there; 6 gradients of one batch
    (each of two Hessian-vector products counts as two). Mode `"fd"` is the authors'
    released method, of 4 gradients: g0 at w, g1 at `rho_inner` up the slope, g2 at
    `rho` along g1 - g0, g3 at `rho_inner` up the slope from there. The direction is
    `s - gamma v` with `s = beta1 g1 + beta3 g3`, where v is the part of
    `g0 + beta2 g2` orthogonal to s.

    Args:
        base: Any optax transformation.
        rho: Radius of the ball, positive; or a schedule, a function of the step.
        rho_inner: Length of the steps whose gradients are compared, positive, or a
            schedule. Only for `"fd"`.
        betas: Weights of g1, g2, g3, not negative, the first and last not both zero.
            Only for `"fd"`.
        gamma: Weight of the orthogonal part, not negative. Only for `"fd"`.
        mode: `"fd"` or `"hvp"`.
        alpha: Weight of the flatness, not negative. Only for `"hvp"`.
        adaptive: Whether balls are relative to the parameters' absolute values.
        normalize_scale: Divides by `beta1 + beta3`: the direction is about so many
            times as long as a gradient, so a learning rate that suits `base` alone is
            too long by that factor. Only for `"fd"`.
        sam_rho: Radius of the step to g1, positive, or a schedule; by default
            `rho_inner`. With a radius of SAM the sum s is of SAM's gradient and GAM's:
            "SAM and GAM". Only for `"fd"`.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`; see `perturbed`.
        Its diagnostics are of the step to the steepest point.

    Raises:
        ValueError: If a radius is not positive, a weight is negative, `betas` are not
            three or leave no s, or `mode` is neither of the two.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import gam
        >>> H, w = jnp.array([1.0, 4.0]), jnp.array([1.0, 0.0])
        >>> method = gam(optax.sgd(1.0), rho=0.5, mode="hvp")
        >>> d, state = method.update(
        ...     H * w, method.init(w), w, grad_fn=lambda w, i: H * w)
        >>> [round(float(x), 3) for x in -d]  # steepest at 1.5: 1 + 0.5 * 1
        [1.5, 0.0]
        >>> int(state.grad_evals)
        6

    Source:
        Zhang, Xu, Yu, Zou and Cui, 2023, "Gradient Norm Aware Minimization Seeks
        First-Order Flatness and Improves Generalization", arXiv:2303.03108, section 4.

    Differences:
        Weights and radii of `"fd"` are those of the released code, whose beta_0 is
        never used and is left out. Nothing is added to norms: zero has no direction.
        How the paper combines SAM and GAM is not in that code; `sam_rho` is our
        reading.
    """
    checks.check_choice("gam", "mode", mode, ("fd", "hvp"))
    for name, radius in (("rho", rho), ("rho_inner", rho_inner), ("sam_rho", sam_rho)):
        if radius is not None:
            check_schedule("gam", name, radius, positive=True)
    checks.check_nonnegative("gam", "gamma", gamma)
    checks.check_nonnegative("gam", "alpha", alpha)
    checks.check_shape("gam", "betas", betas, (3,))
    checks.check_nonnegative("gam", "betas", betas)
    if betas[0] + betas[2] == 0:
        raise ValueError(
            f"gam: the first and last of `betas` must not both be zero (got {betas})."
        )
    if mode == "hvp":
        direction = _exact(rho, alpha, adaptive)
    else:
        scale = betas[0] + betas[2] if normalize_scale else 1.0
        weights = (betas[0] / scale, betas[1], betas[2] / scale, gamma / scale)
        lengths = (rho_inner if sam_rho is None else sam_rho, rho_inner)
        direction = _released(rho, lengths, weights, adaptive)
    return perturbed(base, Rule(direction), **engine)


def _released(rho, lengths, weights, adaptive):
    first, second, third, gamma = weights

    def direction(g0, params, state, grad_fn, call):
        radius = scheduled(rho, call.step)
        inner = tuple(scheduled(length, call.step) for length in lengths)
        sizes = _absolute(params) if adaptive else None
        g = four_gradients(g0, params, radius, inner, grad_fn, call, sizes)
        s = moved(scaled(g.up, first), scaled(g.steep_up, third))
        other = orthogonal(moved(g.here, scaled(g.steep, second)), s)
        return minus(s, scaled(other, gamma)), state, g.e

    return direction


def _exact(rho, alpha, adaptive):
    def direction(g0, params, state, grad_fn, call):
        radius = scheduled(rho, call.step)
        sizes = _absolute(params) if adaptive else None
        _, rise = call.hvp(params, of_length(call.restrict(g0), 1.0))
        e = ascent(call.restrict(rise), radius, sizes=sizes)
        there = moved(params, e)
        steepest = of_length(call.restrict(grad_fn(there)), 1.0)
        _, penalty = call.hvp(there, steepest)
        return moved(g0, scaled(penalty, alpha * radius)), state, e

    return direction


def _absolute(params):
    return jtu.tree_map(jnp.abs, params)
