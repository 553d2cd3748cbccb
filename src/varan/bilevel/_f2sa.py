"""F2SA: bilevel optimisation with gradients only, by a growing penalty.

Two copies of the lower variables: `z` follows the lower level, `y` the penalised
`F / lambda + f`. To first order in `1 / lambda`, `lambda (y - z)` is the adjoint, and

    grad_x F(x, y) + lambda (grad_x f(x, y) - grad_x f(x, z))

the hypergradient, with a bias of order `1 / lambda`. Use it where second derivatives
are not to be had; `Penalty` is its successor for lower levels that are not strongly
convex, with sets.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_nonnegative, check_positive
from ._alternating import (
    AbstractAlternating,
    Oracles,
    advanced,
    descend,
    lower_gradient,
    upper_gradients,
    upper_step,
)

Size = Float[Array, ""] | float


class F2SA(AbstractAlternating):
    """Fully first-order stochastic approximation.

    `inner_steps` times two lower gradients and one upper, then one of each more, a
    round; `y` and `z` see the same draws.

    Args:
        stepsize: Of `x`.
        lower_stepsize: Of `y` and `z`, for `F / lambda + f` and `f`.
        inner_steps: Steps of `y` and `z` a round.
        penalty: `lambda_0`, at least `2 L_F / mu` in the theory.
        power: `lambda_k = lambda_0 (k + 1)^power`; 0 keeps the penalty and its bias.
        key: Draws the batches; needed when the problem has `sample`.

    Raises:
        ValueError: if a setting is out of range, or the problem has constraints, a set
            Y, or `sample` without `key`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import F2SA, BilevelProblem
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> method = F2SA(0.1, 0.5, penalty=10.0)
        >>> bool(abs(solve(problem, method, start, max_steps=500).x.x - 0.5) < 0.02)
        True

    Source: J. Kwon, D. Kwon, S. Wright and R. Nowak (2023), A fully first-order method
        for stochastic bilevel optimization, arXiv 2301.10945, algorithm 1.

    Differences: The stepsizes of `x` and of the lower variables are set apart (in the
        paper all follow from two sequences); the penalty grows like a power.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.1
    inner_steps: int = eqx.field(static=True, default=1)
    penalty: Size = 10.0
    power: Size = 1 / 7
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        for name in ("stepsize", "lower_stepsize", "inner_steps", "penalty"):
            check_positive("F2SA", name, getattr(self, name))
        check_nonnegative("F2SA", "power", self.power)

    def extra(self, problem, start):
        return jtu.tree_map(jnp.copy, start.y)

    def advance(self, problem, iterate):
        key, used, last = jax.random.split(iterate.key, 3)
        x = iterate.x
        dtype = jnp.result_type(*jtu.tree_leaves(iterate.y))
        grown = (iterate.count.astype(dtype) + 1) ** jnp.asarray(self.power, dtype)
        penalty = jnp.asarray(self.penalty, dtype) * grown

        def inner(carry, key):
            y, z = carry
            drawn = problem.draw(key)
            force = jax.grad(drawn.upper_value, argnums=1)(x, y)
            slope = descend(lower_gradient(drawn, x, y), force, -1 / penalty)
            z = descend(z, lower_gradient(drawn, x, z), self.lower_stepsize)
            return (descend(y, slope, self.lower_stepsize), z), None

        draws = jax.random.split(used, self.inner_steps)
        (y, z), _ = jax.lax.scan(inner, (iterate.y, iterate.extra), draws)
        drawn = problem.draw(last)
        slope, _ = upper_gradients(drawn, x, y)
        above, below = (jax.grad(drawn.lower_value)(x, v) for v in (y, z))
        gap = jtu.tree_map(jnp.subtract, above, below)
        x = upper_step(problem, x, descend(slope, gap, -penalty), self.stepsize)
        adjoint = jtu.tree_map(lambda a, b: penalty.astype(a.dtype) * (a - b), y, z)
        steps = self.inner_steps
        cost = Oracles(upper=steps + 1, lower=2 * steps + 2)
        return advanced(iterate, key, cost, x=x, y=y, adjoint=adjoint, extra=z)
