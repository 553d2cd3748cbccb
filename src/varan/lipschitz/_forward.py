"""Bounds of a network's values over a box: intervals, CROWN, alpha-CROWN.

Interval propagation carries a midpoint and a radius through every node. CROWN encloses
every nonlinearity between two lines and pulls the coefficients of a pre-activation
back to the input, where a linear function over a box has its exact extremes. Lower
bounds are upper bounds of the negative, so one pass over the rows `[C; -C]` gives
both. alpha-CROWN improves the free slope of the lower ReLU lines by Adam, one set of
slopes for every row, and keeps the best bound seen.

Cost of CROWN for a dense network of `n` layers of width `w`: about `4 n^2 w^3 / 2`
multiplications, the first product of every pass being the weight matrix itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ..core._checks import check_choice, check_nonempty, is_traced
from ._curves import Lines
from ._graph import BoundGraph
from ._nodes import Activation
from ._sets import Box

ForwardMethod = Literal["ibp", "crown", "alpha"]
FORWARD_METHODS = ("ibp", "crown", "alpha")

Interval = tuple[Array, Array]

# Outward widening of a bound, in units of rounding of the sizes of its terms.
_ROUNDINGS = 4


class SignedIdentity:
    """The rows `[I; -I]`, kept symbolic so that the first product costs nothing."""

    def __init__(self, size: int):
        self.size = size

    def dense(self, shape: tuple[int, ...], dtype) -> Array:
        """The rows written out."""
        eye = jnp.eye(self.size, dtype=dtype)
        return jnp.concatenate([eye, -eye]).reshape(2 * self.size, *shape)


Rows = Array | SignedIdentity


def add_rows(a: Rows | None, b: Rows, shape: tuple[int, ...], dtype) -> Rows:
    """The sum of two sets of rows of one node."""
    if a is None:
        return b
    a, b = (
        r.dense(shape, dtype) if isinstance(r, SignedIdentity) else r for r in (a, b)
    )
    return a + b


def weigh(rows: Array, values: Array) -> Array:
    """`sum rows * values` over the entries of a node, a number a row."""
    return jnp.sum(rows * values, tuple(range(1, rows.ndim)))


def signed(rows: Array, lower: Array, upper: Array) -> Array:
    """`upper` where a coefficient is positive, `lower` elsewhere."""
    return jnp.where(rows > 0, upper, lower)


def pull_back(
    graph: BoundGraph,
    seeds: dict[int, Rows],
    lines: dict[int, Lines],
    sizes: dict[int, Array],
) -> tuple[Array, Array, Array]:
    """Upper-bounds `sum rows . node` by a linear function of the input.

    Whatever node the coefficients have come to, they times its value are what is
    bounded: so a product's rounding counts with the sizes of that value's terms, also
    where coefficients cancel.

    Args:
        graph: The network.
        seeds: Coefficients of the nodes to bound, rows first.
        lines: Enclosing lines of every activation below the seeds, with a leading
            axis of length 1 or the number of rows.
        sizes: How large the terms are that each node below the seeds adds up.

    Returns:
        The coefficients of the input, the offsets, and the sizes of all terms.
    """
    dtype = graph.dtype
    pending = dict(seeds)
    offset = scale = jnp.zeros((), dtype)
    for index in range(max(pending), 0, -1):
        rows = pending.pop(index, None)
        if rows is None:
            continue
        node = graph.nodes[index]
        if isinstance(node, Activation):
            if isinstance(rows, SignedIdentity):
                rows = rows.dense(node.shape, dtype)
            line = lines[index]
            scale = scale + weigh(jnp.abs(rows), sizes[index][None])
            offset = offset + weigh(
                rows, signed(rows, line.lower_offset, line.upper_offset)
            )
            parts = (rows * signed(rows, line.lower_slope, line.upper_slope),)
        else:
            if node.bias is not None:
                offset = offset + _bias_of(rows, node.bias)
            if not isinstance(rows, SignedIdentity):
                scale = scale + weigh(jnp.abs(rows), sizes[index][None])
            elif node.bias is not None:
                scale = scale + jnp.abs(_bias_of(rows, node.bias))
            parts = _pull_affine(graph, index, rows)
        for parent, part in zip(node.parents, parts, strict=True):
            shape = graph.nodes[parent].shape
            pending[parent] = add_rows(pending.get(parent), part, shape, dtype)
    rows = pending[0]
    if isinstance(rows, SignedIdentity):
        rows = rows.dense(graph.nodes[0].shape, dtype)
    # How much is lost by rounding is not to be differentiated.
    return rows, offset, lax.stop_gradient(scale)


def _bias_of(rows: Rows, bias: Array) -> Array:
    if isinstance(rows, SignedIdentity):
        flat = jnp.ravel(bias)
        return jnp.concatenate([flat, -flat])
    return weigh(rows, bias[None])


def _pull_affine(graph: BoundGraph, index: int, rows: Rows) -> tuple[Rows, ...]:
    node = graph.nodes[index]
    if node.identity:
        return (rows,)
    if node.matrix is not None:
        if isinstance(rows, SignedIdentity):
            return (jnp.concatenate([node.matrix, -node.matrix]),)
        return (rows @ node.matrix,)
    if isinstance(rows, SignedIdentity):
        rows = rows.dense(node.shape, graph.dtype)
    return jax.vmap(lambda row: graph.transpose(index, row))(rows)


def concretise(rows: Array, offset: Array, scale: Array, box: Box) -> Array:
    """The maximum of `rows . x + offset` over the box, rounded outward.

    `scale` is the size of the terms that gave the rows and the offset.
    """
    flat = rows.reshape(rows.shape[0], -1)
    centre, radius = jnp.ravel(box.centre), jnp.ravel(box.radius)
    spread = jnp.abs(flat) @ jnp.stack([radius, jnp.abs(centre) + radius], 1)
    value = flat @ centre + spread[:, 0] + offset
    scale = scale + spread[:, 1] + jnp.abs(offset)
    return value + _ROUNDINGS * jnp.finfo(value.dtype).eps * scale


def both_sides(upper: Array, shape: tuple[int, ...]) -> Interval:
    """Turns upper bounds of the rows `[I; -I]` into an interval of a node."""
    top, bottom = jnp.split(upper, 2)
    return -bottom.reshape(shape), top.reshape(shape)


def intersect(a: Interval, b: Interval) -> Interval:
    """The common part of two enclosures of one thing."""
    return jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])


def largest(interval: Interval) -> Array:
    """The largest size of a number in an interval."""
    return jnp.maximum(*map(jnp.abs, interval))


def term_sizes(graph: BoundGraph, index: int, parents: list[Interval]) -> Array:
    """How large the terms are that a node adds up, in all, over its parents' ranges."""
    node = graph.nodes[index]
    if isinstance(node, Activation):
        ((l, u),) = parents
        outer = largest(interval_activation(node.curve, l, u))
        # A line's slope is one of the curve's; its offset is what is left of a value.
        return outer + 2 * largest(node.curve.slope_range(l, u)) * largest((l, u))
    size = node.magnitude(*map(largest, parents))
    return size if node.bias is None else size + jnp.abs(node.bias)


def interval_affine(graph: BoundGraph, index: int, parents: list[Interval]) -> Interval:
    """An affine node over intervals of its parents."""
    node = graph.nodes[index]
    middle = node.linear(*(l / 2 + u / 2 for l, u in parents))
    radius = node.magnitude(*(u / 2 - l / 2 for l, u in parents))
    if node.bias is not None:
        middle = middle + node.bias
    eps = _ROUNDINGS * jnp.finfo(middle.dtype).eps
    lost = eps * term_sizes(graph, index, parents)
    radius = radius + lax.stop_gradient(lost)
    return middle - radius, middle + radius


def expand(lines: Lines) -> Lines:
    """Adds the axis of rows."""
    return Lines(*(v[None] for v in lines))


def interval_activation(curve, l: Array, u: Array) -> Interval:
    """The range of a curve over an interval, from its constant and its chord lines."""
    ends = curve(l), curve(u)
    low, high = jnp.minimum(*ends), jnp.maximum(*ends)
    eps = _ROUNDINGS * jnp.finfo(l.dtype).eps
    if not curve.smooth:
        inside = (l <= 0) & (u >= 0)
        zero = jnp.zeros_like(l)
        low = jnp.where(inside, jnp.minimum(low, zero), low)
        high = jnp.where(inside, jnp.maximum(high, zero), high)
        if {abs(curve.negative), abs(curve.positive)} <= {0, 1}:
            return low, high
        return low - eps * jnp.abs(low), high + eps * jnp.abs(high)
    least, most = curve.slope_range(l, u)
    # |f(z) - f(m)| is at most the distance times the steepest slope: it encloses
    # what the two ends miss when the curve is not monotone in between.
    middle, half = curve(l / 2 + u / 2), u / 2 - l / 2
    steepest = jnp.maximum(jnp.abs(least), jnp.abs(most))
    monotone = (least >= 0) | (most <= 0)
    low = jnp.where(monotone, low, middle - steepest * half)
    high = jnp.where(monotone, high, middle + steepest * half)
    return low - eps * jnp.abs(low), high + eps * jnp.abs(high)


class Forward(NamedTuple):
    """What is known of a network's values over a box.

    Args:
        intervals: Of the argument of every activation.
        lines: Enclosing every activation, with a leading axis of length 1.
        sizes: Of the terms that every node adds up.
        output: The output's interval.
    """

    intervals: dict[int, Interval]
    lines: dict[int, Lines]
    sizes: dict[int, Array]
    output: Interval


def preactivations(
    graph: BoundGraph,
    box: Box,
    method: ForwardMethod,
    known: dict[int, Interval] | None = None,
) -> Forward:
    """Bounds of the argument of every activation, their lines, and of the output.

    Args:
        graph: The network.
        box: A bounded box.
        method: `"ibp"`, `"crown"` or `"alpha"`; the latter two are intersected with
            intervals, so that a larger box never gives a smaller enclosure of the
            first activations.
        known: Bounds of some arguments that may be taken for granted (the domain of
            a branch).

    Returns:
        The bounds, and what the passes that follow need.
    """
    values: dict[int, Interval] = {0: (box.lower, box.upper)}
    found: dict[int, Interval] = {}
    lines: dict[int, Lines] = {}
    sizes: dict[int, Array] = {}
    for index, node in enumerate(graph.nodes[1:], 1):
        around = [values[p] for p in node.parents]
        if isinstance(node, Activation):
            (parent,) = node.parents
            interval = _tighten(graph, box, parent, method, lines, sizes, *around)
            if known is not None:
                interval = intersect(interval, known[index])
            found[index] = interval
            around = [_ordered(interval)]
            if method != "ibp":
                lines[index] = expand(node.curve.lines(*around[0]))
        values[index] = _interval_node(graph, index, around)
        sizes[index] = term_sizes(graph, index, around)
    return Forward(found, lines, sizes, values[graph.output])


def _interval_node(graph: BoundGraph, index: int, parents: list[Interval]) -> Interval:
    node = graph.nodes[index]
    if isinstance(node, Activation):
        return interval_activation(node.curve, *parents[0])
    return interval_affine(graph, index, parents)


def sizes_over(
    graph: BoundGraph, box: Box, intervals: dict[int, Interval]
) -> dict[int, Array]:
    """The sizes of every node's terms where the activations' arguments are known."""
    values: dict[int, Interval] = {0: (box.lower, box.upper)}
    sizes: dict[int, Array] = {}
    for index, node in enumerate(graph.nodes[1:], 1):
        around = [values[p] for p in node.parents]
        if isinstance(node, Activation):
            around = [intervals[index]]
        values[index] = _interval_node(graph, index, around)
        sizes[index] = term_sizes(graph, index, around)
    return sizes


def _ordered(interval: Interval) -> Interval:
    # An empty branch has crossed bounds: it is dropped later, but its lines must not
    # become NaN on the way.
    l, u = interval
    return l, jnp.maximum(l, u)


def _tighten(graph, box, target, method, lines, sizes, interval: Interval) -> Interval:
    if method == "ibp" or (not lines and _is_one_map(graph, target)):
        return interval  # intervals are exact through one affine map
    seeds = {target: SignedIdentity(graph.size(target))}
    shape = graph.nodes[target].shape
    if method == "alpha" and lines:
        upper = optimised_upper_bound(graph, box, seeds, lines, sizes)
    else:
        upper = concretise(*pull_back(graph, seeds, lines, sizes), box)
    return intersect(both_sides(upper, shape), interval)


def _is_one_map(graph: BoundGraph, index: int) -> bool:
    """Whether a node is the input after at most one map that is not the identity."""
    maps = 0
    while index:
        node = graph.nodes[index]
        if isinstance(node, Activation) or len(node.parents) > 1:
            return False
        maps += not node.identity
        (index,) = node.parents
    return maps <= 1


def optimised_upper_bound(
    graph: BoundGraph,
    box: Box,
    seeds: dict[int, Rows],
    lines: dict[int, Lines],
    sizes: dict[int, Array],
    *,
    max_steps: int = 20,
    stepsize: float = 0.5,
    decay: float = 0.98,
) -> Array:
    """Upper bounds of rows, over the free ReLU slopes by projected Adam.

    The slopes do not carry derivatives: what is returned is CROWN's bound at the best
    slopes found, differentiable in weights and box with the slopes held fixed.
    """
    below = [k for k in lines if k < max(seeds) and not graph.nodes[k].curve.smooth]
    (rows,) = seeds.values()
    count = 2 * rows.size if isinstance(rows, SignedIdentity) else rows.shape[0]
    curves = {k: graph.nodes[k].curve for k in below}
    spans = {k: _span(curves[k], lines[k]) for k in below}

    def bound(slopes: dict[int, Array], lines=lines) -> Array:
        chosen = {k: _with_slope(curves[k], lines[k], slopes[k]) for k in below}
        return concretise(*pull_back(graph, seeds, {**lines, **chosen}, sizes), box)

    start = {
        k: jnp.broadcast_to(spans[k], (count, *graph.nodes[k].shape)) for k in below
    }
    if not below:
        return bound({})
    held, dtype = lax.stop_gradient, graph.dtype
    value_and_grad = jax.value_and_grad(
        lambda slopes: (lambda b: (jnp.sum(b), b))(bound(slopes)), has_aux=True
    )

    def keep(best, slopes, value):
        kept, values = best
        better = value < values
        pick = lambda new, old: jnp.where(  # noqa: E731
            better.reshape(-1, *(1,) * (new.ndim - 1)), new, old
        )
        return jax.tree.map(pick, slopes, kept), jnp.minimum(value, values)

    # Adam with its usual constants, written out: the update is projected.
    def step(carry, rate):
        slopes, (mean, square, decays), best = carry
        (_, value), grad = value_and_grad(slopes)
        best = keep(best, slopes, value)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grad)
        square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, square, grad)
        decays = decays * jnp.asarray([0.9, 0.999], dtype)
        first, second = 1 - decays[0], 1 - decays[1]

        def move(s, m, v):
            return jnp.clip(
                s - rate * (m / first) / (jnp.sqrt(v / second) + 1e-8), 0, 1
            )

        slopes = jax.tree.map(move, slopes, mean, square)
        return (slopes, (mean, square, decays), best), None

    start = held(start)
    zeros = jax.tree.map(jnp.zeros_like, start)
    memory = (zeros, zeros, jnp.ones(2, dtype))
    rates = jnp.asarray([stepsize * decay**k for k in range(max_steps)], dtype)
    carry = (start, memory, (start, held(bound(start))))
    (slopes, _, best), _ = lax.scan(step, carry, rates)
    kept, _ = keep(best, slopes, bound(slopes))
    return bound(held(kept))


def _span(curve, line: Lines) -> Array:
    """Where the free line starts: CROWN's choice, as 1 (right piece) or 0 (left)."""
    convex = curve.positive >= curve.negative
    free = line.lower_slope if convex else line.upper_slope
    right = jnp.abs(free - curve.positive) <= jnp.abs(free - curve.negative)
    return right.astype(free.dtype)


def _with_slope(curve, line: Lines, slope: Array) -> Lines:
    """The same lines with another free slope where the state is not fixed."""
    free = curve.negative + slope * (curve.positive - curve.negative)
    unstable = line.lower_slope != line.upper_slope
    if curve.positive >= curve.negative:
        return line._replace(lower_slope=jnp.where(unstable, free, line.lower_slope))
    return line._replace(upper_slope=jnp.where(unstable, free, line.upper_slope))


def refuse_nan(owner: str, *numbers: Array) -> None:
    """NaN proves nothing: it is refused where it is known."""
    if any(is_traced(v) for v in numbers):
        return
    if any(np.isnan(np.asarray(v)).any() for v in numbers):
        raise ValueError(
            f"{owner}: what is to be proved is NaN. Look for weights of the model that "
            "are NaN or infinite, or for numbers that overflow."
        )


def check_box(owner: str, box: Box) -> None:
    """Refuses what is no box."""
    if not isinstance(box, Box):
        raise TypeError(
            f"{owner}: `box` must be a `Box` (got {type(box).__name__}). "
            "Make one with `Box(lower, upper)` or `Box.linf(x, epsilon)`."
        )
    check_nonempty(owner, "box", box.lower)


def poison(valid: Array, tree):
    """NaN everywhere if a traced box is NaN or crossed."""
    return jax.tree.map(lambda v: jnp.where(valid, v, jnp.nan), tree)


@eqx.filter_jit
def _bounds(model, box: Box, method: str) -> Box:
    graph = BoundGraph.from_callable(model, box.lower)
    _, lines, sizes, interval = preactivations(graph, box, method)
    if method != "ibp":
        interval = _tighten(graph, box, graph.output, method, lines, sizes, interval)
    return Box(*poison(box.valid & box.bounded, interval))


def bounds(
    model: Callable[[Array], Array],
    box: Box,
    *,
    method: ForwardMethod = "crown",
) -> Box:
    """Bounds of every output of a network over a box.

    Intervals cost two evaluations. CROWN costs about `n^2` matrix products of the
    layers' width for `n` layers and is never looser than intervals. alpha-CROWN costs
    about sixty times CROWN and is never looser than CROWN on the first two activations.

    Args:
        model: An `equinox.Module` or JAX callable of one input without batch axis, or
            a pair `(weights, biases)` of a ReLU network. Put modules in inference
            mode first.
        box: The inputs, of the model's input shape. Its dtype is the dtype of the
            computation; take float64 for certificates that matter.
        method: `"ibp"`, `"crown"` or `"alpha"`.

    Returns:
        A box of the output's shape that contains `model(x)` for every `x` in `box`,
        widened outward by four units of rounding of the sizes of all terms that any
        of its sums has, also where these cancel. Differentiable in the model's
        weights; under `vmap` one box a lane. NaN under jit if the box is not finite.

    Raises:
        ValueError: an unknown method, an unbounded box, or NaN bounds.
        UnsupportedPrimitive: an operation without a rule.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from varan.lipschitz import Box, bounds
        >>> net = eqx.nn.MLP(2, 1, 8, 2, key=jax.random.key(0))
        >>> out = bounds(net, Box.linf(jnp.zeros(2), 0.1))
        >>> bool(out.lower[0] <= net(jnp.zeros(2))[0] <= out.upper[0])
        True

    Source:
        Zhang, Weng, Chen, Hsieh, Daniel (2018), arXiv:1811.00866 (CROWN); Xu, Zhang,
        Wang, Wang, Jana, Lin, Hsieh (2021), arXiv:2011.13824 (alpha-CROWN).

    Differences:
        CROWN's bounds are intersected with intervals at every activation. The slopes
        of alpha-CROWN are optimised one activation after the other, each for its own
        bounds, instead of all for the output.
    """
    check_choice("bounds", "method", method, FORWARD_METHODS)
    check_bounded("bounds", box)
    found = _bounds(model, box, method)
    refuse_nan("bounds", found.lower, found.upper)
    return found


def check_bounded(owner: str, box: Box) -> None:
    """Refuses boxes with infinite sides."""
    check_box(owner, box)
    if is_traced(box.lower) or is_traced(box.upper):
        return
    if not all(np.isfinite(np.asarray(s)).all() for s in (box.lower, box.upper)):
        raise ValueError(f"{owner}: every side of `box` must be finite. Bound it.")
