"""Linear relaxation of the Clarke Jacobian and its bounds by back-substitution.

The chain rule makes the gradient of `c . f` a network of its own, run from the output
to the input: `g_n = W_n^T c`, then `v_i = g_{i+1} s_i` with `s_i` in the Clarke
derivative of activation `i`, and `g_i = W_i^T v_i`. Over a box the derivative lies in
a known interval `[dl, du]`, so `v` lies between `min(dl g, du g)` and
`max(dl g, du g)`. On `[lg, ug]` the tightest lines are these functions themselves when
`g` has one sign and the chords when it has both. Coefficients of a cotangent are
pushed forward through the network to the constant `c`; the bounds of `g_{n-1}`, then
of `g_{n-2}`, ... make the relaxations of the next ones. The last pass bounds
`sum_k |J_k|`, with the chord of the absolute value where an entry of `J` has no sign.

For smooth activations the derivative itself is enclosed by lines in the state and
multiplied by McCormick's inequalities; what is left depends on the state and is pulled
back to the input. Constant instead of chord bounds give RecurJac, intervals after
every layer give the interval method.

Cost for one row of `n` layers of width `w`: `n^2/2` products of (2w, w) with (w, w)
matrices, one matrix for all rows at the first activation from the start.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._curves import Lines
from ._forward import (
    Interval,
    Rows,
    SignedIdentity,
    add_rows,
    both_sides,
    concretise,
    intersect,
    largest,
    pull_back,
    signed,
    sizes_over,
    weigh,
)
from ._graph import BoundGraph
from ._nodes import Activation
from ._sets import Box

JacobianMethod = Literal["crown", "recurjac", "recurjac_strict", "ibp"]
JACOBIAN_METHODS = ("crown", "recurjac", "recurjac_strict", "ibp")

_ROUNDINGS = 4
# For each node the sizes of what it adds up, one array for each of its parents.
Sizes = dict[int, tuple[Array, ...]]


class State(NamedTuple):
    """What a box (or a branch of it) says about the activations.

    Args:
        slopes: Range of the Clarke derivative, by activation.
        slope_lines: Lines enclosing the derivative in its state, where they are used.
        lines: Enclosing lines of the activations, for pulling state terms back.
        sizes: Of the terms that every node adds up, where there are slope lines.
    """

    slopes: dict[int, Interval]
    slope_lines: dict[int, Lines]
    lines: dict[int, Lines]
    sizes: dict[int, Array]


class Cotangents(NamedTuple):
    """Bounds of the gradient of one output combination `c . f`.

    Args:
        gradient: Interval of the gradient in the input.
        cotangents: Interval of the gradient in every activation's value.
        norm: Upper bound of the gradient's l1 norm.
        sensitivity: Size of the norm's coefficient at every activation.
    """

    gradient: Interval
    cotangents: dict[int, Interval]
    norm: Array
    sensitivity: dict[int, Array]


def state_of(
    graph: BoundGraph,
    box: Box,
    intervals: dict[int, Interval],
    lines: dict[int, Lines],
    *,
    linear: bool,
) -> State:
    """The state of the activations whose arguments lie in `intervals`."""
    slopes, slope_lines = {}, {}
    for index, (l, u) in intervals.items():
        curve = graph.nodes[index].curve
        slopes[index] = curve.slope_range(l, u)
        if linear and curve.smooth:
            slope_lines[index] = Lines(*(v[None] for v in curve.slope_lines(l, u)))
    sizes = sizes_over(graph, box, intervals) if slope_lines else {}
    return State(slopes, slope_lines, lines, sizes)


class _Product(NamedTuple):
    """Lines of `v = g d`: `slope g + state z + offset`, for either side."""

    lower: tuple[Array, Array | None, Array]
    upper: tuple[Array, Array | None, Array]


def chords(lg: Array, ug: Array, dl: Array, du: Array) -> _Product:
    """The envelopes of `g d` over `g in [lg, ug]`, `d in [dl, du]`, in `g` alone."""
    mixed = (lg < 0) & (ug > 0)
    gap = jnp.where(mixed, ug - lg, 1)
    upper = jnp.where(lg >= 0, du, dl)
    lower = jnp.where(lg >= 0, dl, du)
    # Shares of the gap first: a product of two small numbers would underflow.
    above, below = ug / gap, -lg / gap
    upper = jnp.where(mixed, du * above + dl * below, upper)
    lower = jnp.where(mixed, dl * above + du * below, lower)
    tiny = float(jnp.finfo(lg.dtype).tiny)
    offset = jnp.where(mixed, -lg * above * (du - dl) + tiny, 0)
    return _Product((lower, None, -offset), (upper, None, offset))


def constants(lg: Array, ug: Array, dl: Array, du: Array, *, strict: bool) -> _Product:
    """RecurJac's bounds: constants where `g` has both signs.

    `strict` uses them also where the derivative is known exactly.
    """
    tight = chords(lg, ug, dl, du)
    crude = (lg < 0) & (ug > 0) & (strict | (du > dl))
    least, most = interval_product(lg, ug, dl, du)
    zero = jnp.zeros_like(lg)
    pick = lambda line, value: (  # noqa: E731
        jnp.where(crude, zero, line[0]),
        None,
        jnp.where(crude, value, line[2]),
    )
    return _Product(pick(tight.lower, least), pick(tight.upper, most))


def mccormick(lg: Array, ug: Array, dl: Array, du: Array, d: Lines) -> _Product:
    """McCormick's lines of `g d` with `d` between lines in the state.

    Of the two lines on each side the one that leans less on the derivative is taken:
    the derivative's own enclosure is what costs.
    """
    small_low = jnp.abs(lg) <= jnp.abs(ug)
    # v <= a d + b g - a b with (a, b) one of (lg, du), (ug, dl);
    # v >= the same with (lg, dl), (ug, du).
    a = jnp.where(small_low, lg, ug)
    over, under = jnp.where(small_low, du, dl), jnp.where(small_low, dl, du)

    def substitute(b, up):
        rising = (a > 0) == up
        slope = jnp.where(rising, d.upper_slope[0], d.lower_slope[0])
        offset = jnp.where(rising, d.upper_offset[0], d.lower_offset[0])
        return b, a * slope, a * offset - a * b

    return _Product(substitute(under, False), substitute(over, True))


def interval_product(lg: Array, ug: Array, dl: Array, du: Array) -> Interval:
    """The range of `g d`."""
    corners = jnp.stack([lg * dl, lg * du, ug * dl, ug * du])
    return jnp.min(corners, 0), jnp.max(corners, 0)


def _push_affine(graph: BoundGraph, index: int, incoming: list[Rows | None]) -> Rows:
    """Rows on the parents' cotangents become rows on the node's."""
    node = graph.nodes[index]
    if node.identity:
        return incoming[0]
    if node.matrix is not None:
        (rows,) = incoming
        if isinstance(rows, SignedIdentity):
            return jnp.concatenate([node.matrix.T, -node.matrix.T])
        return rows @ node.matrix.T
    filled = []
    for parent, rows in zip(node.parents, incoming, strict=True):
        shape = graph.nodes[parent].shape
        if isinstance(rows, SignedIdentity):
            rows = rows.dense(shape, graph.dtype)
        filled.append(rows)
    count = next(r.shape[0] for r in filled if r is not None)
    filled = [
        jnp.zeros((count, *graph.nodes[p].shape), graph.dtype) if r is None else r
        for p, r in zip(node.parents, filled, strict=True)
    ]
    return jax.vmap(node.linear)(*filled)


def push_forward(
    graph: BoundGraph,
    start: int,
    rows: Rows,
    c: Array,
    products: dict[int, _Product],
    state: State,
    box: Box,
    sizes: Sizes,
) -> tuple[Array, dict[int, Array]]:
    """Upper bounds of `rows . g_start`, with `g` the cotangent of a node.

    Whatever node the coefficients have come to, they times its cotangent are what is
    bounded: so a product's rounding counts with the sizes of the cotangent's terms,
    also where what they make of an entry cancels.

    Args:
        graph: The network.
        start: The node whose cotangent is bounded.
        rows: The combinations of its entries.
        c: The cotangent of the output.
        products: Lines of `v = g d` for every activation after `start`.
        state: The activations' state.
        box: The inputs; only used where a line depends on the state.
        sizes: Of the terms that every node after `start` adds up.

    Returns:
        The bounds, and the coefficients met at every activation.
    """
    dtype = graph.dtype
    pending: dict[int, Rows] = {start: rows}
    met: dict[int, Array] = {}
    states: dict[int, Array] = {}
    offset = scale = jnp.zeros((), dtype)
    for index in range(start + 1, len(graph.nodes)):
        node = graph.nodes[index]
        incoming = [pending.get(p) for p in node.parents]
        if all(r is None for r in incoming):
            continue
        for rows, size in zip(incoming, sizes[index], strict=True):
            exact = isinstance(rows, SignedIdentity) or getattr(node, "identity", False)
            if rows is not None and not exact:
                scale = scale + weigh(jnp.abs(rows), size[None])
        if not isinstance(node, Activation):
            pending[index] = _push_affine(graph, index, incoming)
            continue
        (coefficients,) = incoming
        if isinstance(coefficients, SignedIdentity):
            coefficients = coefficients.dense(node.shape, dtype)
        met[index] = coefficients
        lower, upper = products[index].lower, products[index].upper
        choose = lambda k: signed(coefficients, lower[k][None], upper[k][None])  # noqa: B023, E731
        term = coefficients * choose(2)
        offset = offset + jnp.sum(term, tuple(range(1, term.ndim)))
        scale = scale + jnp.sum(jnp.abs(term), tuple(range(1, term.ndim)))
        if lower[1] is not None:
            (parent,) = node.parents
            part = coefficients * choose(1)
            states[parent] = add_rows(states.get(parent), part, node.shape, dtype)
        pending[index] = coefficients * choose(0)
    last = pending.get(graph.output)
    if last is not None:
        if isinstance(last, SignedIdentity):
            last = last.dense(c.shape, dtype)
        offset = offset + weigh(last, c[None])
        scale = scale + weigh(jnp.abs(last), jnp.abs(c)[None])
    if states:
        pulled = pull_back(graph, states, state.lines, state.sizes)
        offset = offset + concretise(*pulled, box)
    lost = _ROUNDINGS * jnp.finfo(dtype).eps * scale
    return offset + lax.stop_gradient(lost), met


class _Terms:
    """The sizes of cotangents' terms, from the output back as far as they are known.

    A positive and a negative size for every entry; zero, exactly, where an entry has
    no term of that sign.
    """

    def __init__(self, graph: BoundGraph, state: State, c: Array):
        self.graph, self.state = graph, state
        self.parts: dict[int, Interval] = {graph.output: _by_sign((c, c))}
        self.sizes: Sizes = {}
        self.done = graph.output + 1

    def back_to(self, start: int, cotangents: dict[int, Interval]) -> Sizes:
        """What each node after `start` adds up, a size an entry of each parent."""
        zero = jnp.zeros((), self.graph.dtype)
        for index in range(self.done - 1, start, -1):
            node = self.graph.nodes[index]
            positive, negative = self.parts.pop(index, (zero, zero))
            if isinstance(node, Activation):
                slopes = self.state.slopes[index]
                found = [_by_sign(interval_product(*cotangents[index], *slopes))]
            elif positive is zero:
                found = [(zero, zero) for _ in node.parents]
            else:
                found = self.graph.transpose_signed(index, positive, negative)
            self.sizes[index] = tuple(p + n for p, n in found)
            for parent, pair in zip(node.parents, found, strict=True):
                before = self.parts.get(parent, (zero, zero))
                self.parts[parent] = before[0] + pair[0], before[1] + pair[1]
        self.done = start + 1
        return self.sizes


def _keep_sign(interval: Interval, positive: Array, negative: Array) -> Interval:
    """The interval of what has only terms of one sign ends at zero."""
    l, u = interval
    l = jnp.where(negative > 0, l, jnp.maximum(l, 0))
    return l, jnp.where(positive > 0, u, jnp.minimum(u, 0))


def _by_sign(interval: Interval) -> Interval:
    """Sizes of the positive and of the negative numbers of an interval."""
    l, u = interval
    return jnp.maximum(u, 0), jnp.maximum(-l, 0)


def cotangent_bounds(
    graph: BoundGraph,
    box: Box,
    state: State,
    c: Array,
    method: JacobianMethod,
    *,
    known: tuple[dict[int, Interval], Interval] | None = None,
) -> Cotangents:
    """Bounds the gradient of `c . f` over the box, from the output to the input.

    Args:
        graph: The network.
        box: The inputs.
        state: The activations' state over the box.
        c: The combination, of the output's shape.
        method: `"crown"`, `"recurjac"`, `"recurjac_strict"` or `"ibp"`.
        known: Bounds of the cotangents and of the gradient that may be taken for
            granted (those of a parent branch).

    Returns:
        The bounds.
    """
    if method == "ibp":
        return _interval_cotangents(graph, state, c)
    cotangents: dict[int, Interval] = {}
    products: dict[int, _Product] = {}
    linear: dict[int, _Product] = {}
    terms = _Terms(graph, state, c)

    def enclose(index: int) -> Interval:
        rows = SignedIdentity(graph.size(index))
        shape = graph.nodes[index].shape
        sizes = terms.back_to(index, cotangents)

        def one(lines):
            upper, _ = push_forward(graph, index, rows, c, lines, state, box, sizes)
            upper = jnp.broadcast_to(upper, (2 * graph.size(index),))
            return both_sides(upper, shape)

        interval = one(products)
        if _differ(linear, products):
            interval = intersect(one(linear), interval)
        return _keep_sign(interval, *terms.parts[index])

    for index in reversed(graph.activations):
        interval = enclose(index)
        if known is not None:
            interval = intersect(interval, known[0][index])
        interval = interval[0], jnp.maximum(*interval)
        cotangents[index] = interval
        dl, du = state.slopes[index]
        if method == "crown":
            products[index] = linear[index] = chords(*interval, dl, du)
        else:
            strict = method == "recurjac_strict"
            products[index] = constants(*interval, dl, du, strict=strict)
            linear[index] = products[index]
        if method == "crown" and index in state.slope_lines:
            lines = state.slope_lines[index]
            linear[index] = mccormick(*interval, dl, du, lines)
    gradient = enclose(0)
    if known is not None:
        gradient = intersect(gradient, known[1])
    gradient = gradient[0], jnp.maximum(*gradient)
    sizes = terms.sizes
    norm, met = norm_bound(graph, box, state, c, gradient, products, sizes)
    if _differ(linear, products):
        other, _ = norm_bound(graph, box, state, c, gradient, linear, sizes)
        norm = jnp.minimum(norm, other)
    return Cotangents(gradient, cotangents, norm, met)


def _differ(linear: dict, products: dict) -> bool:
    return any(linear[k] is not products[k] for k in products)


def norm_bound(
    graph: BoundGraph,
    box: Box,
    state: State,
    c: Array,
    gradient: Interval,
    products: dict[int, _Product],
    sizes: Sizes,
) -> tuple[Array, dict[int, Array]]:
    """Upper bound of `sum_k |J_k|` by one more pass, and its coefficients."""
    l, u = gradient
    mixed = (l < 0) & (u > 0)
    gap = jnp.where(mixed, u - l, 1)
    slope = jnp.where(mixed, (u + l) / gap, jnp.where(l >= 0, 1, -1).astype(l.dtype))
    offset = jnp.sum(jnp.where(mixed, -2 * l * (u / gap), 0))
    upper, met = push_forward(graph, 0, slope[None], c, products, state, box, sizes)
    outward = 1 + _ROUNDINGS * float(jnp.finfo(graph.dtype).eps)
    upper = jnp.broadcast_to(upper, (1,))[0] + outward * offset
    # Never above the sum of the entries' own bounds, from which the chords came.
    crude = outward * jnp.sum(largest((l, u)))
    return jnp.minimum(upper, crude), {k: jnp.abs(a[0]) for k, a in met.items()}


def _interval_cotangents(graph: BoundGraph, state: State, c: Array) -> Cotangents:
    """Intervals after every step, from the output back to the input."""
    zero = jnp.zeros((), graph.dtype)
    middle: dict[int, Array] = {graph.output: c}
    radius: dict[int, Array] = {graph.output: jnp.zeros_like(c)}
    cotangents: dict[int, Interval] = {}
    eps = _ROUNDINGS * jnp.finfo(graph.dtype).eps
    for index in range(graph.output, 0, -1):
        if index not in middle:
            continue
        node, m, r = graph.nodes[index], middle.pop(index), radius.pop(index)
        if isinstance(node, Activation):
            cotangents[index] = (m - r, m + r)
            low, high = interval_product(m - r, m + r, *state.slopes[index])
            parts = (low + (high - low) / 2,), ((high - low) / 2,)
        else:
            parts = graph.transpose(index, m), graph.transpose_magnitude(index, r)
            size = graph.transpose_magnitude(index, jnp.abs(m))
            parts = (
                parts[0],
                [p + eps * (p + s) for p, s in zip(parts[1], size, strict=True)],
            )
        for parent, pm, pr in zip(node.parents, *parts, strict=True):
            middle[parent] = middle.get(parent, zero) + pm
            radius[parent] = radius.get(parent, zero) + pr
    m, r = middle[0], radius[0]
    norm = (1 + eps) * jnp.sum(jnp.abs(m) + r)
    return Cotangents((m - r, m + r), cotangents, norm, {})


def directional_bounds(
    graph: BoundGraph, box: Box, state: State, c: Array, v: Array
) -> Interval:
    """Bounds of `c . J v`: the cotangents, then one pass with the row `v`."""
    found = cotangent_bounds(graph, box, state, c, "crown")
    products = {
        k: chords(*interval, *state.slopes[k])
        for k, interval in found.cotangents.items()
    }
    linear = {
        k: mccormick(*interval, *state.slopes[k], state.slope_lines[k])
        if k in state.slope_lines
        else products[k]
        for k, interval in found.cotangents.items()
    }
    rows = jnp.stack([v, -v])
    terms = _Terms(graph, state, c)
    sizes = terms.back_to(0, found.cotangents)
    upper, _ = push_forward(graph, 0, rows, c, products, state, box, sizes)
    if _differ(linear, products):
        other, _ = push_forward(graph, 0, rows, c, linear, state, box, sizes)
        upper = jnp.minimum(upper, other)
    (rising, falling), (along, against) = terms.parts[0], _by_sign((v, v))
    return _keep_sign(
        both_sides(jnp.broadcast_to(upper, (2,)), ()),
        jnp.sum(along * rising + against * falling),
        jnp.sum(along * falling + against * rising),
    )


def product_of_norms(graph: BoundGraph) -> Array:
    """The product of the layers' `l_inf` norms: the naive bound, for every row at once.

    Where paths join their bounds add up.
    """
    dtype = graph.dtype
    reach: list[Array] = [jnp.ones((), dtype)]
    for _index, node in enumerate(graph.nodes[1:], 1):
        if isinstance(node, Activation):
            everywhere = jnp.full(node.shape, jnp.inf, dtype)
            slopes = node.curve.slope_range(-everywhere, everywhere)
            steepest = jnp.max(jnp.abs(jnp.stack(slopes)))
            reach.append(reach[node.parents[0]] * steepest)
        else:
            ones = [
                jnp.full(graph.nodes[p].shape, reach[p], dtype) for p in node.parents
            ]
            reach.append(jnp.max(node.magnitude(*ones)))
    eps = _ROUNDINGS * jnp.finfo(dtype).eps
    return reach[-1] * (1 + len(graph.nodes) * eps)
