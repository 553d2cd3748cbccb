"""Certifying ReLU networks by low-rank points of a semidefinite relaxation.

The relaxation replaces products of the network's variables by a positive semidefinite
matrix. Written as a factor of few columns (Burer and Monteiro), it is a small nonconvex
program, solved locally; its multipliers make a slack matrix whose least eigenvalue says
how far they are from a proof, and the bound pays for that: it holds at any multipliers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float, Int

from ..core import Certificate
from ..core._checks import check_positive
from ._lipschitz import Rows, as_rows, check_rows
from ._relu_program import (
    ReluProgram,
    Scaled,
    ranges,
    relu_layers,
    relu_program,
    slack_matrix,
)
from ._result import Certified
from ._sets import Ball, Box

# The augmented Lagrangian: first penalty, its growth where the constraints did not
# shrink by the factor below, and the largest number of updates of the multipliers.
_PENALTY, _STEEPER, _SHRUNK, _UPDATES = 3.0, 2.0, 0.3, 40
# Newton's method with a shift of the Hessian: the first, its change, its ends.
_SHIFT, _MORE, _LESS, _LEAST, _MOST = 1e-3, 4.0, 0.125, 1e-12, 1e8
_NEWTON_STEPS = 60
# Size of the columns that lift, at the start and when one is added.
_LIFT = 0.1
# The gap to the relaxed value, in units of `tol`, that needs no further column, and the
# roundings taken off an eigenvalue, in units of eps times the order.
_GAP, _ROUNDINGS = 100.0, 64


class SDPResult(Certified):
    """What a combination of outputs is at least, and at most at its least.

    Args:
        lower: Proved lower bound of every row over the region.
        upper: The row at an input of the region: no lower bound exceeds it.
        relaxed: The low-rank point's value, which the relaxation's minimum does not
            exceed up to the constraints' `residual`. No bound of the network.
        rank: Columns of the factor for each row.
        slack_min_eig: Least eigenvalue of the slack matrix in the scaled variables; the
            relaxation is solved where it is 0 up to rounding.
        correction: What `lower` pays for a negative eigenvalue: it times the bound on
            the variables' squared norm.
        residual: Largest violation of the constraints, scaled.
        witness: The inputs at which `upper` is attained.
        certificate: The statement that the least entry of `lower` proves.
    """

    lower: Float[Array, " rows"]
    upper: Float[Array, " rows"]
    relaxed: Float[Array, " rows"]
    rank: Int[Array, " rows"]
    slack_min_eig: Float[Array, " rows"]
    correction: Float[Array, " rows"]
    residual: Float[Array, " rows"]
    witness: Float[Array, "rows inputs"]
    certificate: Certificate


def lowrank_sdp(
    model: Callable[[Array], Array],
    region: Ball | Box,
    *,
    rows: Rows = "each",
    rank: int = 2,
    max_rank: int = 4,
    tol: float = 1e-6,
) -> SDPResult:
    """Bounds combinations of a ReLU network's outputs from below, by a low-rank SDP.

    Each layer carries `(z, V)`, V of `rank - 1` columns, with `z' >= 0`,
    `z' >= W z + b` and, row by row, `z' (z' - W z - b) + <V', V' - W V> = 0`, in a ball
    `|x - centre|^2 + |V_0|^2 <= radius^2`. Without V this is the network itself; one
    column already closes most of the relaxation's gap. An augmented Lagrangian with
    Newton steps finds a local minimum and its multipliers; with n variables in all, a
    step costs `O((rank n)^3)`. Where the slack matrix S of the multipliers has a
    negative eigenvalue, its eigenvector becomes one more column, until `max_rank`.

    For any multipliers, `lower = s + min(0, least eigenvalue of S(s)) R^2`, where `s`
    is the best constant and `R^2` bounds the squared norm of all (scaled) variables by
    CROWN ranges. The multipliers come from the solver; matrix and eigenvalue are
    recomputed in float64, with their rounding taken off.

    Args:
        model: As for `local_lipschitz`: one chain of affine maps and ReLUs.
        region: A `Ball` (the paper's set); for a `Box` the constraint is entry by
            entry, `(x - lower) (upper - x) >= 0`, a variant of ours.
        rows: `"each"` output, or combinations of outputs, (rows, outputs): the lead of
            a label over each other class.
        rank: Columns at the start, at least 1; 1 is a local attack on the network,
            whose multipliers still prove something.
        max_rank: Columns at most.
        tol: Scaled violation of the constraints at which the solver stops, and a
            hundredth of the gap to `relaxed` below which no column is added. Below some
            1e-3 it wants float64.

    Returns:
        Bounds, with what they consist of.

    Raises:
        ValueError: Activations other than ReLU, several paths, an unbounded or empty
            region, ranks out of order.
        UnsupportedPrimitive: An operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import Ball, lowrank_sdp
        >>> net = lambda x: jnp.maximum(jnp.array([[1.0, 1.0]]) @ x - 1.0, 0.0)
        >>> found = lowrank_sdp(net, Ball(jnp.array([1.0, 1.0]), 0.5))
        >>> bool(found.lower[0] <= found.upper[0]), round(float(found.lower[0]), 2)
        (True, 0.29)

    Source: Chiu and Zhang, 2023, "Tight Certification of Adversarially Trained Neural
        Networks via Nonconvex Low-Rank Semidefinite Relaxations", arXiv:2211.17244; the
        relaxation: Raghunathan, Steinhardt and Liang, 2018, arXiv:1811.01057.

    Differences: Multipliers are those of the augmented Lagrangian, not of a fit to the
        stationarity condition by least squares. Variables are scaled by powers of two
        to their CROWN ranges, and neurons that are never active are left out.
    """
    owner = "lowrank_sdp"
    check_positive(owner, "tol", tol)
    check_positive(owner, "rank", rank)
    if max_rank < rank:
        raise ValueError(
            f"{owner}: `max_rank` must be at least `rank` (got {max_rank} and {rank})."
        )
    layers, box = relu_layers(owner, model, region)
    c = check_rows(owner, rows, box)
    c = np.asarray(as_rows(c, (len(layers[-1][1]),), box.lower.dtype), float)
    c = c.reshape(len(c), -1)
    hidden, (matrix, bias) = layers[:-1], layers[-1]
    spans = ranges(hidden, region)
    found = []
    for row in c:
        scaled = relu_program(hidden, row @ matrix, float(row @ bias), spans, region)
        found.append(_staircase(scaled, rank, max_rank, tol))
    witness = np.stack([_inside(region, one.factor, one.scaled.basis) for one in found])
    values = np.einsum("ri,ri->r", c, _forward(layers, witness))
    return _result(found, values, witness, box.lower.dtype)


class _Step(NamedTuple):
    """A rung of the staircase: a low-rank point and what its multipliers prove."""

    scaled: Scaled
    factor: np.ndarray
    residual: float
    relaxed: float
    lower: float
    least: float
    correction: float
    direction: np.ndarray


def _staircase(scaled: Scaled, rank: int, max_rank: int, tol: float) -> _Step:
    """Adds a column along the slack matrix's least eigenvector until it is solved."""
    factor, best = _start(scaled.program, rank), None
    while True:
        step = _rung(scaled, factor, tol)
        # More columns never make the answer worse: the best bound is kept.
        if best is None or step.lower > best.lower:
            best = step
        gap = (step.relaxed - step.lower) / scaled.unit
        if gap <= _GAP * tol or factor.shape[1] >= max_rank:
            return best
        factor = np.concatenate([step.factor, _LIFT * step.direction[:, None]], 1)


def _rung(scaled: Scaled, factor: np.ndarray, tol: float) -> _Step:
    program = scaled.program
    point, bound, activity, residual = _solve(program, factor, tol)
    point = np.asarray(point, float)
    # Of whatever the solver returns, what has the right signs proves something.
    bound = np.nan_to_num(np.maximum(np.asarray(bound, float), 0.0))
    activity = np.nan_to_num(np.asarray(activity, float))
    matrix = slack_matrix(program, bound, activity)
    live = np.concatenate([[True], scaled.alive])
    matrix = matrix[np.ix_(live, live)]
    value, least, paid, vector = _proved(matrix, 1 + scaled.squares.sum())
    # What is left of the eigenvector when the column of the point is taken out.
    direction = np.zeros(len(scaled.alive))
    direction[scaled.alive] = vector[1:]
    direction = direction - vector[0] * point[:, 0] * scaled.alive
    last = point[len(point) - len(program.c) :, 0]
    return _Step(
        scaled,
        point,
        float(residual),
        scaled.unit * float(program.c @ last) + scaled.offset,
        scaled.unit * value + scaled.offset,
        least,
        scaled.unit * paid,
        direction / max(np.linalg.norm(direction), 1e-300),
    )


def _proved(matrix: np.ndarray, radius: float):
    """The best `s + min(0, least eigenvalue of (matrix - s at 0, 0)) radius`.

    With a shift d of the spectrum, s may be `m_00 + d - m_0' (M + d)^-1 m_0`: concave
    in d, of which a grid's best is taken. The eigenvalue is then computed anew.
    """
    values, vectors = np.linalg.eigh(matrix[1:, 1:])
    weights = (vectors.T @ matrix[1:, 0]) ** 2
    shifts = max(0.0, -values[0]) + np.geomspace(1e-13, 1.0, 600)
    inverse = np.sum(weights / (values + shifts[:, None]), 1)
    constants = matrix[0, 0] + shifts - inverse
    constant = constants[np.argmax(constants - radius * shifts)]
    slack = matrix.copy()
    slack[0, 0] -= constant
    values, vectors = np.linalg.eigh(slack)
    whole = np.linalg.norm(np.abs(matrix)) + abs(constant)
    rounding = _ROUNDINGS * len(matrix) * np.finfo(float).eps * whole
    paid = min(0.0, values[0] - rounding) * radius
    return constant + paid, float(values[0]), paid, vectors[:, 0]


# The augmented Lagrangian -----------------------------------------------------------


def _start(program: ReluProgram, rank: int) -> np.ndarray:
    """The network at the region's centre, its lift along fixed waves."""
    inputs = program.sizes[0]
    waves = np.cos(np.outer(1 + np.arange(inputs), 1 + np.arange(rank)))
    signal = _LIFT * waves / np.sqrt(inputs)
    signal[:, 0] = 0
    parts = [signal]
    for weight, bias in zip(program.weights, program.biases, strict=True):
        signal = weight @ signal
        signal[:, 0] += bias
        signal = signal * (signal[:, :1] > 0)
        parts.append(signal)
    return np.concatenate(parts)


def _constraints(program: ReluProgram, factor: Array) -> tuple[Array, Array]:
    """What must not be positive, and what must be zero."""
    parts = jnp.split(factor, np.cumsum(program.sizes)[:-1].tolist())
    squares = jnp.sum(parts[0] ** 2, 1)
    below = [jnp.sum(squares)[None] - 1 if program.ball else squares - 1]
    zero = []
    for weight, bias, old, new in zip(
        program.weights, program.biases, parts, parts[1:], strict=False
    ):
        argument = weight @ old
        argument = argument.at[:, 0].add(bias)
        below += [-new[:, 0], argument[:, 0] - new[:, 0]]
        zero.append(jnp.sum(new * (new - argument), 1))
    return jnp.concatenate(below), jnp.concatenate(zero)


def _merit(flat, program: ReluProgram, rank, bound, activity, penalty):
    """The augmented Lagrangian."""
    factor = flat.reshape(-1, rank)
    below, zero = _constraints(program, factor)
    pushed = jnp.maximum(bound + penalty * below, 0)
    return (
        program.c @ factor[-len(program.c) :, 0]
        + jnp.sum(pushed**2 - bound**2) / (2 * penalty)
        + activity @ zero
        + penalty / 2 * jnp.sum(zero**2)
    )


@eqx.filter_jit
def _solve(program: ReluProgram, factor, tol):
    """A local minimum over factors of the given rank, with its multipliers."""
    program = jax.tree.map(jnp.asarray, program)
    factor = jnp.asarray(factor)
    rank = factor.shape[1]
    below, zero = _constraints(program, factor)
    infinite = jnp.full((), jnp.inf, factor.dtype)
    penalty = jnp.full((), _PENALTY, factor.dtype)

    def unfinished(carry):
        *_, residual, updates = carry
        return (residual > tol) & (updates < _UPDATES)

    def update(carry):
        flat, bound, activity, penalty, before, updates = carry
        accuracy = jnp.clip(1e-2 * before, 1e-2 * tol, 1e-3)
        merit = partial(
            _merit,
            program=program,
            rank=rank,
            bound=bound,
            activity=activity,
            penalty=penalty,
        )
        flat = _newton(merit, flat, accuracy)
        below, zero = _constraints(program, flat.reshape(-1, rank))
        residual = jnp.maximum(
            jnp.max(jnp.abs(jnp.maximum(below, -bound / penalty))),
            jnp.max(jnp.abs(zero)),
        )
        bound = jnp.maximum(bound + penalty * below, 0)
        activity = activity + penalty * zero
        steeper = jnp.where(residual > _SHRUNK * before, _STEEPER, 1.0)
        penalty = penalty * steeper.astype(penalty.dtype)
        return flat, bound, activity, penalty, residual, updates + 1

    start = (factor.ravel(), 0 * below, 0 * zero, penalty, infinite, 0)
    flat, bound, activity, _, residual, _ = jax.lax.while_loop(
        unfinished, update, start
    )
    return flat.reshape(-1, rank), bound, activity, residual


def _newton(merit, start, accuracy):
    """Newton's method, the Hessian shifted until the step decreases the merit."""

    def unfinished(carry):
        _, shift, size, steps = carry
        return (size > accuracy) & (steps < _NEWTON_STEPS) & (shift <= _MOST)

    def step(carry):
        point, shift, _, steps = carry
        value, gradient = jax.value_and_grad(merit)(point)
        hessian = jax.hessian(merit)(point)
        eye = jnp.eye(len(point), dtype=point.dtype)

        def rejected(search):
            _, shift, done = search
            return ~done & (shift <= _MOST)

        def longer(search):
            _, shift, _ = search
            factor = jnp.linalg.cholesky(hessian + shift * eye)
            move = -cho_solve((factor, True), gradient)
            enough = merit(point + move) <= value + 1e-4 * (gradient @ move)
            return point + move, jnp.where(enough, shift, _MORE * shift), enough

        # NaN, from a Hessian that is not positive definite, is never enough.
        new, shift, done = jax.lax.while_loop(
            rejected, longer, (point, shift, jnp.asarray(False))
        )
        point = jnp.where(done, new, point)
        size = jnp.linalg.norm(jax.grad(merit)(point))
        shift = jnp.where(done, jnp.maximum(_LESS * shift, _LEAST), shift)
        return point, shift, size, steps + 1

    infinite = jnp.full((), jnp.inf, start.dtype)
    shift = jnp.full((), _SHIFT, start.dtype)
    return jax.lax.while_loop(unfinished, step, (start, shift, infinite, 0))[0]


# What comes back --------------------------------------------------------------------


def _inside(region: Ball | Box, factor: np.ndarray, basis) -> np.ndarray:
    """The first column's input, moved into the region."""
    inputs = len(factor) if basis is None else basis.shape[1]
    unit = factor[:inputs, 0] if basis is None else basis @ factor[:inputs, 0]
    size = np.size(region.centre)
    unit = unit[:size]
    if isinstance(region, Ball):
        unit = unit / max(1.0, float(np.linalg.norm(unit)))
        return np.ravel(np.asarray(region.centre, float)) + float(region.radius) * unit
    lower, upper = (
        np.ravel(np.asarray(s, float)) for s in (region.lower, region.upper)
    )
    centre = lower + (upper - lower) / 2
    return np.clip(centre + (upper - centre) * unit, lower, upper)


def _forward(layers, x: np.ndarray) -> np.ndarray:
    for weight, bias in layers[:-1]:
        x = np.maximum(x @ weight.T + bias, 0)
    return x @ layers[-1][0].T + layers[-1][1]


def _result(found: list[_Step], values, witness, dtype) -> SDPResult:
    def column(name):
        return jnp.asarray(np.array([getattr(one, name) for one in found]), dtype)

    lower = np.array([one.lower for one in found])
    # Down, for the unscaling and the rounding to the dtype.
    size = np.abs(lower) + np.array([one.scaled.unit for one in found])
    proved = jnp.asarray(lower - 4 * float(jnp.finfo(dtype).eps) * size, dtype)
    certificate = Certificate(
        "lower bound",
        jnp.min(proved),
        proof=True,
        statement="every row of the outputs is at least value over the region",
        details={"lower": proved, "slack_min_eig": column("least")},
    )
    return SDPResult(
        lower=proved,
        upper=jnp.asarray(values, dtype),
        relaxed=column("relaxed"),
        rank=jnp.asarray([one.factor.shape[1] for one in found]),
        slack_min_eig=column("least"),
        correction=column("correction"),
        residual=column("residual"),
        witness=jnp.asarray(witness, dtype),
        certificate=certificate,
    )
