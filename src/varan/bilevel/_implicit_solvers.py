"""The classical solvers by implicit gradients, and the unrolled one.

All hold `y` near the lower answer, estimate the adjoint `w = -(hess_yy f)^-1 grad_y F`
and move `x` along `grad_x F + (grad_xy f)' w`. They differ in the estimate:

| solver | adjoint | lower steps a round |
| --- | --- | --- |
| `AIDCG` | conjugate gradients, from the last one | several |
| `StocBiO` | a Neumann series | several |
| `TTSA` | a Neumann series cut at random, stepsizes on two time scales | one |
| `SOBA` | one step on its linear system | one |
| `MASOBA` | as `SOBA`, and the direction for `x` is averaged | one |
| `Unrolled` | the derivative of the lower steps themselves | several |

Use `AIDCG` where Hessians are exact (no `sample`), `SOBA` or `MASOBA` on minibatches;
`Unrolled` where few lower steps are all that is meant. All need a strongly convex lower
level without sets or constraints.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_positive, is_traced
from ._alternating import (
    AbstractAlternating,
    Iterate,
    Oracles,
    adjoint_residual,
    advanced,
    conjugate_gradients,
    descend,
    hessian_product,
    lower_step,
    lower_steps,
    upper_direction,
    upper_gradients,
    upper_step,
)

Size = Float[Array, ""] | float


class SOBA(AbstractAlternating):
    """Stochastic bilevel algorithm: `x`, `y` and the adjoint move at once.

    One gradient of each level, one Hessian and one cross product a round.

    Args:
        stepsize: Of `x`.
        lower_stepsize: Of `y`; below `2 / L`, `L` the lower level's smoothness.
        adjoint_stepsize: Of the adjoint; below `2 / L`.
        key: Draws the batches; needed when the problem has `sample`.

    Raises:
        ValueError: if a stepsize is not positive, or the problem has constraints, a
            set Y, or `sample` without `key`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import SOBA, BilevelProblem
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> round(float(solve(problem, SOBA(0.1, 0.5, 0.5), start).x.x), 2)
        0.5

    Source: M. Dagréou, P. Ablin, S. Vaiter and T. Moreau (2022), A framework for
        bilevel optimization that enables stochastic and global variance reduction
        algorithms, arXiv 2201.13409, algorithm 1 with the directions of SOBA.

    Differences: Fixed stepsizes; the paper's decrease like powers of the round.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.1
    adjoint_stepsize: Size = 0.1
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        _check_sizes(self)

    def advance(self, problem, iterate):
        x, y, adjoint, direction, key = _soba_round(self, problem, iterate)
        x = upper_step(problem, x, direction, self.stepsize)
        cost = Oracles(upper=1, lower=1, hessian=1, cross=1)
        return advanced(iterate, key, cost, x=x, y=y, adjoint=adjoint)


class MASOBA(AbstractAlternating):
    """SOBA with an average of the directions for `x`.

    The oracles of `SOBA` a round.

    Args:
        stepsize: Of `x`.
        lower_stepsize: Of `y`.
        adjoint_stepsize: Of the adjoint.
        averaging: Weight of the newest direction, in (0, 1]; 1 is SOBA one round late.
        key: Draws the batches; needed when the problem has `sample`.

    Raises:
        ValueError: as `SOBA`, or if `averaging` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import MASOBA, BilevelProblem
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> method = MASOBA(0.03, 0.5, 0.5, averaging=0.5)
        >>> round(float(solve(problem, method, start).x.x), 2)
        0.5

    Source: X. Chen, T. Xiao and K. Balasubramanian (2023), Optimal algorithms for
        stochastic bilevel optimization under relaxed smoothness conditions, arXiv
        2306.12067, algorithm 1.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.1
    adjoint_stepsize: Size = 0.1
    averaging: Size = 0.1
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        _check_sizes(self)
        if not is_traced(self.averaging) and not 0 < self.averaging <= 1:
            raise ValueError(
                f"MASOBA: `averaging` must lie in (0, 1] (got {self.averaging})."
            )

    def extra(self, problem, start):
        return jtu.tree_map(jnp.zeros_like, start.x)

    def advance(self, problem, iterate):
        x, y, adjoint, direction, key = _soba_round(self, problem, iterate)
        average = iterate.extra
        x = upper_step(problem, x, average, self.stepsize)
        change = jtu.tree_map(jnp.subtract, average, direction)
        average = descend(average, change, self.averaging)
        cost = Oracles(upper=1, lower=1, hessian=1, cross=1)
        return advanced(iterate, key, cost, x=x, y=y, adjoint=adjoint, extra=average)


class AIDCG(AbstractAlternating):
    """Approximate implicit differentiation with conjugate gradients.

    `inner_steps` lower gradients, up to `adjoint_steps + 1` Hessian products, one cross
    product and one upper gradient a round; `y` and adjoint start from the last ones.

    Args:
        stepsize: Of `x`.
        lower_stepsize: Of `y`.
        inner_steps: Lower steps a round.
        adjoint_steps: Steps of conjugate gradients a round.
        key: Draws the batches (one for all of a round's Hessian products); needed
            when the problem has `sample`.

    Raises:
        ValueError: if a setting is not positive, or the problem has constraints, a
            set Y, or `sample` without `key`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import AIDCG, BilevelProblem
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> round(float(solve(problem, AIDCG(0.1, 0.5), start).x.x), 2)
        0.5

    Source: F. Pedregosa (2016), arXiv 1602.02355; the form with warm starts and a
        fixed number of steps is AID-BiO of K. Ji, J. Yang and Y. Liang (2021), Bilevel
        optimization: convergence analysis and enhanced design, arXiv 2010.07962,
        algorithm 1.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.1
    inner_steps: int = eqx.field(static=True, default=10)
    adjoint_steps: int = eqx.field(static=True, default=10)
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        _check_sizes(self)

    def advance(self, problem, iterate):
        key, *keys = jax.random.split(iterate.key, 4)
        x = iterate.x
        y = lower_steps(
            problem, x, iterate.y, self.lower_stepsize, keys[0], self.inner_steps
        )
        lower, upper = problem.draw(keys[1]), problem.draw(keys[2])
        slope, force = upper_gradients(upper, x, y)
        right = jtu.tree_map(jnp.negative, force)
        eps = jnp.finfo(jnp.result_type(*jtu.tree_leaves(y))).eps
        tol = float(eps) * jnp.sqrt(sum(jnp.sum(v * v) for v in jtu.tree_leaves(right)))
        adjoint, _, products = conjugate_gradients(
            lambda v: hessian_product(lower, x, y, v),
            right,
            iterate.adjoint,
            tol,
            self.adjoint_steps,
        )
        direction = upper_direction(lower, x, y, adjoint, slope)
        x = upper_step(problem, x, direction, self.stepsize)
        cost = Oracles(upper=1, lower=self.inner_steps, hessian=products, cross=1)
        return advanced(iterate, key, cost, x=x, y=y, adjoint=adjoint)


class StocBiO(AbstractAlternating):
    """Implicit gradients by a truncated Neumann series, each factor a fresh batch.

    `inner_steps` lower gradients, `adjoint_steps` Hessian products, one cross product
    and one upper gradient a round.

    Args:
        stepsize: Of `x`.
        lower_stepsize: Of `y`.
        adjoint_stepsize: `eta` of the series `eta sum_q (I - eta H)^q`, below `2 / L`.
        inner_steps: Lower steps a round.
        adjoint_steps: Products of the series.
        key: Draws the batches; needed when the problem has `sample`.

    Raises:
        ValueError: as `AIDCG`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import BilevelProblem, StocBiO
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> method = StocBiO(0.1, 0.5, 0.5, adjoint_steps=20)
        >>> round(float(solve(problem, method, start).x.x), 2)
        0.5

    Source: K. Ji, J. Yang and Y. Liang (2021), Bilevel optimization: convergence
        analysis and enhanced design, arXiv 2010.07962, algorithm 2.

    Differences: All batches have the size of the problem's `sample`; the paper's
        series draws smaller batches for later factors.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.1
    adjoint_stepsize: Size = 0.1
    inner_steps: int = eqx.field(static=True, default=10)
    adjoint_steps: int = eqx.field(static=True, default=10)
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        _check_sizes(self)

    def advance(self, problem, iterate):
        key, *keys = jax.random.split(iterate.key, 5)
        x = iterate.x
        y = lower_steps(
            problem, x, iterate.y, self.lower_stepsize, keys[0], self.inner_steps
        )
        slope, force = upper_gradients(problem.draw(keys[1]), x, y)

        def factor(carry, key):
            power, total = carry
            product = hessian_product(problem.draw(key), x, y, power)
            power = descend(power, product, self.adjoint_stepsize)
            return (power, jtu.tree_map(jnp.add, total, power)), None

        draws = jax.random.split(keys[2], self.adjoint_steps)
        (_, total), _ = jax.lax.scan(factor, (force, force), draws)
        adjoint = _negated(total, self.adjoint_stepsize)
        direction = upper_direction(problem.draw(keys[3]), x, y, adjoint, slope)
        x = upper_step(problem, x, direction, self.stepsize)
        cost = Oracles(
            upper=1, lower=self.inner_steps, hessian=self.adjoint_steps, cross=1
        )
        return advanced(iterate, key, cost, x=x, y=y, adjoint=adjoint)


class TTSA(AbstractAlternating):
    """Two-timescale stochastic approximation: `y` moves on the faster time scale.

    One lower gradient, fewer than `adjoint_steps` Hessian products (their number is
    drawn, so that the estimate's bias falls geometrically), one cross product and one
    upper gradient a round. Draws also on a problem without `sample`.

    Args:
        stepsize: `a` in `a (k + 1)^-decay` for `x`.
        lower_stepsize: `b` in `b (k + 1)^-lower_decay` for `y`.
        adjoint_stepsize: At most `1 / L`.
        adjoint_steps: Bound of the random number of factors.
        decay: 3/5 in the paper for a nonconvex upper level; 0 keeps the stepsize.
        lower_decay: 2/5 in the paper.
        key: Draws numbers of factors and batches.

    Raises:
        ValueError: as `AIDCG`, or if a decay is not in [0, 1].

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.bilevel import TTSA, BilevelProblem, trajectory
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> method = TTSA(0.2, 1.0, 1.0, key=jax.random.key(0))
        >>> last, _ = trajectory(
        ...     problem, method, start, lambda problem, iterate: iterate.x, steps=300
        ... )
        >>> bool(abs(last.x - 0.5) < 0.05)
        True

    Source: M. Hong, H.-T. Wai, Z. Wang and Z. Yang (2020), A two-timescale framework
        for bilevel optimization, arXiv 2007.05170, algorithm 1; the random series is
        that of S. Ghadimi and M. Wang (2018), arXiv 1802.02246.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.1
    adjoint_stepsize: Size = 0.1
    adjoint_steps: int = eqx.field(static=True, default=10)
    decay: Size = 0.6
    lower_decay: Size = 0.4
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        _check_sizes(self)
        for name in ("decay", "lower_decay"):
            value = getattr(self, name)
            if not is_traced(value) and not 0 <= value <= 1:
                raise ValueError(f"TTSA: `{name}` must lie in [0, 1] (got {value}).")

    def advance(self, problem, iterate):
        key, *keys = jax.random.split(iterate.key, 6)
        x, factors = iterate.x, self.adjoint_steps
        size = _decayed(self.lower_stepsize, self.lower_decay, iterate)
        y = lower_step(problem.draw(keys[0]), x, iterate.y, size)
        slope, force = upper_gradients(problem.draw(keys[1]), x, y)
        number = jax.random.randint(keys[2], (), 0, factors)
        draws = jax.random.split(keys[3], factors)

        def factor(i, power):
            product = hessian_product(problem.draw(draws[i]), x, y, power)
            return descend(power, product, self.adjoint_stepsize)

        power = jax.lax.fori_loop(0, number, factor, force)
        adjoint = _negated(power, factors * self.adjoint_stepsize)
        direction = upper_direction(problem.draw(keys[4]), x, y, adjoint, slope)
        size = _decayed(self.stepsize, self.decay, iterate)
        x = upper_step(problem, x, direction, size)
        cost = Oracles(upper=1, lower=1, hessian=number, cross=1)
        return advanced(iterate, key, cost, x=x, y=y, adjoint=adjoint)


class Unrolled(AbstractAlternating):
    """Iterative differentiation: the derivative of the lower steps themselves.

    `inner_steps` lower gradients forward, as many Hessian and cross products backward,
    and one upper gradient a round; memory for `inner_steps` copies of `y`. `y` starts
    from the last one.

    Args:
        stepsize: Of `x`.
        lower_stepsize: Of `y`.
        inner_steps: Lower steps a round.
        key: Draws the batches; needed when the problem has `sample`.

    Raises:
        ValueError: as `AIDCG`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import BilevelProblem, Unrolled
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> round(float(solve(problem, Unrolled(0.1, 0.5), start).x.x), 2)
        0.5

    Source: L. Franceschi, M. Donini, P. Frasconi and M. Pontil (2017), Forward and
        reverse gradient-based hyperparameter optimization, arXiv 1703.01785; with warm
        starts ITD-BiO of arXiv 2010.07962, algorithm 1.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.1
    inner_steps: int = eqx.field(static=True, default=10)
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        _check_sizes(self)

    def advance(self, problem, iterate):
        key, used, last = jax.random.split(iterate.key, 3)
        draws, upper = jax.random.split(used, self.inner_steps), problem.draw(last)

        def value(x, push):
            """`F` after the steps; `push` is added to every lower gradient."""

            def one(y, draw):
                y = lower_step(problem.draw(draw), x, y, self.lower_stepsize)
                return descend(y, push, self.lower_stepsize), None

            y, _ = jax.lax.scan(one, iterate.y, draws)
            return upper.upper_value(x, y), y

        # The derivative in `push` is the adjoint that the unrolled steps amount to.
        push = jtu.tree_map(jnp.zeros_like, iterate.y)
        gradient = jax.grad(value, argnums=(0, 1), has_aux=True)
        (direction, adjoint), y = gradient(iterate.x, push)
        x = upper_step(problem, iterate.x, direction, self.stepsize)
        steps = self.inner_steps
        cost = Oracles(upper=1, lower=steps, hessian=steps, cross=steps)
        return advanced(iterate, key, cost, x=x, y=y, adjoint=adjoint)


def _soba_round(solver: SOBA | MASOBA, problem, iterate: Iterate) -> tuple[Any, ...]:
    """New `y` and adjoint, and the direction for `x`, all from the old three."""
    key, first, second = jax.random.split(iterate.key, 3)
    x, y, adjoint = iterate.x, iterate.y, iterate.adjoint
    lower, upper = problem.draw(first), problem.draw(second)
    slope, force = upper_gradients(upper, x, y)
    residual = adjoint_residual(lower, x, y, adjoint, force)
    direction = upper_direction(lower, x, y, adjoint, slope)
    adjoint = descend(adjoint, residual, solver.adjoint_stepsize)
    y = lower_step(lower, x, y, solver.lower_stepsize)
    return x, y, adjoint, direction, key


def _negated(tree, size):
    return jtu.tree_map(lambda v: -jnp.asarray(size, v.dtype) * v, tree)


def _decayed(size, power, iterate):
    dtype = jnp.result_type(*jtu.tree_leaves(iterate.y))
    rounds = iterate.count.astype(dtype) + 1
    return jnp.asarray(size, dtype) * rounds ** -jnp.asarray(power, dtype)


def _check_sizes(solver):
    """Stepsizes and numbers of steps are positive."""
    name = type(solver).__name__
    for field in (
        "stepsize",
        "lower_stepsize",
        "adjoint_stepsize",
        "inner_steps",
        "adjoint_steps",
    ):
        if hasattr(solver, field):
            check_positive(name, field, getattr(solver, field))
