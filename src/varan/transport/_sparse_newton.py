"""Sinkhorn, then Newton steps with a sparsified Hessian (Sinkhorn-Newton-Sparse).

The dual's Hessian is `[[diag r, P], [P', diag c]] / epsilon`. After a few Sinkhorn
sweeps the plan `P` is nearly sparse, so only its largest entries are kept; the two
diagonal blocks stay exact, which keeps the matrix diagonally dominant and so positive
definite whatever is dropped. Conjugate gradients solve with it, Armijo backtracking on
the dual globalises. A Newton step contracts the error by about the share of mass that
was dropped.

Use it for large problems at small epsilon, where a dense factorisation is too dear;
`SemiDualNewton` is faster up to some thousand points.

Cost: a sweep or a trial of the line search is two reads of the matrix; a gradient step
is two gathers of the kept entries; the choice of the entries is a partial sort.

Source: Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying, 2024 (arXiv
2401.12253).
"""

from __future__ import annotations

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core import Solver, State, Status
from ._kernel import Corrections, Scaling, open_scaling, refresh, sweep
from ._problem import check_entropic

# keep="mass": the first try, the largest, in entries a row, and the share of mass that
# may be dropped. A Newton step contracts the error by about that share.
_MASS_START = 2
_MASS_LIMIT = 16
_MASS_DROPPED = 1e-3
_GRADIENT_TOL = 1e-8
_GRADIENT_STEPS = 400
_ARMIJO = 1e-4
_HALVINGS = 30


class SparseNewtonState(eqx.Module):
    """What a run of `SparseNewton` has done so far; `state.memory` of its states.

    Args:
        kernel: The kernel of the present corrections.
        at: The corrections.
        sweeps: Sinkhorn sweeps done, fallbacks included.
        newton: Newton steps done.
        gradients: Conjugate-gradient steps done.
        dropped: Share of the plan's mass that the last Newton step dropped.
    """

    kernel: Scaling
    at: Corrections
    sweeps: Int[Array, ""]
    newton: Int[Array, ""]
    gradients: Int[Array, ""]
    dropped: Float[Array, ""]


class SparseNewton(Solver):
    """Sinkhorn-Newton-Sparse for `EntropicTransport`. One step is one outer iteration.

    Args:
        warmup: Sinkhorn sweeps before the first Newton step; 20 is the paper's for
            costs with a unique optimal plan, 700 for its L1 example.
        keep_per_row: Plan entries kept in the Hessian, for each point of the longer
            side; the paper keeps 2 (15 for its L1 example). `"mass"` keeps, in each
            step, as many as leave a thousandth of the mass out (at most 16).

    Raises:
        ValueError: If `warmup` is negative or `keep_per_row` below 1.

    Statuses: `STALLED` where neither Newton nor a sweep improves anything.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.transport import EntropicTransport, SparseNewton
        >>> cost = (jnp.arange(4.0)[:, None] - jnp.arange(5.0)[None, :]) ** 2 / 16
        >>> problem = EntropicTransport(cost, epsilon=0.05)
        >>> solution = solve(problem, SparseNewton(), problem.start(), tol=1e-5)
        >>> bool(solution.converged)
        True

    Source:
        Tang et al., 2024 (arXiv 2401.12253), the two-stage algorithm.

    Differences:
        The diagonal blocks are never sparsified; a Newton step whose line search fails
        is replaced by a Sinkhorn sweep; `"mass"` is ours; so are the constants of the
        line search and of the conjugate gradients, which the paper does not state.
    """

    warmup: int = eqx.field(static=True, default=20)
    keep_per_row: int | Literal["mass"] = eqx.field(static=True, default=4)

    def __check_init__(self):
        if not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError(
                f"SparseNewton: `warmup` must be an integer >= 0 (got {self.warmup!r})."
            )
        if self.keep_per_row != "mass" and not (
            isinstance(self.keep_per_row, int) and self.keep_per_row >= 1
        ):
            raise ValueError(
                "SparseNewton: `keep_per_row` must be a positive integer or 'mass' "
                f"(got {self.keep_per_row!r})."
            )

    def init(self, problem, start):
        check_entropic("SparseNewton", problem)
        condition, kernel, at = open_scaling(problem, start)
        zero = jnp.zeros((), jnp.int32)
        dropped = jnp.zeros((), problem.a.dtype)
        # The opening sweep is the first of the warm-up, seen after the first step.
        memory = SparseNewtonState(kernel, at, zero, zero, zero, dropped)
        return State(start, condition, memory, evaluations=2)

    def step(self, problem, state):
        memory = state.memory
        opening = memory.sweeps == 0
        memory, work, failed = jax.lax.cond(
            opening | (memory.sweeps < self.warmup),
            lambda m: _sweep(problem, m, opening),
            lambda m: _newton(problem, m, self.keep_per_row),
            memory,
        )
        kernel, at = memory.kernel, memory.at
        condition = at.condition(problem)
        x = kernel.potentials(problem, at.phi, at.psi)
        kernel, at = refresh(problem, kernel, at)
        memory = eqx.tree_at(lambda m: (m.kernel, m.at), memory, (kernel, at))
        status = jnp.where(failed, Status.STALLED, Status.RUNNING)
        return State(x, condition, memory, evaluations=work, status=status)


def _sweep(problem, memory, opening):
    new = sweep(memory.kernel, jnp.log(problem.a), jnp.log(problem.b), memory.at)
    at = jax.tree_util.tree_map(
        lambda old, new: jnp.where(opening, old, new), memory.at, new
    )
    memory = eqx.tree_at(lambda m: (m.at, m.sweeps), memory, (at, memory.sweeps + 1))
    return memory, jnp.ones((), jnp.int32), jnp.asarray(False)


def _newton(problem, memory, keep_per_row):
    """One Newton step with the sparsified Hessian."""
    kernel, at = memory.kernel, memory.at
    rows, columns = jnp.exp(at.phi + at.rows), jnp.exp(at.psi + at.columns)
    error = problem.a - rows, problem.b - columns
    plan = jnp.exp(at.phi)[:, None] * kernel.matrix * jnp.exp(at.psi)[None, :]
    entries, dropped = sparsify(plan, keep_per_row)
    direction, gradients = _solve(entries, rows, columns, error)
    new, trials, fallback = _search(problem, kernel, at, error, direction)
    before = problem.residual(error)
    improved = problem.residual(new.condition(problem)) < before
    step = fallback.astype(jnp.int32)
    memory = SparseNewtonState(
        kernel,
        new,
        memory.sweeps + step,
        memory.newton + 1 - step,
        memory.gradients + gradients,
        dropped,
    )
    # A gradient step touches the kept entries only; choosing them reads the plan twice.
    share = entries[0].size / plan.size
    spent = jnp.ceil(gradients.astype(plan.dtype) * share).astype(jnp.int32)
    work = 1 + trials + spent
    return memory, work, fallback & ~improved


def sparsify(plan, keep_per_row):
    """The largest entries of a plan.

    Returns:
        Values, row indices and column indices of the entries, and the share of the
        mass that was dropped. The number of entries is static: those that
        `keep_per_row="mass"` does not need have value 0.
    """
    longer = max(plan.shape)
    wanted = _MASS_LIMIT if keep_per_row == "mass" else keep_per_row
    count = min(wanted * longer, plan.size)
    flat = plan.reshape(-1)
    # The order is asked for in single precision: XLA sorts float64 20 times slower, and
    # which of two entries that agree to 1e-7 is kept does not matter.
    _, index = jax.lax.top_k(flat.astype(jnp.float32), count)
    values = flat[index]
    total = jnp.sum(plan)
    if keep_per_row == "mass":
        kept = jnp.cumsum(values)
        doublings = math.ceil(math.log2(_MASS_LIMIT / _MASS_START)) + 1
        sizes = np.minimum(_MASS_START * longer * 2 ** np.arange(doublings), count)
        enough = kept[sizes - 1] >= (1 - _MASS_DROPPED) * total
        chosen = jnp.where(jnp.any(enough), jnp.argmax(enough), doublings - 1)
        size = jnp.asarray(sizes)[chosen]
        values = jnp.where(jnp.arange(count) < size, values, 0)
    dropped = jnp.maximum(1 - jnp.sum(values) / total, 0)
    return (values, index // plan.shape[1], index % plan.shape[1]), dropped


def hessian_product(entries, rows, columns, x, y):
    """The sparsified Hessian (times epsilon) on a pair of vectors."""
    values, i, j = entries
    across = jax.ops.segment_sum(values * y[j], i, num_segments=rows.size)
    down = jax.ops.segment_sum(values * x[i], j, num_segments=columns.size)
    return rows * x + across, columns * y + down


def _solve(entries, rows, columns, error):
    """Jacobi-preconditioned conjugate gradients on pairs of vectors."""

    def dot(u, v):
        return u[0] @ v[0] + u[1] @ v[1]

    def add(u, t, v):
        return u[0] + t * v[0], u[1] + t * v[1]

    def precondition(r):
        return r[0] / rows, r[1] / columns

    def body(carry):
        x, r, p, rz, k = carry
        q = hessian_product(entries, rows, columns, *p)
        step = rz / dot(p, q)
        x, r = add(x, step, p), add(r, -step, q)
        z = precondition(r)
        new = dot(r, z)
        return x, r, add(z, new / rz, p), new, k + 1

    z = precondition(error)
    first = dot(error, z)

    def proceed(carry):
        return (carry[3] > _GRADIENT_TOL**2 * first) & (carry[4] < _GRADIENT_STEPS)

    zero = jax.tree_util.tree_map(jnp.zeros_like, error)
    start = (zero, error, z, first, jnp.zeros((), jnp.int32))
    x, _, _, _, k = jax.lax.while_loop(proceed, body, start)
    return x, k


def _search(problem, kernel, at, error, direction):
    """Armijo backtracking on the dual; the last trial is a Sinkhorn sweep."""
    phi, psi = (jnp.where(jnp.isfinite(d), d, 0) for d in direction)
    slope = error[0] @ phi + error[1] @ psi
    mass = jnp.sum(problem.a - error[0])
    swept = jnp.log(problem.a) - at.rows - at.phi
    noise = 8 * float(np.finfo(slope.dtype).eps)

    def trial(carry):
        t, _, _, count = carry
        last = count >= _HALVINGS
        new_phi = at.phi + jnp.where(last, swept, t * phi)
        columns = kernel.columns(new_phi)
        new_psi = jnp.where(last, jnp.log(problem.b) - columns, at.psi + t * psi)
        new = Corrections(new_phi, new_psi, kernel.rows(new_psi), columns)
        gain = problem.a @ (new_phi - at.phi) + problem.b @ (new_psi - at.psi)
        gain = gain - (jnp.sum(jnp.exp(new.phi + new.rows)) - mass)
        # NaN and infinity are refused.
        return t / 2, new, gain >= _ARMIJO * t * slope - noise, count + 1

    def proceed(carry):
        _, _, good, count = carry
        return ~good & (count <= _HALVINGS)

    first = jnp.where(slope > 0, 0, _HALVINGS).astype(jnp.int32)
    start = (jnp.ones_like(slope), at, jnp.asarray(False), first)
    _, new, _, count = jax.lax.while_loop(proceed, trial, start)
    return new, count - first, count > _HALVINGS
