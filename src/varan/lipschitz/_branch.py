"""Branch and bound over unstable neurons: splitting what loosens a Jacobian bound.

A branch is a range for the argument of every activation. Splitting a neuron at zero
gives two branches in which its derivative is known; their bounds, intersected with the
parent's, are at most the parent's. All rows share one queue: the branch with the
largest bound is split first, so the answer at any stop is the queue's maximum.
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..core._checks import check_choice, check_positive
from ._forward import Interval, expand, preactivations
from ._graph import BoundGraph
from ._jacobian import Cotangents, cotangent_bounds, state_of
from ._sets import Box

# Both children exclude zero, where the Clarke derivative is still the whole interval;
# the points with a zero argument are limits of points of the two children.
_STRICT = 1e-9


@dataclass(frozen=True)
class BaB:
    """The budget and the rules of branch and bound.

    Args:
        time: Seconds of wall clock, compilation included.
        batch: Branches split at once.
        max_domains: Branches bounded in all.
        heuristic: Which neuron is split: the one whose relaxation covers the largest
            `"area"`, or has the largest `"offset"`, each weighted with the size of the
            norm's coefficient there.
        reforward: Bound all activations anew in every branch, and drop branches that
            this proves empty. Costs one CROWN pass a branch.

    Raises:
        ValueError: a budget that is not positive, or an unknown heuristic.
    """

    time: float = 60.0
    batch: int = 128
    max_domains: int = 200_000
    heuristic: Literal["area", "offset"] = "area"
    reforward: bool = False

    def __post_init__(self):
        check_positive("BaB", "time", self.time)
        check_positive("BaB", "batch", self.batch)
        check_positive("BaB", "max_domains", self.max_domains)
        check_choice("BaB", "heuristic", self.heuristic, ("area", "offset"))


class _Branches(NamedTuple):
    """Branches side by side; flat over activations, the gradient's entries last."""

    lower: Array
    upper: Array
    below: Array
    above: Array
    bound: Array
    split: Array
    alive: Array


class _Layout:
    """Where every activation lies in the flat vectors."""

    def __init__(self, graph: BoundGraph):
        self.graph = graph
        self.indices = graph.activations
        self.sizes = [graph.size(k) for k in self.indices]

    def flat(self, values: dict[int, Array]) -> Array:
        parts = [jnp.ravel(values[k]) for k in self.indices]
        return jnp.concatenate([jnp.zeros(0, self.graph.dtype), *parts])

    def split(self, vector: Array) -> dict[int, Array]:
        edges = np.cumsum([0, *self.sizes])
        return {
            k: vector[a:b].reshape(self.graph.nodes[k].shape)
            for k, a, b in zip(self.indices, edges, edges[1:], strict=False)
        }

    def intervals(self, lower: Array, upper: Array) -> dict[int, Interval]:
        low, high = self.split(lower), self.split(upper)
        return {k: (low[k], high[k]) for k in self.indices}


def _side(values: dict[int, Interval], side: int) -> dict[int, Array]:
    return {k: interval[side] for k, interval in values.items()}


@eqx.filter_jit
def _flatten(model, box: Box, intervals: dict[int, Interval]) -> tuple[Array, Array]:
    layout = _Layout(BoundGraph.from_callable(model, box.lower))
    return layout.flat(_side(intervals, 0)), layout.flat(_side(intervals, 1))


@eqx.filter_jit
def _children(
    model,
    box: Box,
    rows: Array,
    parents: _Branches,
    sign: Array,
    heuristic: str,
    reforward: bool,
    linear: bool,
) -> _Branches:
    """Bounds one child of every parent: the side `sign` of the neuron `split`."""
    graph = BoundGraph.from_callable(model, box.lower)
    layout = _Layout(graph)

    def child(c: Array, parent: _Branches, sign: Array) -> _Branches:
        here = jnp.arange(parent.lower.size, dtype=jnp.int32) == parent.split
        cut = jnp.asarray(_STRICT, graph.dtype)
        lower = jnp.where(
            here & (sign > 0), jnp.maximum(parent.lower, cut), parent.lower
        )
        upper = jnp.where(
            here & (sign < 0), jnp.minimum(parent.upper, -cut), parent.upper
        )
        intervals = layout.intervals(lower, upper)
        alive = parent.alive
        if reforward:
            intervals, lines, *_ = preactivations(graph, box, "crown", intervals)
            lower, upper = (layout.flat(_side(intervals, k)) for k in (0, 1))
            # A strict side may cross a range that ends within the cut.
            alive = alive & ~jnp.any(lower > upper + 2 * cut)
        else:
            curves = {k: graph.nodes[k].curve for k in layout.indices}
            lines = {k: expand(curves[k].lines(*intervals[k])) for k in layout.indices}
        intervals = layout.intervals(lower, jnp.maximum(lower, upper))
        state = state_of(graph, box, intervals, lines, linear=linear)
        size = lower.size
        known = layout.intervals(parent.below[:size], parent.above[:size])
        shape = graph.nodes[0].shape
        entries = parent.below[size:].reshape(shape), parent.above[size:].reshape(shape)
        shaped = c.reshape(graph.nodes[-1].shape)
        found = cotangent_bounds(
            graph, box, state, shaped, "crown", known=(known, entries)
        )
        below, above = (
            jnp.concatenate(
                [layout.flat(_side(found.cotangents, k)), jnp.ravel(found.gradient[k])]
            )
            for k in (0, 1)
        )
        bound = jnp.fmin(found.norm, parent.bound)  # NaN says nothing
        split = _choose(layout, state.slopes, found, heuristic)
        return _Branches(lower, upper, below, above, bound, split, alive)

    return jax.vmap(child)(rows, parents, sign)


def _choose(layout: _Layout, slopes, found: Cotangents, heuristic: str) -> Array:
    """The neuron to split next; -1 when no split can change the bound."""
    scores = []
    for index in layout.indices:
        dl, du = slopes[index]
        lg, ug = found.cotangents[index]
        area = (ug * jnp.abs(ug) - lg * jnp.abs(lg)) * (du - dl)
        mixed = (lg < 0) & (ug > 0)
        lift = jnp.where(mixed, -lg * ug / jnp.where(mixed, ug - lg, 1), 0) * (du - dl)
        # Where no offset is left the area decides, however small its weight.
        loose = area if heuristic == "area" else lift + 1e-6 * area
        size = found.sensitivity.get(index, jnp.zeros_like(loose))
        # A neuron that the norm ignores may still loosen another one's bounds.
        score = loose * (size + 1e-9)
        open_ = (du > dl) & (jnp.maximum(jnp.abs(lg), jnp.abs(ug)) > 0)
        if layout.graph.nodes[index].curve.smooth:
            open_ = jnp.zeros_like(open_)
        scores.append(jnp.ravel(jnp.where(open_, jnp.maximum(score, 1e-30), -1.0)))
    flat = jnp.concatenate([jnp.full(1, -1.0, layout.graph.dtype), *scores])
    best = jnp.argmax(flat)
    return jnp.where(flat[best] > 0, best - 1, -1).astype(jnp.int32)


class _Queue:
    """Branches on the host, worst first."""

    def __init__(self):
        self.heap: list[tuple[float, int, int]] = []
        self.items: list[tuple[np.ndarray, ...]] = []
        self.finished: list[tuple[float, int, int]] = []

    def push(self, row: int, branch: tuple[np.ndarray, ...]) -> None:
        place = len(self.items)
        self.items.append(branch)
        entry = (-float(branch[4]), place, row)
        if branch[5] < 0:
            self.finished.append(entry)
        else:
            heapq.heappush(self.heap, entry)

    def take(self, count: int, floor: float) -> list[tuple[float, int, int]]:
        """The worst branches whose bound lies above every final one."""
        taken = []
        while self.heap and len(taken) < count and -self.heap[0][0] > floor:
            taken.append(heapq.heappop(self.heap))
        return taken

    def all(self):
        return [*self.heap, *self.finished]


def branch_and_bound(
    model,
    box: Box,
    rows: Array,
    intervals: dict[int, Interval],
    rule: BaB,
    attained,
    *,
    linear: bool,
):
    """Splits until the budget is spent or the bound cannot fall any more.

    Args:
        model: The network.
        box: The inputs.
        rows: Combinations of outputs.
        intervals: Bounds of the activations' arguments over the box.
        rule: Budget and rules.
        attained: A value that some point attains: no bound can fall below it.
        linear: Whether smooth derivatives follow their state.

    Returns:
        Bound, bound of every row, lower and upper Jacobian entries, branches bounded.
    """
    started = time.monotonic()
    width = rule.batch
    lower, upper = (np.asarray(v) for v in _flatten(model, box, intervals))
    count, dtype = rows.shape[0], lower.dtype
    whole = np.full(lower.size + box.lower.size, np.inf, dtype)
    infinite, unsplit, alive = dtype.type(np.inf), np.int32(-1), np.bool_(True)
    root = (lower, upper, -whole, whole, infinite, unsplit, alive)
    queue, matrix = _Queue(), np.asarray(rows)

    def bound_lanes(owners: list[int], lanes: list, sign: float) -> None:
        spare = width - len(lanes)
        lanes, chosen = lanes + lanes[:1] * spare, owners + owners[:1] * spare
        parents = _Branches(
            *(jnp.asarray(np.stack(v)) for v in zip(*lanes, strict=True))
        )
        signs = jnp.asarray(np.full(width, sign, dtype))
        combinations = jnp.asarray(matrix[chosen])
        settings = (rule.heuristic, rule.reforward, linear)
        found = _children(model, box, combinations, parents, signs, *settings)
        found = [np.asarray(v) for v in found]
        for lane, row in enumerate(owners):
            if found[6][lane]:
                queue.push(row, tuple(v[lane] for v in found))

    for first in range(0, count, width):
        owners = list(range(first, min(first + width, count)))
        bound_lanes(owners, [root] * len(owners), 0.0)
    bounded = count
    # Splitting below what a point attains, up to rounding, cannot help.
    target = float(attained) * (1 + 64 * float(jnp.finfo(dtype).eps))
    while bounded < rule.max_domains and time.monotonic() - started < rule.time:
        final = max((-b for b, *_ in queue.finished), default=-math.inf)
        taken = queue.take(width, max(final, target))
        if not taken:
            break
        lanes = [queue.items[place] for _, place, _ in taken]
        owners = [row for *_, row in taken]
        for sign in (1.0, -1.0):
            bound_lanes(owners, lanes, sign)
        for _, place, _ in taken:
            queue.items[place] = ()
        bounded += 2 * len(taken)
    return (*_collect(queue, count, box), bounded)


def _collect(queue: _Queue, count: int, box: Box):
    """The maxima over the branches that remain, row by row."""
    size = box.lower.size
    dtype = np.dtype(box.lower.dtype)
    per_row = np.zeros(count, dtype)
    low = np.full((count, size), np.inf, dtype)
    high = np.full((count, size), -np.inf, dtype)
    for negative, place, row in queue.all():
        item = queue.items[place]
        per_row[row] = max(per_row[row], -negative)
        low[row] = np.minimum(low[row], item[2][item[0].size :])
        high[row] = np.maximum(high[row], item[3][item[0].size :])
    shape = (count, *box.lower.shape)
    entries = (jnp.asarray(v.reshape(shape)) for v in (low, high))
    per_row = jnp.asarray(per_row)
    return (jnp.max(per_row), per_row, *entries)
