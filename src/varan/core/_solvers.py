"""The two plainest solvers: one evaluation of the condition a step."""

from __future__ import annotations

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float

from ._checks import check_positive
from ._problem import Problem
from ._solver import Solver, State


class GradientDescent(Solver):
    """Gradient descent with a fixed step: `x <- x - stepsize * condition(x)`.

    Converges linearly on a strongly convex function with L-Lipschitz gradient when
    `stepsize <= 1 / L`; one gradient a step, and the stopping test is free.

    Args:
        stepsize: Positive; in units of x per unit of gradient.

    Raises:
        ValueError: If `stepsize` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import GradientDescent, Smooth, solve
        >>> problem = Smooth(lambda x: jnp.sum((x - 1.0) ** 2))
        >>> solve(problem, GradientDescent(0.4), jnp.zeros(2)).x.round(2)
        Array([1., 1.], dtype=float32)

    Source:
        Cauchy, 1847; for the rate Nesterov, 2004, theorem 2.1.14.
    """

    stepsize: float | Float[Array, ""]

    def __check_init__(self):
        check_positive("GradientDescent", "stepsize", self.stepsize)

    def init(self, problem: Problem, start):
        return State(start, problem.condition(start))

    def step(self, problem: Problem, state: State):
        x = _move(state.x, state.condition, -self.stepsize)
        return State(x, problem.condition(x))


class FixedPointIteration(Solver):
    """Damped Picard iteration: `x <- x + damping * (function(x) - x)`.

    For a `FixedPoint` problem; on any other it follows the condition itself.
    Converges linearly when the map is a contraction, and for nonexpansive maps with
    `damping < 1` (Krasnoselskii-Mann). One application of the map a step.

    Args:
        damping: In (0, 1]; 1 is the plain iteration.

    Raises:
        ValueError: If `damping` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import FixedPoint, FixedPointIteration, solve
        >>> problem = FixedPoint(lambda x, c: 0.5 * x + c, jnp.ones(()))
        >>> solve(problem, FixedPointIteration(), jnp.zeros(())).x.round(2)
        Array(2., dtype=float32)

    Source:
        Krasnoselskii, 1955; Mann, 1953.
    """

    damping: float | Float[Array, ""] = 1.0

    def __check_init__(self):
        check_positive("FixedPointIteration", "damping", self.damping)

    def init(self, problem: Problem, start):
        return State(start, problem.condition(start))

    def step(self, problem: Problem, state: State):
        x = _move(state.x, state.condition, self.damping)
        return State(x, problem.condition(x))


def _move(x, direction, stepsize):
    return jtu.tree_map(
        lambda leaf, d: leaf + jnp.asarray(stepsize, leaf.dtype) * d, x, direction
    )
