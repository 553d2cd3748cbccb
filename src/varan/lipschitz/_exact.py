"""The exact local Lipschitz constant of a tiny network, by enumerating its cells.

A network with piecewise-linear activations is affine on every cell of constant signs.
A depth-first search fixes one sign after the other; a linear program says whether the
polytope of the signs so far has an interior. The constant is the largest norm of the
Jacobian over the cells that remain. The number of cells grows exponentially with the
input's dimension: this is the ground truth that bounds are tested against, not a way
to certify a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..core._checks import check_positive
from ._forward import SignedIdentity, _pull_affine, add_rows, check_bounded
from ._graph import BoundGraph
from ._lipschitz import Rows, as_rows, check_rows
from ._nodes import Activation
from ._sets import Box

# The key of the output's block: the output may be an activation, with a block too.
OUTPUT = -1

# A cell counts if a point of it is this far (l_inf) from all hyperplanes, where every
# side of the box has length one. What is no farther than the second is a touching of
# hyperplanes, in double precision; what lies between was seen and is left out.
_INTERIOR, _TOUCHING = 1e-9, 1e-13
# The least that HiGHS allows; its default would be above the distances to tell apart.
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class ExactLipschitz:
    """What the enumeration found.

    Args:
        value: The constant: the largest l1 norm of a row over all cells.
        per_row: The largest norm of every row.
        cells: Number of cells in the box.
        complete: Whether the search ended by itself, found cells and left out none
            for its size; otherwise `value` is only the largest norm among the cells
            visited, a lower bound.
    """

    value: float
    per_row: np.ndarray
    cells: int
    complete: bool


def exact_lipschitz(
    model: Callable[[Array], Array],
    box: Box,
    *,
    rows: Rows = "each",
    max_programs: int = 100_000,
) -> ExactLipschitz:
    """The exact l_inf local Lipschitz constant of a tiny piecewise-linear network.

    Costs about one linear program for every cell and every neuron without a fixed
    sign; networks beyond some thirty unstable neurons are out of reach. Cells are
    searched where every side of the box has length one: those about 1e-9 wide there
    or less are left out, and the result is then not `complete`. Down to 1e-13, that
    is: what is thinner cannot be told from hyperplanes that touch, and is no cell.

    Args:
        model: As for `local_lipschitz`, with ReLU-like activations only.
        box: A bounded box; an empty interior gives the constant at its point.
        rows: `"each"` output, or combinations of outputs, (rows, outputs).
        max_programs: Linear programs to solve at most.

    Returns:
        The constant, the rows' constants and the number of cells.

    Raises:
        ValueError: a smooth activation, an infinite box, a budget that is not positive,
            weights that are not finite.
        UnsupportedPrimitive: an operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import Box, exact_lipschitz
        >>> net = lambda x: jnp.maximum(x[:1], 0) + 2 * jnp.maximum(-x[:1], 0)
        >>> exact_lipschitz(net, Box(jnp.array([-1.0]), jnp.array([1.0]))).value
        2.0

    Source:
        The definition; compare Jordan, Dimakis (2020), arXiv:2003.01219, who solve
        the same problem by mixed-integer programming.
    """
    check_bounded("exact_lipschitz", box)
    check_positive("exact_lipschitz", "max_programs", max_programs)
    graph = BoundGraph.from_callable(model, box.lower)
    c = check_rows("exact_lipschitz", rows, box)
    c = as_rows(c, graph.nodes[-1].shape, graph.dtype)
    c = np.asarray(c, float).reshape(c.shape[0], -1)
    if any(graph.nodes[k].curve.smooth for k in graph.activations):
        raise ValueError(
            "exact_lipschitz: every activation must be piecewise linear. "
            "Use `local_lipschitz` for smooth ones."
        )
    # From here on everything is NumPy: thousands of small programs, no array of JAX.
    blocks = finite_blocks("exact_lipschitz", model, box)
    search = _Search(graph, blocks, box, c, max_programs)
    for gradient in search.cells():
        search.record(gradient)
    return ExactLipschitz(
        float(np.max(search.best)),
        search.best,
        search.count,
        search.complete and search.count > 0,
    )


@eqx.filter_jit
def affine_blocks(model, box: Box) -> dict[int, tuple[dict[int, Array], Array]]:
    """Every activation's argument, and the output, as affine maps of what precedes."""
    graph = BoundGraph.from_callable(model, box.lower)
    targets = {k: graph.nodes[k].parents[0] for k in graph.activations}
    targets[OUTPUT] = graph.output
    return {k: _block(graph, target) for k, target in targets.items()}


def _block(graph: BoundGraph, target: int) -> tuple[dict[int, Array], Array]:
    """The matrices of one node in the nearest activations and the input."""
    size, dtype = graph.size(target), graph.dtype
    eye = SignedIdentity(size).dense(graph.nodes[target].shape, dtype)[:size]
    pending: dict[int, Array] = {target: eye}
    bias = jnp.zeros(size, dtype)
    done: dict[int, Array] = {}
    for index in range(target, -1, -1):
        rows = pending.pop(index, None)
        if rows is None:
            continue
        node = graph.nodes[index]
        if index == 0 or isinstance(node, Activation):
            done[index] = rows.reshape(size, -1)
            continue
        if node.bias is not None:
            bias = bias + rows.reshape(size, -1) @ jnp.ravel(node.bias)
        for parent, part in zip(
            node.parents, _pull_affine(graph, index, rows), strict=True
        ):
            shape = graph.nodes[parent].shape
            pending[parent] = add_rows(pending.get(parent), part, shape, dtype)
    return done, bias


def finite_blocks(owner: str, model, box: Box):
    """`affine_blocks` in NumPy's doubles; refuses what is not finite."""
    blocks = jax.tree.map(lambda a: np.asarray(a, float), affine_blocks(model, box))
    bad = sum(np.count_nonzero(~np.isfinite(a)) for a in jax.tree.leaves(blocks))
    if bad:
        raise ValueError(
            f"{owner}: the coefficients of `model` must be finite over the box "
            f"(got {bad} NaN or infinite). Check its weights."
        )
    return blocks


class _Search:
    """Depth-first search over sign patterns, with the polytope and a point in it."""

    def __init__(self, graph, blocks, box, c, max_programs):
        self.order = graph.activations
        self.slopes = {
            k: (graph.nodes[k].curve.negative, graph.nodes[k].curve.positive)
            for k in self.order
        }
        self.blocks, self.c = blocks, c
        lower, upper = (np.ravel(np.asarray(a, float)) for a in (box.lower, box.upper))
        # Affine maps are kept as a matrix and their value at the centre.
        self.centre, self.sides = lower / 2 + upper / 2, upper - lower
        # Sides without width are constants; programs run in the others.
        self.free = self.sides > 0
        self.budget = max_programs
        self.best = np.zeros(c.shape[0])
        self.count = 0
        self.complete = True

    def record(self, gradient: np.ndarray) -> None:
        self.best = np.maximum(self.best, np.abs(gradient).sum(1))
        self.count += 1

    def cells(self) -> Iterator[np.ndarray]:
        """The Jacobian of every cell."""
        start = {0: (np.eye(self.centre.size), self.centre)}
        yield from self._layer(0, start, [], [])

    def _affine(self, block, values):
        matrices, bias = block
        parts = [(m @ values[k][0], m @ values[k][1]) for k, m in matrices.items()]
        return sum(p[0] for p in parts), bias + sum(p[1] for p in parts)

    def _layer(self, depth, values, normals, offsets):
        if depth == len(self.order):
            matrix, _ = self._affine(self.blocks[OUTPUT], values)
            yield self.c @ matrix
            return
        index = self.order[depth]
        matrix, constant = self._affine(self.blocks[index], values)
        signs = np.zeros(len(constant))
        yield from self._neuron(
            depth, index, values, (matrix, constant), signs, 0, normals, offsets
        )

    def _neuron(self, depth, index, values, z, signs, k, normals, offsets):
        """Fixes the sign of neuron `k` of a layer in every way with an interior."""
        matrix, constant = z
        if k == len(signs):
            slope = np.where(signs > 0, self.slopes[index][1], self.slopes[index][0])
            mine = (slope[:, None] * matrix, slope * constant)
            deeper = {**values, index: mine}
            yield from self._layer(depth + 1, deeper, normals, offsets)
            return
        row, centre = matrix[k] * self.sides, constant[k]
        length = np.abs(row).sum()
        reach = length / 2
        for sign in (1.0, -1.0):
            if sign * centre + reach <= 0 and not (reach == 0 and sign * centre == 0):
                continue
            chosen = signs.copy()
            chosen[k] = sign
            args = (depth, index, values, z, chosen, k + 1)
            if sign * centre - reach >= 0:
                yield from self._neuron(*args, normals, offsets)
                continue
            more = [*normals, -sign * row / length]
            limits = [*offsets, sign * centre / length]
            if self._has_interior(more, limits):
                yield from self._neuron(*args, more, limits)

    def _has_interior(self, normals, offsets) -> bool:
        """Whether a point of the box is inside all hyperplanes, and not by rounding."""
        from scipy.optimize import linprog

        if self.budget <= 0:
            self.complete = False
            return False
        self.budget -= 1
        a = np.asarray(normals)[:, self.free]
        cost = np.zeros(a.shape[1] + 1)
        cost[-1] = -1.0
        # The distance may be negative: the program always has a solution.
        found = linprog(
            cost,
            A_ub=np.hstack([a, np.ones((len(a), 1))]),
            b_ub=np.asarray(offsets),
            bounds=[(-0.5, 0.5)] * a.shape[1] + [(None, None)],
            method="highs",
            options={
                "primal_feasibility_tolerance": _TOLERANCE,
                "dual_feasibility_tolerance": _TOLERANCE,
            },
        )
        distance = -np.inf if found.x is None else found.x[-1]
        inside = bool(distance > _INTERIOR)
        if not inside and (found.x is None or distance > _TOUCHING):
            self.complete = False
        return inside
