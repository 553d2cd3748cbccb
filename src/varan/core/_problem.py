"""Problems: each states what it means to be solved, and that is all it must state."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ._certificate import Certificate
from ._trees import floats_as_arrays, tree_norm


class Problem(eqx.Module):
    """States its own optimality condition; its array leaves are its parameters.

    Subclass it and write `condition`, a function of `x` that is zero exactly at a
    solution and returns a pytree with as many numbers as `x`. Residual, certificate,
    derivative and stability follow from it for every solver.

    Override the rest only where more is known:

    - `residual`: how far from zero a value of the condition is (default: Euclidean
      norm);
    - `certify`: a stronger certificate than the residual;
    - `value`: the objective, where there is one; minimisers and line searches use it;
    - `jacobian_tags`: what is known of the condition's Jacobian, a subset of
      `{"symmetric", "positive_semidefinite"}`;
    - `unique`: `False` where the solution is a set by nature (a gauge freedom, a
      rank-deficient least-squares problem), for all nearby data. Derivatives are then
      right for everything that does not depend on which solution is taken. For what
      does, reverse mode gives NaN; forward mode takes the tangent of least norm, one
      of many. Where it is `True` and the Jacobian proves singular, the derivative is
      NaN rather than a plausible number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import GradientDescent, Problem, solve
        >>> class Mean(Problem):
        ...     points: jax.Array
        ...     def condition(self, x):
        ...         return x - self.points.mean(0)
        >>> problem = Mean(jnp.arange(6.0).reshape(3, 2))
        >>> solve(problem, GradientDescent(0.5), jnp.zeros(2), tol=1e-4).x.round(2)
        Array([2., 3.], dtype=float32)
    """

    @abc.abstractmethod
    def condition(self, x: PyTree[Array]) -> PyTree[Array]:
        """Zero exactly where `x` solves the problem."""

    def residual(self, condition: PyTree[Array]) -> Float[Array, ""]:
        """The size of a value of the condition, a nonnegative scalar."""
        return tree_norm(condition)

    def certify(self, x, condition, tol) -> Certificate:
        """The certificate of `x`, given the condition there."""
        del x
        return Certificate(
            "residual",
            self.residual(condition),
            tol=tol,
            proof=True,
            statement="value is the norm of the optimality condition at x",
        )

    @property
    def jacobian_tags(self) -> frozenset[str]:
        """What is known of the condition's Jacobian."""
        return frozenset()

    @property
    def unique(self) -> bool:
        """Whether the solution is (locally) a single point."""
        return True


class Smooth(Problem):
    """Minimise a smooth function: `min_x objective(x, *params)`.

    The condition is the gradient.

    Args:
        objective: Scalar function of `x` and the parameters.
        *params: Pytrees of arrays; derivatives of the solution are taken with
            respect to these.
        convex: Promise that the objective is convex, so that its Hessian is
            positive semidefinite.
        unique: See `Problem`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import Newton, Smooth, solve
        >>> def loss(w, X, y, lam):
        ...     return jnp.mean((X @ w - y) ** 2) + lam * w @ w
        >>> X, y = jnp.eye(3), jnp.arange(3.0)
        >>> problem = Smooth(loss, X, y, 0.1, convex=True)
        >>> bool(solve(problem, Newton(), jnp.zeros(3)).converged)
        True
    """

    objective: Callable
    params: tuple
    convex: bool = eqx.field(static=True)
    _unique: bool = eqx.field(static=True)

    def __init__(
        self,
        objective: Callable,
        *params: PyTree,
        convex: bool = False,
        unique: bool = True,
    ):
        self.objective = as_function("Smooth", "objective", objective)
        self.params = floats_as_arrays(params)
        self.convex = convex
        self._unique = unique

    def value(self, x):
        """The objective at `x`."""
        return self.objective(x, *self.params)

    def condition(self, x):
        return jax.grad(self.value)(x)

    @property
    def jacobian_tags(self):
        if self.convex:
            return frozenset({"symmetric", "positive_semidefinite"})
        return frozenset({"symmetric"})

    @property
    def unique(self):
        return self._unique


class Root(Problem):
    """Find `x` with `function(x, *params) = 0`.

    Args:
        function: Maps `x` and the parameters to a pytree with as many numbers as `x`.
        *params: Pytrees of arrays; derivatives of the root are taken with respect to
            these.
        unique: See `Problem`.

    Example:
        >>> import jax, jax.numpy as jnp, optimistix as optx
        >>> from varan import Root, solve
        >>> newton = optx.Newton(rtol=1e-6, atol=1e-6)
        >>> def root(c):
        ...     return solve(Root(lambda x, c: x**2 - c, c), newton, jnp.ones(())).x
        >>> [round(float(v), 3) for v in (root(4.0), jax.grad(root)(4.0))]
        [2.0, 0.25]
    """

    function: Callable
    params: tuple
    _unique: bool = eqx.field(static=True)

    def __init__(self, function: Callable, *params: PyTree, unique: bool = True):
        self.function = as_function("Root", "function", function)
        self.params = floats_as_arrays(params)
        self._unique = unique

    def condition(self, x):
        return self.function(x, *self.params)

    @property
    def unique(self):
        return self._unique


class FixedPoint(Problem):
    """Find `x` with `function(x, *params) = x`.

    The condition is `function(x) - x`.

    Args:
        function: Maps `x` and the parameters to a pytree like `x`.
        *params: Pytrees of arrays; derivatives of the fixed point are taken with
            respect to these.
        unique: See `Problem`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import FixedPoint, FixedPointIteration, solve
        >>> problem = FixedPoint(lambda x: jnp.cos(x))
        >>> round(float(solve(problem, FixedPointIteration(), jnp.ones(())).x), 3)
        0.739
    """

    function: Callable
    params: tuple
    _unique: bool = eqx.field(static=True)

    def __init__(self, function: Callable, *params: PyTree, unique: bool = True):
        self.function = as_function("FixedPoint", "function", function)
        self.params = floats_as_arrays(params)
        self._unique = unique

    def apply(self, x):
        """One application of the map."""
        return self.function(x, *self.params)

    def condition(self, x):
        return jtu.tree_map(jnp.subtract, self.apply(x), x)

    @property
    def unique(self):
        return self._unique


def objective_of(problem: Problem) -> Callable | None:
    """The problem's objective `value`, where it has one."""
    return getattr(problem, "value", None)


def as_function(owner: str, argument: str, function) -> Callable:
    """Makes a callable fit to be a pytree node.

    A module keeps its array leaves; a plain function becomes a node without leaves,
    so that `jax.grad`, `jax.jit` and `jax.vmap` accept the problem that holds it.
    """
    if not callable(function):
        raise TypeError(
            f"{owner}: `{argument}` must be callable (got {type(function).__name__})."
        )
    if isinstance(function, eqx.Module):
        return cast(Callable, function)
    return function if isinstance(function, jtu.Partial) else jtu.Partial(function)
