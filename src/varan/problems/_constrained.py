"""Smooth minimisation with smooth equality and inequality constraints."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from ..core import Certificate, Problem
from ..core._problem import as_function
from ..core._trees import floats_as_arrays, tree_norm
from ..core.optimality import KKTPoint, kkt


class Constrained(Problem):
    """Minimise a smooth function under smooth constraints.

    `min_x objective(x, *params)` with `equality(x, *params) = 0` and
    `inequality(x, *params) <= 0`. The unknown is a `varan.core.optimality.KKTPoint` of
    `x` and the multipliers; begin with `start`. The condition is that of Karush, Kuhn
    and Tucker, `varan.core.optimality.kkt`: where it holds and the problem is not
    convex, the point may still be no minimum.

    The derivative of the solution and of the multipliers exists where the active
    constraints' gradients are independent, the second-order sufficient condition holds
    and no active inequality has a zero multiplier. Elsewhere NaN comes out.

    Args:
        objective: A scalar function of `x` and the parameters.
        *params: Pytrees of arrays, shared by all functions; derivatives of the solution
            are taken with respect to these.
        equality: Function of `x` and the parameters, to any pytree of arrays.
        inequality: As `equality`; bounds are inequalities too.
        unique: See `varan.Problem`.

    Raises:
        TypeError: If a function is not callable.
        ValueError: If there is no constraint, or the unknown's multipliers are not
            shaped like the constraints.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.constrained import AugmentedLagrangian
        >>> from varan.problems import Constrained
        >>> def nearest(radius):
        ...     problem = Constrained(
        ...         lambda x, r: jnp.sum((x - jnp.array([3.0, 4.0])) ** 2),
        ...         radius,
        ...         inequality=lambda x, r: x @ x - r**2,
        ...     )
        ...     start = problem.start(jnp.ones(2))
        ...     return solve(problem, AugmentedLagrangian(), start).x.x
        >>> [round(float(v), 2) for v in nearest(1.0)]
        [0.6, 0.8]
        >>> [round(float(v), 2) for v in jax.jacobian(nearest)(1.0)]
        [0.6, 0.8]

    Source:
        Karush, 1939; Kuhn, Tucker, 1951; the derivative: Fiacco, McCormick, 1968,
        "Nonlinear programming".
    """

    objective: Callable
    equality: Callable | None
    inequality: Callable | None
    params: tuple
    _unique: bool = eqx.field(static=True)

    def __init__(
        self,
        objective: Callable,
        *params: PyTree,
        equality: Callable | None = None,
        inequality: Callable | None = None,
        unique: bool = True,
    ):
        self.objective = as_function("Constrained", "objective", objective)
        if equality is None and inequality is None:
            raise ValueError(
                "Constrained: `equality` or `inequality` must be given (got neither). "
                "Without constraints use varan.Smooth."
            )
        self.equality, self.inequality = (
            None if f is None else as_function("Constrained", name, f)
            for name, f in (("equality", equality), ("inequality", inequality))
        )
        self.params = floats_as_arrays(params)
        self._unique = unique

    def start(self, x: PyTree[Array]) -> KKTPoint:
        """A first unknown: `x`, feasible or not, and multipliers of zero."""
        values = jax.eval_shape(self.constraints, x)
        zeros = jtu.tree_map(lambda v: jnp.zeros(v.shape, v.dtype), values)
        return KKTPoint(x, *zeros)

    def constraints(self, x: PyTree[Array]) -> tuple[PyTree, PyTree]:
        """The values of `equality` and `inequality` at `x`, `None` without them."""

        def evaluate(function):
            return jtu.tree_map(jnp.asarray, function(x, *self.params))

        h, g = self.equality, self.inequality
        return None if h is None else evaluate(h), None if g is None else evaluate(g)

    def condition(self, x):
        x = KKTPoint(*x)
        value = kkt(self.objective, self.equality, self.inequality)(x, *self.params)
        if x.inequality is None:
            return value
        _, g = self.constraints(jtu.tree_map(jax.lax.stop_gradient, x.x))
        return value._replace(
            inequality=jtu.tree_map(_untied, value.inequality, x.inequality, g)
        )

    def certify(self, x, condition, tol):
        x = KKTPoint(*x)
        h, g = self.constraints(x.x)
        violation = jtu.tree_map(lambda v: jnp.maximum(v, 0), g)
        products = jtu.tree_map(lambda m, v: m * v, x.inequality, g)
        signs = jtu.tree_map(lambda m: jnp.maximum(-m, 0), x.inequality)
        return Certificate(
            "residual",
            self.residual(condition),
            tol=tol,
            proof=True,
            statement="value is the norm of the Karush-Kuhn-Tucker condition at x",
            details={
                "objective": self.objective(x.x, *self.params),
                "stationarity": tree_norm(condition[0]),
                "infeasibility": _largest((h, violation), x.x),
                "complementarity": _largest(products, x.x),
                "negative_multiplier": _largest(signs, x.x),
            },
        )

    @property
    def unique(self):
        return self._unique


def _untied(value, multiplier, g):
    """Where multiplier and slack are both zero, what the parameters do, and no more.

    The Jacobian's row is zero there, and the matrix singular: the derivative is NaN.
    `g` is that of an `x` that does not move.
    """
    # Absolute, below an entry of size one: the constraint's units are the user's.
    tiny = float(np.sqrt(np.finfo(jnp.result_type(value)).eps))
    tied = (jnp.abs(multiplier) <= tiny) & (jnp.abs(g) <= tiny)
    return jnp.where(tied, jax.lax.stop_gradient(value + g) - g, value)


def _largest(tree, like):
    """The largest absolute entry; zero, of the dtype of `like`, where there is none."""
    dtype = jnp.result_type(*jtu.tree_leaves(like))
    sizes = [jnp.max(jnp.abs(v), initial=0) for v in jtu.tree_leaves(tree)]
    return jnp.max(jnp.stack(sizes)) if sizes else jnp.zeros((), dtype)
