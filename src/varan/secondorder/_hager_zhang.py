"""Hager and Zhang's line search: Wolfe's conditions, to the last digit.

Near a minimum the decrease of the objective drowns in its rounding, and a search that
compares values stops at half the digits. The approximate Wolfe conditions replace that
comparison by one of slopes, which keep their digits. The bracket shrinks by two secant
steps at once, and by bisection where those gain less than a third.

Use it in place of a zoom search where tight tolerances matter, and with nonlinear
conjugate gradients, whose theory asks for it. Cost: every trial is one value and one
gradient, and the last trial's are the next step's: with a good first trial a step costs
one evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from ..core._checks import check_choice

# The constants of Hager and Zhang, 2006, in their order: sufficient decrease,
# curvature, error allowed in a value, share of the bracket that secants must leave at
# most, growth while there is no bracket, and the factors of the first trial.
_DELTA, _SIGMA, _ERROR, _GAMMA, _GROW = 0.1, 0.9, 1e-6, 0.66, 5.0
_FIRST, _PROBE, _BOLD = 0.01, 0.1, 2.0

# What the next trial is: a look before the first, a step out, a halving towards a
# decrease, the first and the second secant, a halving of the bracket.
_LOOK, _OUT, _BACK, _SECANT, _SECOND, _HALVE = range(6)


class HagerZhangInfo(NamedTuple):
    """How a search went.

    Args:
        num_linesearch_steps: Evaluations of value and gradient.
        accepted: Whether Wolfe's conditions (or the approximate ones) hold; where not,
            the step is the best that was seen, or none.
    """

    num_linesearch_steps: Int[Array, ""]
    accepted: Bool[Array, ""]


class ScaleByHagerZhangState(NamedTuple):
    """State of `scale_by_hager_zhang_linesearch`.

    Args:
        learning_rate: The last step.
        value: The objective at the new parameters; `optax.value_and_grad_from_state`
            reads it.
        grad: Its gradient there.
        info: How the search went.
    """

    learning_rate: Float[Array, ""]
    value: Float[Array, ""]
    grad: Any
    info: HagerZhangInfo


def scale_by_hager_zhang_linesearch(
    max_linesearch_steps: int = 30,
    *,
    first_trial: Literal["one", "previous"] = "one",
) -> optax.GradientTransformationExtraArgs:
    """Scales a descent direction by Hager and Zhang's line search.

    An optax transformation with the protocol of `optax.scale_by_zoom_linesearch`: its
    `update` takes `value`, `grad` and `value_fn`, and its state leaves the value and
    gradient at the new parameters.

    Args:
        max_linesearch_steps: Evaluations a search may take; then the best step seen is
            taken.
        first_trial: `"one"`, right for directions of (quasi-)Newton type; or
            `"previous"`, the minimum of a parabola through a short step like the last,
            right for conjugate gradients: one evaluation more.

    Returns:
        An `optax.GradientTransformationExtraArgs`, to come last in a chain.

    Raises:
        ValueError: If `max_linesearch_steps` is not a positive integer, or
            `first_trial` unknown.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan import Smooth, solve
        >>> from varan.secondorder import scale_by_hager_zhang_linesearch
        >>> solver = optax.lbfgs(linesearch=scale_by_hager_zhang_linesearch())
        >>> problem = Smooth(lambda x: jnp.sum(jnp.cosh(x - 1.0)))
        >>> solve(problem, solver, jnp.zeros(2)).x.round(3)
        Array([1., 1.], dtype=float32)

    Source:
        Hager, Zhang, 2005, "A new conjugate gradient method with guaranteed descent and
        an efficient line search"; 2006, "Algorithm 851: CG_DESCENT".

    Differences:
        The error allowed in a value is relative to the value at the start of the
        search, not to an average over the run. Both kinds of Wolfe's conditions are
        accepted from the first step on. The first search of a run tries a step that
        moves the largest entry of x by a hundredth, as theirs, unless told `"one"`.
    """
    if not isinstance(max_linesearch_steps, int) or max_linesearch_steps < 1:
        raise ValueError(
            "scale_by_hager_zhang_linesearch: `max_linesearch_steps` must be a "
            f"positive integer (got {max_linesearch_steps!r})."
        )
    check_choice(
        "scale_by_hager_zhang_linesearch",
        "first_trial",
        first_trial,
        ("one", "previous"),
    )
    look = first_trial == "previous"

    def init(params):
        dtype = jnp.result_type(*jtu.tree_leaves(params))
        return ScaleByHagerZhangState(
            # No last step yet; optax reads an infinite value as none.
            jnp.zeros((), dtype),
            jnp.full((), jnp.inf, dtype),
            jtu.tree_map(jnp.zeros_like, params),
            HagerZhangInfo(jnp.zeros((), jnp.int32), jnp.asarray(False)),
        )

    def update(updates, state, params=None, *, value, grad, value_fn, **extra):
        if params is None:
            raise ValueError(
                "scale_by_hager_zhang_linesearch: `params` must be passed to `update` "
                "(got None)."
            )
        x, unravel = ravel_pytree(params)
        direction = ravel_pytree(updates)[0]
        gradient = ravel_pytree(grad)[0]

        def evaluate(v):
            number, slope = jax.value_and_grad(value_fn)(unravel(v), **extra)
            return jnp.asarray(number, x.dtype), ravel_pytree(slope)[0]

        value = jnp.asarray(value, x.dtype)
        trial = jnp.ones((), x.dtype)
        if look:
            trial = _like_the_last(state.learning_rate, x, direction, value)
        end = search(
            evaluate,
            x,
            direction,
            value,
            gradient,
            trial,
            look=look,
            max_steps=max_linesearch_steps,
        )
        new = ScaleByHagerZhangState(
            end.t,
            end.value,
            unravel(end.gradient),
            HagerZhangInfo(end.count, end.accepted),
        )
        return unravel(end.t * direction), new

    # optax types its updates without their extra arguments.
    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def _like_the_last(last, x, direction, value):
    """The last step; before there is one, a hundredth of the largest entry of `x`."""
    size, push = jnp.max(jnp.abs(x)), jnp.max(jnp.abs(direction))
    square = direction @ direction
    by_value = jnp.abs(value) / jnp.where(square > 0, square, 1)
    by_value = jnp.where(by_value > 0, by_value, 1 / _FIRST)
    by_size = size / jnp.where(push > 0, push, 1)
    # The look before the first trial is at a tenth of this.
    start = _FIRST / _PROBE * jnp.where(size > 0, by_size, by_value)
    return jnp.where(last > 0, last, start)


class Found(eqx.Module):
    """Where a line search ended.

    Args:
        t: The step; zero where nothing better than the start was seen.
        value: The value there.
        gradient: The gradient there.
        accepted: Whether Wolfe's conditions hold.
        count: Evaluations.
    """

    t: Float[Array, ""]
    value: Float[Array, ""]
    gradient: Float[Array, " n"]
    accepted: Bool[Array, ""]
    count: Int[Array, ""]


class _Point(eqx.Module):
    t: Float[Array, ""]
    value: Float[Array, ""]
    slope: Float[Array, ""]


class _Carry(eqx.Module):
    best: Found
    best_slope: Float[Array, ""]
    trial: Float[Array, ""]
    phase: Int[Array, ""]
    # The bracket, and what it was when its shrinking began.
    low: _Point
    high: _Point
    old_low: _Point
    old_high: _Point
    stuck: Bool[Array, ""]


def search(
    evaluate: Callable,
    x: Float[Array, " n"],
    direction: Float[Array, " n"],
    value: Float[Array, ""],
    gradient: Float[Array, " n"],
    trial: Float[Array, ""],
    *,
    look: bool = False,
    furthest: Float[Array, ""] | float = np.inf,
    max_steps: int = 30,
) -> Found:
    """Searches along `x + t direction`, one evaluation for each turn of one loop.

    Args:
        evaluate: From a point to value and gradient.
        x: Where the search begins.
        direction: Of descent; along any other nothing is tried.
        value: The value at `x`.
        gradient: The gradient at `x`.
        trial: The first step tried.
        look: Whether to look at a tenth of `trial` first, and fit a parabola.
        furthest: The largest step allowed; taken where the slope still falls there.
        max_steps: Limit of evaluations.
    """
    slope = gradient @ direction
    # Not below a few roundings of the value: float32 has no 1e-6.
    error = max(_ERROR, 8 * float(np.finfo(x.dtype).eps))
    bound = value + error * jnp.abs(value)
    furthest = jnp.asarray(furthest, x.dtype)
    zero = jnp.zeros((), x.dtype)
    none = _Point(jnp.full((), jnp.inf, x.dtype), zero, zero)
    origin = _Point(zero, value, slope)

    def proceed(c: _Carry):
        return ~c.best.accepted & ~c.stuck & (c.best.count < max_steps)

    def advance(c: _Carry) -> _Carry:
        number, new = evaluate(x + c.trial * direction)
        here = _Point(c.trial, number, new @ direction)
        finite = jnp.isfinite(here.value) & jnp.isfinite(here.slope)
        below = finite & (here.value <= bound)
        at_end = below & (here.t >= furthest) & (here.slope < 0)
        # A look is short: what it finds may pass and still be a timid step.
        accepted = finite & (_wolfe(here, value, slope, below) | at_end)
        accepted = accepted & (c.phase != _LOOK)
        better = accepted | (below & (jnp.abs(here.slope) < c.best_slope))
        best = _choose(
            better, (here.t, here.value, new), (c.best.t, c.best.value, c.best.gradient)
        )
        best = Found(best[0], best[1], best[2], accepted, c.best.count + 1)
        trial, phase, low, high, olds = _next(c, here, finite, below, value, slope)
        trial = jnp.minimum(trial, furthest)
        # No number is left between the ends.
        stuck = (trial <= low.t) | (trial >= high.t)
        stuck = stuck & (phase != _LOOK) | ~jnp.isfinite(trial)
        best_slope = jnp.where(better, jnp.abs(here.slope), c.best_slope)
        return _Carry(
            best, best_slope, trial, phase, low, high, olds[0], olds[1], stuck
        )

    start = _Carry(
        Found(
            zero,
            value,
            gradient,
            jnp.asarray(False),
            jnp.zeros((), jnp.int32),
        ),
        jnp.abs(slope),
        jnp.minimum(jnp.asarray(_PROBE if look else 1.0, x.dtype) * trial, furthest),
        jnp.asarray(_LOOK if look else _OUT, jnp.int32),
        origin,
        none,
        origin,
        none,
        ~(slope < 0),
    )
    return jax.lax.while_loop(proceed, advance, start).best


def _wolfe(here, value, slope, below):
    """Wolfe's conditions, or the approximate ones."""
    curved = here.slope >= _SIGMA * slope
    falls = here.value - value <= _DELTA * here.t * slope
    flat = below & (here.slope <= (2 * _DELTA - 1) * slope)
    return curved & (falls | flat)


def _next(c, here, finite, below, value, slope):
    """The next trial and its phase, and the bracket: the paper's steps by their cases.

    The bracket's low end has a falling slope and a value that is no higher than at the
    start; its high end has a rising slope, or, in phase `_BACK`, too high a value.
    """
    looking = c.phase == _LOOK
    rising = finite & (here.slope >= 0)
    falling = below & ~rising
    low = _choose(falling & ~looking, here, c.low)
    high = _choose(~falling & ~looking, here, c.high)
    middle = (low.t + high.t) / 2

    # A bracket whose high end does rise: two secants, then a halving if they gained
    # too little, then anew.
    second = _choose(
        rising, _secant(c.old_high, high, middle), _secant(c.old_low, low, middle)
    )
    inside = (second > low.t) & (second < high.t)
    gained = high.t - low.t <= _GAMMA * (c.old_high.t - c.old_low.t)
    again = (c.phase == _SECANT) & inside
    halve = ~again & ~gained & (c.phase != _HALVE) & (c.phase != _OUT)
    anew = ~again & ~halve
    first = _secant(low, high, middle)
    first = jnp.where((first > low.t) & (first < high.t), first, middle)
    trial = jnp.where(again, second, jnp.where(halve, middle, first))
    phase = jnp.where(again, _SECOND, jnp.where(halve, _HALVE, _SECANT))

    # No such bracket yet.
    back = (~rising & ~falling) | (falling & (c.phase == _BACK))
    out = falling & (c.phase == _OUT)
    trial = jnp.where(back, middle, jnp.where(out, _GROW * here.t, trial))
    phase = jnp.where(back, _BACK, jnp.where(out, _OUT, phase))

    # After the look: where the parabola through value, slope and this value is least.
    bend = (here.value - value - here.t * slope) / (here.t * here.t)
    convex = below & (bend > 0)
    least = -slope / (2 * jnp.where(convex, bend, 1))
    least = jnp.where(convex, least, _BOLD / _PROBE * here.t)
    trial = jnp.where(looking, least, trial)
    phase = jnp.where(looking, _OUT, phase).astype(jnp.int32)

    anew = anew & ~back & ~out & ~looking
    olds = _choose(anew, (low, high), (c.old_low, c.old_high))
    return trial, phase, low, high, olds


def _secant(a: _Point, b: _Point, otherwise):
    """Where the line through two slopes is zero."""
    bend = b.slope - a.slope
    usable = jnp.isfinite(a.t) & jnp.isfinite(b.t) & (bend != 0)
    point = (a.t * b.slope - b.t * a.slope) / jnp.where(usable, bend, 1)
    return jnp.where(usable & jnp.isfinite(point), point, otherwise)


def _choose(flag, new, old):
    return jtu.tree_map(lambda n, o: jnp.where(flag, n, o), new, old)
