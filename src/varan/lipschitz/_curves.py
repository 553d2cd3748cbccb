"""Elementwise nonlinearities: their values, slopes and enclosing lines.

A curve says over `[l, u]` which values its Clarke derivative takes and which pair of
lines encloses it. Piecewise-linear curves have closed forms. A smooth curve is known
by its formula and by the points where its first two derivatives change monotonicity;
from these any slope `k` gets the exact intercept `max (f(z) - k z)` over `[l, u]`, and
the slope is the candidate (chord, tangent at the midpoint, tangents through the ends)
that lies closest to the curve at the midpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class Lines(NamedTuple):
    """`lower_slope z + lower_offset <= f(z) <= upper_slope z + upper_offset`."""

    lower_slope: Array
    lower_offset: Array
    upper_slope: Array
    upper_offset: Array


class PiecewiseLinear(NamedTuple):
    """`z -> negative z` for `z < 0` and `positive z` for `z > 0`.

    ReLU is (0, 1), leaky ReLU (a, 1), the absolute value (-1, 1). The Clarke
    derivative at 0 is the whole interval between the slopes.

    Args:
        negative: The slope left of zero.
        positive: The slope right of zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import PiecewiseLinear
        >>> leaky = PiecewiseLinear(0.5, 1.0)
        >>> leaky(jnp.array([-2.0, 2.0])).tolist()
        [-1.0, 2.0]
        >>> low, high = leaky.slope_range(jnp.array([-1.0, 1.0]), jnp.array([2.0, 3.0]))
        >>> low.tolist(), high.tolist()
        ([0.5, 1.0], [1.0, 1.0])
    """

    negative: float
    positive: float

    @property
    def smooth(self) -> bool:
        """Whether the derivative is a continuous function of the state."""
        return False

    def __call__(self, z: Array) -> Array:
        return jnp.where(z > 0, self.positive * z, self.negative * z)

    def slope_range(self, l: Array, u: Array) -> tuple[Array, Array]:
        """Smallest and largest Clarke derivative over `[l, u]`."""
        low, high = sorted((self.negative, self.positive))
        positive, negative = l > 0, u < 0
        fixed = jnp.where(positive, self.positive, self.negative).astype(l.dtype)
        stable = positive | negative
        return jnp.where(stable, fixed, low), jnp.where(stable, fixed, high)

    def lines(self, l: Array, u: Array, slope: Array | None = None) -> Lines:
        """Enclosing lines; `slope` in [0, 1] picks the free line between the pieces.

        Without `slope` the free line takes the slope of the longer side.
        """
        unstable = (l <= 0) & (u >= 0)
        fixed = jnp.where(l > 0, self.positive, self.negative).astype(l.dtype)
        # Halves, and quotients before products: nothing over- or underflows that the
        # lines themselves do not.
        wide = unstable & (u > l)
        gap = jnp.where(wide, u / 2 - l / 2, 1)
        chord = (self.positive * (u / 2) - self.negative * (l / 2)) / gap
        tiny = float(jnp.finfo(l.dtype).tiny)
        reach = l * ((u / 2) / gap) - tiny
        offset = (self.negative - self.positive) * reach
        if slope is None:
            slope = jnp.where(u > -l, 1.0, 0.0).astype(l.dtype)
        free = self.negative + slope * (self.positive - self.negative)
        chord = jnp.where(wide, chord, fixed)
        offset = jnp.where(unstable, offset, 0)
        free, chord = (jnp.where(unstable, v, fixed) for v in (free, chord))
        zero = jnp.zeros_like(free)
        if self.positive >= self.negative:
            return Lines(free, zero, chord, offset)
        return Lines(chord, offset, free, zero)


class SmoothCurve(NamedTuple):
    """A twice differentiable nonlinearity.

    Args:
        function: The elementwise function.
        turns: Where its derivative changes from rising to falling or back, ascending.
        bends: Where its second derivative does.
        limits: The derivative's infimum and supremum over the whole line.

    Example:
        The derivative of the hyperbolic tangent rises up to 0 and falls beyond.

        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import SmoothCurve
        >>> curve = SmoothCurve(jnp.tanh, turns=(0.0,), bends=(-0.6585, 0.6585))
        >>> low, high = curve.slope_range(jnp.array(-1.0), jnp.array(2.0))
        >>> round(float(low), 3), round(float(high), 3)
        (0.071, 1.0)
    """

    function: Callable[[Array], Array]
    turns: tuple[float, ...]
    bends: tuple[float, ...]
    limits: tuple[float, float] = (0.0, 1.0)

    @property
    def smooth(self) -> bool:
        """Whether the derivative is a continuous function of the state."""
        return True

    def __call__(self, z: Array) -> Array:
        return self.function(z)

    def slope_range(self, l: Array, u: Array) -> tuple[Array, Array]:
        """Smallest and largest derivative over `[l, u]`."""
        slope = _derivative(self.function)
        finite = jnp.isfinite(l) & jnp.isfinite(u)
        a, b = jnp.where(finite, l, 0), jnp.where(finite, u, 0)
        points = [a, b, *(jnp.clip(t, a, b) for t in self.turns)]
        values = jnp.stack([slope(z) for z in points])
        low, high = self.limits
        noise = _slope_noise(l.dtype)
        return (
            jnp.where(finite, jnp.maximum(jnp.min(values, 0) - noise, low), low),
            jnp.where(finite, jnp.minimum(jnp.max(values, 0) + noise, high), high),
        )

    def lines(self, l: Array, u: Array, slope: Array | None = None) -> Lines:
        """Enclosing lines; they have no free slope, `slope` is ignored."""
        return _lines(self.function, self.turns, l, u)

    def slope_lines(self, l: Array, u: Array) -> Lines:
        """Lines that enclose the derivative over `[l, u]`."""
        lines = _lines(_derivative(self.function), self.bends, l, u)
        noise = _slope_noise(l.dtype)
        return lines._replace(
            lower_offset=lines.lower_offset - noise,
            upper_offset=lines.upper_offset + noise,
        )


Curve = PiecewiseLinear | SmoothCurve


def _slope_noise(dtype) -> float:
    """Of a slope such as GELU's: 1 - tanh^2 times a cubic, where it is small too."""
    return 64 * float(jnp.finfo(dtype).eps)


def _derivative(function):
    return lambda z: jax.jvp(function, (z,), (jnp.ones_like(z),))[1]


def _lines(function, turns, l: Array, u: Array) -> Lines:
    upper = _upper_line(function, turns, l, u)
    lower = _upper_line(lambda z: -function(z), turns, l, u)
    return Lines(-lower[0], -lower[1], *upper)


def _upper_line(function, turns, l: Array, u: Array) -> tuple[Array, Array]:
    """Slope and offset of a line above `function` on `[l, u]`.

    Differentiable in `l` and `u`: by the envelope theorem the interior maximiser of
    `f(z) - k z` does not move the intercept to first order, so it is held fixed.
    """
    slope = _derivative(function)
    # A leading axis for the candidate slopes.
    l, u = l[None], u[None]
    middle = (l + u) / 2
    wide = u - l > jnp.sqrt(jnp.finfo(l.dtype).eps)
    chord = jnp.where(
        wide, (function(u) - function(l)) / jnp.where(wide, u - l, 1), slope(middle)
    )
    tangents = [slope(_touching(function, end, l, u)) for end in (l, u)]
    k = jnp.concatenate([chord, slope(middle), *tangents])
    edges = [-jnp.inf, *turns, jnp.inf]
    points = [jnp.broadcast_to(z, k.shape) for z in (l, u)]
    points += [
        _stationary(slope, k, jnp.clip(a, l, u), jnp.clip(b, l, u))
        for a, b in itertools.pairwise(edges)
    ]
    heights = jnp.stack([function(z) - k * z for z in points])
    reach = jnp.maximum(jnp.abs(l), jnp.abs(u))
    # Near zero a function such as GELU is what is left of numbers of its argument's
    # size.
    scale = jnp.max(jnp.abs(heights), 0) + (1 + jnp.abs(k)) * reach
    offset = jnp.max(heights, 0) + 8 * jnp.finfo(l.dtype).eps * scale
    best = jnp.argmin(lax.stop_gradient(offset + k * middle), 0, keepdims=True)
    k, offset = (jnp.take_along_axis(v, best, 0)[0] for v in (k, offset))
    return k, offset


def _bisections(dtype) -> int:
    # Halvings after which the second-order error of an extremum is below rounding.
    return 14 if jnp.finfo(dtype).bits <= 32 else 27


def _stationary(slope, k, low, high) -> Array:
    """The point of a piece with monotone slope where the slope is `k`, or an end."""
    low, high, k = (lax.stop_gradient(v) for v in (low, high, k))
    low, high = jnp.broadcast_to(low, k.shape), jnp.broadcast_to(high, k.shape)
    above = slope(low) > k

    def halve(_, ends):
        a, b = ends
        middle = (a + b) / 2
        same = (slope(middle) > k) == above
        return jnp.where(same, middle, a), jnp.where(same, b, middle)

    a, b = lax.fori_loop(0, _bisections(k.dtype), halve, (low, high))
    return (a + b) / 2


def _touching(function, end, l, u) -> Array:
    """Where a line through the curve at `end` touches it, if it does so in [l, u]."""
    slope = _derivative(function)

    def miss(t, end):
        return function(t) - function(end) - slope(t) * (t - end)

    fixed = lax.stop_gradient(end)
    a, b = lax.stop_gradient(l), lax.stop_gradient(u)
    far = jnp.where(fixed == a, b, a)
    above = miss(far, fixed) > 0

    def halve(_, ends):
        a, b = ends
        middle = (a + b) / 2
        same = (miss(middle, fixed) > 0) == above
        return jnp.where(same, a, middle), jnp.where(same, middle, b)

    a, b = lax.fori_loop(0, 2 * _bisections(end.dtype), halve, (fixed, far))
    t = (a + b) / 2
    # One Newton step from the fixed root carries the derivative in `end`.
    curvature = lax.stop_gradient(-_derivative(slope)(t) * (t - fixed))
    safe = jnp.abs(curvature) > jnp.sqrt(jnp.finfo(end.dtype).eps)
    residual = miss(t, end) - lax.stop_gradient(miss(t, fixed))
    return t - jnp.where(safe, residual / jnp.where(safe, curvature, 1), 0)


@cache
def known_curves() -> list[tuple[Callable[[Array], Array], Curve]]:
    """The smooth activations that the front end recognises.

    `turns` and `bends` are the zeros of the second and third derivatives.
    """

    def gelu_erf(z):
        return jax.nn.gelu(z, approximate=False)

    # Outward in the last digit: they must enclose.
    silu_slopes = (-0.09983933, 1.09983933)
    gelu_slopes = (-0.12890415, 1.12890415)
    tanh_gelu_slopes = (-0.12899308, 1.12899308)
    return [
        (
            jnp.tanh,
            SmoothCurve(jnp.tanh, (0.0,), (-0.65847894846240835, 0.65847894846240835)),
        ),
        (
            jax.nn.sigmoid,
            SmoothCurve(
                jax.nn.sigmoid,
                (0.0,),
                (-1.3169578969248167, 1.3169578969248167),
                (0.0, 0.25),
            ),
        ),
        (
            jax.nn.silu,
            SmoothCurve(
                jax.nn.silu,
                (-2.3993572805154677, 2.3993572805154677),
                (-3.4358409935351107, 0.0, 3.4358409935351107),
                silu_slopes,
            ),
        ),
        (jax.nn.softplus, SmoothCurve(jax.nn.softplus, (), (0.0,))),
        (
            gelu_erf,
            SmoothCurve(
                gelu_erf,
                (-1.4142135623730950, 1.4142135623730950),
                (-2.0, 0.0, 2.0),
                gelu_slopes,
            ),
        ),
        (
            jax.nn.gelu,
            SmoothCurve(
                jax.nn.gelu,
                (-1.4185040087908284, 1.4185040087908284),
                (-2.0134807246242579, 0.0, 2.0134807246242579),
                tanh_gelu_slopes,
            ),
        ),
    ]
