"""The matrix inequality of LipSDP: what activations keep and do not stretch."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from ..core._checks import check_finite, check_positive, check_shape
from ._lmi import Inequality

# p^T form p, of a difference of arguments and one of values, is never positive: the
# values' norm is no larger; the slope lies between 0 and 1.
FORMS = {
    "norm": np.array([[-1.0, 0.0], [0.0, 1.0]]),
    "slope": np.array([[0.0, -1.0], [-1.0, 2.0]]),
}
# How much longer than needed the multipliers of the strictly feasible start are.
_ROOM = 2.0


class Kept(NamedTuple):
    """Combinations of hidden units that the activation keeps, and who shares them."""

    rows: np.ndarray  # (combinations, hidden)
    ties: np.ndarray  # (combinations, groups)


def kept_by(owner, widths, activation, group, directions) -> Kept:
    groups = sum(widths) // group
    if activation in ("relu", "nonexpansive"):
        return Kept(np.zeros((0, sum(widths))), np.zeros((0, groups)))
    if activation == "householder":
        complements = _complements(owner, widths, group, directions)
    else:
        complements = np.full((groups, 1, group), group**-0.5)
    count = complements.shape[1]
    rows = np.zeros((groups, count, groups, group))
    rows[np.arange(groups), :, np.arange(groups)] = complements
    ties = np.repeat(np.eye(groups), count, 0)
    return Kept(rows.reshape(groups * count, -1), ties)


def _complements(owner, widths, group, directions) -> np.ndarray:
    """Orthonormal bases of what is orthogonal to each group's direction."""
    if directions is None or len(directions) != len(widths):
        got = "none" if directions is None else f"{len(directions)}"
        raise ValueError(
            f"{owner}: `directions` must hold an array of unit vectors for each of "
            f"the {len(widths)} layers (got {got})."
        )
    for vectors, width in zip(directions, widths, strict=True):
        check_shape(owner, "directions", vectors, (width // group, group))
        check_finite(owner, "directions", vectors)
    whole = np.concatenate([np.asarray(v, float) for v in directions])
    norms = np.linalg.norm(whole, axis=1)
    check_positive(owner, "directions", norms)
    if np.max(np.abs(norms - 1)) > 1e-5:
        warnings.warn(
            f"{owner}: `directions` are not of length one and were normalised (lengths "
            f"{norms.min():.3g} to {norms.max():.3g}). The bound holds for a network "
            "that normalises them too.",
            stacklevel=3,
        )
    # The last rows of a complete set of right singular vectors.
    return np.linalg.svd(whole[:, None])[2][:, 1:]


def check_groups(owner, model, group):
    check_positive(owner, "group", group)
    wrong = [width for width in model.widths if width % group]
    if wrong:
        raise ValueError(
            f"{owner}: `group` must divide every width (got {group} and a layer of "
            f"{wrong[0]}). Take the group size that the activation has."
        )


def ties_of(widths, group, structure) -> np.ndarray:
    """Which multiplier weighs which hidden unit."""
    whole = structure == "layer"
    sizes = widths if whole else [group] * (sum(widths) // group)
    return np.repeat(np.eye(len(sizes)), sizes, 0)


def inequality(model, form, ties, row, norm) -> Inequality:
    """Over differences of the input and of the hidden units' values."""
    hidden, inputs = model.input.shape
    eye = np.eye(inputs + hidden)
    arguments = np.concatenate([model.input, model.feedback], 1)
    # The input's own squares, as forms in two rows of which the second counts nothing.
    squares = np.stack([eye[:inputs], 0 * eye[:inputs]], 1)
    rows = np.concatenate([squares, np.stack([arguments, eye[inputs:]], 1)])
    first = np.ones((inputs, 1)) if norm == "l2" else np.eye(inputs)
    whole = np.zeros((len(rows), first.shape[1] + ties.shape[1]))
    whole[:inputs, : first.shape[1]] = first
    whole[inputs:, first.shape[1] :] = ties
    forms = np.concatenate(
        [
            np.broadcast_to(np.diag([1.0, 0.0]), (inputs, 2, 2)),
            np.broadcast_to(form, (hidden, 2, 2)),
        ]
    )
    target = np.concatenate([model.skip[row], model.output[row]], 1)
    cost = np.zeros(whole.shape[1])
    cost[: first.shape[1]] = 1
    return Inequality(rows, forms, whole, target, cost)


def with_kept(full: Inequality, kept: Kept) -> Inequality:
    """With the paper's free multipliers gamma, nu and tau of what is kept."""
    inputs = len(full.rows) - kept.rows.shape[1]
    pairs = np.tensordot(kept.rows, full.rows[inputs:], 1)
    free = [[[-1, 0], [0, 1]], [[0, -1], [-1, 2]], [[2, -1], [-1, 0]]]
    count, groups = kept.ties.shape
    ties = np.zeros((len(full.rows) + 3 * count, len(full.cost) + 3 * groups))
    ties[: len(full.rows), : len(full.cost)] = full.ties
    ties[len(full.rows) :, len(full.cost) :] = np.kron(np.eye(3), kept.ties)
    forms = np.repeat(np.array(free, float), count, 0)
    return Inequality(
        np.concatenate([full.rows, pairs, pairs, pairs]),
        np.concatenate([full.forms, forms]),
        ties,
        full.target,
        np.concatenate([full.cost, np.full(3 * groups, np.nan)]),
    )


def inside_point(owner, full: Inequality, model) -> np.ndarray:
    """A strictly feasible point: multipliers that fall from layer to layer.

    Scaled so, the later layers' arguments weigh nothing against the earlier layers'
    values, and the hidden part is positive definite; then both the multipliers' length
    and the bound are taken large enough.
    """
    inputs = model.input.shape[1]
    layer = np.repeat(np.arange(len(model.widths)), model.widths)
    own = full.cost == 0
    best, start = 0.0, np.zeros_like(full.cost)
    for power in range(60):
        falling = 0.5 ** (power * layer)
        y = np.where(own, np.max(full.ties[inputs:] * falling[:, None], 0), 0.0)
        hidden = full.weighed(y)[inputs:, inputs:]
        scale = 1 / np.sqrt(falling)
        least = np.linalg.eigvalsh(scale[:, None] * hidden * scale[None])[0]
        if least > best:
            best, start = least, y
        if least > 0.3:
            break
    if best <= 1e-9:
        raise ValueError(
            f"{owner}: no multipliers make the loop a contraction. The norm of "
            "`feedback` within each layer must be below 1."
        )
    hidden = full.weighed(start)[inputs:, inputs:]
    reach = np.linalg.solve(hidden, full.target[:, inputs:].T)
    need = np.linalg.norm(full.target[:, inputs:] @ reach, 2)
    start = start * (_ROOM * need if need > 0 else 1.0)
    slack = full.slack(start)
    coupled = np.linalg.solve(slack[inputs:, inputs:], slack[inputs:, :inputs])
    rest = slack[:inputs, :inputs] - slack[:inputs, inputs:] @ coupled
    bound = -np.linalg.eigvalsh((rest + rest.T) / 2)[0]
    return np.where(own, start, _ROOM * max(bound, np.finfo(float).tiny ** 0.25))
