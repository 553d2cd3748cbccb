"""Four gradients that show both flatnesses: what GAM and FAD make directions of.

From the weights a step up the slope; from there a step in the direction in which the
slope grows fastest, to where it is steepest in the ball; and there again a step up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, PyTree

from ._engine import Call
from ._sam import ascent
from ._vectors import minus, moved


class FourGradients(NamedTuple):
    """Gradients of one batch, and the way to the steepest point.

    `up - here` over its step's length is `H g / |g|` at the weights to first order,
    `steep_up - steep` the same at `w + e`.
    """

    here: PyTree[Array]
    up: PyTree[Array]
    steep: PyTree[Array]
    steep_up: PyTree[Array]
    e: PyTree[Array]


def four_gradients(
    here: PyTree[Array],
    params: PyTree[Array],
    rho: Float[Array, ""] | float,
    inner: tuple[Float[Array, ""] | float, Float[Array, ""] | float],
    grad_fn: Callable[[PyTree[Array]], PyTree[Array]],
    call: Call,
    sizes: PyTree[Array] | None = None,
) -> FourGradients:
    """Steps of lengths `inner` up the slope, of `rho` to the steepest point.

    All steps keep their length whatever the gradient's, and are zero where it is. With
    `sizes` the balls are relative to them.
    """

    def step(direction, length):
        return ascent(call.restrict(direction), length, sizes=sizes)

    up = grad_fn(moved(params, step(here, inner[0])))
    e = step(minus(up, here), rho)
    there = moved(params, e)
    steep = grad_fn(there)
    steep_up = grad_fn(moved(there, step(steep, inner[1])))
    return FourGradients(here, up, steep, steep_up, e)
