"""Mirror descent: gradient steps in the coordinates that suit the set.

`x <- projection(mirror_map(x) - t * gradient)`: the mirror map (the gradient of a
strictly convex function, the entropy by default) takes the iterate to a space where
the step is made, the Bregman projection brings it back on the set. On the simplex, with
the entropy, that is multiplying by `exp(-t * gradient)` and normalising; the error then
grows with the logarithm of the dimension where projected gradient's grows with its
root.

With a constant step `1 / L`, where `L` times the mirror function less the objective is
convex, the objective's error falls like `1 / k`, linearly only where the objective
curves as the mirror function does or a vertex is the solution. Without smoothness take
a schedule that falls like `1 / sqrt(k)`, with that rate, and a loose tolerance: there
the condition need not vanish along the iterates.

Cost: an iteration takes one gradient and one Bregman projection. The condition is
looked at once in ten iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ..core import Solver, State
from ..core._checks import check_positive
from ..core._problem import as_function
from ..problems import SetConstrained


def _entropy_map(x: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(jnp.log, x)


def _onto_simplices(y: PyTree[Array], *params: Any) -> PyTree[Array]:
    del params
    return jtu.tree_map(jax.nn.softmax, y)


class MirrorDescent(Solver):
    """Mirror descent for `SetConstrained` problems.

    By default for probabilities: the entropy, and each leaf's rows (its last axis)
    on the simplex. For other sets pass the Bregman projection that belongs to the
    problem's own Euclidean one, for instance
    `lambda y, *params: project_kl_transport(y, rows, columns)`. Start inside: with the
    entropy an entry that is zero stays zero.

    Args:
        stepsize: Positive, in units of the mirror image per unit of gradient; or a
            schedule, a function of the number of iterations made.
        mirror_map: Function of `x`, the gradient of the mirror function.
        projection: Function of `(y, *params)` with the problem's parameters: the
            point of the set nearest to the point with mirror image `y`, in the mirror
            function's divergence.
        iterations: Iterations in one step; the condition is looked at once a step.

    Raises:
        ValueError: If `stepsize` is not positive or `iterations` below 1.
        TypeError: In `solve`, if the problem is no `SetConstrained`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.firstorder import MirrorDescent
        >>> from varan.operators import project_simplex
        >>> from varan.problems import SetConstrained
        >>> problem = SetConstrained(
        ...     lambda p: jnp.sum((p - jnp.array([0.7, 0.2, 0.1])) ** 2),
        ...     project_simplex,
        ... )
        >>> p = solve(problem, MirrorDescent(1.0), jnp.ones(3) / 3, tol=1e-3).x
        >>> [round(float(v), 2) for v in p]
        [0.7, 0.2, 0.1]

    Source:
        Nemirovsky, Yudin, 1983, "Problem complexity and method efficiency in
        optimization"; Beck, Teboulle, 2003, "Mirror descent and nonlinear projected
        subgradient methods for convex optimization"; the rate with a constant step:
        Lu, Freund, Nesterov, 2018 (arXiv 1610.05708), theorem 3.1.
    """

    stepsize: Float[Array, ""] | float | Callable
    mirror_map: Callable
    projection: Callable
    iterations: int = eqx.field(static=True)

    def __init__(
        self,
        stepsize: Float[Array, ""] | float | Callable,
        mirror_map: Callable = _entropy_map,
        projection: Callable = _onto_simplices,
        *,
        iterations: int = 10,
    ):
        if callable(stepsize):
            stepsize = as_function("MirrorDescent", "stepsize", stepsize)
        else:
            check_positive("MirrorDescent", "stepsize", stepsize)
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(
                "MirrorDescent: `iterations` must be a positive integer (got "
                f"{iterations!r})."
            )
        self.stepsize = stepsize
        self.mirror_map = as_function("MirrorDescent", "mirror_map", mirror_map)
        self.projection = as_function("MirrorDescent", "projection", projection)
        self.iterations = iterations

    def init(self, problem, start):
        if not isinstance(problem, SetConstrained):
            raise TypeError(
                "MirrorDescent: the problem must be a SetConstrained (got "
                f"{type(problem).__name__})."
            )
        return State(start, problem.condition(start), jnp.asarray(0, jnp.int32))

    def step(self, problem, state):
        x = jax.lax.fori_loop(
            0,
            self.iterations,
            lambda k, x: self._iterate(problem, x, state.memory + k),
            state.x,
        )
        return State(
            x,
            problem.condition(x),
            state.memory + self.iterations,
            evaluations=self.iterations + 1,
        )

    def _iterate(self, problem, x, count):
        stepsize = self.stepsize
        if callable(stepsize):
            stepsize = stepsize(count)
        gradient = jax.grad(problem.smooth)(x)
        moved = jtu.tree_map(
            lambda y, g: y - jnp.asarray(stepsize, y.dtype) * g,
            self.mirror_map(x),
            gradient,
        )
        return self.projection(moved, *problem.params)
