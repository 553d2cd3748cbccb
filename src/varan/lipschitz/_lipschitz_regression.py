"""The values of a Lipschitz function that lie nearest to data.

Given points `x_i` and data `u_i`, the values `v_i` of a function with constant `alpha`
that minimise `sum |u_i - v_i|^2 / 2` solve a convex program in the values alone,

    |v_i - v_j| <= alpha |x_i - x_j|   for all pairs,

because every such set of values extends to the whole space (`McShane`, `Kirszbraun`).
It is solved by augmented Lagrangians: the multipliers `y` of the pairs are renewed by

    q = D v + y / rho,   y <- rho (q - projection of q on the balls),

`D` the differences, after Newton's method has minimised over `v`. The function to be
minimised is piecewise smooth, so that Newton's method ends after finitely many steps;
some tens in all reach the last digits, where splitting methods need thousands. A step
costs `(n m)^3 / 3` flops for n points with m values each.

The dual function at any multipliers is a lower bound for all functions with the
constant, and for any part of the pairs: a proof that does not rest on convergence.

Source: methods of multipliers with Newton steps: X. Li, D. Sun and K.-C. Toh, 2018, "A
highly efficient semismooth Newton augmented Lagrangian method for solving Lasso
problems", arXiv:1607.05428.
"""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# The penalty's first value (over the number of points, the largest curvature of the
# pairs) and its growth: small enough that the Newton systems stay well-conditioned.
_PENALTY, _GROWTH = 10.0, 3.0
_MAX_NEWTON = 400
# Newton's method has done enough when the gradient is this small beside the violation.
_SETTLED = 0.01


class Values(NamedTuple):
    """Fitted values with what proves them good.

    Args:
        values: Nearly feasible; the constraint is met to the tolerance.
        lower: At most the least `sum |u_i - v_i|^2 / 2`, rounding covered.
        steps: Newton steps.
        converged: Whether violation and gap met the tolerance.
    """

    values: Float[Array, "points outputs"]
    lower: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


class _Carry(NamedTuple):
    v: Array
    y: Array
    rho: Array
    steps: Array
    done: Array


@eqx.filter_jit
def fit_values(x: Array, u: Array, alpha: Array, pairs: Array, tol: Array) -> Values:
    """Nearest values to `u`, (points, outputs), with the constant `alpha`.

    `pairs`, (pairs, 2), are those held to it; `tol` is relative to the spread of `u`.
    """
    first, second = pairs[:, 0], pairs[:, 1]
    radius = alpha * jnp.sqrt(jnp.sum((x[first] - x[second]) ** 2, 1))
    mean = jnp.mean(u, 0, keepdims=True)
    size = jnp.sqrt(jnp.sum((u - mean) ** 2))
    scale = jnp.where(size > 0, size, 1)
    u, radius = (u - mean) / scale, radius / scale
    pull, eps = _pull(first, second, len(x)), float(jnp.finfo(u.dtype).eps)
    tol = jnp.maximum(tol, 256 * eps)

    def multipliers(v, y, rho):
        """What the pairs exert, and by how much the shifted pairs leave the balls."""
        q = v[first] - v[second] + y / rho
        length = jnp.sqrt(jnp.sum(q**2, 1))
        excess = jnp.maximum(length - radius, 0)
        share = jnp.where(excess > 0, excess / jnp.where(length > 0, length, 1), 0)
        return rho * share[:, None] * q, q, length, excess

    def value(v, y, rho):
        excess = multipliers(v, y, rho)[3]
        return (jnp.sum((v - u) ** 2) + rho * jnp.sum(excess**2)) / 2

    def step(carry: _Carry):
        v, y, rho = carry.v, carry.y, carry.rho
        force, _, _, excess = multipliers(v, y, rho)
        gradient = v - u + pull(force)
        settled = _norm(gradient) <= _SETTLED * _norm(excess) + 1e-3 * tol + 128 * eps
        gap = jnp.sum((v - u) ** 2) / 2 - _dual(force, u, radius, pull)
        violation = jnp.max(_lengths(v, first, second) - radius, initial=0)
        done = settled & (violation <= tol) & (jnp.abs(gap) <= tol)
        y = jnp.where(settled, force, y)
        rho = jnp.where(settled, jnp.minimum(_GROWTH * rho, 0.01 / eps), rho)
        force, q, length, excess = multipliers(v, y, rho)
        gradient = v - u + pull(force)
        hessian = _hessian(q, length, excess, rho, first, second, len(x))
        factor = jsp.linalg.cho_factor(hessian)
        move = -jsp.linalg.cho_solve(factor, gradient.reshape(-1)).reshape(u.shape)
        best = _line_search(value, v, move, y, rho, jnp.sum(gradient * move))
        return _Carry(jnp.where(done, v, best), y, rho, carry.steps + 1, done)

    def proceed(carry: _Carry):
        return (
            ~carry.done & (carry.steps < _MAX_NEWTON) & jnp.all(jnp.isfinite(carry.v))
        )

    rho = jnp.asarray(_PENALTY / len(x), u.dtype)
    y = jnp.zeros((len(pairs), u.shape[1]), u.dtype)
    start = _Carry(u, y, rho, jnp.asarray(0), jnp.asarray(False))
    end = jax.lax.while_loop(proceed, step, start)
    lower = _dual(end.y, u, radius, pull)
    # Sums of as many terms as there are pairs, rounded outward.
    terms = jnp.sum(radius * jnp.sqrt(jnp.sum(end.y**2, 1))) + jnp.sum(u**2) + 1
    slack = 4 * (len(pairs) + 1) ** 0.5 * eps * terms
    lower = jnp.maximum(lower - slack, 0)
    return Values(end.v * scale + mean, lower * scale**2, end.steps, end.done)


def _pull(first, second, points):
    """The adjoint of the differences: what forces on pairs do to their points."""

    def pull(force):
        total = jnp.zeros((points, force.shape[1]), force.dtype)
        return total.at[first].add(force).at[second].add(-force)

    return pull


def _dual(force, u, radius, pull):
    """The dual function: at most the objective of any feasible values."""
    moved = pull(force)
    lengths = jnp.sqrt(jnp.sum(force**2, 1))
    return jnp.sum(moved * u) - jnp.sum(moved**2) / 2 - jnp.sum(radius * lengths)


def _hessian(q, length, excess, rho, first, second, points):
    """One of the generalised Hessians, (points * outputs) squared."""
    m = q.shape[1]
    active = (excess > 0)[:, None, None]
    unit = q / jnp.where(length > 0, length, 1)[:, None]
    along = unit[:, :, None] * unit[:, None, :]
    share = jnp.where(length > 0, excess / jnp.where(length > 0, length, 1), 0)
    eye = jnp.eye(m, dtype=q.dtype)[None]
    block = share[:, None, None] * eye + (1 - share)[:, None, None] * along
    block = jnp.where(active, rho * block, 0)
    off = jnp.zeros((points, points, m, m), q.dtype).at[first, second].add(-block)
    off = off + jnp.swapaxes(off, 0, 1)
    here = jnp.arange(points)
    diagonal = jnp.eye(m, dtype=q.dtype)[None] - jnp.sum(off, 1)
    full = off.at[here, here].add(diagonal)
    return jnp.swapaxes(full, 1, 2).reshape(points * m, points * m)


def _line_search(value, v, move, y, rho, slope):
    """The first of the halved steps that descends enough."""
    start = value(v, y, rho)
    # Below its rounding a value cannot be told from a smaller one.
    blur = 8 * float(jnp.finfo(v.dtype).eps) * start

    def fails(length):
        there = value(v + length * move, y, rho)
        return (there > start + 1e-4 * length * slope + blur) & (length > 1e-6)

    length = jax.lax.while_loop(fails, lambda t: t / 2, jnp.ones((), v.dtype))
    return v + length * move


def _lengths(v, first, second):
    return jnp.sqrt(jnp.sum((v[first] - v[second]) ** 2, 1))


def _norm(array):
    return jnp.sqrt(jnp.sum(array**2))


def all_pairs(points: int) -> np.ndarray:
    """Every pair once, (points (points - 1) / 2, 2)."""
    return np.stack(np.triu_indices(points, 1), 1)


def spanner(x: np.ndarray, stretch: float) -> np.ndarray:
    """A part of the pairs whose paths are at most `stretch` times the distances.

    Greedy: from the shortest pair on, one is taken if the paths so far are too long.
    Values that keep a constant along it keep `stretch` times the constant everywhere.
    Costs points^2 for each pair that is taken, of which there are a few a point.
    """
    points = len(x)
    pairs = all_pairs(points)
    lengths = np.sqrt(np.sum((x[pairs[:, 0]] - x[pairs[:, 1]]) ** 2, 1))
    paths = np.full((points, points), np.inf)
    np.fill_diagonal(paths, 0.0)
    taken = []
    for place in np.argsort(lengths, kind="stable"):
        (i, j), length = pairs[place], lengths[place]
        if paths[i, j] > stretch * length:
            taken.append(place)
            through = paths[:, i, None] + length + paths[None, j]
            paths = np.minimum(paths, np.minimum(through, through.T))
    return pairs[np.array(taken, int)]
