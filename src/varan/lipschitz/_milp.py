"""The exact range of a small ReLU network over a box, by mixed-integer programming.

Every activation whose sign is not fixed by interval bounds gets one binary variable;
the program's optimum is the network's. The ground truth that bounds of outputs are
compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..core._checks import check_positive
from ._exact import OUTPUT, affine_blocks
from ._forward import check_bounded, preactivations
from ._graph import BoundGraph
from ._lipschitz import Rows, as_rows, check_rows
from ._sets import Box


def exact_bounds(
    model: Callable[[Array], Array],
    box: Box,
    *,
    rows: Rows = "each",
    time_limit: float = 60.0,
) -> Box:
    """The smallest and largest value of each output over a box, exactly.

    Solves two mixed-integer linear programs a row with HiGHS, to its tolerance of about
    1e-6 relative; the time grows exponentially with the number of activations of
    unfixed sign, some tens of which are feasible.

    Args:
        model: As for `local_lipschitz`, with convex piecewise-linear activations
            (ReLU, leaky ReLU, absolute value) only.
        box: A bounded box.
        rows: `"each"` output, or combinations of outputs, (rows, outputs).
        time_limit: Seconds for each program.

    Returns:
        A box with one entry a row; infinite where a program was not solved in time.

    Raises:
        ValueError: A smooth or concave activation, an infinite box, a `time_limit`
            that is not positive.
        UnsupportedPrimitive: An operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import Box, exact_bounds
        >>> net = lambda x: jnp.maximum(x, 0) - jnp.maximum(x - 1, 0)
        >>> found = exact_bounds(net, Box(jnp.array([-1.0]), jnp.array([3.0])))
        >>> round(float(found.lower[0]), 6), round(float(found.upper[0]), 6)
        (0.0, 1.0)

    Source:
        Tjeng, Xiao, Tedrake (2019), arXiv:1711.07356, section 4.
    """
    owner = "exact_bounds"
    check_bounded(owner, box)
    check_positive(owner, "time_limit", time_limit)
    graph = BoundGraph.from_callable(model, box.lower)
    c = check_rows(owner, rows, box)
    c = as_rows(c, graph.nodes[-1].shape, graph.dtype)
    c = np.asarray(c, float).reshape(c.shape[0], -1)
    curves = [graph.nodes[k].curve for k in graph.activations]
    if any(curve.smooth or curve.positive < curve.negative for curve in curves):
        raise ValueError(
            f"{owner}: every activation must be convex and piecewise linear. Use "
            "`bounds` for others."
        )
    program = _Program(model, graph, box)
    matrix, offset = program.output()
    ends = [program.extremes(row @ matrix, time_limit) for row in c]
    low, high = (np.array(side) + c @ offset for side in zip(*ends, strict=True))
    return Box(*(jnp.asarray(side, box.lower.dtype) for side in (low, high)))


_SOLVE_ERROR = 4  # of SciPy's `milp`


class _Program:
    """The graph of the network over the box as a polytope with integers.

    Variables: the input, then what each activation gives, then one binary each.
    """

    def __init__(self, model, graph: BoundGraph, box: Box):
        self.graph, self.order = graph, graph.activations
        self.blocks = {
            k: _numpy(block) for k, block in affine_blocks(model, box).items()
        }
        intervals = preactivations(graph, box, "ibp").intervals
        self.places, size = {0: slice(0, box.lower.size)}, box.lower.size
        for k in self.order:
            self.places[k] = slice(size, size + graph.size(k))
            size = self.places[k].stop
        self.size = 2 * size - box.lower.size
        self.lower, self.upper = np.full(self.size, -np.inf), np.full(self.size, np.inf)
        self.lower[self.places[0]] = np.ravel(box.lower)
        self.upper[self.places[0]] = np.ravel(box.upper)
        self.lower[size:], self.upper[size:] = 0, 1
        self.integer = np.zeros(self.size)
        self.integer[size:] = 1
        self.rows: list[np.ndarray] = []
        self.ends: list[tuple[np.ndarray, np.ndarray]] = []
        for k in self.order:
            self._activation(
                k, *(np.ravel(side).astype(float) for side in intervals[k])
            )

    def _affine(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's matrix in all variables, and its constant."""
        parts, constant = self.blocks[k]
        whole = np.zeros((len(constant), self.size))
        for source, matrix in parts.items():
            whole[:, self.places[source]] = matrix
        return whole, constant

    def output(self) -> tuple[np.ndarray, np.ndarray]:
        return self._affine(OUTPUT)

    def _activation(self, k: int, low, high) -> None:
        curve = self.graph.nodes[k].curve
        z, constant = self._affine(k)
        a = np.zeros_like(z)
        a[:, self.places[k]] = np.eye(len(z))
        on = np.zeros_like(z)
        first = self.places[k].start - self.places[0].stop
        binary = self.size - (self.size - self.places[0].stop) // 2 + first
        on[:, binary : binary + len(z)] = np.eye(len(z))
        n, p = curve.negative, curve.positive
        bend = p - n
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        free = np.full(len(z), np.inf)
        # Above both pieces, and below the one that the binary chooses.
        self._add(a - p * z, p * constant, free)
        self._add(a - n * z, n * constant, free)
        self._add(
            a - p * z - bend * low[:, None] * on, -free, p * constant - bend * low
        )
        self._add(a - n * z - bend * high[:, None] * on, -free, n * constant)

    def _add(self, rows, lower, upper) -> None:
        self.rows.append(rows)
        self.ends.append((lower, upper))

    def extremes(self, objective: np.ndarray, seconds: float) -> tuple[float, float]:
        from scipy.optimize import Bounds, LinearConstraint

        constraints = None
        if self.rows:
            lower, upper = (np.concatenate(e) for e in zip(*self.ends, strict=True))
            constraints = LinearConstraint(np.concatenate(self.rows), lower, upper)
        common = {
            "integrality": self.integer,
            "bounds": Bounds(self.lower, self.upper),
            "constraints": constraints,
        }
        low = _minimum(objective, seconds, common)
        return low, -_minimum(-objective, seconds, common)


def _minimum(objective: np.ndarray, seconds: float, common) -> float:
    """The least value, or minus infinity if it was not found."""
    from scipy.optimize import milp

    # Presolving fails on some programs that are solved without it.
    for presolve in (True, False):
        options = {"time_limit": seconds, "presolve": presolve}
        found = milp(objective, options=options, **common)
        if found.status != _SOLVE_ERROR:
            break
    return float(found.fun) if found.status == 0 else -np.inf


def _numpy(block):
    parts, constant = block
    return {k: np.asarray(v, float) for k, v in parts.items()}, np.asarray(constant)
