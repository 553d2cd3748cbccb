"""Projections on the matrices with given row and column sums, in two geometries.

The nearest `P >= 0` with row sums `a` and column sums `b` is, column by column, the
projection of `x + f` on a scaled simplex (squares) or a scaled softmax of it (relative
entropy), for one number `f_i` a row. These numbers minimise a smooth convex function
of as many unknowns as there are rows, the semi-dual, whose gradient is the error of
the row sums. In both geometries its (generalised) Hessian is the Laplacian of a
weighted bipartite graph, `diag(K 1) - K diag(1 / 1'K) K'`, with `K` the support of `P`
or `P` itself. A damped Newton method with line search finds the answer to rounding in
some ten or twenty steps of O(m n^2 + n^3), n the shorter side; where Newton's step
does not help, one exact pass over the rows (Sinkhorn's in relative entropy) does.

The derivative is one more solve with the same Laplacian.

Source: M. Blondel, V. Seguy and A. Rolet, Smooth and sparse optimal transport (AISTATS
2018), arXiv 1710.06276, section 3; the Hessian of the entropic semi-dual: M. Cuturi
and G. Peyre, A smoothed dual approach for variational Wasserstein problems, SIAM
Journal on Imaging Sciences 9 (2016).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from ..core._checks import check_nonempty, check_positive, check_shape, is_traced
from ._simplex import simplex_cut

_SUFFICIENT = 1e-4
# Damping of Newton's step, relative to the Laplacian's diagonal.
_EASE, _RAISE = 4.0, 4.0
# Beyond this a pass over the rows takes its turn.
_HIGHEST = 1e3
_MAX_STEPS = 1000
# Large entries are approached by multiples of `x` that grow so, each solved roughly.
_GROWTH = 4.0
_ROUGH = 0.03


def project_transport(
    x: Float[Array, "n m"], rows: Float[Array, " n"], columns: Float[Array, " m"]
) -> Float[Array, "n m"]:
    """Projects on `{P >= 0 : P 1 = rows, P' 1 = columns}`, the transport polytope.

    Minimises `sum((P - x)^2)`. With `x = -cost / strength` it is optimal transport
    with a quadratic penalty, whose plans are sparse.

    Args:
        x: A matrix; use `vmap` for batches.
        rows: What the rows sum to, positive, (n,).
        columns: What the columns sum to, positive, (m,), with the same total.

    Returns:
        A matrix like `x`; NaN where the row sums could not be met to the root of the
        dtype's rounding unit, relative to the total. Derivatives with respect to the
        sums are NaN where the support of `P` falls into parts that exchange nothing.

    Raises:
        ValueError: if the shapes do not fit, sums are not positive or the totals
            differ (the polytope is empty).

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_transport
        >>> x = jnp.array([[1.0, 0.0], [0.0, 0.5]])
        >>> plan = project_transport(x, jnp.full(2, 0.5), jnp.full(2, 0.5))
        >>> [[round(float(v), 3) for v in row] for row in plan]
        [[0.5, 0.0], [0.0, 0.5]]

    Source: Blondel, Seguy and Rolet (2018), equation 10.
    """
    return _project("project_transport", "l2", x, rows, columns)


def project_birkhoff(x: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Projects on the doubly stochastic matrices: all rows and columns sum to one.

    Args:
        x: A square matrix; use `vmap` for batches.

    Returns:
        A matrix like `x`; NaN where `project_transport` gives NaN.

    Raises:
        ValueError: if `x` is not a non-empty square matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_birkhoff
        >>> plan = project_birkhoff(jnp.array([[0.5, 0.0], [0.0, 0.0]]))
        >>> [[round(float(v), 3) for v in row] for row in plan]
        [[0.625, 0.375], [0.375, 0.625]]

    Source: Blondel, Seguy and Rolet (2018), equation 10.
    """
    return _project("project_birkhoff", "l2", x, *_ones("project_birkhoff", x))


def project_kl_transport(
    x: Float[Array, "n m"], rows: Float[Array, " n"], columns: Float[Array, " m"]
) -> Float[Array, "n m"]:
    """Projects `exp(x)` on the transport polytope in relative entropy.

    Minimises `sum(P log P - P x)` over `{P >= 0 : P 1 = rows, P' 1 = columns}`. With
    `x = -cost / strength` it is optimal transport with an entropy penalty. `x` is a
    logarithm, so that nothing overflows.

    Args:
        x: Logarithms of what is projected, a matrix; use `vmap` for batches.
        rows: What the rows sum to, positive, (n,).
        columns: What the columns sum to, positive, (m,), with the same total.

    Returns:
        A positive matrix like `x`; NaN where the row sums could not be met to the root
        of the dtype's rounding unit, relative to the total.

    Raises:
        ValueError: as `project_transport`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_kl_transport
        >>> sums = jnp.full(2, 0.5)
        >>> plan = project_kl_transport(jnp.zeros((2, 2)), sums, sums)
        >>> [[round(float(v), 3) for v in row] for row in plan]
        [[0.25, 0.25], [0.25, 0.25]]

    Source: Blondel, Seguy and Rolet (2018), equation 10 and table 1.
    """
    return _project("project_kl_transport", "kl", x, rows, columns)


def project_kl_birkhoff(x: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Projects `exp(x)` on the doubly stochastic matrices in relative entropy.

    Args:
        x: Logarithms, a square matrix; use `vmap` for batches.

    Returns:
        A positive matrix like `x`; NaN where `project_kl_transport` gives NaN.

    Raises:
        ValueError: if `x` is not a non-empty square matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_kl_birkhoff
        >>> plan = project_kl_birkhoff(jnp.log(jnp.array([[4.0, 1.0], [1.0, 1.0]])))
        >>> [[round(float(v), 3) for v in row] for row in plan]
        [[0.667, 0.333], [0.333, 0.667]]

    Source: Blondel, Seguy and Rolet (2018), equation 10 and table 1.
    """
    return _project("project_kl_birkhoff", "kl", x, *_ones("project_kl_birkhoff", x))


def project_kl_simplex(
    x: Float[Array, " n"], total: Float[Array, ""] | float = 1.0
) -> Float[Array, " n"]:
    """Projects `exp(x)` on `{p >= 0, sum(p) = total}` in relative entropy: a softmax.

    Args:
        x: Logarithms of what is projected, a vector; use `vmap` for batches.
        total: What the entries sum to, positive.

    Returns:
        A positive vector like `x`.

    Raises:
        ValueError: if `x` is not a non-empty vector or `total` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_kl_simplex
        >>> p = project_kl_simplex(jnp.log(jnp.array([1.0, 3.0])))
        >>> [round(float(v), 3) for v in p]
        [0.25, 0.75]

    Source: A. Beck and M. Teboulle, Mirror descent and nonlinear projected subgradient
        methods for convex optimization, Operations Research Letters 31 (2003).
    """
    check_shape("project_kl_simplex", "x", x, (None,))
    check_nonempty("project_kl_simplex", "x", x)
    check_positive("project_kl_simplex", "total", total)
    total = jnp.asarray(total, x.dtype)
    return jnp.where(total > 0, total, jnp.nan) * jax.nn.softmax(x)


def _ones(owner, x):
    check_shape(owner, "x", x, (None, None))
    check_shape(owner, "x", x, (x.shape[0], x.shape[0]))
    one = jnp.ones(x.shape[0], x.dtype)
    return one, one


def _project(owner, kind, x, rows, columns):
    check_shape(owner, "x", x, (None, None))
    check_nonempty(owner, "x", x)
    check_shape(owner, "rows", rows, (x.shape[0],))
    check_shape(owner, "columns", columns, (x.shape[1],))
    check_positive(owner, "rows", rows)
    check_positive(owner, "columns", columns)
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    given, total = jnp.sum(rows), jnp.sum(columns)
    empty = ~(jnp.abs(given - total) <= _root_eps(x) * total)
    if not is_traced(empty) and bool(empty):
        raise ValueError(
            f"{owner}: `rows` and `columns` must have the same total (got "
            f"{float(given):.6g} and {float(total):.6g}). The polytope is empty."
        )
    valid = jnp.all(rows > 0) & jnp.all(columns > 0) & ~empty
    # Totals that differ by rounding are made equal.
    rows = jnp.where(valid, rows * (total / given), jnp.nan)
    if x.shape[0] > x.shape[1]:
        return _compiled_plan(kind, x.T, columns, rows).T
    return _compiled_plan(kind, x, rows, columns)


class _State(NamedTuple):
    """A point of the semi-dual, what was found there, and where to look next."""

    f: Array
    g: Array
    plan: Array
    gap: Array
    value: Array
    error: Array
    damping: Array
    scale: Array
    stuck: Array
    steps: Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _plan(kind, x, rows, columns):
    total = jnp.sum(rows)
    tol, eps = _root_eps(x), float(jnp.finfo(x.dtype).eps)
    floor = _floor(x)

    def step(state):
        scaled = state.scale * x
        newtonian = state.damping < _HIGHEST
        curvature = _curvature(kind, state.plan)
        direction = _laplacian_inverse(curvature, state.damping)(-state.gap)
        f = jnp.where(
            newtonian, state.f + direction, _rows(kind, scaled, rows, state.g)
        )
        g, plan, value = _columns(kind, scaled, columns, f)
        value = value - f @ rows
        gap = jnp.sum(plan, 1) - rows
        error = jnp.sum(jnp.abs(gap)) / total
        rounding = 16 * eps * (jnp.abs(value) + jnp.abs(f) @ rows)
        fell = value <= state.value + _SUFFICIENT * (state.gap @ direction)
        # Where the decrease drowns in rounding the gradient still tells progress.
        blind = (value <= state.value + rounding) & (error < state.error)
        take = ~newtonian | (jnp.isfinite(value) & (fell | blind))
        better = error < state.error / 2
        # More damping where the step failed: it shortens the flat directions, in which
        # Newton's step is a guess, and spares the others.
        eased = jnp.where(newtonian, state.damping / _EASE, 1)
        damping = jnp.where(take, jnp.maximum(eased, floor), _RAISE * state.damping)
        new = f, g, plan, gap, value, error
        kept = [jnp.where(take, n, o) for n, o in zip(new, state[:6], strict=True)]
        whole = state.scale == 1
        stuck = whole & (kept[5] <= tol) & ~better
        # Rough is enough on the way: the duals scale along, and a pass over the rows
        # mends what they lose.
        onward = ~whole & (kept[5] <= _ROUGH)
        scale = jnp.where(onward, jnp.minimum(_GROWTH * state.scale, 1), state.scale)
        kept[1] = kept[1] * (scale / state.scale)
        damping = jnp.where(onward, jnp.inf, damping)
        kept[5] = jnp.where(onward, jnp.inf, kept[5])
        return _State(*kept, damping, scale, stuck, state.steps + 1)

    def unfinished(state):
        exact = (state.scale == 1) & (state.error <= 4 * eps)
        return ~exact & ~state.stuck & (state.steps < _MAX_STEPS)

    # Where the entries of `x` differ less than this the plan is positive (squares) or
    # nearly flat (entropy), and Newton's method sure.
    easy = 10.0 if kind == "kl" else 4 * total / x.size
    spread = jnp.max(x) - jnp.min(x)
    scale = jnp.where(spread > easy, easy / spread, jnp.ones_like(total))
    zero = jnp.zeros_like(rows)
    g, plan, _ = _columns(kind, scale * x, columns, zero)
    large = jnp.full_like(total, jnp.inf)
    # The first step is a pass over the rows.
    start = _State(zero, g, plan, zero, large, large, large, scale, total < 0, 0)
    end = lax.while_loop(unfinished, step, start)
    return jnp.where(end.error <= tol, end.plan, jnp.nan)


# A loop outside of `jit` compiles anew with every call.
_compiled_plan = jax.jit(_plan, static_argnums=0)


def _columns(kind, x, columns, f):
    """Column duals, the plan that meets the column sums, and the semi-dual's sum."""
    moved = x + f[:, None]
    if kind == "kl":
        top = jax.nn.logsumexp(moved, 0)
        g = jnp.log(columns) - top
        return g, jnp.exp(moved + g[None, :]), top @ columns
    g = -jax.vmap(simplex_cut, (1, 0))(moved, columns)
    plan = jax.nn.relu(moved + g[None, :])
    return g, plan, jnp.sum(plan * (moved - plan / 2))


def _rows(kind, x, rows, g):
    """The row duals that meet the row sums given the column duals."""
    moved = x + g[None, :]
    if kind == "kl":
        return jnp.log(rows) - jax.nn.logsumexp(moved, 1)
    return -jax.vmap(simplex_cut)(moved, rows)


def _curvature(kind, plan):
    return plan if kind == "kl" else (plan > 0).astype(plan.dtype)


def _laplacian(K):
    """The semi-dual's Hessian for edge weights `K`, as a function of a vector."""
    sums = jnp.sum(K, 0)

    def apply(v):
        return jnp.sum(K, 1) * v - K @ ((v @ K) / sums)

    return apply


def _laplacian_inverse(K, damping):
    """Solves with the Laplacian, slightly damped; up to a constant vector."""
    degrees = jnp.sum(K, 1)
    mean = jnp.mean(degrees)
    matrix = jnp.diag(degrees) - (K / jnp.sum(K, 0)[None, :]) @ K.T
    ridge = damping * (degrees + mean) / 2
    # The constant vector is the Laplacian's null space: any size will do there.
    matrix = matrix + mean / degrees.size + jnp.diag(ridge)
    factor = jnp.linalg.cholesky(matrix, symmetrize_input=False)

    def solve(b):
        return jax.scipy.linalg.cho_solve((factor, True), b)

    return solve


def _refined_solve(K, b):
    """Solves with the Laplacian to rounding, and by how much that misses `b`."""
    apply, solve = _laplacian(K), _laplacian_inverse(K, _floor(b))
    answer = jnp.zeros_like(b)
    # Each pass divides the effect of the ridge by its ratio to the eigenvalues.
    for _ in range(4):
        answer = answer + solve(b - apply(answer))
    miss = jnp.linalg.norm(b - apply(answer))
    return answer, miss


@functools.partial(_plan.defjvp, symbolic_zeros=True)
def _plan_jvp(kind, primals, tangents):
    x, rows, columns = primals
    dx, drows, dcolumns = tangents
    plan = _plan(kind, x, rows, columns)
    K = _curvature(kind, plan)
    sums = jnp.sum(K, 0)
    dx = jnp.zeros_like(x) if isinstance(dx, SymbolicZero) else dx
    direct = K * dx
    row_side, column_side = -jnp.sum(direct, 1), -jnp.sum(direct, 0)
    known = jnp.where(_is_connected(lax.stop_gradient(K)), 1, jnp.nan).astype(x.dtype)
    if not isinstance(drows, SymbolicZero):
        row_side = row_side + known * drows
    if not isinstance(dcolumns, SymbolicZero):
        column_side = column_side + known * dcolumns
    df = lax.custom_linear_solve(
        _laplacian(K),
        row_side - K @ (column_side / sums),
        lambda _, b: _checked_solve(lax.stop_gradient(K), b),
        symmetric=True,
    )
    dg = (column_side - df @ K) / sums
    return plan, direct + K * (df[:, None] + dg[None, :])


def _checked_solve(K, b):
    answer, miss = _refined_solve(K, b)
    failed = ~(miss <= _root_eps(b) * jnp.linalg.norm(b))
    return jnp.where(failed & jnp.any(b != 0), jnp.nan, answer)


def _is_connected(K):
    """Whether every balanced load can be met along the edges."""
    load = np.random.default_rng(0).standard_normal(K.shape[0])
    load = jnp.asarray(load - load.mean(), K.dtype)
    if K.shape[0] == 1:
        return jnp.asarray(True)
    _, miss = _refined_solve(K, load)
    return miss <= _root_eps(load) * jnp.linalg.norm(load)


def _root_eps(x) -> float:
    return float(jnp.finfo(x.dtype).eps) ** 0.5


def _floor(x) -> float:
    """The least damping that keeps the factorisation of a singular matrix safe."""
    return 1e3 * float(jnp.finfo(x.dtype).eps)
