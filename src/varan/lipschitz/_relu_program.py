"""A chain of affine maps and ReLUs over a region, scaled for its quadratic relaxation.

Variables: the input in units of the region, then every neuron's value in units of its
range. Neurons that are never active are kept at zero and take no part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._exact import OUTPUT, affine_blocks
from ._forward import check_bounded
from ._graph import BoundGraph
from ._lipschitz import Rows, as_rows, check_rows
from ._sets import Ball, Box

Layer = tuple[np.ndarray, np.ndarray]
# A range is never taken for less than this share of what the neuron's argument spans: a
# neuron that is hardly ever active would have huge weights.
_SHARE = 0.25
# Roundings, in units of eps times the number of terms, by which ranges are widened.
_ROUNDINGS = 8


class ReluProgram(eqx.Module):
    """Minimise `c . z` over what the relaxation allows; see `slack_matrix`.

    Args:
        weights: Of every layer, in scaled variables.
        biases: Likewise.
        c: (last layer,).
        ball: Whether the input is in the unit ball, otherwise in the unit cube.
    """

    weights: tuple[Float[Array, ...], ...]
    biases: tuple[Float[Array, ...], ...]
    c: Float[Array, " last"]
    ball: bool = eqx.field(static=True)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Variables of the input and of every layer."""
        return (self.weights[0].shape[1], *(len(b) for b in self.biases))


class Scaled(NamedTuple):
    """A program and what it stands for.

    Args:
        program: With numpy arrays.
        alive: Variables that take part.
        squares: Bound of every variable's square; those of the input in a ball share
            the ball's.
        unit: What one unit of the objective is worth.
        offset: The objective's constant.
        basis: Of the input's variables in the units of the region, or `None`.
    """

    program: ReluProgram
    alive: np.ndarray
    squares: np.ndarray
    unit: float
    offset: float
    basis: np.ndarray | None


def relu_layers(owner: str, model, region: Ball | Box) -> tuple[list[Layer], Box]:
    """The network's affine maps, in float64, and the box around the region."""
    box = region.box if isinstance(region, Ball) else region
    check_bounded(owner, box)
    graph = BoundGraph.from_callable(model, box.lower)
    curves = [graph.nodes[k].curve for k in graph.activations]
    relu = all(
        not c.smooth and (float(c.negative), float(c.positive)) == (0, 1)
        for c in curves
    )
    if not curves or not relu:
        raise ValueError(
            f"{owner}: every activation must be a ReLU, and there must be one (got "
            f"{len(curves)} activations). Use `local_lipschitz` or `bounds` for others."
        )
    blocks = affine_blocks(model, box)
    layers, before = [], 0
    for k in (*graph.activations, OUTPUT):
        parts, bias = blocks[k]
        if set(parts) != {before}:
            raise ValueError(
                f"{owner}: the network must be one chain of layers (it has several "
                "paths). Use `verify` or `bounds` for residual networks."
            )
        layers.append((np.asarray(parts[before], float), np.asarray(bias, float)))
        before = k
    return layers, box


def layer_bounds(
    model: Callable[[Array], Array], region: Ball | Box, *, rows: Rows = "each"
) -> list[Box]:
    """Bounds of every layer of a ReLU network over a ball or a box, by CROWN.

    Each layer's argument is pulled back through lines around the ReLUs to the input and
    bounded over the region itself: a `Ball` is not replaced by the box around it.

    Args:
        model: As for `lowrank_sdp`: one chain of affine maps and ReLUs.
        region: A ball or a bounded box.
        rows: `"each"` output, or combinations of outputs, (rows, outputs).

    Returns:
        A box for the argument of every activation in order, flattened, then one for the
        rows; rounded outward.

    Raises:
        ValueError: As `lowrank_sdp`.
        UnsupportedPrimitive: An operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import Ball, layer_bounds
        >>> weights = [jnp.array([[3.0, 4.0]]), jnp.array([[2.0]])]
        >>> biases = [jnp.array([1.0]), jnp.array([0.0])]
        >>> hidden, out = layer_bounds((weights, biases), Ball(jnp.zeros(2), 1.0))
        >>> round(float(hidden.upper[0]), 3), round(float(out.upper[0]), 3)
        (6.0, 12.0)

    Source: Zhang, Weng, Chen, Hsieh and Daniel, 2018, "Efficient Neural Network
        Robustness Certification with General Activation Functions", arXiv:1811.00866.
    """
    layers, box = relu_layers("layer_bounds", model, region)
    matrix, bias = layers[-1]
    c = check_rows("layer_bounds", rows, box)
    c = np.asarray(as_rows(c, (len(bias),), box.lower.dtype), float).reshape(
        -1, len(bias)
    )
    spans = ranges([*layers[:-1], (c @ matrix, c @ bias)], region)
    dtype = box.lower.dtype
    return [Box(*_outward(low, high, dtype)) for low, high in spans]


def _outward(low, high, dtype):
    """Both sides in a dtype that may be coarser than float64."""
    eps = float(jnp.finfo(dtype).eps)
    slack = eps * np.maximum(np.abs(low), np.abs(high))
    return jnp.asarray(low - slack, dtype), jnp.asarray(high + slack, dtype)


def ranges(layers: list[Layer], region: Ball | Box) -> list[tuple[np.ndarray, ...]]:
    """Lower and upper bounds of every layer's arguments by CROWN over the region."""
    found: list[tuple[np.ndarray, ...]] = []
    for k in range(len(layers)):
        top = _crown(layers[: k + 1], found, region, 1.0)
        bottom = _crown(layers[: k + 1], found, region, -1.0)
        found.append((-bottom, top))
    return found


def _crown(layers, found, region, sign) -> np.ndarray:
    """Upper bounds of `sign` times the last layer's arguments."""
    rows, offset = sign * layers[-1][0], sign * layers[-1][1]
    size = np.abs(offset)
    for (weight, bias), (low, high) in zip(
        layers[-2::-1], found[len(layers) - 2 :: -1], strict=True
    ):
        open_ = (low < 0) & (high > 0)
        slope = np.where(open_, high / np.where(open_, high - low, 1), low >= 0)
        # Of the lower line's slopes the one that encloses less.
        under = np.where(open_, high > -low, low >= 0)
        offset = offset + np.maximum(rows, 0) @ np.where(open_, -slope * low, 0)
        rows = np.maximum(rows, 0) * slope + np.minimum(rows, 0) * under
        offset, size = offset + rows @ bias, size + np.abs(rows) @ np.abs(bias)
        rows = rows @ weight
    centre, reach = centre_and_reach(rows, region)
    size = size + np.abs(rows) @ np.abs(centre) + reach
    terms = sum(weight.shape[1] for weight, _ in layers)
    rounding = _ROUNDINGS * terms * np.finfo(float).eps * size
    return rows @ centre + reach + offset + rounding


def centre_and_reach(rows, region) -> tuple[np.ndarray, np.ndarray]:
    """The region's middle, and how far rows reach from there."""
    if isinstance(region, Ball):
        reach = float(region.radius) * np.linalg.norm(rows, axis=1)
        return np.ravel(np.asarray(region.centre, float)), reach
    centre, radius = (np.ravel(np.asarray(v, float)) for v in _middle(region))
    return centre, np.abs(rows) @ radius


def _middle(box: Box):
    lower, upper = (np.asarray(side, float) for side in (box.lower, box.upper))
    centre = lower + (upper - lower) / 2
    return centre, np.maximum(upper - centre, centre - lower)


def relu_program(layers: list[Layer], c, offset: float, found, region) -> Scaled:
    """The scaled program of `c . z + offset` after layers with the given ranges."""
    ball = isinstance(region, Ball)
    centre, _ = centre_and_reach(np.zeros((1, layers[0][0].shape[1])), region)
    radius = float(region.radius) if ball else np.ravel(_middle(region)[1])
    first = layers[0][0] * radius
    basis = None
    if ball and first.shape[1] > len(first):
        # Of the input only its part in the rows' span matters.
        basis, triangle = np.linalg.qr(first.T)
        first = triangle.T
    arguments = [(first, layers[0][1] + layers[0][0] @ centre), *layers[1:]]
    weights, biases, alive, squares = [], [], [], []
    width = first.shape[1]
    alive.append(np.ones(width, bool))
    squares.append(np.full(width, 1 / width if ball else 1.0))
    before = np.ones(width)
    for (weight, bias), (low, high) in zip(arguments, found, strict=True):
        live = high > 0
        # Powers of two: scaling rounds nothing.
        needed = np.where(live, np.maximum(high, _SHARE * (high - low)), 1.0)
        scale = 2.0 ** np.ceil(np.log2(needed))
        shown = weight * before * alive[-1] / scale[:, None]
        weights.append(np.where(live[:, None], shown, 0.0))
        biases.append(np.where(live, bias / scale, -1.0))
        alive.append(live)
        squares.append(np.where(live, (high / scale) ** 2, 0.0))
        before = scale
    c = c * before * alive[-1]
    unit = float(np.linalg.norm(c)) or 1.0
    return Scaled(
        ReluProgram(tuple(weights), tuple(biases), c / unit, ball),
        np.concatenate(alive),
        np.concatenate(squares),
        unit,
        offset,
        basis,
    )


def slack_matrix(program: ReluProgram, bound, activity) -> np.ndarray:
    """The Lagrangian as a quadratic form in `(1, all variables)`.

    Args:
        program: In scaled variables.
        bound: Multipliers, not negative: of the input's region, then of every layer's
            `-z <= 0` and `W z + b - z' <= 0`, in the order of `constraints`.
        activity: Multipliers of `z' (z' - W z - b) = 0`.

    Returns:
        Symmetric; at every point of the network over the region its value is at most
        the objective.
    """
    ends = np.cumsum([1, *program.sizes])
    whole = np.zeros((ends[-1], ends[-1]))
    places = [slice(a, b) for a, b in itertools.pairwise(ends)]
    regions = 1 if program.ball else program.sizes[0]
    radii, rest = bound[:regions], bound[regions:]
    whole[0, 0] -= radii.sum()
    whole[places[0], places[0]] += np.diag(np.broadcast_to(radii, program.sizes[:1]))
    for k, weight in enumerate(program.weights):
        bias = program.biases[k]
        count = len(bias)
        positive, above, rest = np.split(rest, [count, 2 * count])
        active, activity = np.split(activity, [count])
        old, new = places[k], places[k + 1]
        # Twice the symmetric part's upper half.
        whole[0, new] -= positive + above + active * bias
        whole[0, old] += above @ weight
        whole[0, 0] += above @ bias
        whole[new, new] += np.diag(active)
        whole[old, new] -= (active[:, None] * weight).T
    whole[0, places[-1]] += program.c
    diagonal = np.diag(np.diag(whole))
    upper = np.triu(whole, 1) / 2
    return diagonal + upper + upper.T
