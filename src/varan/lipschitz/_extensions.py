"""Lipschitz functions through given values, on the whole space.

`McShane` is explicit and keeps the constant of scalar values; of vectors it keeps that
of each coordinate. `Kirszbraun` keeps the constant of vectors, for a small quadratic
program at every point. Both have their constant whatever the values are; where the
values themselves have it, both go through them.
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core._checks import check_finite, check_nonempty, check_nonnegative, check_shape

# More than any corral holds in exact arithmetic, by two.
_SPARE = 4
_MAX_TURNS = 200
_REFINEMENTS = 3


class McShane(eqx.Module):
    """The middle of the greatest and the least Lipschitz function through values.

    `(max_i (v_i - a |x - x_i|) + min_i (v_i + a |x - x_i|)) / 2`, coordinate by
    coordinate; one pass over the points.

    Args:
        points: (points, inputs).
        values: (points, outputs).
        constant: `a`, not negative.

    Raises:
        ValueError: Shapes that do not fit, no points, numbers that are not finite, or a
            negative constant.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import McShane
        >>> points, values = jnp.array([[0.0], [2.0]]), jnp.array([[0.0], [1.0]])
        >>> function = McShane(points, values, 1.0)
        >>> float(function(jnp.array([1.0]))[0]), float(function.lipschitz)
        (0.5, 1.0)

    Source: E. J. McShane, 1934, "Extension of range of functions", Bulletin of the
        American Mathematical Society 40; H. Whitney, 1934, "Analytic extensions of
        differentiable functions defined in closed sets", Transactions of the AMS 36.
    """

    points: Float[Array, "points inputs"]
    values: Float[Array, "points outputs"]
    constant: Float[Array, ""]

    def __init__(self, points, values, constant):
        self.points, self.values, self.constant = _checked(
            "McShane", points, values, constant
        )

    @property
    def lipschitz(self) -> Float[Array, ""]:
        """The constant times the square root of the number of outputs."""
        return self.constant * self.values.shape[1] ** 0.5

    def __call__(self, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
        """The function at a point."""
        square = jnp.sum((x[None] - self.points) ** 2, 1)
        apart = square > 0
        distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)
        reach = (self.constant * distance)[:, None]
        low = _extreme(self.values - reach, jnp.argmax)
        return low + (_extreme(self.values + reach, jnp.argmin) - low) / 2


def _extreme(values, where):
    """The extreme of each column, by its place: its derivative knows no ties."""
    return jnp.take_along_axis(values, where(values, 0)[None], 0)[0]


class Kirszbraun(eqx.Module):
    """A vector-valued extension that keeps the constant of its values.

    At `x` the value is the mean of the `v_i` with the weights, on the simplex, that
    minimise

        2 a^2 |x - mean of x_i|^2 + a^2 var(x_i) - var(v_i)

    (means and variances in the weights): the second half is nonnegative where the
    values have the constant `a`, and zero where one weight is all. An active-set method
    finds them in some ten turns, each a pass over the points and a linear system of
    the size inputs + outputs. Differentiable in everything, by the optimal weights'
    system. Wants double precision: in single the values keep some three digits.

    Args:
        points: (points, inputs).
        values: (points, outputs).
        constant: `a`, not negative.

    Raises:
        ValueError: As `McShane`. Where the active-set method fails the value is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import Kirszbraun
        >>> points = jnp.array([[0.0], [2.0]])
        >>> function = Kirszbraun(points, jnp.array([[0.0, 0.0], [2.0, 0.0]]), 1.0)
        >>> [round(float(v), 3) for v in function(jnp.array([0.5]))]
        [0.5, 0.0]

    Source: D. Azagra, E. Le Gruyer and C. Mudarra, 2018, "Kirszbraun's theorem via an
        explicit formula", arXiv:1810.10288; M. D. Kirszbraun, 1934, "Über die
        zusammenziehende und Lipschitzsche Transformationen", Fundamenta
        Mathematicae 22.

    Differences: The formula's convex envelope is that of paraboloids of one curvature,
        so that its gradient is the quadratic program above. A point in the
        intersection of balls also extends by one point, but not to a Lipschitz map.
    """

    points: Float[Array, "points inputs"]
    values: Float[Array, "points outputs"]
    constant: Float[Array, ""]

    def __init__(self, points, values, constant):
        self.points, self.values, self.constant = _checked(
            "Kirszbraun", points, values, constant
        )

    @property
    def lipschitz(self) -> Float[Array, ""]:
        """The constant."""
        return self.constant

    def __call__(self, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
        """The function at a point."""
        mean = jnp.mean(self.values, 0)
        values = self.values - mean[None]
        positive = self.constant > 0
        # In the units of the inputs, the values of a function with constant 1.
        scaled = values / jnp.where(positive, self.constant, 1)
        scaled = jnp.where(positive, scaled, 0)
        rows, offset = _program(x, self.points, scaled)
        corral, solved = _weights(*jax.lax.stop_gradient((rows, offset)))
        weights = _equalised(rows, offset, corral)
        value = mean + jnp.sum(weights[:, None] * values[corral.members], 0)
        return jnp.where(solved, value, jnp.nan)


def _program(x, points, scaled):
    """Rows and offsets of `min |sum w_i row_i|^2 + w . offset` over the simplex."""
    centre = jnp.mean(points, 0)
    x, points = x - centre, points - centre[None]
    rows = jnp.concatenate([x[None] - points / 2, scaled / 2], 1)
    return rows, (jnp.sum(points**2, 1) - jnp.sum(scaled**2, 1)) / 4


class _Corral(NamedTuple):
    members: Array
    active: Array
    weights: Array


def _weights(rows, offset):
    """The points that share the optimal weights, and whether they are optimal.

    Each turn solves for the weights that would be optimal if those of the corral were
    free. If they are nonnegative, the point whose gradient is least joins; else the
    corral moves towards them until a weight is zero, and that point leaves.
    """
    size = rows.shape[1] + _SPARE
    scale = jnp.max(jnp.sum(rows**2, 1)) + jnp.max(jnp.abs(offset))
    eps = float(jnp.finfo(rows.dtype).eps)
    first = jnp.argmin(jnp.sum(rows**2, 1) + offset)
    here = jnp.arange(size) == 0
    start = _Corral(
        jnp.where(here, first, 0), here, jnp.where(here, 1, 0).astype(rows.dtype)
    )

    def turn(carry):
        corral, _, count = carry
        weights = _equalised(rows, offset, corral)
        wrong = corral.active & (weights < 0)
        inside = ~jnp.any(wrong)
        joined, optimal = _join(rows, offset, corral._replace(weights=weights), scale)
        left = _leave(corral, weights, wrong)
        corral = jax.tree.map(lambda a, b: jnp.where(inside, a, b), joined, left)
        return corral, inside & optimal, count + 1

    def proceed(carry):
        return ~carry[1] & (carry[2] < _MAX_TURNS)

    begin = (start, jnp.asarray(False), jnp.asarray(0))
    corral, _, _ = jax.lax.while_loop(proceed, turn, begin)
    # However the turns ended, what counts is that no gradient lies much below theirs.
    gradient, level = _gradients(rows, offset, corral)
    return corral, level - jnp.min(gradient) <= eps**0.6 * scale


def _gradients(rows, offset, corral):
    """The objective's gradient in each weight, and its mean over the corral."""
    chosen = jnp.sum(corral.weights[:, None] * rows[corral.members], 0)
    gradient = 2 * (rows @ chosen) + offset
    return gradient, jnp.sum(corral.weights * gradient[corral.members])


def _join(rows, offset, corral, scale):
    gradient, level = _gradients(rows, offset, corral)
    # Its own points' gradients are equal but for rounding: they do not join again.
    gradient = gradient.at[corral.members].add(jnp.where(corral.active, jnp.inf, 0))
    new = jnp.argmin(gradient)
    slack = 16 * float(jnp.finfo(rows.dtype).eps) * scale
    optimal = level - gradient[new] <= slack
    # A free place; if rounding has filled all, that of the smallest weight.
    place = jnp.argmin(jnp.where(corral.active, corral.weights, -1))
    here = (jnp.arange(corral.members.size) == place) & ~optimal
    joined = _Corral(
        jnp.where(here, new, corral.members),
        corral.active | here,
        jnp.where(here, 0, corral.weights),
    )
    return joined, optimal


def _leave(corral, wanted, wrong):
    fall = jnp.where(wrong, corral.weights - wanted, 1)
    share = jnp.where(wrong, corral.weights / jnp.where(fall > 0, fall, 1), jnp.inf)
    step = jnp.min(share)
    weights = corral.weights + jnp.minimum(step, 1) * (wanted - corral.weights)
    active = corral.active & ~(wrong & (share <= step))
    return _Corral(corral.members, active, jnp.where(active, weights, 0))


def _equalised(rows, offset, corral):
    """The weights that make the gradients of the corral's points equal.

    The system is singular where the rows depend on each other: a ridge, mended by
    proximal steps, gives the direction that then ends at a zero weight.
    """
    active, dtype = corral.active, rows.dtype
    chosen = jnp.where(active[:, None], rows[corral.members], 0)
    right = jnp.where(active, -offset[corral.members], 0)
    gram = 2 * (chosen @ chosen.T)
    level = jnp.trace(gram) + _tiny(dtype)
    ridge = float(jnp.finfo(dtype).eps) ** 0.8 * level
    # The weights sum to 1: what this adds to every gradient changes nothing.
    border = active.astype(dtype)
    gram = gram + level * border[:, None] * border[None]
    inverse = _inverse(gram + jnp.diag(jnp.where(active, ridge, level)))
    ones = inverse @ border
    weights = corral.weights
    for _ in range(_REFINEMENTS):
        free = inverse @ jnp.where(active, right + ridge * weights, 0)
        shift = (1 - jnp.sum(border * free)) / jnp.sum(border * ones)
        weights = border * (free + shift * ones)
    return weights


def _inverse(matrix):
    """Of a small positive definite matrix, by elimination: fast in large batches."""
    size = len(matrix)

    def eliminate(k, pair):
        pivot = pair[k] / pair[k, k]
        column = jnp.where(jnp.arange(size) == k, 0, pair[:, k])
        return (pair - column[:, None] * pivot[None]).at[k].set(pivot)

    pair = jnp.concatenate([matrix, jnp.eye(size, dtype=matrix.dtype)], 1)
    return jax.lax.fori_loop(0, size, eliminate, pair)[:, size:]


def _tiny(dtype):
    return float(jnp.finfo(dtype).tiny) ** 0.5


def _checked(owner, points, values, constant):
    """The three, as arrays of one dtype."""
    check_shape(owner, "points", points, (None, None))
    check_nonempty(owner, "points", points)
    check_shape(owner, "values", values, (jnp.shape(points)[0], None))
    check_finite(owner, "points", points)
    check_finite(owner, "values", values)
    check_nonnegative(owner, "constant", constant)
    points = jnp.asarray(points)
    dtype = jnp.result_type(points.dtype, jnp.result_type(float))
    if jnp.issubdtype(points.dtype, jnp.floating):
        dtype = points.dtype
    return tuple(jnp.asarray(a, dtype) for a in (points, values, constant))
