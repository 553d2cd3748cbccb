"""A quadratic program made ready for factorisations: scaled rows, one interval each.

All constraints become `lo <= M x <= up`, with the rows of `A`, of `G` and, where there
are bounds, of the identity. Ruiz's iteration brings the rows and columns of
`[[P, R'], [R, 0]]` to size one; the identity's rows are scaled so that they stay the
identity's, and cost a vector instead of a matrix.

A factorisation is of `P + shift I + M' diag(weights) M`, of the size of `x`: Cholesky,
whatever the number of constraints.

Source: Ruiz, 2001, "A scaling algorithm to equilibrate both rows and columns norms in
matrices"; Stellato et al., 2020 (arXiv 1711.08013), section 5.1.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
from jaxtyping import Array, Float

from ..core import Status
from ..core.optimality import KKTPoint
from ..problems import Quadratic
from ..problems._quadratic import (
    apply,
    apply_transpose,
    farkas_numbers,
    ray_numbers,
    row_count,
)

_RUIZ = 10
# A scaling beyond this belongs to a row or column of zeros.
_MIN_SCALE, _MAX_SCALE = 1e-4, 1e4


class Scaled(eqx.Module):
    """`min x'P x / 2 + q'x, lo <= M x <= up`, and the way back.

    The program's `x` is `columns * x` here, its multipliers `rows * y / cost`.
    """

    P: Array
    q: Float[Array, " n"]
    R: tuple
    lo: Float[Array, " m"]
    up: Float[Array, " m"]
    lower: Float[Array, " n"]
    upper: Float[Array, " n"]
    columns: Float[Array, " n"]
    rows: Float[Array, " m"]
    cost: Float[Array, ""]
    equalities: int = eqx.field(static=True)
    general: int = eqx.field(static=True)

    @property
    def boxed(self) -> bool:
        return self.lo.size > self.general

    def image(self, x):
        """`M x`."""
        return jnp.concatenate([*(apply(R, x) for R in self.R), x[: self._tail]])

    def pull(self, y):
        """`M'y`."""
        total, at = jnp.zeros_like(self.q), 0
        for R in self.R:
            size = row_count(R)
            total = total + apply_transpose(R, y[at : at + size])
            at += size
        return total + y[at:] if self.boxed else total

    @property
    def _tail(self):
        return self.lo.size - self.general

    def gradient(self, x):
        """`P x + q`."""
        return apply(self.P, x) + self.q

    def factor(self, shift, weights):
        """Cholesky's factor of `P + shift I + M' diag(weights) M`."""
        diagonal = jnp.full_like(self.q, 1) * shift
        if self.boxed:
            diagonal = diagonal + weights[self.general :]
        matrix = self.P + jnp.diag(diagonal)
        if self.general:
            (R,) = self.R
            matrix = matrix + R.T @ (weights[: self.general, None] * R)
        return jnp.linalg.cholesky(matrix, symmetrize_input=False)

    def to_scaled(self, problem: Quadratic, point: KKTPoint):
        """`x` and `y` of a point; the bounds' multipliers from the gradient."""
        given = [v for v in point[1:] if v is not None]
        x, pull = point.x, jnp.zeros_like(self.q)
        if problem.A is not None:
            pull = pull + apply_transpose(problem.A, point.equality)
        if problem.G is not None:
            pull = pull + apply_transpose(problem.G, point.inequality)
        gradient = apply(problem.Q, x) + problem.c + pull
        if self.boxed:
            lower, upper = problem.box
            held = ((x <= lower) & (gradient > 0)) | ((x >= upper) & (gradient < 0))
            given.append(jnp.where(held, -gradient, 0))
        y = jnp.concatenate(given) if given else jnp.zeros_like(self.lo)
        return x / self.columns, self.cost * y / self.rows

    def from_scaled(self, problem: Quadratic, x, y) -> KKTPoint:
        """The point of `x`, moved into the box, and `y`, with its signs."""
        y = self.rows * y / self.cost
        p, m = self.equalities, self.general
        return KKTPoint(
            jnp.clip(self.columns * x, *problem.box),
            None if problem.b is None else y[:p],
            None if problem.h is None else jnp.maximum(y[p:m], 0),
        )


def scale(problem: Quadratic) -> Scaled:
    """Scales a program; one with operators is only rearranged."""
    n, dtype = problem.c.size, problem.c.dtype
    matrices = tuple(M for M in (problem.A, problem.G) if M is not None)
    rights = [v for v in (problem.b, problem.h) if v is not None]
    equalities = 0 if problem.b is None else problem.b.size
    up = jnp.concatenate(rights) if rights else jnp.zeros(0, dtype)
    m = up.size
    lo = jnp.where(jnp.arange(m) < equalities, up, -jnp.inf)
    if problem.matrix_free:
        R, P = matrices, problem.Q
        d, e = jnp.ones(n, dtype), jnp.ones(m, dtype)
        cost = jnp.ones((), dtype)
    else:
        stacked = jnp.concatenate(matrices) if m else jnp.zeros((0, n), dtype)
        d, e = _equilibrate(problem.Q, stacked)
        P = d[:, None] * problem.Q * d[None, :]
        R = (e[:, None] * stacked * d[None, :],) if m else ()
        size = jnp.maximum(
            jnp.mean(jnp.max(jnp.abs(P), axis=0)), jnp.max(jnp.abs(d * problem.c))
        )
        cost = 1 / jnp.where(size > 0, size, 1)
        P = cost * P
    lower, upper = (v / d for v in problem.box)
    lo, up = e * lo, e * up
    if problem.lower is not None or problem.upper is not None:
        lo, up = jnp.concatenate([lo, lower]), jnp.concatenate([up, upper])
        e = jnp.concatenate([e, 1 / d])
    return Scaled(
        P, cost * d * problem.c, R, lo, up, lower, upper, d, e, cost, equalities, m
    )


def _equilibrate(P, R):
    """Scales of columns and rows."""
    P, R = jnp.abs(P), jnp.abs(R)

    def improve(_, scales):
        d, e = scales
        below = jnp.max(e[:, None] * R, axis=0, initial=0)
        columns = d * jnp.maximum(jnp.max(P * d[None, :], axis=1), below)
        rows = e * jnp.max(R * d[None, :], axis=1, initial=0)
        return d / _root(columns), e / _root(rows)

    start = jnp.ones(P.shape[0], P.dtype), jnp.ones(R.shape[0], P.dtype)
    return jax.lax.fori_loop(0, _RUIZ, improve, start)


def _root(size):
    # Zero rows and columns keep their scale.
    inside = jnp.clip(size, _MIN_SCALE, _MAX_SCALE)
    return jnp.sqrt(jnp.where(size > 0, inside, 1))


def solve_active(scaled: Scaled, x, y, active, target, refinements: int):
    """Solves the program with its `active` rows held at their `target`.

    The proximal method of multipliers on the optimality system, with one
    factorisation: each round divides the error by its smallest curvature (or squared
    singular value) over the shift, and forgives the factorisation's rounding.
    Dependent rows are no harm; where there is no solution, the moves converge to the
    proof.

    Returns:
        `x` and `y`, zero for rows that are not active, and their last moves.
    """
    # Small, and its reciprocal far from the dtype's rounding unit.
    shift = float(np.cbrt(np.finfo(x.dtype).eps))
    factor = scaled.factor(shift, jnp.where(active, 1 / shift, 0))

    def refine(_, carry):
        x, y, *_ = carry
        gap = jnp.where(active, scaled.image(x) - target, 0)
        right = -(scaled.gradient(x) + scaled.pull(y + gap / shift))
        dx = jsp.linalg.cho_solve((factor, True), right)
        dy = jnp.where(active, scaled.image(dx) + gap, 0) / shift
        return x + dx, y + dy, dx, dy

    y = jnp.where(active, y, 0)
    return jax.lax.fori_loop(0, refinements, refine, (x, y, x, y))


def find_proof(scaled: Scaled, dx, dy, feasible):
    """Whether the last moves of a diverging run prove that there is no solution.

    Margins are compared with the size of what they are the sum of, violations with the
    vector's: a program is called infeasible whose feasible points, if any, are `1 /
    tol` times as long as what its own numbers suggest.

    Args:
        scaled: The program.
        dx: The last change of x.
        dy: The last change of the multipliers.
        feasible: Whether the constraints are met well enough to call it unbounded.

    Returns:
        The status, and both vectors with their signs, of size one.
    """
    m, tol = scaled.general, float(np.finfo(dx.dtype).eps) ** (2 / 3)
    dy = jnp.where(jnp.isinf(scaled.lo), jnp.maximum(dy, 0), dy)
    dy = jnp.where(jnp.isinf(scaled.up), jnp.minimum(dy, 0), dy)
    weights, bounds = dy[:m], jnp.where(dy > 0, scaled.up, scaled.lo)[:m]
    terms = jnp.where(weights == 0, 0, weights * bounds)
    pull = scaled.pull(jnp.zeros_like(dy).at[:m].set(weights))
    margin, violation = farkas_numbers(
        (weights,), pull, jnp.sum(terms), scaled.lower, scaled.upper
    )
    size = _size(weights)
    ends = jnp.where(pull > 0, scaled.lower, scaled.upper)
    held = jnp.where(jnp.isfinite(ends), pull * ends, 0)
    total = (jnp.sum(jnp.abs(terms)) + jnp.sum(jnp.abs(held))) / size
    empty = _proves(margin, violation, total, tol) | jnp.any(
        scaled.lower > scaled.upper
    )
    ray = dx / _size(dx)
    fall, bent = ray_numbers(
        ray,
        apply(scaled.P, ray),
        -(scaled.q @ ray),
        [(scaled.image(ray), scaled.lo, scaled.up)],
    )
    falls = _proves(fall, bent, jnp.sum(jnp.abs(scaled.q * ray)), tol)
    status = jnp.where(
        empty,
        Status.INFEASIBLE,
        jnp.where(falls & feasible, Status.UNBOUNDED, Status.RUNNING),
    )
    return status.astype(jnp.int32), ray, dy / size


def _proves(margin, violation, total, tol):
    return (margin > tol * total) & (violation * total <= tol * margin)


def _size(vector):
    size = jnp.max(jnp.abs(vector), initial=0)
    return jnp.where(size > 0, size, 1)
