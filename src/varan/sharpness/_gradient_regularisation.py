"""Gradient regularisation: descent on the loss plus a multiple of its squared slope.

The penalty's gradient is a Hessian-vector product. One more gradient a step away along
the gradient gives it as a finite difference, at less cost, and not the same method any
more: forward, backward and exact differ in where they lead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Unpack

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, Int

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
from ._vectors import minus, moved, norm, norm_dtype, scaled

SCHEMES = ("forward", "backward", "exact", "central")


class GRState(NamedTuple):
    """What the finite differences report, under jit too.

    Args:
        imprecise: Steps whose perturbation was shorter than 1000 rounding units of the
            weights (1e-4 of their norm in float32, 8 times it in bfloat16, where no
            difference is precise): what the gradients differ by is then mostly
            rounding. Choose a larger `eps`, or `scheme="exact"`.
    """

    imprecise: Int[Array, ""]


@with_engine_options()
def gr(
    base: optax.GradientTransformation,
    gamma: Schedule,
    eps: Schedule | None = None,
    *,
    scheme: Literal["forward", "backward", "exact", "central"] = "forward",
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Gradient regularisation: descends `L + gamma/2 ||g||^2`, g the gradient of L.

    The penalty's gradient is gamma H g. `"exact"` takes that Hessian-vector product;
    `"forward"` takes `(g(w + eps g) - g(w)) / eps` instead, `"backward"`
    `(g(w) - g(w - eps g)) / eps`, `"central"` the mean of both. A step costs 2
    gradients of one batch, for `"central"` and `"exact"` 3 (the product of the latter
    evaluates the gradient again). Forward differences with `eps = gamma` are
    unnormalised sharpness-aware minimisation, `usam`.

    Args:
        base: Any optax transformation.
        gamma: Strength, not negative; or a schedule, a function of the step.
        eps: Length of the difference in units of the gradient, positive, or a schedule;
            by default `gamma`. Not used by `"exact"`.
        scheme: How the penalty's gradient is taken.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`; see `perturbed`. With
        a difference scheme `state.rule_state.imprecise` counts the steps whose
        perturbation was lost in the rounding of the weights.

    Raises:
        ValueError: If `gamma` is negative, `eps` not positive (zero is
            `scheme="exact"`), or `scheme` is none of the four.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import gr
        >>> H, w = jnp.array([1.0, 4.0]), jnp.array([1.0, 1.0])
        >>> for scheme in ("forward", "backward", "exact", "central"):
        ...     method = gr(optax.sgd(1.0), 0.1, 0.5, scheme=scheme)
        ...     d, state = method.update(
        ...         H * w, method.init(w), w, grad_fn=lambda w, i: H * w)
        ...     print(bool(jnp.allclose(-d, H * w + 0.1 * H * H * w)))
        True
        True
        True
        True

    Source:
        Karakida, Takase, Hayase and Osawa, 2023, "Understanding Gradient Regularization
        in Deep Learning: Efficient Finite-Difference Computation and Implicit Bias",
        arXiv:2210.02720, equations 3 to 5.

    Differences:
        `"central"` is not in the paper.
    """
    checks.check_choice("gr", "scheme", scheme, SCHEMES)
    check_schedule("gr", "gamma", gamma)
    if eps is not None and scheme != "exact":
        check_schedule("gr", "eps", eps, positive=True)
    if scheme == "exact":
        return perturbed(base, Rule(_exact(gamma)), **engine)
    rule = Rule(_difference(gamma, eps, scheme), _no_step_imprecise)
    return perturbed(base, rule, **engine)


def _exact(gamma):
    def direction(g0, params, state, grad_fn, call):
        del grad_fn
        _, product = call.hvp(params, call.restrict(g0))
        return moved(g0, scaled(product, scheduled(gamma, call.step))), state, None

    return direction


def _difference(gamma, eps, scheme):
    def direction(g0, params, state, grad_fn, call):
        strength = scheduled(gamma, call.step)
        length = strength if eps is None else scheduled(eps, call.step)
        # Not gamma / gamma, which is NaN where a schedule reaches zero.
        ratio = 1.0 if eps is None else strength / length
        e = scaled(call.restrict(g0), -length if scheme == "backward" else length)
        g1 = grad_fn(moved(params, e))
        if scheme == "central":
            behind = grad_fn(moved(params, scaled(e, -1.0)))
            d = moved(g0, scaled(minus(g1, behind), ratio / 2))
        else:
            # Weights, not a difference: at eps = gamma this is g1 to the last bit.
            ratio = -ratio if scheme == "backward" else ratio
            d = moved(scaled(g0, 1.0 - ratio), scaled(g1, ratio))
        return d, _with_precision(state, e, params), e

    return direction


def _no_step_imprecise(params):
    del params
    return GRState(jnp.zeros((), jnp.int32))


def _with_precision(state, e, params):
    # Rounding w + e loses half a unit of w: a thousandth of such an e.
    dtype = norm_dtype(params)
    units = jtu.tree_map(
        lambda leaf: float(jnp.finfo(leaf.dtype).eps) * leaf.astype(dtype), params
    )
    least = 1e3 * norm(units)
    length = norm(e)
    lost = (length > 0) & (length < least)
    return GRState(state.imprecise + lost.astype(jnp.int32))


def flooding(
    loss_fn: Callable[..., Float[Array, ""]], level: float
) -> Callable[..., Float[Array, ""]]:
    """A loss that is kept at a level: `|L - level| + level`.

    Above the level it is descended, below it ascended. A step down and the step up
    that follows move the weights by `-eta^2` times the backward difference of `gr`'s
    penalty with `eps = eta`, the learning rate; up and then down by the forward one: at
    the level, flooding is gradient regularisation. Costs nothing.

    Args:
        loss_fn: Any function with a scalar value.
        level: The level, in units of the loss, finite.

    Returns:
        A function of the same arguments.

    Raises:
        ValueError: If the level is not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import flooding
        >>> flooded = flooding(lambda w: w**2, 0.25)
        >>> float(flooded(0.0)), float(jax.grad(flooded)(0.25))
        (0.5, -0.5)

    Source:
        Ishida, Yamane, Sakai, Niu and Sugiyama, 2020, arXiv:2002.08709; as gradient
        regularisation: Karakida et al., 2023, arXiv:2210.02720, section 3.3.
    """
    checks.check_finite("flooding", "level", level)

    def flooded(*args, **kwargs):
        return jnp.abs(loss_fn(*args, **kwargs) - level) + level

    return flooded
