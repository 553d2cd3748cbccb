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
from ._exact import OUTPUT, finite_blocks
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
    1e-6 relative to the range that interval bounds give, whatever the scale of inputs
    and weights; the time grows exponentially with the number of activations of unfixed
    sign, some tens of which are feasible.

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
            that is not positive, weights that are not finite.
        UnsupportedPrimitive: An operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import Box, exact_bounds
        >>> net = lambda x: 1 + jnp.maximum(x, 0) - jnp.maximum(x - 1, 0)
        >>> found = exact_bounds(net, Box(jnp.array([-1.0]), jnp.array([3.0])))
        >>> round(float(found.lower[0]), 6), round(float(found.upper[0]), 6)
        (1.0, 2.0)

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
    matrix, offset = program.affine(OUTPUT)
    ends = [program.extremes(row @ matrix, time_limit) for row in c]
    low, high = (np.array(side) + c @ offset for side in zip(*ends, strict=True))
    return Box(*(jnp.asarray(side, box.lower.dtype) for side in (low, high)))


_SOLVE_ERROR = 4  # of SciPy's `milp`
# The least unit of a variable, relative to its size: less would scale rounding up.
_LEAST_UNIT = 1e-6


class _Program:
    """The graph of the network over the box as a polytope with integers.

    Variables: the input, then what each activation gives, then one binary each. The
    solver's tolerances are absolute, so a variable counts from the middle of its
    interval in units of half the interval's width, and a row is in the unit of its
    activation's argument: all numbers are near one.
    """

    def __init__(self, model, graph: BoundGraph, box: Box):
        self.graph, self.order = graph, graph.activations
        self.blocks = finite_blocks("exact_bounds", model, box)
        intervals = preactivations(graph, box, "ibp").intervals
        self.places, size = {0: slice(0, box.lower.size)}, box.lower.size
        for k in self.order:
            self.places[k] = slice(size, size + graph.size(k))
            size = self.places[k].stop
        self.size = 2 * size - box.lower.size
        self.middle, self.unit = np.zeros(self.size), np.ones(self.size)
        low, high = (np.ravel(side).astype(float) for side in (box.lower, box.upper))
        self._measure(0, low, high)
        self.lower, self.upper = np.full(self.size, -np.inf), np.full(self.size, np.inf)
        inputs = self.places[0]
        self.lower[inputs] = (low - self.middle[inputs]) / self.unit[inputs]
        self.upper[inputs] = (high - self.middle[inputs]) / self.unit[inputs]
        self.lower[size:], self.upper[size:] = 0, 1
        self.integer = np.zeros(self.size)
        self.integer[size:] = 1
        self.rows: list[np.ndarray] = []
        self.ends: list[tuple[np.ndarray, np.ndarray]] = []
        for k in self.order:
            self._activation(
                k, *(np.ravel(side).astype(float) for side in intervals[k])
            )

    def _measure(self, k: int, low, high) -> None:
        self.middle[self.places[k]] = low / 2 + high / 2
        self.unit[self.places[k]] = _half_width(low, high)

    def affine(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's matrix in all variables, and its value at their middles."""
        parts, constant = self.blocks[k]
        whole = np.zeros((len(constant), self.size))
        for source, matrix in parts.items():
            whole[:, self.places[source]] = matrix
        return whole * self.unit, constant + whole @ self.middle

    def _activation(self, k: int, low, high) -> None:
        place, curve = self.places[k], self.graph.nodes[k].curve
        n, p = curve.negative, curve.positive
        bend = p - n
        # A convex curve is largest at an end and least at an end or its kink.
        points = np.stack([low, high, np.clip(0, low, high)])
        values = n * np.minimum(points, 0) + p * np.maximum(points, 0)
        self._measure(k, values.min(0), values.max(0))
        unit = _half_width(low, high)
        z, constant = self.affine(k)
        z, constant = z / unit[:, None], constant / unit
        low, high = low / unit, high / unit
        a = np.zeros_like(z)
        a[:, place] = np.diag(self.unit[place] / unit)
        shift = self.middle[place] / unit
        on = np.zeros_like(z)
        binary = place.start + (self.size - self.places[0].stop) // 2
        on[:, binary : binary + len(z)] = np.eye(len(z))
        fixed = (low >= 0) | (high <= 0)
        self.upper[binary : binary + len(z)][fixed] = 0
        slope = np.where(low >= 0, p, n)
        line = slope * constant - shift
        self._add(fixed, a - slope[:, None] * z, line, line)
        # Above both pieces, and below the one that the binary chooses.
        free = np.full(len(z), np.inf)
        above, below = p * constant - shift, n * constant - shift
        self._add(~fixed, a - p * z, above, free)
        self._add(~fixed, a - n * z, below, free)
        self._add(
            ~fixed, a - p * z - bend * low[:, None] * on, -free, above - bend * low
        )
        self._add(~fixed, a - n * z - bend * high[:, None] * on, -free, below)

    def _add(self, chosen, rows, lower, upper) -> None:
        self.rows.append(rows[chosen])
        self.ends.append((lower[chosen], upper[chosen]))

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
        size = np.abs(objective).sum() or 1.0
        low, negative_high = (
            size * _minimum(sign * objective / size, seconds, common)
            for sign in (1, -1)
        )
        return low, -negative_high


def _minimum(objective: np.ndarray, seconds: float, common) -> float:
    """The least value, or minus infinity if it was not found."""
    from scipy.optimize import milp

    # Presolving fails on some programs that are solved without it.
    for presolve in (True, False):
        # Only the absolute gap, 1e-6, ends the search: the relative one is 1e-4.
        options = {"time_limit": seconds, "presolve": presolve, "mip_rel_gap": 0.0}
        found = milp(objective, options=options, **common)
        if found.status != _SOLVE_ERROR:
            break
    return float(found.fun) if found.status == 0 else -np.inf


def _half_width(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Half of each interval's width, for a unit: positive, and above rounding."""
    size = np.maximum(np.abs(low), np.abs(high))
    unit = np.maximum(high / 2 - low / 2, _LEAST_UNIT * size)
    return np.where(unit > 0, unit, 1.0)
