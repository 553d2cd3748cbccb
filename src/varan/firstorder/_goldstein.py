"""A stochastic line search that can lengthen its steps as well as shorten them.

Armijo's test `f(x + t u) <= f(x) + c t u'g` on the batch's own loss bounds a step from
above; Goldstein's second test `f(x + t u) >= f(x) + (1 - c) t u'g` bounds it from
below. Each update begins with the step that the last one found and looks for one that
passes both. Where the model can interpolate its data (every batch's loss is smallest
at one point) such steps converge without a schedule, and fast.

What begins each search at a longer step and only shortens it is
`optax.scale_by_backtracking_linesearch`; see the package page.

Source: Vaswani, Mishkin, Laradji, Schmidt, Gidel, Lacoste-Julien, 2019, "Painless
stochastic gradient: interpolation, line-search, and convergence rates" (arXiv
1905.09997).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ..core._checks import check_positive


class GoldsteinState(NamedTuple):
    """What `scale_by_goldstein_linesearch` keeps.

    Args:
        stepsize: That the last search ended with; the next one begins there.
        trials: Values that the last search took.
    """

    stepsize: Float[Array, ""]
    trials: Int[Array, ""]


class _Search(NamedTuple):
    stepsize: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    done: Bool[Array, ""]
    trials: Int[Array, ""]


def scale_by_goldstein_linesearch(
    slope_rtol: float = 0.1,
    decrease_factor: float = 0.8,
    increase_factor: float = 1.5,
    max_stepsize: float = 1.0,
    max_trials: int = 15,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates by a step that passes Goldstein's two tests on the batch.

    Chain it after a descent direction, and momentum after it:
    `optax.chain(optax.sgd(1.0), scale_by_goldstein_linesearch(), optax.trace(0.9))`. A
    search costs one value a trial; one that is out of trials takes the longest step
    that it knows to pass Armijo's test, or else none.

    Args:
        slope_rtol: The `c` of both tests, in (0, 1/2).
        decrease_factor: In (0, 1): of a step that is too long.
        increase_factor: Above 1: of a step that is too short. Once one of each is
            known, the search halves the interval between them.
        max_stepsize: Positive; the first step tried, and the longest.
        max_trials: Values that a search may take.

    Returns:
        An optax transformation whose `update` needs the keywords `value` and `grad` at
        the parameters, and `value_fn`, the loss of the same batch as a function of
        parameters.

    Raises:
        ValueError: If a setting is outside its range.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.firstorder import scale_by_goldstein_linesearch
        >>> method = optax.chain(optax.sgd(1.0), scale_by_goldstein_linesearch())
        >>> def loss(w):
        ...     return 4.0 * jnp.sum((w - 1.0) ** 2)
        >>> w = jnp.zeros(2)
        >>> state = method.init(w)
        >>> for _ in range(30):
        ...     value, grad = jax.value_and_grad(loss)(w)
        ...     updates, state = method.update(
        ...         grad, state, w, value=value, grad=grad, value_fn=loss
        ...     )
        ...     w = optax.apply_updates(w, updates)
        >>> w.round(3)
        Array([1., 1.], dtype=float32)

    Source:
        Vaswani et al., 2019 (arXiv 1905.09997), section 6; the tests: Nocedal, Wright,
        2006, "Numerical Optimization", section 3.1.

    Differences:
        Between a step that is too long and one that is too short the interval is
        halved: factors alone may jump over the steps that pass for ever.
    """
    _check_settings(
        slope_rtol, decrease_factor, increase_factor, max_stepsize, max_trials
    )

    def init(params):
        dtype = optax.tree.dtype(params, "lowest")
        longest = jnp.asarray(max_stepsize, dtype)
        return GoldsteinState(longest, jnp.asarray(0, jnp.int32))

    def update(updates, state, params, *, value, grad, value_fn, **extra):
        del extra
        dtype = state.stepsize.dtype
        slope = jnp.asarray(optax.tree.vdot(updates, grad), dtype)
        value = jnp.asarray(value, dtype)
        noise = float(np.finfo(dtype).eps) * jnp.abs(value)
        longest = jnp.asarray(max_stepsize, dtype)

        def trial(search):
            t = search.stepsize
            new = jnp.asarray(value_fn(optax.tree.add_scale(params, t, updates)), dtype)
            long = ~(new <= value + slope_rtol * t * slope + noise)
            short = new < value + (1 - slope_rtol) * t * slope - noise
            short = short & (t < longest)
            low = jnp.where(long, search.low, t)
            high = jnp.where(long, t, search.high)
            known = (low > 0) & jnp.isfinite(high)
            factor = jnp.where(long, decrease_factor, increase_factor).astype(dtype)
            step = jnp.where(known, (low + high) / 2, jnp.minimum(t * factor, longest))
            done = ~(long | short)
            step = jnp.where(done, t, step)
            return _Search(step, low, high, done, search.trials + 1)

        def proceed(search):
            return ~search.done & (search.trials < max_trials)

        search = _Search(
            state.stepsize,
            jnp.zeros((), dtype),
            jnp.asarray(jnp.inf, dtype),
            jnp.asarray(False),
            jnp.asarray(0, jnp.int32),
        )
        search = jax.lax.while_loop(proceed, trial, search)
        # `low` is the longest step that has passed Armijo's test, the last one if done.
        scaled = optax.tree.scale(search.low, updates)
        return scaled, GoldsteinState(search.stepsize, search.trials)

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def _check_settings(slope_rtol, decrease_factor, increase_factor, max_stepsize, trials):
    owner = "scale_by_goldstein_linesearch"
    ranges = {
        "slope_rtol": (0 < slope_rtol < 0.5, "in (0, 1/2)", slope_rtol),
        "decrease_factor": (0 < decrease_factor < 1, "in (0, 1)", decrease_factor),
        "increase_factor": (increase_factor > 1, "above 1", increase_factor),
        "max_trials": (trials >= 1, "at least 1", trials),
    }
    for name, (fine, wanted, got) in ranges.items():
        if not fine:
            raise ValueError(f"{owner}: `{name}` must be {wanted} (got {got}).")
    check_positive(owner, "max_stepsize", max_stepsize)
