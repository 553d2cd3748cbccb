"""A linear matrix inequality in positive unknowns: solved inside, checked outside.

`min cost . y` subject to `sum_j y_j A_j - D^T D >= 0` (positive semidefinite), `y > 0`,
where each `A_j` is a sum of forms in two vectors. The log-determinant barrier follows
the central path by Newton steps. Every iterate is strictly feasible, so stopping early
costs tightness and never validity, and a step needs one Cholesky factor and products of
matrices: `O(n^3 + c n^2 + c^2 n)` for order n and c forms.
"""

from __future__ import annotations

import itertools
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

# Factor of the path's parameter between centres, and the Newton decrement (squared)
# below which a point counts as a centre.
_FASTER, _CENTRED = 10.0, 0.25
_ARMIJO, _HALVINGS = 0.1, 40


class Inequality(NamedTuple):
    """`sum_i (ties y)_i rows_i^T forms_i rows_i >= target^T target`, and the cost of y.

    Args:
        rows: (forms, 2, n).
        forms: (forms, 2, 2), symmetric.
        ties: (forms, unknowns), which unknown weighs which form.
        target: (outputs, n).
        cost: (unknowns,).
    """

    rows: np.ndarray
    forms: np.ndarray
    ties: np.ndarray
    target: np.ndarray
    cost: np.ndarray

    def slack(self, y):
        """What must be positive semidefinite."""
        return self.weighed(y) - self.target.T @ self.target

    def weighed(self, y):
        """`sum_j y_j A_j`."""
        size = self.rows.shape[-1]
        xp = jnp if isinstance(y, jax.Array) else np
        weighted = (self.ties @ y)[:, None, None] * self.forms
        halves = xp.matmul(weighted, self.rows).reshape(-1, size)
        return self.rows.reshape(-1, size).T @ halves


class _State(NamedTuple):
    y: jax.Array
    t: jax.Array
    gap: jax.Array
    steps: jax.Array
    stuck: jax.Array


@jax.jit
def minimise(problem: Inequality, start, tol, max_steps):
    """Follows the central path from a strictly feasible point.

    Returns the last iterate, its relative gap to the minimum (as the path tells it, an
    estimate) and the number of Newton steps.
    """
    count = problem.rows.shape[-1] + start.size

    def merit(y, t, factor):
        volume = 2 * jnp.sum(jnp.log(jnp.diagonal(factor))) + jnp.sum(jnp.log(y))
        return t * (problem.cost @ y) - volume

    def unfinished(state):
        return (state.gap > tol) & (state.steps < max_steps) & ~state.stuck

    def step(state):
        y, t = state.y, state.t
        inner = jnp.linalg.cholesky(problem.slack(y))
        gradient, hessian = _derivatives(problem, y, t, inner)
        # In units of y the Hessian's diagonal is of order one and above.
        scaled = hessian * y[:, None] * y[None]
        factor = jnp.linalg.cholesky(scaled)
        direction = -y * cho_solve((factor, True), y * gradient)
        decrement = -gradient @ direction
        here = merit(y, t, inner)

        def too_long(search):
            length, halvings = search
            new = y + length * direction
            found = merit(new, t, jnp.linalg.cholesky(problem.slack(new)))
            enough = found <= here - _ARMIJO * length * decrement
            return ~enough & (halvings < _HALVINGS)

        # NaN, from a point outside, never counts as enough.
        length, halvings = jax.lax.while_loop(
            too_long, lambda s: (s[0] / 2, s[1] + 1), (jnp.ones_like(t), 0)
        )
        centred = decrement < _CENTRED
        moved = halvings < _HALVINGS
        new = jnp.where(moved, y + length * direction, y)
        gap = jnp.where(centred, count / (t * (problem.cost @ new)), state.gap)
        # At a centre rounding may hide the last decrease: the path goes on.
        faster = jnp.where(centred, _FASTER * t, t)
        return _State(new, faster, gap, state.steps + 1, ~moved & ~centred)

    t = count / (problem.cost @ start)
    infinite = jnp.full((), jnp.inf, start.dtype)
    state = _State(start, t, infinite, jnp.asarray(0), jnp.asarray(False))
    state = jax.lax.while_loop(unfinished, step, state)
    return state.y, state.gap, state.steps


def _derivatives(problem: Inequality, y, t, factor):
    """Gradient and Hessian of the barrier's merit, from one Gram matrix of the rows.

    With `G = rows slack^-1 rows^T` in blocks, `tr(slack^-1 A_i) = tr(K_i G_ii)` and
    `tr(slack^-1 A_i slack^-1 A_j) = tr(K_i G_ij K_j G_ji)`.
    """
    forms, size = len(problem.forms), problem.rows.shape[-1]
    flat = problem.rows.reshape(-1, size)
    half = solve_triangular(factor, flat.T, lower=True)
    gram = (half.T @ half).reshape(forms, 2, 2 * forms)
    turned = jnp.matmul(problem.forms, gram).reshape(2 * forms, 2 * forms)
    traces = jnp.diagonal(turned).reshape(forms, 2).sum(1)
    pairs = (turned * turned.T).reshape(forms, 2, forms, 2).sum((1, 3))
    gradient = t * problem.cost - problem.ties.T @ traces - 1 / y
    hessian = problem.ties.T @ pairs @ problem.ties + jnp.diag(1 / y**2)
    return gradient, hessian


def least_eigenvalue(problem: Inequality, y: np.ndarray) -> tuple[float, float]:
    """The slack's least eigenvalue in float64, and what rounding may have moved it by.

    The second number bounds the error of assembling the matrix (sums of products of
    known sizes) and of the symmetric eigenvalue solver, both relative to the sizes.
    """
    sizes = Inequality(*(np.abs(np.asarray(part, float)) for part in problem))
    whole = np.linalg.norm(sizes.weighed(np.abs(y)) + sizes.target.T @ sizes.target)
    terms = sum(problem.rows.shape) + len(problem.target)
    # Of the same size: products of weights that made the rows, and the factor 2 twice
    # over for the bounds of sums.
    rounding = 16 * terms * np.finfo(float).eps * whole
    return float(np.linalg.eigvalsh(problem.slack(y))[0]), float(rounding)


def repaired(problem: Inequality, y: np.ndarray, inside: np.ndarray, slack: float = 1):
    """A point between `y` and `inside` at which the inequality is proved.

    The slack is affine in the point, so going towards a strictly feasible point raises
    its least eigenvalue. `slack` multiplies the rounding that must be exceeded.

    Returns the point, the eigenvalue and the required margin; NaN where even `inside`
    does not exceed it.
    """
    y = np.maximum(np.where(np.isfinite(y), y, inside), 0.0)
    least = margin = np.nan
    for share in (0.0, *2.0 ** np.arange(-40, 1)):
        point = (1 - share) * y + share * inside
        least, rounding = least_eigenvalue(problem, point)
        margin = slack * rounding
        if least >= margin:
            return point, least, margin
    return np.full_like(y, np.nan), least, margin


def null_space(equations: np.ndarray) -> tuple[np.ndarray, float]:
    """An orthonormal basis of what the equations leave, and their conditioning plus 1.

    What rounding cannot tell from zero counts as no equation, which only leaves more.
    """
    if not len(equations):
        return np.eye(equations.shape[1]), 1.0
    _, values, vectors = np.linalg.svd(equations)
    rank = int(np.sum(values > 1e-8 * values[0]))
    return vectors[rank:].T, 1 + float(values[0] / values[rank - 1])


def solve_with_cvxpy(owner: str, problem: Inequality, solver: str, tol: float):
    """The program by a solver of CVXPY; unknowns whose cost is NaN are free.

    Returns the point, NaN for the gap, and the iterations; NaN as the point where the
    solver fails.
    """
    try:
        import cvxpy
    except ImportError:
        raise ImportError(
            f'{owner}: solver "{solver}" needs CVXPY: pip install "varan[sdp]".'
        ) from None
    free = np.isnan(problem.cost)
    y = cvxpy.Variable(len(problem.cost))
    # Row by row of the two: no Kronecker product of the whole is formed.
    terms: list[Any] = [-problem.target.T @ problem.target]
    for a, b in itertools.product(range(2), repeat=2):
        weights = cvxpy.multiply(problem.forms[:, a, b], problem.ties @ y)
        left, right = problem.rows[:, a], problem.rows[:, b]
        terms.append(left.T @ cvxpy.diag(weights) @ right)
    slack = sum(terms[1:], terms[0])
    constraints: list[Any] = [(slack + slack.T) / 2 >> 0]
    constraints.append(y[np.flatnonzero(~free)] >= 0)
    cost = np.where(free, 0.0, problem.cost)
    program = cvxpy.Problem(cvxpy.Minimize(cost @ y), constraints)
    settings = {
        "clarabel": {"tol_gap_rel": tol, "tol_gap_abs": tol, "tol_feas": tol},
        "scs": {"eps_rel": tol, "eps_abs": tol, "max_iters": 50_000},
    }[solver]
    with warnings.catch_warnings(), suppress(cvxpy.SolverError):
        # "May be inaccurate": the check that follows says so in numbers.
        warnings.simplefilter("ignore", UserWarning)
        program.solve(solver=solver.upper(), **settings)
    if y.value is None:
        return np.full(len(free), np.nan), np.nan, 0
    return y.value, np.nan, program.solver_stats.num_iters
