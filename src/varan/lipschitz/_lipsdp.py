"""Global Lipschitz bounds of networks by a semidefinite program over all layers.

What is known of an activation is written as quadratic constraints between differences
of its arguments and of its values; multipliers weigh them, and a matrix inequality says
that together they imply the bound. All layers are bounded at once, so what one layer
stretches and the next one shrinks is not counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core import Certificate
from ..core._checks import (
    check_choice,
    check_positive,
)
from ._linear_fractional import LinearFractional
from ._lipsdp_program import (
    FORMS,
    check_groups,
    inequality,
    inside_point,
    kept_by,
    ties_of,
    with_kept,
)
from ._lmi import minimise, null_space, repaired, solve_with_cvxpy
from ._result import Certified

Activation = Literal["groupsort", "maxmin", "householder", "nonexpansive", "relu"]


class LipSDPResult(Certified):
    """A global Lipschitz bound and the multipliers that prove it.

    Args:
        bound: Upper bound of the constant.
        per_row: For `"linf"` the bound of each output; for `"l2"` the bound alone.
        multipliers: Of the constraints on the activations, one row for each of
            `per_row`.
        gap: How far, relatively, the bound's square lies above the program's minimum,
            as the solver tells it: an estimate. NaN where it tells nothing.
        steps: The solver's iterations, over all rows.
        certificate: The statement that `bound` proves; `details` has the checked
            eigenvalue and the rounding that it exceeds.
    """

    bound: Float[Array, ""]
    per_row: Float[Array, " rows"]
    multipliers: Float[Array, "rows constraints"]
    gap: Float[Array, " rows"]
    steps: Int[Array, ""]
    certificate: Certificate


def lipsdp(
    model: LinearFractional | Sequence[Float[Array, "rows columns"]],
    *,
    activation: Activation = "groupsort",
    group: int = 2,
    directions: Sequence[Float[Array, "groups group"]] | None = None,
    norm: Literal["l2", "linf"] = "l2",
    structure: Literal["neuron", "layer"] = "neuron",
    solver: Literal["barrier", "clarabel", "scs"] = "barrier",
    tol: float = 1e-6,
    max_steps: int = 200,
) -> LipSDPResult:
    """Bounds the global Lipschitz constant of a network by semidefinite programming.

    GroupSort (sorts each group; `"maxmin"` is GroupSort in pairs) and Householder
    reflections never stretch a group, and keep its sum, or its part orthogonal to the
    direction: both are used, which bounds by norms or by slopes cannot. With n inputs,
    m hidden units and k groups, the default solver's Newton step costs
    `O((n + m)^3)`; some fifty are made.

    For `"l2"` it minimises rho subject to a matrix inequality that implies
    `|f(x) - f(y)|^2 <= rho |x - y|^2`; for `"linf"`, output by output, `1 . mu` such
    that `(f(x) - f(y))^2 <= sum_i mu_i (x - y)_i^2`. The solver's answer is moved
    inward until the inequality's least eigenvalue, computed in float64, exceeds its
    rounding: that point, not the solver's word, is the proof.

    Args:
        model: Weight matrices `W_1` to `W_n` of a network of layers, or any network as
            a `LinearFractional` (residual, implicit, read from a model). Biases do not
            matter.
        activation: `"groupsort"`, `"maxmin"`, `"householder"`; `"nonexpansive"` for
            anything 1-Lipschitz on groups, of which no more is known; `"relu"` for
            anything elementwise with slopes between 0 and 1.
        group: Size of a group; it divides every width. 2 for `"maxmin"`, and without
            meaning for `"relu"`.
        directions: For `"householder"`, the unit vector of every group, one array a
            layer.
        norm: Of both inputs and outputs.
        structure: A multiplier for every neuron or group, or one for every layer
            (faster and looser).
        solver: `"barrier"` (own, compiled), or `"clarabel"` or `"scs"` by CVXPY on the
            inequality with all of the paper's multipliers.
        tol: Relative gap at which the barrier stops, and the tolerance of the others.
        max_steps: Newton steps at most; cut off, the bound is looser and still one.

    Returns:
        The bound with its multipliers and its certificate. Where no point passes the
        check, the bound is NaN and the certificate no proof.

    Raises:
        ValueError: A width that `group` does not divide, missing or misshapen
            directions, entries that are not finite, or a loop (implicit model) for
            which no multipliers are found: its feedback's norm must be below 1.
        ImportError: `"clarabel"` or `"scs"` without the extra `varan[sdp]`.

    Example:
        Sorting a pair keeps its sum, so a network that adds the pair up is linear, with
        the constant sqrt(5); the product of the norms is sqrt(8).

        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import lipsdp
        >>> first, last = jnp.diag(jnp.array([1.0, 2.0])), jnp.array([[1.0, 1.0]])
        >>> [round(float(lipsdp([first, last], activation=a).bound), 3)
        ...  for a in ("maxmin", "nonexpansive")]
        [2.236, 2.828]

    Source: Pauli, Havens, Araujo, Garg, Khorrami, Allgöwer and Hu, 2024, "Novel
        Quadratic Constraints for Extending LipSDP beyond Slope-Restricted Activations",
        arXiv:2401.14033; for `"relu"` (LipSDP-Neuron), Fazlyab, Robey, Hassani, Morari
        and Pappas, 2019, arXiv:1906.04893.

    Differences: The paper's free multipliers of the kept sums (gamma, nu, tau) may grow
        without bound; by Finsler's lemma their best value is that of the inequality on
        the differences that keep the sums, where they vanish. The barrier solves that
        smaller program; the CVXPY solvers the paper's. For `"linf"` the paper's scalar
        `(rho + 1 . mu) / 2` is minimised over rho in closed form.
    """
    owner = "lipsdp"
    check_choice(owner, "activation", activation, get_args(Activation))
    check_choice(owner, "norm", norm, ("l2", "linf"))
    check_choice(owner, "structure", structure, ("neuron", "layer"))
    check_choice(owner, "solver", solver, ("barrier", "clarabel", "scs"))
    check_positive(owner, "tol", tol)
    if not isinstance(model, LinearFractional):
        model = LinearFractional.feedforward(model)
    group = {"maxmin": 2, "relu": 1}.get(activation, group)
    check_groups(owner, model, group)
    kept = kept_by(owner, model.widths, activation, group, directions)
    form = FORMS["slope" if activation == "relu" else "norm"]
    ties = ties_of(model.widths, group, structure)
    if norm == "l2":
        rows = [slice(None)]
    else:
        rows = [slice(k, k + 1) for k in range(len(model.skip))]
    loop = np.concatenate([model.input, model.feedback - np.eye(sum(model.widths))], 1)
    found = []
    for row in rows:
        full = inequality(model, form, ties, row, norm)
        inside = inside_point(owner, full, model)
        # Units in which the slack at the start has a diagonal of ones: layers of very
        # different size are then checked equally well.
        units = 1 / np.sqrt(np.diag(full.slack(inside)))
        full = full._replace(rows=full.rows * units, target=full.target * units)
        basis, condition = null_space(kept.rows @ (loop * units))
        reduced = full._replace(rows=full.rows @ basis, target=full.target @ basis)
        if solver == "barrier":
            answer = minimise(reduced, inside, tol, max_steps)
        else:
            answer = solve_with_cvxpy(owner, with_kept(full, kept), solver, tol)
        y, *progress = (np.asarray(part, float) for part in answer)
        y = y[: len(inside)]
        y, *check = repaired(reduced, y, inside, slack=condition)
        square = full.cost @ y * (1 + 2 * len(y) * np.finfo(float).eps)
        found.append((square, y[full.cost == 0], *check, *progress))
    return _result(found, norm)


def _result(found, norm) -> LipSDPResult:
    stacked = (np.stack(part) for part in zip(*found, strict=True))
    squares, multipliers, least, margins, gaps, steps = stacked
    dtype = jnp.result_type(float)
    # Outward: the root, and its rounding to the result's dtype.
    per_row = jnp.asarray(np.sqrt(squares) * (1 + 2 * jnp.finfo(dtype).eps), dtype)
    bound = jnp.max(per_row)
    measure = {"l2": "2", "linf": "inf"}[norm]
    proved = bool(jnp.isfinite(bound))
    says = f"|f(x) - f(y)|_{measure} <= value |x - y|_{measure} for all x, y"
    certificate = Certificate(
        "Lipschitz bound",
        bound,
        proof=proved,
        statement=says if proved else "no point passed the check in float64",
        details={
            "least_eigenvalue": jnp.asarray(np.min(least), dtype),
            "required": jnp.asarray(np.max(margins), dtype),
        },
    )
    return LipSDPResult(
        bound,
        per_row,
        jnp.asarray(multipliers, dtype),
        jnp.asarray(gaps, dtype),
        jnp.asarray(int(steps.sum())),
        certificate,
    )
