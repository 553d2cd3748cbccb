"""Sharpness-aware minimisation: the gradient at the worst point nearby.

The objective is min over w of the maximum of the loss on a ball around w. The maximum's
place is taken to first order, and its dependence on w is left out of the derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, PyTree

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
from ._vectors import moved, of_length, scaled

Scale = Callable[[PyTree[Array]], PyTree[Array]]


@with_engine_options()
def sam(
    base: optax.GradientTransformation,
    rho: Schedule = 0.05,
    *,
    p: float = 2,
    ascent_steps: int = 1,
    adaptive: bool | Scale = False,
    eta: float = 0.01,
    normalize: bool = True,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimisation (SAM) around any optax optimiser.

    The weights are moved to the highest point of a ball of radius `rho`, to first
    order; the gradient found there goes to `base` at the weights themselves. A step
    costs `1 + ascent_steps` gradients of one batch. With `adaptive` the ball is one of
    relative size: T the scale of each parameter, the step is rho T^2 g / |T g|.

    Args:
        base: Any optax transformation; `optax.adamw(1e-3)`, or a chain.
        rho: Radius, not negative; or a schedule, a function of the step.
        p: The norm whose ball it is, from 1 to `math.inf`.
        ascent_steps: Gradient steps on the way up, each `rho / ascent_steps` long.
        adaptive: Scales parameters by their size: True for absolute value plus `eta`
            for arrays of two or more axes and 1 for the others (shifts), or a function
            of the parameters that gives T as a tree like them.
        eta: What is added to the absolute values.
        normalize: Whether the ascent has length `rho` whatever the gradient's; else it
            is `rho` times the gradient ("unnormalised SAM").
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`; see `perturbed`.

    Raises:
        ValueError: If `rho` or `eta` is negative, `p` below 1, `ascent_steps` below 1,
            or `normalize=False` is combined with another `p` than 2.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.sharpness import sam
        >>> loss = lambda w: jnp.sum(jnp.array([1.0, 9.0]) * w**2) / 2
        >>> method, w = sam(optax.sgd(0.1), rho=0.1), jnp.array([3.0, 4.0])
        >>> state = method.init(w)
        >>> g = jax.grad(loss)
        >>> updates, state = method.update(
        ...     g(w), state, w, grad_fn=lambda w, i: g(w))
        >>> e = 0.1 * g(w) / jnp.linalg.norm(g(w))
        >>> bool(jnp.allclose(updates, -0.1 * g(w + e)))
        True
        >>> round(float(state.info.ascent_norm), 6)
        0.1

    Source:
        Foret, Kleiner, Mobahi and Neyshabur, 2021, "Sharpness-Aware Minimization for
        Efficiently Improving Generalization", arXiv:2010.01412, equation 2; adaptive:
        Kwon, Kim, Park and Choi, 2021, arXiv:2102.11600; unnormalised: Andriushchenko
        and Flammarion, 2022, arXiv:2206.06232.

    Differences:
        A weight penalty belongs into `base`, so it is not part of the ascent.
    """
    check_schedule("sam", "rho", rho)
    checks.check_nonnegative("sam", "eta", eta)
    if checks.is_traced(p) or not p >= 1:
        raise ValueError(f"sam: `p` must be at least 1, and not traced (got {p}).")
    ascent_steps = check_count("sam", "ascent_steps", ascent_steps)
    if not normalize and p != 2:
        raise ValueError(
            "sam: `normalize=False` ascends by the gradient itself, so `p` must be 2 "
            f"(got {p})."
        )
    scale = _scale_of(adaptive, eta)

    def direction(g0, params, state, grad_fn, call):
        radius = scheduled(rho, call.step) / ascent_steps
        sizes = None if scale is None else scale(params)
        gradient, e = g0, None
        for _ in range(ascent_steps):
            gradient = gradient if e is None else grad_fn(moved(params, e))
            gradient = call.restrict(gradient)
            step = ascent(gradient, radius, p=p, sizes=sizes, normalize=normalize)
            e = step if e is None else moved(e, step)
        return grad_fn(moved(params, e)), state, e

    return perturbed(base, Rule(direction), **engine)


@with_engine_options()
def asam(
    base: optax.GradientTransformation,
    rho: Schedule = 0.5,
    *,
    eta: float = 0.01,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adaptive sharpness-aware minimisation (ASAM): `sam` with `adaptive=True`.

    Args:
        base: Any optax transformation.
        rho: Radius relative to the parameters' size, or a schedule.
        eta: Added to the absolute values.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`.

    Raises:
        ValueError: As `sam`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import asam
        >>> state = asam(optax.sgd(0.1)).init(jnp.ones((2, 2)))
        >>> int(state.grad_evals)
        0

    Source:
        Kwon, Kim, Park and Choi, 2021, arXiv:2102.11600.
    """
    return sam(base, rho, adaptive=True, eta=eta, **engine)


@with_engine_options()
def usam(
    base: optax.GradientTransformation,
    rho: Schedule = 0.05,
    **engine: Unpack[EngineOptions],
) -> optax.GradientTransformationExtraArgs:
    """Unnormalised sharpness-aware minimisation: the gradient at w + rho g.

    Args:
        base: Any optax transformation.
        rho: Length of the ascent in units of the gradient, or a schedule.
        interval, mask, microbatch, axis_name, sync_ascent, measure_gain, seed: As in
            `perturbed`.

    Returns:
        An optax transformation whose `update` is given `grad_fn`.

    Raises:
        ValueError: As `sam`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.sharpness import usam
        >>> method, w = usam(optax.sgd(1.0), 0.5), jnp.asarray(2.0)
        >>> update, _ = method.update(w, method.init(w), w, grad_fn=lambda w, i: w)
        >>> float(update)
        -3.0

    Source:
        Andriushchenko and Flammarion, 2022, arXiv:2206.06232.
    """
    return sam(base, rho, normalize=False, **engine)


def ascent(
    gradient: PyTree[Array],
    radius,
    *,
    p: float = 2,
    sizes: PyTree[Array] | None = None,
    normalize: bool = True,
) -> PyTree[Array]:
    """The step in a ball that raises the loss most, to first order."""
    inside = gradient if sizes is None else jtu.tree_map(jnp.multiply, sizes, gradient)
    if not normalize:
        step = scaled(inside, radius)
    elif p == 2:
        step = of_length(inside, radius)
    else:
        step = scaled(_dual_direction(inside, p), radius)
    if sizes is None:
        return step
    return jtu.tree_map(lambda t, s: (t * s).astype(s.dtype), sizes, step)


def _dual_direction(tree, p):
    """The point of the unit ball of the p-norm that a gradient points to most."""
    if p == jnp.inf:
        return jtu.tree_map(jnp.sign, tree)
    peak = _largest(tree)
    if p == 1:
        # All of it on the largest entries, evenly. Not on those that are 1 in units of
        # the peak: the quotient may round below.
        top = jtu.tree_map(
            lambda leaf: jnp.where(jnp.abs(leaf) < peak, 0, jnp.sign(leaf)), tree
        )
        return scaled(top, 1 / jnp.maximum(_sum_of_powers(top, 1), 1))
    relative = scaled(tree, jnp.where(peak > 0, 1 / jnp.where(peak > 0, peak, 1), 1))
    q = p / (p - 1)
    powered = jtu.tree_map(
        lambda leaf: jnp.sign(leaf) * jnp.abs(leaf) ** (q - 1), relative
    )
    total = _sum_of_powers(relative, q)
    return scaled(powered, jnp.where(total > 0, total, 1) ** (-1 / p))


def _largest(tree):
    return jnp.max(
        jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jtu.tree_leaves(tree)])
    )


def _sum_of_powers(tree, power):
    leaves = [jnp.sum(jnp.abs(leaf) ** power) for leaf in jtu.tree_leaves(tree)]
    return jnp.sum(jnp.stack(leaves))


def _scale_of(adaptive, eta):
    if adaptive is False:
        return None
    if adaptive is not True:
        return adaptive
    return lambda params: jtu.tree_map(
        lambda leaf: jnp.abs(leaf) + eta if leaf.ndim > 1 else jnp.ones_like(leaf),
        params,
    )
