"""How much interval propagation loses: propagation tightness.

The box that intervals compute for a network's output, layer by layer, against the
smallest box that holds it. A ratio of 1 says that intervals are exact; random networks
lose a constant factor with every layer and width, and training with interval bounds
makes networks that do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core._checks import check_choice, check_finite, check_positive
from ._forward import interval_activation, interval_affine, largest
from ._graph import BoundGraph
from ._lipschitz import as_rows, check_rows
from ._milp import exact_bounds
from ._nodes import Activation
from ._sets import Box

TightnessMode = Literal["dln", "local", "true"]


class Elided(NamedTuple):
    """Combinations of outputs as combinations of an earlier node, plus a constant."""

    node: int
    rows: Array
    offset: Array


def propagation_tightness(
    model: Callable[[Array], Array],
    x: Float[Array, ...],
    epsilon: float,
    *,
    mode: TightnessMode = "local",
    rows: Literal["each"] | Float[Array, "rows out"] = "each",
    clip: tuple[float, float] | None = None,
) -> Float[Array, " rows"]:
    """The radius of the optimal output box over that of interval propagation.

    Between 0 and 1; 1 says that intervals lose nothing. Modes `"dln"` and `"local"`
    cost a Jacobian and one interval pass, are exact for networks that are linear over
    the ball, and work under `jit`, `vmap` and `grad`: they serve as a regulariser. The
    last linear map is merged with `rows` on both sides.

    Args:
        model: As for `local_lipschitz`.
        x: The centre of the ball.
        epsilon: Its radius in the l_inf norm, positive.
        mode: `"dln"` leaves the activations out, as if the network were deep linear;
            `"local"` replaces them by their slopes at `x`; `"true"` divides the exact
            range (`exact_bounds`, for small ReLU networks, outside jit) by that of
            intervals over the ball itself.
        rows: `"each"` output, or combinations of outputs such as differences of logits.
        clip: Smallest and largest value an entry can take: the ball is cut to it.

    Returns:
        One ratio a row. An output that does not move at all (0 / 0) has the ratio 1;
        NaN where the exact range is not found within a minute.

    Raises:
        ValueError: A radius that is not positive, an `x` that is not finite, `rows` of
            the wrong shape; in mode `"true"` what `exact_bounds` refuses.
        UnsupportedPrimitive: An operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import propagation_tightness
        >>> first, second = jnp.array([[1.0, 1], [1, -1]]), jnp.array([[1.0, 1.0]])
        >>> net = lambda x: second @ (first @ x)
        >>> [float(t) for t in propagation_tightness(net, jnp.zeros(2), 0.1)]
        [0.5]

    Source:
        Mao, Müller, Fischer and Vechev, 2024, "Understanding Certified Training with
        Interval Bound Propagation", arXiv:2306.10426, definitions 3.1 and 3.2.
    """
    owner = "propagation_tightness"
    check_choice(owner, "mode", mode, ("dln", "local", "true"))
    check_positive(owner, "epsilon", epsilon)
    check_finite(owner, "x", x)
    box = Box.linf(x, epsilon, clip=clip)
    chosen = check_rows(owner, rows, box)
    if mode == "true":
        exact = exact_bounds(model, box, rows=rows)
        low, high = interval_bounds(model, box, chosen)
        known = jnp.where(jnp.isfinite(exact.radius), exact.radius, jnp.nan)
        return _ratio(known, (high - low) / 2)
    graph = BoundGraph.from_callable(model, box.lower)
    c = as_rows(chosen, graph.nodes[-1].shape, graph.dtype)
    slopes = _slopes(graph, jnp.asarray(x, graph.dtype), mode)
    pulled = _pulled_to_input(graph, c, slopes)
    optimal = _absorbed(pulled, box.radius)
    return _ratio(optimal, _layerwise(graph, c, slopes, box.radius))


def expected_tightness(widths: tuple[int, ...], *, relu: bool = False) -> float:
    """The tightness of a random deep linear network, in expectation to leading order.

    `(pi / 2)^((n - 1) / 2) prod d_i^(-1/2)` over the n - 1 hidden widths; with the
    pattern of a ReLU network half of each layer is active, a factor sqrt(2) a layer.

    Args:
        widths: From the input's to the output's, at least two, positive.
        relu: For `mode="local"` instead of `"dln"`.

    Returns:
        The expected ratio for independent normal weights.

    Raises:
        ValueError: Fewer than two widths, or one below 1.

    Example:
        >>> from varan.lipschitz import expected_tightness
        >>> round(expected_tightness((64, 64, 64)), 4)
        0.1567

    Source:
        Derived here from arXiv:2306.10426, theorem 3.7, with its constants.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(
            "expected_tightness: `widths` must be at least two positive numbers "
            f"(got {widths})."
        )
    hidden = np.asarray(widths[1:-1], float)
    layer = np.sqrt(np.pi / 2 / hidden) * (np.sqrt(2) if relu else 1.0)
    return float(np.prod(layer))


def interval_bounds(model, box: Box, rows: Array | None) -> tuple[Array, Array]:
    """Intervals of combinations of outputs, the last linear map merged into them."""
    graph = BoundGraph.from_callable(model, box.lower)
    c = as_rows(rows, graph.nodes[-1].shape, graph.dtype)
    end = elide(graph, c)
    values = [(box.lower, box.upper)]
    for index, node in enumerate(graph.nodes[1 : end.node + 1], 1):
        if isinstance(node, Activation):
            values.append(interval_activation(node.curve, *values[node.parents[0]]))
        else:
            parents = [values[p] for p in node.parents]
            values.append(interval_affine(graph, index, parents))
    low, high = values[end.node]
    middle = jnp.sum(end.rows * (low + (high - low) / 2)[None], _axes(end.rows))
    radius = _absorbed(end.rows, (high - low) / 2)
    # Sums of as many terms as a row has, rounded outward.
    size = max(np.size(low), 1) ** 0.5
    eps = 4 * size * jnp.finfo(low.dtype).eps
    reach = _absorbed(end.rows, largest((low, high)))
    radius = radius + eps * (reach + jnp.abs(end.offset))
    return middle + end.offset - radius, middle + end.offset + radius


def elide(graph: BoundGraph, rows: Array) -> Elided:
    """Pulls rows back through the last linear map and what only moves entries.

    Of a residual sum nothing is pulled through: its parents share what is below.
    """
    index, offset, weighted = graph.output, jnp.zeros(len(rows), graph.dtype), False
    while index > 0:
        node = graph.nodes[index]
        moves = not isinstance(node, Activation) and (
            node.identity or node.linear is node.magnitude
        )
        if isinstance(node, Activation) or len(node.parents) > 1:
            break
        if weighted and not moves:
            break
        weighted = weighted or not moves
        if node.bias is not None:
            offset = offset + jnp.sum(rows * node.bias[None], _axes(rows))
        rows = jax.vmap(lambda r, k=index: graph.transpose(k, r)[0])(rows)
        (index,) = node.parents
    return Elided(index, rows, offset)


def _slopes(graph: BoundGraph, x: Array, mode: str) -> dict[int, Array]:
    """What stands for each activation: 1, or its slope at the point."""
    if mode == "dln":
        return {k: jnp.ones(graph.nodes[k].shape, x.dtype) for k in graph.activations}
    values, slopes = [x], {}
    for k, node in enumerate(graph.nodes[1:], 1):
        parents = [values[p] for p in node.parents]
        if isinstance(node, Activation):
            one = jnp.ones_like(parents[0])
            value, slopes[k] = jax.jvp(partial(_curve, node.curve), parents, [one])
        else:
            value = node.linear(*parents)
            value = value if node.bias is None else value + node.bias
        values.append(value)
    return slopes


def _curve(curve, z):
    return curve(z)


def _pulled_to_input(graph: BoundGraph, rows: Array, slopes) -> Array:
    """The rows' coefficients in the input, through the activations' slopes."""
    pending = {graph.output: rows}
    for index in range(graph.output, 0, -1):
        mine = pending.pop(index, None)
        if mine is None:
            continue
        node = graph.nodes[index]
        if isinstance(node, Activation):
            parts = (mine * slopes[index][None],)
        else:
            parts = jax.vmap(lambda r, k=index: graph.transpose(k, r))(mine)
        for parent, part in zip(node.parents, parts, strict=True):
            pending[parent] = pending[parent] + part if parent in pending else part
    return pending.get(0, jnp.zeros((len(rows), *graph.nodes[0].shape), graph.dtype))


def _layerwise(graph: BoundGraph, rows: Array, slopes, radius: Array) -> Array:
    """The radius that intervals give, with the activations' slopes in their place."""
    end = elide(graph, rows)
    values = [radius]
    for k, node in enumerate(graph.nodes[1 : end.node + 1], 1):
        parents = [values[p] for p in node.parents]
        if isinstance(node, Activation):
            values.append(jnp.abs(slopes[k]) * parents[0])
        else:
            values.append(node.magnitude(*parents))
    return _absorbed(end.rows, values[end.node])


def _absorbed(rows: Array, radius: Array) -> Array:
    """How far rows reach over a box of a radius."""
    return jnp.sum(jnp.abs(rows) * radius[None], _axes(rows))


def _axes(rows: Array) -> tuple[int, ...]:
    return tuple(range(1, rows.ndim))


def _ratio(optimal: Array, layerwise: Array) -> Array:
    moves = layerwise > 0
    return jnp.where(moves, optimal / jnp.where(moves, layerwise, 1), 1)
