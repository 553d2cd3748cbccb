"""Penalty methods: first derivatives only, no convexity, many lower answers, sets.

Both solvers look for a saddle point of `(h_s(x, y) - f(x, z)) / s`, `h_s = s F + f`,
smoothed by proximal terms around running centres: `w` near `prox_{rho h_s}` of the
centre `y` and `u` near `prox_{rho f}` of the centre `z`, then

    y += beta (w - y),  z += beta (u - z),
    x <- P_X(x - alpha (grad_x F(x, w) + (grad_x f(x, w) - grad_x f(x, u)) / s)).

`Penalty` takes several lower steps a round and averages several draws for `x`;
`SingleLoopPenalty` takes one of each and corrects its three estimates by what the same
draw says of the last point (recursive momentum). `w` and `u` always see the same draws:
their difference is divided by `s`.

Use them where the lower level has many answers or a set Y, or second derivatives are
not to be had. `psi_s` is within `O(s)` of the problem's value under a proximal error
bound only. Directions in which the lower level is flat move at speed `beta rho s` a
round, and `x` must be slower still: stepsizes of order `s`.

Source: J. Kwon, D. Kwon, S. Wright and R. Nowak (2024), On Penalty Methods for
Nonconvex Bilevel Optimization and First-Order Stochastic Approximation, ICLR 2024,
arXiv 2309.01753.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core._checks import check_nonnegative, check_positive, is_traced
from ._alternating import (
    AbstractAlternating,
    Iterate,
    Oracles,
    advanced,
    descend,
    lower_gradient,
    upper_step,
)
from ._penalty_gradient import check_sets_only, penalty_direction
from ._problem import BilevelPoint

Size = Float[Array, ""] | float


class _Centres(eqx.Module):
    """What both methods keep besides `x`, `w` (as `Iterate.y`) and the adjoint."""

    y: PyTree[Array]
    z: PyTree[Array]
    u: PyTree[Array]
    estimates: Any = None  # of the gradients in w, u and x
    previous: Any = None  # the point (x, w, u) where they were made


class Penalty(AbstractAlternating):
    """Double-loop penalty method with proximal centres.

    `inner_steps` times two lower gradients and one upper, and `samples` times the same
    for `x`, a round.

    Args:
        stepsize: `alpha`, of `x`; small against `sigma` where the lower level has
            flat directions.
        lower_stepsize: `gamma`, of `w` and `u`; below `1 / (L + 1 / rho)`.
        sigma: The penalty parameter `s`; the bias of the answer is of its order.
        rho: Proximal parameter; below the inverse of the lower level's weak convexity.
        averaging: `beta` in (0, 1], of the centres.
        inner_steps: Lower steps a round (`T` in the paper).
        samples: Draws that the direction for `x` averages (`M`).
        power: `sigma_k = sigma (k + 1)^-power`; 0 keeps it.
        key: Draws the batches; needed when the problem has `sample`.

    Raises:
        ValueError: if a setting is out of range, or the problem has constraints, or
            `sample` without `key`. A set Y that is unbounded, without a coercive level,
            shows as the status DIVERGED.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import BilevelProblem, Penalty
        >>> problem = BilevelProblem(  # the lower level fixes y[0] + y[1] alone
        ...     lambda x, y: jnp.sum((y - 1) ** 2) / 2 + (x - 1) ** 2,
        ...     lambda x, y: (y[0] + y[1] - x) ** 2 / 2,
        ...     unique=False,
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array([1.0, -1.0]))
        >>> method = Penalty(0.1, 0.25, sigma=0.1, averaging=1.0, inner_steps=3)
        >>> bool(abs(solve(problem, method, start).x.x - 1.2) < 0.02)
        True

    Source: arXiv 2309.01753, algorithm 1.

    Differences: Constant `inner_steps` and `samples`, where the paper lets both grow;
        the lower steps start from the last proximal points.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.1
    sigma: Size = 0.1
    rho: Size = 1.0
    averaging: Size = 0.5
    inner_steps: int = eqx.field(static=True, default=10)
    samples: int = eqx.field(static=True, default=1)
    power: Size = 0.0
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        check_positive("Penalty", "inner_steps", self.inner_steps)
        check_positive("Penalty", "samples", self.samples)
        check_nonnegative("Penalty", "power", self.power)
        _check(self)

    def check(self, problem):
        check_sets_only("Penalty", problem)

    def extra(self, problem, start):
        return _Centres(*(jtu.tree_map(jnp.copy, start.y) for _ in range(3)))

    def point(self, problem, iterate):
        return _point(problem, iterate)

    def advance(self, problem, iterate):
        key, used, last = jax.random.split(iterate.key, 3)
        x, at = iterate.x, iterate.extra
        sigma = _sigma(self, iterate)

        def inner(carry, key):
            drawn = problem.draw(key)
            slopes = _lower_slopes(drawn, x, *carry, sigma)
            return _proximal_steps(self, problem, at, carry, slopes), None

        draws = jax.random.split(used, self.inner_steps)
        (w, u), _ = jax.lax.scan(inner, (iterate.y, at.u), draws)
        centres = _follow(self, at, w, u)

        def more(total, key):
            direction = penalty_direction(problem.draw(key), x, w, u, sigma)
            return descend(total, direction, -1 / self.samples), None

        zero = jtu.tree_map(jnp.zeros_like, x)
        draws = jax.random.split(last, self.samples)
        direction, _ = jax.lax.scan(more, zero, draws)
        x = upper_step(problem, x, direction, self.stepsize)
        calls = self.inner_steps + self.samples
        cost = Oracles(upper=calls, lower=2 * calls)
        adjoint = _adjoint(w, u, sigma)
        return advanced(iterate, key, cost, x=x, y=w, adjoint=adjoint, extra=centres)


class SingleLoopPenalty(AbstractAlternating):
    """Single-loop penalty method with recursive momentum.

    One draw a round, looked at in two points: two upper and four lower gradients.

    Args:
        stepsize: As `Penalty`.
        lower_stepsize: As `Penalty`.
        sigma: As `Penalty`.
        rho: As `Penalty`.
        averaging: As `Penalty`.
        momentum: `eta` in (0, 1]: how much of an estimate is forgotten a round; 1 is
            the plain stochastic gradient.
        power: As `Penalty`.
        key: Draws the batches; needed when the problem has `sample`.

    Raises:
        ValueError: as `Penalty`, or if `momentum` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import BilevelProblem, SingleLoopPenalty
        >>> problem = BilevelProblem(
        ...     lambda x, y: jnp.sum((y - 1) ** 2) / 2 + (x - 1) ** 2,
        ...     lambda x, y: (y[0] + y[1] - x) ** 2 / 2,
        ...     unique=False,
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array([1.0, -1.0]))
        >>> method = SingleLoopPenalty(0.05, 0.25, sigma=0.1, averaging=1.0)
        >>> bool(abs(solve(problem, method, start).x.x - 1.2) < 0.02)
        True

    Source: arXiv 2309.01753, algorithm 2; recursive momentum: A. Cutkosky and F.
        Orabona (2019), arXiv 1905.10018.

    Differences: All estimates are made at one point `(x, w, u)`, and `x`, `w`, `u`
        move from it at once.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.1
    sigma: Size = 0.1
    rho: Size = 1.0
    averaging: Size = 0.5
    momentum: Size = 0.1
    power: Size = 0.0
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        check_nonnegative("SingleLoopPenalty", "power", self.power)
        _check(self)
        if not is_traced(self.momentum) and not 0 < self.momentum <= 1:
            raise ValueError(
                "SingleLoopPenalty: `momentum` must lie in (0, 1] (got "
                f"{self.momentum})."
            )

    def check(self, problem):
        check_sets_only("SingleLoopPenalty", problem)

    def extra(self, problem, start):
        y, z, u, w = (jtu.tree_map(jnp.copy, start.y) for _ in range(4))
        x = jtu.tree_map(jnp.copy, start.x)
        zeros = jtu.tree_map(jnp.zeros_like, (w, u, x))
        return _Centres(y, z, u, zeros, (x, w, jtu.tree_map(jnp.copy, u)))

    def point(self, problem, iterate):
        return _point(problem, iterate)

    def advance(self, problem, iterate):
        key, used = jax.random.split(iterate.key)
        at, sigma = iterate.extra, _sigma(self, iterate)
        drawn, here = problem.draw(used), (iterate.x, iterate.y, at.u)

        def gradients(x, w, u):
            slopes = _lower_slopes(drawn, x, w, u, sigma)
            return (*slopes, penalty_direction(drawn, x, w, u, sigma))

        new, old = gradients(*here), gradients(*at.previous)
        # The first estimate is the plain gradient.
        keep = jnp.where(iterate.count == 0, 0, 1 - jnp.asarray(self.momentum))

        def correct(new, old, estimate):
            return new + keep.astype(new.dtype) * (estimate - old)

        estimates = jtu.tree_map(correct, new, old, at.estimates)
        slopes, direction = estimates[:2], estimates[2]
        w, u = _proximal_steps(self, problem, at, here[1:], slopes)
        centres = _follow(self, at, w, u, estimates, here)
        x = upper_step(problem, iterate.x, direction, self.stepsize)
        cost = Oracles(upper=2, lower=4)
        adjoint = _adjoint(w, u, sigma)
        return advanced(iterate, key, cost, x=x, y=w, adjoint=adjoint, extra=centres)


def _lower_slopes(problem, x, w, u, sigma):
    """`grad_y h_s(x, w)` and `grad_y f(x, u)`."""
    force = jax.grad(problem.upper_value, argnums=1)(x, w)
    return (
        descend(lower_gradient(problem, x, w), force, -sigma),
        lower_gradient(problem, x, u),
    )


def _proximal_steps(solver, problem, centres, points, slopes):
    """A (projected) step of each of `w` and `u` towards its proximal point."""

    def step(point, centre, slope):
        pull = jtu.tree_map(jnp.subtract, point, centre)
        point = descend(
            point, descend(slope, pull, -1 / solver.rho), solver.lower_stepsize
        )
        return point if problem.project_y is None else problem.project_y(point)

    (w, u), (slope_w, slope_u) = points, slopes
    return step(w, centres.y, slope_w), step(u, centres.z, slope_u)


def _follow(solver, at, w, u, estimates=None, previous=None):
    """The centres move towards the proximal points."""

    def move(centre, point):
        gap = jtu.tree_map(jnp.subtract, centre, point)
        return descend(centre, gap, solver.averaging)

    return _Centres(move(at.y, w), move(at.z, u), u, estimates, previous)


def _sigma(solver, iterate: Iterate):
    dtype = jnp.result_type(*jtu.tree_leaves(iterate.y))
    rounds = iterate.count.astype(dtype) + 1
    return jnp.asarray(solver.sigma, dtype) * rounds ** -jnp.asarray(
        solver.power, dtype
    )


def _adjoint(w, u, sigma):
    """`(w - u) / s`: stationarity of `h_s` at `w` minus that of `f` at `u`."""
    return jtu.tree_map(lambda a, b: (a - b) / sigma.astype(a.dtype), w, u)


def _point(problem, iterate):
    """The iterate as a candidate answer.

    With a set Y the lower level's condition is a projected step, in whose fixed
    directions (those the projection removes) the adjoint is what the equation leaves.
    """
    x, y, adjoint = iterate.x, iterate.y, iterate.adjoint
    if problem.project_y is None:
        return BilevelPoint(x, y, adjoint)
    moved = descend(y, lower_gradient(problem, x, y), 1)
    _, free = jax.linearize(problem.project_y, moved)
    adjoint = free(adjoint)
    gap = problem.condition(BilevelPoint(x, y, adjoint)).y
    fixed = jtu.tree_map(jnp.subtract, gap, free(gap))
    return BilevelPoint(x, y, jtu.tree_map(jnp.subtract, adjoint, fixed))


def _check(solver):
    name = type(solver).__name__
    for field in ("stepsize", "lower_stepsize", "sigma", "rho"):
        check_positive(name, field, getattr(solver, field))
    if not is_traced(solver.averaging) and not 0 < solver.averaging <= 1:
        raise ValueError(
            f"{name}: `averaging` must lie in (0, 1] (got {solver.averaging})."
        )
