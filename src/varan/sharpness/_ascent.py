"""APGD: projected ascent in a ball without a stepsize to choose.

In coordinates z the feasible set is the l2 or linf ball of radius rho. Each step goes
`stepsize` along the normalised gradient (or its sign), projects, and mixes with the
point before the last. At fixed checkpoints the step halves and the search returns to
the best point if too few steps improved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

# All from the authors' code: shares of the steps at which a checkpoint stands and by
# which the distances between checkpoints shrink, the share of improving steps that
# keeps the stepsize, the weight of the new point.
_FIRST, _SHRINK, _LEAST, _IMPROVING, _NEW = 0.22, 0.03, 0.06, 0.75, 0.75


class _State(NamedTuple):
    here: Float[Array, " n"]
    before: Float[Array, " n"]
    best: Float[Array, " n"]
    best_value: Float[Array, ""]
    stepsize: Float[Array, ""]
    improved: Float[Array, ""]
    at_checkpoint: tuple[Float[Array, ""], Float[Array, ""]]  # value and stepsize
    defined: Bool[Array, ""]  # whether the start had a value


def ascend(
    value_and_direction: Callable[[Array], tuple[Float[Array, ""], Array]],
    value: Callable[[Array], Float[Array, ""]],
    start: Float[Array, " n"],
    start_value: Float[Array, ""],
    rho: Float[Array, ""],
    p: float,
    steps: int,
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """The best of `steps` points and of the start, and its value.

    `start_value` is what has to be beaten: that of the ball's centre, returned as the
    zero vector where nothing is better. NaN if the value is NaN at the start: the
    search would end next to the centre, and say nothing about the ball.
    """
    gaps = np.asarray(_gaps(steps), start.dtype)

    def one(state, inputs):
        index, gap = inputs
        found, direction = value_and_direction(state.here)
        state = _keep(state, found)
        begun = (index == 0) & ~jnp.isnan(found)
        state = state._replace(defined=state.defined | begun)
        # The starting point is no step that could have improved.
        state = jax.lax.cond(
            (gap > 0) & (index > 0), _review, lambda state, _: state, state, gap
        )
        moved = state.here + state.stepsize * unit(direction, p)
        projected = project(moved, rho, p)
        following = _NEW * projected + (1 - _NEW) * state.before
        return state._replace(here=following, before=state.here), None

    zero = jnp.zeros_like(start)
    two = jnp.asarray(2 * rho, start.dtype)
    first = _State(
        start, start, zero, start_value, two, jnp.zeros((), start.dtype),
        (start_value, two),
        jnp.asarray(False),
    )  # fmt: skip
    inputs = (jnp.arange(steps, dtype=jnp.int32), gaps)
    state, _ = jax.lax.scan(one, first, inputs)
    state = _keep(state, value(state.here))
    return state.best, jnp.where(state.defined, state.best_value, jnp.nan)


def _keep(state, found):
    # A NaN is no improvement.
    better = found > state.best_value
    return state._replace(
        best=jnp.where(better, state.here, state.best),
        best_value=jnp.where(better, found, state.best_value),
        improved=state.improved + better.astype(state.improved.dtype),
    )


def _review(state, gap):
    value, stepsize = state.at_checkpoint
    stuck = (stepsize == state.stepsize) & (value == state.best_value)
    halve = stuck | (state.improved < _IMPROVING * gap)
    return state._replace(
        here=jnp.where(halve, state.best, state.here),
        before=jnp.where(halve, state.best, state.before),
        stepsize=jnp.where(halve, state.stepsize / 2, state.stepsize),
        improved=jnp.zeros_like(state.improved),
        at_checkpoint=(state.best_value, state.stepsize),
    )


def _gaps(steps):
    """Steps since the last checkpoint where one stands, else 0."""
    gaps, share, width, last = [0.0] * steps, 0.0, _FIRST, 0
    while (place := math.ceil((share + width) * steps)) < steps and place > last:
        gaps[place], last = float(place - last), place
        share, width = share + width, max(width - _SHRINK, _LEAST)
    return gaps


def unit(direction: Float[Array, " n"], p: float) -> Float[Array, " n"]:
    """The steepest direction of length 1 in the l_p norm; zero stays zero."""
    if p == math.inf:
        return jnp.sign(direction)
    length = jnp.linalg.norm(direction)
    return jnp.where(length > 0, direction / jnp.where(length > 0, length, 1), 0)


def project(z: Float[Array, " n"], rho: Float[Array, ""], p: float):
    """The nearest point of the ball of radius rho."""
    if p == math.inf:
        return jnp.clip(z, -rho, rho)
    length = jnp.linalg.norm(z)
    return z * jnp.where(length > rho, rho / length, 1)


def random_start(key: PRNGKeyArray, like: Float[Array, " n"], rho, p: float):
    """A random point of the ball: uniform in the cube, on a sphere of radius rho / 2.

    Not at the centre, where the gradient of a minimum is zero.
    """
    if p == math.inf:
        return rho * jax.random.uniform(key, like.shape, like.dtype, -1, 1)
    return rho / 2 * unit(jax.random.normal(key, like.shape, like.dtype), p)
