"""Safety of a ball by a grid, from a Lipschitz constant of the lead.

Between two points of a grid a class's lead cannot fall faster than its Lipschitz
constant says. So finitely many evaluations decide a whole ball, of a network that need
not be opened: a grid fine enough, without an adversarial point on it, is a proof. Use
it in a few dimensions; a grid of many is larger than any budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core import Certificate
from ..core._checks import check_finite, check_nonnegative, check_positive
from ._graph import as_callable
from ._lipschitz import local_lipschitz
from ._sets import Box

_CHUNKS = (64, 4096)  # points a call: two compilations serve every grid
# Rounding of a network's evaluation cannot be bounded from outside; this many units of
# its largest output are allowed for, far more than a small network needs.
_UNITS = 64


class GridSafety(eqx.Module):
    """What a grid decided about a ball.

    Args:
        kind: `"proof"`: the class leads everywhere in the ball, given the constants;
            `"counterexample"`: it does not at `point`; `"unknown"`: the budget is
            spent.
        point: A point of the ball where another class leads or draws level, or `None`.
        margin: The smallest lead that was evaluated, an upper bound of the smallest.
        evaluations: Points of the grid.
        certificate: A lower bound of the lead over the whole ball, whatever `kind` is.
    """

    kind: Literal["proof", "counterexample", "unknown"] = eqx.field(static=True)
    point: Float[Array, ...] | None
    margin: float
    evaluations: int
    certificate: Certificate


def grid_safety(
    model: Callable[[Array], Array],
    x: Float[Array, ...],
    radius: float,
    lipschitz: float | Float[Array, " others"] | None = None,
    *,
    label: int | None = None,
    clip: tuple[float, float] | None = None,
    max_points: int = 100_000,
) -> GridSafety:
    """Decides whether a class leads everywhere in an l_inf ball.

    A point whose leads over all other classes exceed `h w` speaks for all points within
    `w` of it. The grid begins as the centre alone and is halved, in every dimension,
    only where that has not yet been shown: in `d` dimensions a cell costs `2^d`
    evaluations. Runs on the host over batches of compiled evaluations.

    Args:
        model: As for `local_lipschitz`; returns logits, one for each class.
        x: The centre.
        radius: Of the ball in the l_inf norm, positive, in the units of `x`.
        lipschitz: Of the *leads* `f_label - f_j` in the l_inf norm, over the ball: one
            for all, or one for each j in the classes' order. The constants of single
            logits are not enough: leads can change at up to twice their rate. By
            default `local_lipschitz` proves them.
        label: The class; the leading one at `x` by default.
        clip: Smallest and largest value an entry can take: the ball is cut to it.
        max_points: Evaluations at most.

    Returns:
        The decision; its certificate is a proof when the constants were proved here,
        and an estimate when they were given. Rounding of the evaluations is allowed for
        by 64 units of the largest logit.

    Raises:
        ValueError: A radius that is not positive, negative or non-finite constants or
            as many as do not fit, an `x` that is not finite, a label that does not
            exist, a network that returns NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import grid_safety
        >>> net = lambda x: jnp.stack([x[0] + 1, x[1]])
        >>> [grid_safety(net, jnp.zeros(2), r).kind for r in (0.4, 0.6)]
        ['proof', 'counterexample']

    Source:
        Wicker, Huang, Kwiatkowska (2018), arXiv:1710.07859, on safety guarantees for
        Lipschitz networks.

    Differences:
        The grid is refined where it is needed instead of having the step 1 / h
        throughout, and a proof needs no unit of the lead: the leads themselves say how
        far a point's evaluation reaches.
    """
    owner = "grid_safety"
    check_finite(owner, "x", x)
    check_positive(owner, "radius", radius)
    box = Box.linf(x, radius, clip=clip)
    function = as_callable(model)
    classes, label = _check_label(owner, function, box, x, label)
    if lipschitz is None:
        eye = np.eye(classes)
        rows = jnp.asarray(eye[label] - np.delete(eye, label, 0), box.lower.dtype)
        found = local_lipschitz(function, box, rows=rows, forward="crown", samples=0)
        constants = np.asarray(found.per_row, float)
    else:
        constants = _check_constants(owner, lipschitz, classes)
    kind, point, margin, floor, used = _refine(
        owner, function, box, label, constants, max_points
    )
    dtype = box.lower.dtype
    floor -= float(jnp.finfo(dtype).eps) * abs(floor)  # rounded downward
    where = f"at every y with |y - x|_inf <= {radius:g}"
    where += "" if clip is None else f" and entries in {list(clip)}"
    where += "" if lipschitz is None else ", given the Lipschitz constants"
    certificate = Certificate(
        "smallest lead",
        jnp.asarray(floor, dtype),
        proof=lipschitz is None,
        statement=f"class {label} leads by value or more {where}",
        details={"lipschitz": jnp.asarray(constants, dtype)},
    )
    return GridSafety(kind, point, margin, used, certificate)


def _refine(owner, function, box: Box, label: int, constants, max_points: int):
    """Halves cells until all are shown to be safe, or one is not, or none is left."""
    shape, dtype = box.lower.shape, box.lower.dtype
    centre = np.ravel(np.asarray(box.centre, float))
    half = np.ravel(np.asarray(box.radius, float))
    eps = float(jnp.finfo(dtype).eps)
    # Centres are rounded to the network's dtype: cells are larger by as much.
    rounding = 4 * eps * float(np.max(np.abs(centre) + half))
    cells, used, margin, proved = centre[None], 0, math.inf, math.inf
    while True:
        leads, size = _leads(function, cells, shape, dtype, label)
        if np.isnan(leads).any():
            raise ValueError(
                f"{owner}: `model` must return numbers (got NaN in the ball)."
            )
        used += len(cells)
        worst = np.min(leads, 1)
        margin = min(margin, float(np.min(worst)))
        reach = float(np.max(half)) + rounding
        floors = np.min(leads - constants * reach, 1) - _UNITS * eps * size
        floor = min(proved, float(np.min(floors)))
        if margin <= 0:
            point = jnp.asarray(cells[np.argmin(worst)].reshape(shape), dtype)
            return "counterexample", point, margin, floor, used
        open_ = cells[floors <= 0]
        if not len(open_):
            return "proof", None, margin, floor, used
        children = len(open_) * 2 ** len(half)
        if used + children > max_points or np.max(half) <= rounding:
            return "unknown", None, margin, floor, used
        proved = min(proved, float(np.min(floors[floors > 0], initial=math.inf)))
        half = half / 2
        corners = np.stack(np.meshgrid(*([[-1.0, 1.0]] * len(half)), indexing="ij"), -1)
        moves = corners.reshape(-1, len(half)) * half
        cells = (open_[:, None] + moves[None]).reshape(-1, len(half))


def _leads(function, cells: np.ndarray, shape, dtype, label: int):
    """The leads at all centres in double precision, and the largest output."""
    chunk = _CHUNKS[len(cells) > _CHUNKS[0]]
    leads, size = [], 0.0
    for start in range(0, len(cells), chunk):
        own = cells[start : start + chunk]
        padded = np.concatenate([own, np.repeat(own[:1], chunk - len(own), 0)])
        points = jnp.asarray(padded.reshape(-1, *shape), dtype)
        logits = np.asarray(_evaluate(function, points), float)[: len(own)]
        size = max(size, float(np.max(np.abs(logits))))
        leads.append(logits[:, [label]] - np.delete(logits, label, 1))
    return np.concatenate(leads), size


@eqx.filter_jit
def _evaluate(function, points):
    return jax.vmap(lambda x: jnp.ravel(function(x)))(points)


def _check_label(owner, function, box: Box, x, label: int | None) -> tuple[int, int]:
    classes = math.prod(jax.eval_shape(function, box.lower).shape)
    if label is None:
        label = int(np.argmax(np.asarray(function(jnp.asarray(x, box.lower.dtype)))))
    if classes < 2 or not 0 <= label < classes:
        raise ValueError(
            f"{owner}: `label` must be one of at least two classes "
            f"(got {label} of {classes})."
        )
    return classes, label


def _check_constants(owner, lipschitz, classes: int) -> np.ndarray:
    check_nonnegative(owner, "lipschitz", lipschitz)
    constants = np.asarray(lipschitz, float)
    if constants.shape not in ((), (classes - 1,)):
        raise ValueError(
            f"{owner}: `lipschitz` must be one number, or one for each of the "
            f"{classes - 1} other classes (got shape {constants.shape})."
        )
    return np.broadcast_to(constants, (classes - 1,))
