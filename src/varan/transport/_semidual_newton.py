"""Newton's method on the semi-dual, with epsilon lowered step by step.

The columns' potentials are eliminated, so that only the shorter side's errors remain;
their Newton system is a graph Laplacian (`_schur`). Early systems are well conditioned
and a few conjugate-gradient steps in single precision, on a matrix half as large to
read, give a direction good enough for a full contraction; late systems at small epsilon
are not, and are factorised by Cholesky. Which one is decided in the run, by what the
gradients cost and whether they worked. Nothing of that precision reaches the answer:
marginals are always evaluated in the problem's dtype.

The problem is first solved roughly at a large epsilon, which is then lowered by factors
of 4: the number of Newton steps grows with `log(1 / epsilon)` and the time hardly does.
Use it for high accuracy (errors of 1e-6 and below) at any epsilon.

Cost: a Newton step reads the matrix 2 (k + 2) times, k gradient steps, or takes
`m m n + m^3 / 3` multiplications where Cholesky is used.
"""

from __future__ import annotations

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..core import Solver, State, Status
from ..core._checks import check_choice
from ..core._control import when
from ._kernel import Scaling, absorb_limit, tight_scaling
from ._problem import check_entropic
from ._schur import apply_inverse, factorise

# The first level's epsilon, as a share of the costs' spread, is at most this: there
# Sinkhorn alone contracts quickly.
_COARSEST = 0.02
_FACTOR = 4.0
# A level is left when its L1 error is this small: the next level's start is as good.
_LEVEL_TOL = 1e-2
_LEVEL_STEPS = 20
_WARM_SWEEPS = 10
# A start with less error than this is near enough to begin at the wanted epsilon.
_NEAR = 0.1
# Entries of a Newton direction, in units of epsilon: more would overflow `exp`.
_LONGEST = 30.0
_ARMIJO = 1e-4
_HALVINGS = 25


class SemiDualState(eqx.Module):
    """An iterate with exact columns.

    Args:
        phi: Row corrections, in units of epsilon.
        psi: Column corrections that make the columns exact.
        rows: Row marginals of the plan.
        direct: Whether gradients have failed here and Cholesky is used.
    """

    phi: Float[Array, " m"]
    psi: Float[Array, " n"]
    rows: Float[Array, " m"]
    direct: Bool[Array, ""]

    def error(self, a):
        """L1 error of the rows; the columns have none."""
        return jnp.sum(jnp.abs(self.rows - a))


class _Memory(eqx.Module):
    kernel: Scaling
    at: SemiDualState
    # Levels of epsilon still above the problem's, and whether the kernel of the
    # present one has yet to be built.
    left: Int[Array, ""]
    pending: Bool[Array, ""]


class SemiDualNewton(Solver):
    """Newton's method on the semi-dual of `EntropicTransport`.

    The first step also lowers epsilon from a coarse level to the problem's, unless the
    start is near the solution.

    Args:
        linear: Linear solves by `"gradients"` (Jacobi-preconditioned conjugate
            gradients), by `"cholesky"`, or `"auto"`: gradients until they cost more
            than Cholesky or stop helping.

    Raises:
        ValueError: If `linear` is unknown.

    Statuses: `STALLED` where neither the Newton direction nor a Sinkhorn sweep
    improves the dual, as when the tolerance is below what the dtype can reach.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.transport import EntropicTransport, SemiDualNewton
        >>> cost = (jnp.arange(4.0)[:, None] - jnp.arange(5.0)[None, :]) ** 2 / 16
        >>> problem = EntropicTransport(cost, epsilon=0.01)
        >>> solution = solve(problem, SemiDualNewton(), problem.start(), tol=1e-5)
        >>> bool(solution.converged)
        True

    Source:
        Semi-dual: Cuturi, Peyré, 2018 (arXiv 1812.04426); Newton for it: Brauer,
        Clason, Lorenz, Wirth, 2017 (arXiv 1710.06635).
    """

    linear: Literal["auto", "gradients", "cholesky"] = eqx.field(
        static=True, default="auto"
    )

    def __check_init__(self):
        check_choice(
            "SemiDualNewton", "linear", self.linear, ("auto", "gradients", "cholesky")
        )

    def init(self, problem, start):
        check_entropic("SemiDualNewton", problem)
        problem, (f, g), flip = _orient(problem, start)
        kernel = tight_scaling(problem, f, g, problem.epsilon)
        phi = (f - kernel.f) / problem.epsilon
        at = complete(problem, kernel, phi, jnp.asarray(self.linear == "cholesky"))
        at = _finite(at)
        near = at.error(problem.a) < _NEAR
        far_f, far_g, levels = _coarse_start(problem, g)
        x = kernel.potentials(problem, at.phi, at.psi)
        kernel = Scaling(
            kernel.matrix,
            jnp.where(near, kernel.f, far_f),
            jnp.where(near, kernel.g, far_g),
        )
        # A far start's corrections belong to the kernel that is dropped.
        phi, psi = jnp.where(near, at.phi, 0), jnp.where(near, at.psi, 0)
        at = SemiDualState(phi, psi, at.rows, at.direct)
        memory = _Memory(kernel, at, jnp.where(near, 0, levels), ~near)
        return _state(problem, x, memory, flip, 2, Status.RUNNING)

    def step(self, problem, state):
        problem, _, flip = _orient(problem, state.x)

        def body(carry):
            memory, work, _, rounds = carry
            memory, built = _build(problem, memory)
            at, spent, failed = newton_step(
                self.linear, problem, memory.kernel, memory.at
            )
            done = (at.error(problem.a) <= _LEVEL_TOL) | (rounds > _LEVEL_STEPS)
            done = done | failed
            descend = (memory.left > 0) & done
            memory = _Memory(
                memory.kernel, at, memory.left - descend.astype(jnp.int32), descend
            )
            rounds = jnp.where(descend, 0, rounds + 1)
            return memory, work + built + spent, failed, rounds

        def unfinished(carry):
            memory, _, _, rounds = carry
            # Above the wanted epsilon the errors say nothing about the problem.
            return (memory.left > 0) | memory.pending | (rounds == 0)

        zero = jnp.asarray(0, jnp.int32)
        memory, work, failed, _ = jax.lax.while_loop(
            unfinished, body, (state.memory, zero, jnp.asarray(False), zero)
        )
        x = memory.kernel.potentials(problem, memory.at.phi, memory.at.psi)
        status = jnp.where(failed, Status.STALLED, Status.RUNNING)
        return _state(problem, x, memory, flip, work, status)


def _orient(problem, x):
    """Exchanges the sides where that makes the Newton system smaller."""
    if problem.a.size <= problem.b.size:
        return problem, x, False
    return problem.transpose(), (x[1], x[0]), True


def _state(problem, x, memory, flip, work, status):
    errors = (memory.at.rows - problem.a, jnp.zeros_like(problem.b))
    if flip:
        x, errors = x[::-1], errors[::-1]
    return State(x, errors, memory, evaluations=work, status=status)


def complete(problem, kernel, phi, direct) -> SemiDualState:
    """Makes the columns exact: one read; the rows then follow: another."""
    psi = jnp.log(problem.b) - kernel.columns(phi)
    rows = jnp.exp(phi + kernel.rows(psi))
    return SemiDualState(phi, psi, rows, direct)


def _finite(at):
    """A start whose plan under- or overflows counts as an empty plan."""
    good = jnp.all(jnp.isfinite(at.rows)) & jnp.all(jnp.isfinite(at.psi))
    psi, rows = jnp.where(good, at.psi, 0), jnp.where(good, at.rows, 0)
    return SemiDualState(at.phi, psi, rows, at.direct)


def _coarse_start(problem, g):
    """Potentials from which no kernel underflows, and how many levels lie ahead.

    Rows and columns of `C - f - g` all have a zero, and no entry is negative.
    """
    f = jnp.min(problem.cost - g[None, :], axis=1)
    g = jnp.min(problem.cost - f[:, None], axis=0)
    spread = jnp.max(problem.cost - f[:, None] - g[None, :])
    ratio = jnp.maximum(_COARSEST * spread / problem.epsilon, 1)
    levels = jnp.floor(jnp.log(ratio) / float(np.log(_FACTOR)))
    return f, g, levels.astype(jnp.int32)


def _build(problem, memory):
    """The kernel of the present level, where it is pending or corrections are large."""
    at, left = memory.at, memory.left
    size = jnp.maximum(jnp.max(jnp.abs(at.phi)), jnp.max(jnp.abs(at.psi)))
    epsilon = problem.epsilon * _FACTOR ** left.astype(at.phi.dtype)
    # What the old kernel's corrections were in units of: one level up.
    unit = jnp.where(memory.pending, _FACTOR * epsilon, epsilon)

    def build(carry):
        kernel, at, _ = carry
        f, g = kernel.f + unit * at.phi, kernel.g + unit * at.psi
        kernel = tight_scaling(problem, f, g, epsilon)
        phi = jnp.log(problem.a) - kernel.rows(jnp.zeros_like(g))
        at, sweeps = _warm(problem, kernel, phi, at.direct)
        return kernel, at, sweeps + 2

    zero = jnp.asarray(0, jnp.int32)
    needed = memory.pending | (size > absorb_limit(size.dtype))
    kernel, at, work = when(needed, build, (memory.kernel, at, zero))
    return _Memory(kernel, at, left, jnp.asarray(False)), work


def _warm(problem, kernel, phi, direct):
    """Sinkhorn sweeps, which are cheap while the error is large."""
    nothing = SemiDualState(phi, jnp.zeros_like(problem.b), problem.a * jnp.inf, direct)

    def sweep(carry):
        at, phi, count = carry
        at = complete(problem, kernel, phi, direct)
        return at, phi + jnp.log(problem.a) - jnp.log(at.rows), count + 1

    def proceed(carry):
        at, _, count = carry
        return (count < _WARM_SWEEPS) & (at.error(problem.a) > _LEVEL_TOL)

    at, _, count = jax.lax.while_loop(
        proceed, sweep, (nothing, phi, jnp.asarray(0, jnp.int32))
    )
    return at, count


def newton_step(linear, problem, kernel, at):
    """One damped Newton step; a Sinkhorn sweep where its line search fails.

    Returns:
        The next iterate, the work in evaluations of the condition (two reads of the
        matrix each), and whether nothing improved.
    """
    error = problem.a - at.rows
    direction, work, solved = _direction(linear, problem, kernel, at, error)
    new, tried = _search(problem, kernel, at, error, direction)
    before, after = at.error(problem.a), new.error(problem.a)
    # A full step with an accurate direction contracts; one that did not was inaccurate.
    poor = (tried == 1) & ~(after < before / 2)
    direct = at.direct | ~solved | poor if linear == "auto" else at.direct
    new = SemiDualState(new.phi, new.psi, new.rows, direct)
    return new, work + tried, (tried > _HALVINGS) & ~(after < before)


def _direction(linear, problem, kernel, at, error):
    """The Newton direction (in units of epsilon), its work, whether it is accurate."""
    m = problem.a.size
    plan = jnp.exp(at.phi)[:, None] * kernel.matrix * jnp.exp(at.psi)[None, :]
    # Beyond so many gradient steps Cholesky is cheaper (measured: matrix reads in
    # single precision against a gemm and a factorisation, one or two cores).
    limit = m // 4 + 25 if linear == "auto" else 4 * m
    dense_work = jnp.asarray(max(1, m // 8), jnp.int32)

    def cholesky(_):
        factor = factorise(plan, at.rows, problem.b)
        return apply_inverse(factor, error), dense_work, jnp.asarray(True)

    def gradients(_):
        return conjugate_gradients(plan, at.rows, problem.b, error, limit)

    if linear == "cholesky":
        return cholesky(None)
    if linear == "gradients":
        return gradients(None)
    zero = jnp.asarray(0, jnp.int32)
    tried = when(~at.direct, gradients, (error, zero, jnp.asarray(False)))
    direction, more, _ = when(~tried[2], cholesky, tried)
    return direction, tried[1] + jnp.where(tried[2], 0, more), tried[2]


def conjugate_gradients(plan, rows, columns, error, limit):
    """Jacobi-preconditioned conjugate gradients on the Schur complement, in float32.

    The relative accuracy asked for is that of the error itself (the forcing term of a
    quadratically convergent Newton method), within what single precision gives.
    """
    low = jnp.float32
    size = jnp.sum(jnp.abs(error))
    half = plan.astype(low) * jax.lax.rsqrt(columns).astype(low)[None, :]
    rows = rows.astype(low)
    diagonal = rows - jnp.sum(half * half, axis=1)
    scale = jax.lax.rsqrt(jnp.maximum(diagonal, 1e-6 * rows))
    half = scale[:, None] * half
    ridge = scale * scale * rows
    unit = jnp.where(size > 0, size, 1)
    # The null vector's share of it is rounding, far below the tolerance.
    right = scale * (error / unit).astype(low)
    tol = jnp.clip(size, 1e-5, 1e-2).astype(low)
    target = (tol * tol) * (right @ right)

    def body(carry):
        x, r, p, rr, k = carry
        q = ridge * p - half @ (p @ half)
        step = rr / (p @ q)
        x, r = x + step * p, r - step * q
        new = r @ r
        return x, r, r + (new / rr) * p, new, k + 1

    def proceed(carry):
        # NaN ends the loop as well.
        return (carry[3] > target) & (carry[4] < limit)

    zero = jnp.asarray(0, jnp.int32)
    start = (jnp.zeros_like(right), right, right, right @ right, zero)
    x, _, _, rr, k = jax.lax.while_loop(proceed, body, start)
    direction = (scale * x).astype(error.dtype) * unit
    # A step in single precision reads half the bytes.
    return direction, (k + 1) // 2 + 1, rr <= target


def _search(problem, kernel, at, error, direction):
    """Backtracks until the dual grows as Armijo asks; each trial is two reads.

    The last trial is a Sinkhorn sweep, which never lowers the dual.
    """
    direction = jnp.where(jnp.isfinite(direction), direction, 0)
    direction = jnp.clip(direction, -_LONGEST, _LONGEST)
    slope = error @ direction
    sweep = jnp.log(problem.a) - jnp.log(at.rows)
    # What differences of logarithms can resolve.
    noise = 8 * float(np.finfo(slope.dtype).eps)

    def trial(carry):
        t, _, _, count = carry
        move = jnp.where(count < _HALVINGS, t * direction, sweep)
        new = complete(problem, kernel, at.phi + move, at.direct)
        gain = problem.a @ move + problem.b @ (new.psi - at.psi)
        good = gain >= _ARMIJO * t * slope - noise
        return t / 2, new, good, count + 1

    def proceed(carry):
        _, _, good, count = carry
        return ~good & (count <= _HALVINGS)

    # A direction that does not ascend, as one of rounding alone, is not tried.
    first = jnp.where(slope > 0, 0, _HALVINGS).astype(jnp.int32)
    start = (jnp.ones_like(slope), at, jnp.asarray(False), first)
    _, new, _, count = jax.lax.while_loop(proceed, trial, start)
    return new, count
