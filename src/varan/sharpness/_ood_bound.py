"""A bound on the risk under a shifted distribution, cell by cell.

A model whose loss changes little within the cells of a partition cannot be surprised
by what a target distribution does inside them: only how much mass it gives to each cell
matters, and that is read off unlabelled target samples. `oscillation` says how much the
loss can rise within each cell, `ood_bound` puts the parts together.

The theorem. Let the loss of a model lie in [0, M], let the cells `C_1 .. C_K` be fixed
without the target sample, and let `b_i` be at least the supremum of the loss over
`C_i`. With probability at least `1 - delta` over n independent target samples with cell
masses q, for all models at once,

    R_T <= max { sum_i u_i b_i : u >= 0, sum u = 1, |u - q|_1 <= r },
    r = sqrt((2 K ln 2 + 2 ln(1 / delta)) / n).

Proof. Let u be the true target masses. The risk is `sum_i u_i E_T[loss | C_i]`, at most
`sum_i u_i b_i`. By the inequality of Bretagnolle, Huber and Carol `|u - q|_1 <= r` with
probability at least `1 - 2^K exp(-n r^2 / 2) = 1 - delta`, and this event depends on no
model. The maximum moves mass r / 2 from the smallest `b_i` to the largest. QED

With the source's masses p, its empirical risk in each cell `R_i` and
`eps_i = b_i - R_i`, the maximum is at most

    sum_i p_i R_i + sum_i q_i eps_i + M sum_i (q_i - p_i)_+ + M r / 2,

since `sum_i q_i R_i - sum_i p_i R_i <= M sum_i (q_i - p_i)_+` and mass r / 2 gains at
most M: the source risk, the robustness of the model, the shift, the sample. The source
sample need not be random: it only tells how high the loss is in each cell.

Source: Y. Zou, K. Kawaguchi, Y. Liu, J. Liu, M.-L. Lee and W. Hsu (2024), Towards
Robust Out-of-Distribution Generalization Bounds via Sharpness, ICLR 2024, arXiv
2403.06392; robustness is that of H. Xu and S. Mannor (2012), arXiv 1005.2243.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..core._certificate import Certificate
from ..core._checks import (
    check_finite,
    check_nonempty,
    check_nonnegative,
    check_positive,
    check_shape,
    is_traced,
)
from ._objective import MeasureResult
from ._spectrum import hessian_trace


class Oscillation(eqx.Module):
    """How far the loss can lie above the source's mean loss, in each cell.

    Args:
        value: `eps_i`, of shape (K,), not negative; M in a cell without source points.
        proof: Whether no point of the cell exceeds it, or whether it was sampled.
    """

    value: Float[Array, " K"]
    proof: bool = eqx.field(static=True)


class OODBound(eqx.Module):
    """A bound on the target risk, and what it is made of.

    Args:
        value: The bound; M where nothing can be said.
        source_risk: Mean source loss.
        robustness: `sum_i q_i eps_i`: what the oscillation adds.
        shift: `M sum_i (q_i - p_i)_+`: what the shift between cells adds.
        deviation: `M r / 2`: what the size of the target sample adds.
        proof: Whether the oscillation is proved.
    """

    value: Float[Array, ""]
    source_risk: Float[Array, ""]
    robustness: Float[Array, ""]
    shift: Float[Array, ""]
    deviation: Float[Array, ""]
    proof: bool = eqx.field(static=True)

    @property
    def decomposed(self) -> Float[Array, ""]:
        """The sum of the four parts: readable, and never below `value`."""
        return self.source_risk + self.robustness + self.shift + self.deviation

    @property
    def certificate(self) -> Certificate:
        """The bound as a certificate."""
        return Certificate(
            "target risk bound",
            self.value,
            proof=self.proof,
            statement="target risk <= value, with the chosen confidence over the "
            "target sample",
            details={
                "source_risk": self.source_risk,
                "robustness": self.robustness,
                "shift": self.shift,
                "deviation": self.deviation,
            },
        )


def oscillation(
    losses: Float[Array, " n"],
    cells: Int[Array, " n"],
    count: int,
    M: Float[Array, ""] | float,
    *,
    lipschitz: Float[Array, ""] | float | None = None,
    reach: Float[Array, " n"] | None = None,
    probes: tuple[Float[Array, " m"], Int[Array, " m"]] | None = None,
) -> Oscillation:
    """How much the loss can rise within each cell.

    With `lipschitz` and `reach` it is proved: every source point bounds the loss in its
    whole cell by its own loss plus the constant times the distance that the cell
    reaches from it, and the best point counts. With `probes` it is the largest loss
    seen among further points of the cell, an estimate. Cost: linear in the points.

    Args:
        losses: Source losses, in [0, M].
        cells: Their cells, in 0 .. count - 1.
        count: Number of cells K.
        M: Upper bound of the loss, positive.
        lipschitz: A proved Lipschitz constant of the loss in whatever varies within a
            cell, not negative.
        reach: For each source point a bound on the distance to anything in its cell
            (`Cells.reach`); infinite where there is none.
        probes: Losses and cells of further points.

    Returns:
        An `Oscillation`; at most what keeps the loss in [0, M].

    Raises:
        ValueError: If losses, cells or settings are out of range or of other shapes,
            or not exactly one way is chosen.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import oscillation
        >>> eps = oscillation(jnp.array([0.1, 0.3]), jnp.array([0, 0]), 2, 1.0,
        ...                   lipschitz=0.5, reach=jnp.array([0.4, 0.8]))
        >>> [round(float(e), 3) for e in eps.value], eps.proof
        ([0.1, 1.0], True)

    Source: arXiv 2403.06392 (robustness); the one-sided form is ours.
    """
    _check_losses("oscillation", "losses", losses, cells, count, M)
    mean, size = _cell_means(losses, cells, count)
    top = jnp.asarray(M, losses.dtype)
    if lipschitz is not None and reach is not None and probes is None:
        check_nonnegative("oscillation", "lipschitz", lipschitz)
        check_shape("oscillation", "reach", reach, losses.shape)
        constant = jnp.asarray(lipschitz, losses.dtype)
        # Zero times an infinite reach says nothing about what is outside.
        above = jnp.where(jnp.isinf(reach), jnp.inf, losses + constant * reach)
        highest = jax.ops.segment_min(above, cells, count)
    elif probes is not None and lipschitz is None and reach is None:
        seen, where = probes
        _check_losses("oscillation", "probes", seen, where, count, M)
        seen, where = jnp.append(losses, seen), jnp.append(cells, where)
        highest = jax.ops.segment_max(seen, where, count)
    else:
        raise ValueError(
            "oscillation: give either `lipschitz` with `reach`, which proves, or "
            "`probes`, which estimates."
        )
    value = jnp.where(size > 0, jnp.minimum(highest, top) - mean, top)
    return Oscillation(jnp.maximum(value, 0), proof=probes is None)


def ood_bound(
    losses_source: Float[Array, " n"],
    cells_source: Int[Array, " n"],
    cells_target: Int[Array, " m"],
    oscillation: Oscillation,
    M: Float[Array, ""] | float,
    delta: float,
) -> OODBound:
    """Bounds the target risk from source losses and unlabelled target samples.

    See the module's theorem and its proof. It holds for all models at once if the cells
    were fixed without the target sample (the model may depend on everything). Cells
    live on inputs and labels; on inputs alone when the label is a fixed function of the
    input whose variation within the cell is inside the oscillation. Where the target
    sample is labelled, its own mean loss with Hoeffding's inequality is the better
    bound for a single model. Cost: linear in the samples, and one sort of the cells.

    Args:
        losses_source: Source losses, in [0, M].
        cells_source: Their cells, in 0 .. K - 1.
        cells_target: Cells of independent target samples.
        oscillation: From `oscillation`, for the same cells; its length is K.
        M: Upper bound of the loss, positive.
        delta: Probability that the bound may fail, in (0, 1).

    Returns:
        An `OODBound`, a proof where the oscillation is one.

    Raises:
        ValueError: If losses lie outside [0, M], cells are out of range, samples are
            empty, or `delta` is not in (0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import Oscillation, ood_bound
        >>> losses, cells = jnp.array([0.1, 0.1, 0.5]), jnp.array([0, 0, 1])
        >>> target = jnp.array([0] * 500 + [1] * 500)
        >>> flat = Oscillation(jnp.array([0.05, 0.05]), proof=True)
        >>> bound = ood_bound(losses, cells, target, flat, 1.0, 0.05)
        >>> round(float(bound.value), 3), round(float(bound.shift), 3)
        (0.369, 0.167)

    Source: arXiv 2403.06392.

    Differences: The paper's theorem 3.1 is stated here with its own proof: cells fixed
        without the target sample, a one-sided oscillation, half the deviation (the
        masses' positive differences are half of their L1 distance), and the maximum
        over the masses instead of the sum of the four parts, which it never exceeds.
    """
    count = oscillation.value.shape[0]
    _check_losses("ood_bound", "losses_source", losses_source, cells_source, count, M)
    _check_cells("ood_bound", "cells_target", cells_target, count)
    check_nonnegative("ood_bound", "oscillation", oscillation.value)
    if not is_traced(delta) and not 0 < float(np.asarray(delta)) < 1:
        raise ValueError(f"ood_bound: `delta` must lie in (0, 1) (got {delta}).")
    dtype = losses_source.dtype
    n_source, n_target = losses_source.shape[0], cells_target.shape[0]
    mean, size = _cell_means(losses_source, cells_source, count)
    p = size / n_source
    ones = jnp.ones(n_target, dtype)
    q = jax.ops.segment_sum(ones, cells_target, count) / n_target

    top = jnp.asarray(M, dtype)
    highest = jnp.minimum(mean + oscillation.value.astype(dtype), top)
    highest = jnp.where(size > 0, highest, top)
    logarithm = count * math.log(2) + jnp.log(1 / jnp.asarray(delta, dtype))
    half_r = jnp.sqrt(2 * logarithm / n_target) / 2
    return OODBound(
        _worst_mean(highest, q, half_r),
        jnp.mean(losses_source),
        jnp.sum(q * oscillation.value.astype(dtype)),
        top * jnp.sum(jnp.maximum(q - p, 0)),
        top * half_r,
        proof=oscillation.proof,
    )


def relative_sharpness(
    loss_fn: Callable[[PyTree, Any], Float[Array, ""]],
    params: PyTree,
    batch: Any,
    layer: Callable[[PyTree], Float[Array, ...]],
    **settings: Any,
) -> MeasureResult:
    """Squared norm of a layer's weights times the trace of its Hessian block.

    `kappa = <w, w> Tr H_w`: a sharpness that does not change when a ReLU network's
    layers are rescaled against each other. For random features
    `f(x) = a . relu(T x)` with squared loss it is `|a|^2 * 2 mean |relu(T x)|^2`, and
    the loss has the slope `2 |f - y| |T| |a|` at most: small kappa, small oscillation.
    Cost: that of `hessian_trace`, exact for layers of up to 2000 weights.

    Args:
        loss_fn: `(params, batch) -> scalar`.
        params: The parameters.
        batch: The data.
        layer: From the parameters to the array of the layer's weights.
        **settings: Passed on to `hessian_trace`.

    Returns:
        A `MeasureResult`, of the kind that the trace is.

    Raises:
        ValueError: As `hessian_trace` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import relative_sharpness
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> found = relative_sharpness(loss, jnp.array([2.0, 0.0]), jnp.eye(2),
        ...                            lambda w: w, key=jax.random.key(0))
        >>> round(float(found.value), 3), found.kind
        (8.0, 'exact')

    Source: arXiv 2403.06392; relative flatness is that of H. Petzka, M. Kamp, L.
        Adilova, C. Sminchisescu and M. Boley (2021), arXiv 2001.00939.

    Differences: For a matrix of weights relative flatness sums `<w_s, w_t> Tr H_st`
        over all pairs of rows; both agree for one row, the paper's case.
    """
    weights = layer(params)
    of_layer = _OfLayer(loss_fn, params, layer)
    trace = hessian_trace(of_layer, weights, batch, **settings)
    square = jnp.sum(weights * weights).astype(trace.value.dtype)
    half = None if trace.half_width is None else square * trace.half_width
    return eqx.tree_at(
        lambda r: (r.value, r.half_width),
        trace,
        (square * trace.value, half),
        is_leaf=lambda x: x is None,
    )


class _OfLayer(eqx.Module):
    """A loss as a function of one layer's weights, the others as they are."""

    loss_fn: Callable
    params: PyTree
    layer: Callable = eqx.field(static=True)

    def __call__(self, weights, batch):
        return self.loss_fn(eqx.tree_at(self.layer, self.params, weights), batch)


def _worst_mean(values, masses, budget):
    """The largest mean of the values after moving a budget of mass between them."""
    order = jnp.argsort(values)
    values, masses = values[order], masses[order]
    before = jnp.cumsum(masses) - masses
    left = masses - jnp.clip(budget - before, 0, masses)
    # From the top down: masses that round to a sum below 1 must not lower a bound that
    # says nothing, and all that is subtracted is not negative.
    return values[-1] - jnp.sum(left * (values[-1] - values))


def _cell_means(losses, cells, count):
    """Mean loss of each cell (0 where it is empty), and how many are in it."""
    size = jax.ops.segment_sum(jnp.ones_like(losses), cells, count)
    total = jax.ops.segment_sum(losses, cells, count)
    return total / jnp.maximum(size, 1), size


def _check_losses(owner, name, losses, cells, count, M):
    check_positive(owner, "M", M)
    check_nonempty(owner, name, losses)
    check_shape(owner, name, losses, np.shape(cells))
    check_finite(owner, name, losses)
    if not is_traced(losses) and not is_traced(M):
        # By NumPy: under jit even what is known would become a tracer by JAX's.
        known = np.asarray(losses)
        low, high = float(np.min(known)), float(np.max(known))
        if low < 0 or high > float(np.asarray(M)):
            raise ValueError(
                f"{owner}: `{name}` must lie in [0, {M}] (got {low:.3g} to "
                f"{high:.3g}). Clip the loss, which the bound is then about, or raise "
                "`M`."
            )
    _check_cells(owner, f"cells of `{name}`", cells, count)


def _check_cells(owner, name, cells, count):
    check_nonempty(owner, name, cells)
    if is_traced(cells):
        return
    known = np.asarray(cells)
    low, high = int(np.min(known)), int(np.max(known))
    if low < 0 or high >= count:
        raise ValueError(
            f"{owner}: `{name}` must lie in 0 .. {count - 1} (got {low} to {high})."
        )
