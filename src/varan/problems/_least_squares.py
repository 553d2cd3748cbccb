"""Nonlinear least squares."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from ..core import Problem
from ..core._problem import as_function
from ..core._trees import floats_as_arrays, tree_square


class LeastSquares(Problem):
    """Minimise half the sum of squares: `min_x ||residuals(x, *params)||^2 / 2`.

    The condition is the gradient `J' r`. optimistix's least-squares solvers
    (`LevenbergMarquardt`, `GaussNewton`, `Dogleg`) get the residuals themselves; every
    minimiser gets their half square.

    Args:
        residuals: Function of `x` and the parameters, to any pytree of arrays.
        *params: Pytrees of arrays; derivatives of the solution are taken with respect
            to these.
        unique: `False` where `J` has dependent columns for all nearby data; see
            `varan.Problem`.

    Raises:
        TypeError: If `residuals` is not callable.

    Example:
        >>> import jax.numpy as jnp, optimistix as optx
        >>> from varan import solve
        >>> from varan.problems import LeastSquares
        >>> t = jnp.linspace(0.0, 1.0, 5)
        >>> problem = LeastSquares(lambda x, y: jnp.exp(x * t) - y, jnp.exp(2 * t))
        >>> solver = optx.LevenbergMarquardt(rtol=1e-6, atol=1e-6)
        >>> solve(problem, solver, jnp.zeros(())).x.round(3)
        Array(2., dtype=float32)

    Source:
        Levenberg, 1944; Marquardt, 1963.
    """

    function: Callable
    params: tuple
    _unique: bool = eqx.field(static=True)

    def __init__(self, residuals: Callable, *params: PyTree, unique: bool = True):
        self.function = as_function("LeastSquares", "residuals", residuals)
        self.params = floats_as_arrays(params)
        self._unique = unique

    def residuals(self, x: PyTree[Array]) -> PyTree[Array]:
        """The residuals at `x`."""
        return self.function(x, *self.params)

    def value(self, x) -> Float[Array, ""]:
        """Half the sum of their squares."""
        return tree_square(self.residuals(x)) / 2

    def condition(self, x):
        residuals, pull = jax.vjp(self.residuals, x)
        return pull(residuals)[0]

    @property
    def jacobian_tags(self):
        return frozenset({"symmetric"})

    @property
    def unique(self):
        return self._unique
