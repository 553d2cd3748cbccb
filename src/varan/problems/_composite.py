"""Minimisation with a part that is not smooth: a penalty, or a set to stay in.

Both problems offer what forward-backward methods read, and differ in nothing else:
`smooth(x)`, the smooth part, and `prox(v, stepsize)`, the rest's proximal operator.
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ..core import Problem
from ..core._checks import check_positive
from ..core._problem import as_function
from ..core._trees import floats_as_arrays


class Composite(Problem):
    """Minimise a smooth function plus one with a proximal operator.

    `min_x objective(x, *params) + nonsmooth(x, *params)`. The condition is the gradient
    mapping `(x - prox(x - stepsize * gradient, stepsize)) / stepsize`, which is the
    gradient where there is nothing else.

    Args:
        objective: The smooth part: a scalar function of `x` and the parameters.
        prox: Function of `(v, stepsize, *params)`: the proximal operator of the rest;
            see `varan.operators`.
        *params: Pytrees of arrays, shared by all functions; derivatives of the solution
            are taken with respect to these.
        nonsmooth: The other part's value, a function of `x` and the parameters.
            Left out, the problem has no `value`: solvers that compare objectives
            cannot run on it.
        stepsize: Positive; the condition's. Any gives the same solutions and
            derivatives; near the reciprocal of the gradient's Lipschitz constant the
            linear system of the derivative is best conditioned.
        unique: See `varan.Problem`.

    Raises:
        TypeError: If a function is not callable.
        ValueError: If `stepsize` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.firstorder import ProximalGradient
        >>> from varan.operators import prox_l1
        >>> from varan.problems import Composite
        >>> def lasso(lam, y=jnp.array([3.0, 0.2])):
        ...     problem = Composite(
        ...         lambda x, y, lam: jnp.sum((x - y) ** 2) / 2,
        ...         lambda v, stepsize, y, lam: prox_l1(v, lam, stepsize),
        ...         y,
        ...         lam,
        ...     )
        ...     return solve(problem, ProximalGradient(), jnp.zeros(2)).x
        >>> lasso(1.0).round(3), jax.jacobian(lasso)(1.0).round(3)
        (Array([2., 0.], dtype=float32), Array([-1.,  0.], dtype=float32))

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equation 7; the gradient mapping:
        Nesterov, 2013, "Gradient methods for minimizing composite functions".
    """

    objective: Callable
    proximal: Callable
    nonsmooth: Callable | None
    params: tuple
    stepsize: Float[Array, ""]
    _unique: bool = eqx.field(static=True)

    def __init__(
        self,
        objective: Callable,
        prox: Callable,
        *params: PyTree,
        nonsmooth: Callable | None = None,
        stepsize: float | Float[Array, ""] = 1.0,
        unique: bool = True,
    ):
        self.objective = as_function("Composite", "objective", objective)
        self.proximal = as_function("Composite", "prox", prox)
        self.nonsmooth = (
            None
            if nonsmooth is None
            else as_function("Composite", "nonsmooth", nonsmooth)
        )
        self.params = floats_as_arrays(params)
        check_positive("Composite", "stepsize", stepsize)
        self.stepsize = jnp.asarray(stepsize)
        self._unique = unique

    def smooth(self, x: PyTree[Array]) -> Float[Array, ""]:
        """The smooth part at `x`."""
        return self.objective(x, *self.params)

    def prox(self, v: PyTree[Array], stepsize: Float[Array, ""]) -> PyTree[Array]:
        """The proximal operator of the rest, at `v`."""
        return self.proximal(v, stepsize, *self.params)

    def penalty(self, x: PyTree[Array]) -> Float[Array, ""]:
        """The other part at `x`."""
        if self.nonsmooth is None:
            raise TypeError(
                "Composite: this needs the value of the part that is not smooth. Pass "
                "it as `nonsmooth`."
            )
        return self.nonsmooth(x, *self.params)

    def condition(self, x):
        return gradient_mapping(self, x, jax.grad(self.smooth)(x), self.stepsize)

    @property
    def unique(self):
        return self._unique


class SetConstrained(Problem):
    """Minimise a smooth function over a set that one can project on.

    `min_x objective(x, *params)` over a closed convex set. The condition is that of
    `Composite`, with the projection as the proximal operator: zero exactly where no
    feasible direction descends.

    Args:
        objective: A scalar function of `x` and the parameters.
        projection: Function of `(v, *params)`: the Euclidean projection on the set; see
            `varan.operators`.
        *params: Pytrees of arrays, shared by both functions; derivatives of the
            solution are taken with respect to these.
        stepsize: See `Composite`.
        unique: See `varan.Problem`.

    Raises:
        TypeError: If a function is not callable.
        ValueError: If `stepsize` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.firstorder import ProximalGradient
        >>> from varan.operators import project_simplex
        >>> from varan.problems import SetConstrained
        >>> problem = SetConstrained(
        ...     lambda x, c: jnp.sum((x - c) ** 2),
        ...     lambda v, c: project_simplex(v),
        ...     jnp.array([1.5, 1.0, -3.0]),
        ... )
        >>> x = solve(problem, ProximalGradient(), jnp.ones(3) / 3).x
        >>> [round(float(v), 3) for v in x]
        [0.75, 0.25, 0.0]

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equation 9.
    """

    objective: Callable
    projection: Callable
    params: tuple
    stepsize: Float[Array, ""]
    _unique: bool = eqx.field(static=True)

    def __init__(
        self,
        objective: Callable,
        projection: Callable,
        *params: PyTree,
        stepsize: float | Float[Array, ""] = 1.0,
        unique: bool = True,
    ):
        self.objective = as_function("SetConstrained", "objective", objective)
        self.projection = as_function("SetConstrained", "projection", projection)
        self.params = floats_as_arrays(params)
        check_positive("SetConstrained", "stepsize", stepsize)
        self.stepsize = jnp.asarray(stepsize)
        self._unique = unique

    def value(self, x):
        """The objective at `x`, whether or not `x` is in the set."""
        return self.objective(x, *self.params)

    def smooth(self, x: PyTree[Array]) -> Float[Array, ""]:
        """The objective at `x`."""
        return self.value(x)

    def prox(self, v: PyTree[Array], stepsize: Float[Array, ""]) -> PyTree[Array]:
        """The projection of `v`, whatever the stepsize."""
        del stepsize
        return self.projection(v, *self.params)

    def condition(self, x):
        return gradient_mapping(self, x, jax.grad(self.smooth)(x), self.stepsize)

    @property
    def unique(self):
        return self._unique


def gradient_mapping(problem, x, gradient, stepsize) -> PyTree[Array]:
    """`(x - prox(x - stepsize * gradient, stepsize)) / stepsize`."""
    moved = jtu.tree_map(
        lambda v, g: v - jnp.asarray(stepsize, v.dtype) * g, x, gradient
    )
    return jtu.tree_map(
        lambda v, u: (v - u) / jnp.asarray(stepsize, v.dtype),
        x,
        problem.prox(moved, stepsize),
    )
