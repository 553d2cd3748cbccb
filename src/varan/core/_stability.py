"""How far the answer moves when the data move: stability of the solution map.

At a solution `x` of `F(x, p) = 0` with Jacobians `J = dF/dx` and `B = dF/dp`, the
solution map's derivative is `-J^-1 B`. Its norm is the local Lipschitz modulus; a
nonsingular `J` is strong regularity (Robinson); for a minimiser a positive definite
`J`, the Hessian, is tilt stability with modulus `1 / smallest curvature`
(Poliquin and Rockafellar).
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from ._captures import capture_key
from ._certificate import format_flag, format_number
from ._checks import is_traced
from ._linear import DENSE_SIZE, solve_jacobian
from ._solution import Solution

# A cross derivative of at most this many entries is materialised.
_DENSE_ENTRIES = 4_000_000
# Lanczos steps above the dense size: with full reorthogonalisation the extreme Ritz
# values are good to three digits unless the spectrum is clustered there.
_LANCZOS_STEPS = 60


class Stability(eqx.Module):
    """What `stability` found at a solution.

    Args:
        lipschitz: Local Lipschitz modulus of the solution map with respect to the
            chosen data, both in the Euclidean norm. Where the solution is not unique
            it is that of the part which is.
        regularity: Smallest (nonzero, where the solution is not unique) singular
            value of the condition's Jacobian.
        curvature: Smallest (nonzero likewise) eigenvalue of a symmetric Jacobian;
            NaN for one not known to be symmetric.
        largest: Largest singular value of the Jacobian.
        null_dimension: Directions in which the solution is not determined; -1 where
            it was not computed (matrix-free).
        converged: Whether the run had converged; if not, all this describes its last
            iterate, which is no solution.
        exact: Dense factorisations (`True`) or Lanczos estimates (`False`): the
            moduli are then estimated from below, `regularity` from above.
    """

    lipschitz: Float[Array, ""]
    regularity: Float[Array, ""]
    curvature: Float[Array, ""]
    largest: Float[Array, ""]
    null_dimension: Int[Array, ""]
    converged: Bool[Array, ""]
    exact: bool = eqx.field(static=True)

    @property
    def condition_number(self) -> Float[Array, ""]:
        """Largest over smallest (nonzero) singular value of the Jacobian."""
        return self.largest / self.regularity

    @property
    def strongly_regular(self) -> Bool[Array, ""]:
        """Whether the solution is locally unique and Lipschitz in every parameter."""
        eps = np.finfo(self.largest.dtype).eps
        return (self.regularity > 10 * eps * self.largest) & (self.null_dimension <= 0)

    @property
    def tilt_stable(self) -> Bool[Array, ""]:
        """Whether the solution is a tilt-stable local minimiser.

        False where the Jacobian is not known to be symmetric: the notion belongs to
        minimisation.
        """
        return self.strongly_regular & (self.curvature > 0)

    def __str__(self) -> str:
        if is_traced(self.lipschitz):
            return "Stability(traced)"
        method = "dense" if self.exact else "Lanczos estimate"
        null = np.max(np.asarray(self.null_dimension))
        lines = [
            f"Stability ({method})",
            f"  Lipschitz modulus    {format_number(self.lipschitz)}",
            f"  smallest curvature   {format_number(self.curvature)}",
            f"  regularity           {format_number(self.regularity)}",
            f"  condition number     {format_number(self.condition_number)}",
            "  strongly regular     " + format_flag(self.strongly_regular, "yes", "no"),
            "  tilt stable          " + format_flag(self.tilt_stable, "yes", "no"),
        ]
        if null > 0:
            lines.append(f"  undetermined         {null} directions: not unique")
        if not np.all(self.converged):
            lines.append("  of the last iterate: the run did not converge")
        return "\n".join(lines)

    __repr__ = __str__


def stability(solution: Solution, wrt: Callable | None = None) -> Stability:
    """The stability of a solution with respect to the problem's data.

    Dense up to 512 unknowns: one eigenvalue or singular value decomposition, O(n^3).
    Above, 60 Lanczos steps through the implicit derivative, each one linear solve.
    Works under `jit` and `vmap`.

    Args:
        solution: What `solve` returned.
        wrt: Selects the data, a function of the problem, as `lambda p: p.params[1]`;
            default: every floating array in the problem.

    Returns:
        A `Stability`. It describes the point `solution.x`; of the solution it tells
        only as much as the run has converged.

    Raises:
        ValueError: If the selection holds no floating array.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import Newton, Smooth, solve, stability
        >>> problem = Smooth(lambda x, c: x @ (jnp.diag(c) @ x), jnp.array([1.0, 4.0]))
        >>> report = stability(solve(problem, Newton(), jnp.ones(2)))
        >>> float(report.curvature), float(report.condition_number)
        (2.0, 4.0)

    Source:
        Dontchev and Rockafellar, 2014, "Implicit Functions and Solution Mappings",
        section 2B; Poliquin and Rockafellar, 1998, "Tilt stability of a local
        minimum".
    """
    return _stability(
        solution.problem,
        solution.x,
        solution.converged,
        _Selection(wrt),
        capture_key(solution.problem),
    )


class _Selection(eqx.Module):
    wrt: Callable | None = eqx.field(static=True)

    def split(self, problem):
        """The chosen arrays as a vector, and the problem as a function of it."""
        chosen = problem if self.wrt is None else self.wrt(problem)
        arrays = eqx.filter(chosen, eqx.is_inexact_array)
        if not jax.tree_util.tree_leaves(arrays):
            raise ValueError(
                "stability: the problem holds no floating array to be stable against. "
                "Pass the data to the problem, as in Smooth(loss, data), and check "
                "`wrt`."
            )
        flat, unravel = ravel_pytree(arrays)

        def rebuild(vector):
            replaced = eqx.combine(unravel(vector), chosen)
            if self.wrt is None:
                return replaced
            return eqx.tree_at(self.wrt, problem, replaced)

        return flat, rebuild


@eqx.filter_jit
def _stability(problem, x, converged, selection, captures) -> Stability:
    del captures  # part of the key under which this is compiled, nothing else
    point, unravel = ravel_pytree(x)
    data, rebuild = selection.split(problem)

    def condition(v):
        return ravel_pytree(problem.condition(unravel(v)))[0]

    def of_data(vector):
        return ravel_pytree(rebuild(vector).condition(x))[0]

    tags = problem.jacobian_tags
    symmetric = bool(tags & {"symmetric", "positive_semidefinite"})
    if point.size <= DENSE_SIZE:
        report = _dense(condition, of_data, point, data, symmetric, problem.unique)
    else:
        report = _matrix_free(condition, of_data, point, data, tags, problem.unique)
    return eqx.tree_at(lambda s: s.converged, report, converged)


def _dense(condition, of_data, point, data, symmetric, unique) -> Stability:
    jacobian = jax.jacfwd(condition)(point)
    left, singular, right = jnp.linalg.svd(jacobian)
    if symmetric:
        values = jnp.linalg.eigvalsh((jacobian + jacobian.T) / 2)
    else:
        values = jnp.full_like(singular, jnp.nan)
    cut = point.size * np.finfo(point.dtype).eps * singular[0]
    kept = singular > cut
    # With a unique solution a null direction is a failure, shown as it is.
    shown = jnp.ones_like(kept) if unique else kept
    infinite = jnp.any(shown & (singular <= cut))
    inverse = jnp.where(
        shown & (singular > 0), 1 / jnp.where(singular > 0, singular, 1), 0
    )
    determined = jnp.ones_like(kept) if unique else jnp.abs(values) > cut

    def apply_inverse(matrix):
        return right.T @ (inverse[:, None] * (left.T @ matrix))

    if point.size * data.size <= _DENSE_ENTRIES:
        response = apply_inverse(jax.jacrev(of_data)(data))
        lipschitz = jnp.linalg.norm(response, ord=2)
    else:
        forward, backward = _products(of_data, data)

        def gram(v):
            middle = left @ (inverse * (right @ v))
            return apply_inverse(forward(backward(middle))[:, None])[:, 0]

        lipschitz = jnp.sqrt(_extreme_ritz(gram, _unit_vector(point))[1])
    return Stability(
        lipschitz=jnp.where(infinite, jnp.inf, lipschitz),
        regularity=jnp.min(jnp.where(shown, singular, jnp.inf)),
        curvature=jnp.min(jnp.where(determined, values, jnp.inf)),
        largest=singular[0],
        null_dimension=jnp.sum(singular <= cut).astype(jnp.int32),
        converged=jnp.asarray(True),
        exact=point.size * data.size <= _DENSE_ENTRIES,
    )


def _matrix_free(condition, of_data, point, data, tags, unique) -> Stability:
    def inverse(v):
        return solve_jacobian(condition, point, v, tags=tags, unique=unique)

    def inverse_transpose(v):
        return jax.linear_transpose(inverse, v)(v)[0]

    product, transpose = _products(condition, point)
    forward, backward = _products(of_data, data)
    first = _unit_vector(point)
    if not unique:
        # Only what is determined has an inverse.
        first = inverse(product(first))
    response = _extreme_ritz(
        lambda v: inverse(forward(backward(inverse_transpose(v)))), first
    )
    if tags & {"symmetric", "positive_semidefinite"}:
        low, high = _extreme_ritz(product, first)
        inverse_low, inverse_high = _extreme_ritz(inverse, first)
        largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
        regularity = 1 / jnp.maximum(jnp.abs(inverse_low), jnp.abs(inverse_high))
        indefinite = (low < 0) & (inverse_low < 0)
        curvature = jnp.where(indefinite, low, 1 / inverse_high)
    else:
        largest = jnp.sqrt(_extreme_ritz(lambda v: transpose(product(v)), first)[1])
        norm = _extreme_ritz(lambda v: inverse(inverse_transpose(v)), first)[1]
        regularity = 1 / jnp.sqrt(norm)
        curvature = jnp.full_like(largest, jnp.nan)
    return Stability(
        lipschitz=jnp.sqrt(response[1]),
        regularity=regularity,
        curvature=curvature,
        largest=largest,
        null_dimension=jnp.asarray(-1, jnp.int32),
        converged=jnp.asarray(True),
        exact=False,
    )


def _products(function, point):
    """`J v` and `J' v` of a function at a point, linearised once."""
    _, forward = jax.linearize(function, point)
    transpose = jax.linear_transpose(forward, point)
    return forward, lambda v: transpose(v)[0]


def _unit_vector(like):
    vector = np.random.default_rng(0).standard_normal(like.size)
    return jnp.asarray(vector / np.linalg.norm(vector), like.dtype)


def _extreme_ritz(product, first):
    """Extreme Ritz values of a symmetric operator: Lanczos, fully reorthogonalised."""
    size, dtype = first.size, first.dtype
    steps = min(_LANCZOS_STEPS, size)
    first = first / jnp.linalg.norm(first)
    basis = jnp.zeros((steps + 1, size), dtype).at[0].set(first)

    def advance(index, carry):
        basis, diagonal, off = carry
        image = product(basis[index])
        diagonal = diagonal.at[index].set(jnp.vdot(basis[index], image))
        # Twice is enough (Kahan and Parlett).
        for _ in range(2):
            image = image - basis.T @ (basis @ image)
        length = jnp.linalg.norm(image)
        # An invariant subspace ends the recurrence; zero rows add zero Ritz values,
        # which the mask below removes.
        ended = length <= 1e3 * np.finfo(dtype).eps * jnp.max(jnp.abs(diagonal))
        following = jnp.where(ended, 0, image / jnp.where(ended, 1, length))
        basis = basis.at[index + 1].set(following)
        return basis, diagonal, off.at[index].set(jnp.where(ended, 0, length))

    zeros = jnp.zeros(steps, dtype)
    basis, diagonal, off = jax.lax.fori_loop(0, steps, advance, (basis, zeros, zeros))
    used = jnp.linalg.norm(basis[:-1], axis=1) > 0
    # Unused rows repeat an actual entry, so that they add no extreme of their own.
    diagonal = jnp.where(used, diagonal, diagonal[0])
    tridiagonal = jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1)
    ritz = jnp.linalg.eigvalsh(tridiagonal)
    return ritz[0], ritz[-1]
