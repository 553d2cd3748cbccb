"""How near-collapsed features answer a change of the features they are held near.

At a strict minimiser (W, H) of the anchored model a change of the anchor by dA moves
the features by

    dH = F dA,   F = (beta / N) S^{-1},   S = f_HH - f_HW f_WW^{-1} f_WH.

S acts on N d unknowns but its inverse does not need them: f_HH is one d x d matrix
for every sample, so eliminating the features first leaves K d unknowns. For large beta

    F = I - (lam_h / beta) I - (1 / beta) W'W (each sample) + Z / beta + O(beta^-2)

with Z the part that goes through the last layer. Held near an exactly collapsed anchor,
the spectrum of this form is known in closed form (`collapse_spectrum`): deviations
inside a class shrink by a factor that the features' weight decay sets and the last
layer's hardly does.

Source: Tirer, Huang, Niles-Weed, 2023 (arXiv 2210.16658), theorems 4.1 and 4.2.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from ..core._checks import check_positive, is_traced
from ._unconstrained_features import (
    HeadAndFeatures,
    UnconstrainedFeatures,
    _eye_like,
    _solve_definite,
)


class CollapseSpectrum(eqx.Module):
    """Singular values of the blocks of the response near collapse.

    The response is split into K x K blocks of size d n, one for each pair of classes.

    Args:
        diagonal: Singular values of a diagonal block, all of them distinct in general.
        multiplicities: How often each occurs; they sum to d n.
        off_diagonal: The one nonzero singular value of an off-diagonal block.
    """

    diagonal: Float[Array, " 5"]
    multiplicities: tuple[int, ...] = eqx.field(static=True)
    off_diagonal: Float[Array, ""]


def response_operator(
    problem: UnconstrainedFeatures,
    x: HeadAndFeatures,
    *,
    large_beta: bool = False,
    linear_solver: lx.AbstractLinearSolver | None = None,
) -> lx.AbstractLinearOperator:
    """The derivative of the minimising features with respect to the anchor.

    A symmetric operator on (N, d) arrays that never forms the N d x N d matrix:
    applying it costs O(N d (d + K)) and one solve with K d unknowns, factorised once
    (large_beta: d unknowns).

    Args:
        problem: The anchored model.
        x: Its strict minimiser, for instance `solution.x`.
        large_beta: The first-order expansion in 1/beta instead of the exact operator.
        linear_solver: lineax solver for the K d unknowns; `lx.Cholesky()` by default.
            Use `lx.CG(rtol, atol)` where K d is beyond a few thousand.

    Returns:
        A `lineax` operator; `.mv(change)` or `.as_matrix()` (rows and columns sample by
        sample). NaN at a point that is no strict minimiser.

    Raises:
        ValueError: If the problem has no anchor.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.landscape import (
        ...     UnconstrainedFeatures, proximal_features, response_operator)
        >>> labels = jnp.array([0, 0, 1, 1])
        >>> anchor = jax.random.normal(jax.random.key(0), (4, 3))
        >>> solution = proximal_features(anchor, labels, 0.1, 0.1, 1e3, tol=1e-5)
        >>> response = response_operator(solution.problem, solution.x)
        >>> bool(jnp.allclose(response.mv(anchor), anchor, rtol=0.02))
        True

    Source:
        Tirer, Huang, Niles-Weed, 2023 (arXiv 2210.16658), theorem 4.1.

    Differences:
        The theorem's inverse on N d unknowns is applied through the equivalent one on
        K d unknowns.
    """
    if problem.anchor is None:
        raise ValueError(
            "response_operator: `problem` must have an anchor (got the plain model, "
            "whose minimisers do not answer to one). Give `anchor` and `beta`."
        )
    if large_beta:
        apply = _large_beta_response(problem, x)
    else:
        apply = _exact_response(problem, x, linear_solver or lx.Cholesky())
    shape = jax.eval_shape(lambda: x.features)
    return lx.FunctionLinearOperator(apply, shape, lx.symmetric_tag)


def collapse_spectrum(
    num_classes: int,
    dim: int,
    per_class: int,
    lam_w: float | Float[Array, ""],
    lam_h: float | Float[Array, ""],
    beta: float | Float[Array, ""],
) -> CollapseSpectrum:
    """The spectrum of the large-beta response at a collapsed anchor, in closed form.

    The anchor is a global minimiser of the plain model with the same penalties.

    Args:
        num_classes: K, at least 2.
        dim: Feature dimension d, more than K.
        per_class: Samples in each class, n.
        lam_w: Weight decay of the last layer, positive.
        lam_h: Weight decay of the features, positive, with `lam_w * lam_h < 1`.
        beta: Weight of the anchor, positive.

    Returns:
        The singular values with their multiplicities.

    Raises:
        ValueError: On arguments outside these ranges.

    Example:
        >>> from varan.landscape import collapse_spectrum
        >>> spectrum = collapse_spectrum(4, 10, 10, 1.0, 0.25, 100.0)
        >>> spectrum.multiplicities, round(float(spectrum.diagonal[-1]), 3)
        ((6, 3, 1, 54, 36), 0.995)

    Source:
        Tirer, Huang, Niles-Weed, 2023 (arXiv 2210.16658), theorem 4.2 and its proof.
    """
    owner = "collapse_spectrum"
    for name, value in (("lam_w", lam_w), ("lam_h", lam_h), ("beta", beta)):
        check_positive(owner, name, value)
    if num_classes < 2 or per_class < 1:
        raise ValueError(
            f"{owner}: `num_classes` must be at least 2 and `per_class` at least 1 "
            f"(got {num_classes} and {per_class})."
        )
    if dim <= num_classes:
        raise ValueError(
            f"{owner}: `dim` must exceed `num_classes` {num_classes} (got {dim})."
        )
    product = jnp.asarray(lam_w * lam_h)
    if not is_traced(product) and not float(product) < 1:
        raise ValueError(
            f"{owner}: `lam_w * lam_h` must be below 1 (got {float(product)}): at 1 "
            "the minimiser is zero and nothing is left to respond."
        )
    step = 2 * lam_h * (1 - jnp.sqrt(product)) / beta
    one = jnp.ones_like(step)
    within = jnp.sqrt(jnp.asarray(lam_h / lam_w)) / beta
    shrink = jnp.stack([0 * one, step, 2 * step, lam_h / beta * one, within])
    extra = per_class - 1
    counts = (
        dim - num_classes,
        num_classes - 1,
        1,
        (dim - num_classes) * extra,
        num_classes * extra,
    )
    return CollapseSpectrum(1 - shrink, counts, step)


def _exact_response(problem, x, linear_solver):
    head, features = x
    to_features, to_head = _couplings(problem, x)
    block = head.T @ head + (problem.lam_h + problem.beta) * _eye_like(features)
    gram = features.T @ features + problem.ridge * _eye_like(features)

    def soften(change):  # (N f_HH)^{-1}
        return _solve_definite(block, change.T).T

    def reduced(change):  # N (f_WW - f_WH f_HH^{-1} f_HW)
        return change @ gram - to_head(soften(to_features(change)))

    operator = lx.FunctionLinearOperator(
        reduced, jax.eval_shape(lambda: head), lx.positive_semidefinite_tag
    )
    state = linear_solver.init(operator, {})

    def apply(change):
        direct = soften(problem.beta * change)
        moved = lx.linear_solve(
            operator, to_head(direct), linear_solver, state=state, throw=False
        )
        failed = moved.result != lx.RESULTS.successful
        return jnp.where(failed, jnp.nan, direct + soften(to_features(moved.value)))

    return apply


def _large_beta_response(problem, x):
    head, features = x
    to_features, to_head = _couplings(problem, x)
    gram = features.T @ features + problem.ridge * _eye_like(features)

    def apply(change):
        returned = to_features(_solve_definite(gram, to_head(change).T).T)
        lost = problem.lam_h * change + (change @ head.T) @ head - returned
        return change - lost / problem.beta

    return apply


def _couplings(problem, x):
    """N f_HW and its transpose N f_WH, as functions."""
    head, features = x
    misfit = features @ head.T - problem.targets

    def to_features(change):
        return misfit @ change + (features @ change.T) @ head

    def to_head(change):
        return misfit.T @ change + (head @ change.T) @ features

    return to_features, to_head
