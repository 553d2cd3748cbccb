"""Smooth minimisation between bounds."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..core import Certificate, Problem
from ..core._checks import is_traced
from ..core._problem import as_function
from ..core._trees import floats_as_arrays
from ._quadratic import _stationarity


class BoxConstrained(Problem):
    """Minimise a smooth function between bounds.

    `min_x objective(x, *params)` over `lower <= x <= upper`, entry by entry. The
    condition is `x - clip(x - gradient, lower, upper)`. Where a bound is active and its
    gradient zero the solution has no derivative, and NaN comes out.

    Args:
        objective: A scalar function of `x` and the parameters.
        lower: Scalar, or a pytree like `x`; `-inf` where there is no bound.
        upper: As `lower`; `inf` where there is no bound.
        *params: Pytrees of arrays; derivatives of the solution are taken with respect
            to these and to the bounds.
        convex: Promise that the objective is convex. With finite bounds the certificate
            is then a bound of `f(x) - min f`.
        unique: See `varan.Problem`.

    Raises:
        TypeError: If `objective` is not callable.
        ValueError: If bounds cross or are NaN. Under jit crossing bounds give NaN, and
            the run ends `DIVERGED`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.problems import BoxConstrained
        >>> from varan.secondorder import LBFGSB
        >>> def nearest(upper, c=jnp.array([3.0, 0.5])):
        ...     problem = BoxConstrained(
        ...         lambda x, c: jnp.sum((x - c) ** 2), 0.0, upper, c
        ...     )
        ...     return solve(problem, LBFGSB(), jnp.zeros(2)).x
        >>> nearest(1.0).round(3), jax.jacobian(nearest)(1.0).round(3)
        (Array([1. , 0.5], dtype=float32), Array([1., 0.], dtype=float32))

    Source:
        Bertsekas, 1982, "Projected Newton methods for optimization problems with simple
        constraints"; the bound of the certificate: Frank, Wolfe, 1956.
    """

    objective: Callable
    lower: PyTree[Array]
    upper: PyTree[Array]
    params: tuple
    convex: bool = eqx.field(static=True)
    _unique: bool = eqx.field(static=True)

    def __init__(
        self,
        objective: Callable,
        lower: PyTree[Array] | float,
        upper: PyTree[Array] | float,
        *params: PyTree,
        convex: bool = False,
        unique: bool = True,
    ):
        self.objective = as_function("BoxConstrained", "objective", objective)
        _check_bounds(lower, upper)
        # A number has no dtype of its own: it takes that of what it bounds.
        self.lower, self.upper = jtu.tree_map(jnp.asarray, (lower, upper))
        self.params = floats_as_arrays(params)
        self.convex = convex
        self._unique = unique

    def value(self, x):
        """The objective at `x`, whether or not `x` is between the bounds."""
        return self.objective(x, *self.params)

    def smooth(self, x: PyTree[Array]) -> Float[Array, ""]:
        """The objective at `x`."""
        return self.value(x)

    def bounds(self, x: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
        """Both bounds as pytrees like `x`, NaN where they cross."""
        lower, upper = _spread(self.lower, x), _spread(self.upper, x)
        crossing = jtu.tree_map(lambda low, high: low > high, lower, upper)

        def void(bound):
            return jtu.tree_map(lambda b, c: jnp.where(c, jnp.nan, b), bound, crossing)

        return void(lower), void(upper)

    def prox(
        self, v: PyTree[Array], stepsize: Float[Array, ""] | float = 1.0
    ) -> PyTree[Array]:
        """The nearest point between the bounds, whatever the stepsize."""
        del stepsize
        return jtu.tree_map(jnp.clip, v, *self.bounds(v))

    def condition(self, x):
        value = self.condition_with(x, jax.grad(self.value)(x))
        # At a tie the Jacobian's row is zero, and with it the matrix singular, while
        # the parameters still act: the derivative is then NaN, not zero.
        still = jtu.tree_map(jax.lax.stop_gradient, x)
        gradient = jax.grad(self.value)(still)
        tiny = float(np.sqrt(np.finfo(jnp.result_type(*jtu.tree_leaves(x))).eps))
        steep = tiny * _largest(gradient, default=1.0)
        lower, upper = self.bounds(x)
        near = tiny * _largest((x, lower, upper), default=0.0)

        def untie(c, g, v, low, high):
            at_low = v - low < high - v
            distance = v - jnp.where(at_low, low, high)
            tied = (low < high) & (jnp.abs(distance) <= near) & (jnp.abs(g) <= steep)
            moves = g + distance
            frozen = jax.lax.stop_gradient(c - moves) + moves
            return jnp.where(tied, frozen, c)

        return jtu.tree_map(untie, value, gradient, still, lower, upper)

    def condition_with(self, x: PyTree[Array], gradient: PyTree[Array]):
        """The condition's value at `x`, given the gradient there."""
        return jtu.tree_map(
            lambda g, v, low, high: _stationarity(g, v, low, high),
            gradient,
            x,
            *self.bounds(x),
        )

    def certify(self, x, condition, tol):
        if not self.convex:
            return super().certify(x, condition, tol)
        gradient = jax.grad(self.value)(x)

        def fall(g, v, low, high):
            move = jnp.where(g > 0, v - low, v - high)
            return jnp.sum(g * jnp.where(g == 0, 0, move))

        falls = jtu.tree_map(fall, gradient, x, *self.bounds(x))
        gap = sum(jtu.tree_leaves(falls))
        return Certificate(
            "duality gap",
            gap,
            proof=True,
            statement="f(x) - min f <= value (infinite without the bound that x seeks)",
            details={"residual": self.residual(condition), "objective": self.value(x)},
        )

    @property
    def unique(self):
        return self._unique


def _check_bounds(lower, upper):
    leaves = jtu.tree_leaves(lower), jtu.tree_leaves(upper)
    for name, side in zip(("lower", "upper"), leaves, strict=True):
        for leaf in side:
            if not is_traced(leaf) and np.any(np.isnan(np.asarray(leaf))):
                raise ValueError(
                    f"BoxConstrained: `{name}` must not hold NaN (got "
                    f"{np.sum(np.isnan(np.asarray(leaf)))} such entries). Use "
                    "infinity where there is no bound."
                )
    single = 1 in (len(leaves[0]), len(leaves[1]))
    if not single and jtu.tree_structure(lower) != jtu.tree_structure(upper):
        raise ValueError(
            "BoxConstrained: `lower` and `upper` must have one structure, or be "
            f"scalars (got {jtu.tree_structure(lower)} and "
            f"{jtu.tree_structure(upper)})."
        )
    many = max(len(leaves[0]), len(leaves[1]))
    pairs = zip(*(side * (many if len(side) == 1 else 1) for side in leaves))  # noqa: B905
    for low, high in pairs:
        if is_traced(low) or is_traced(high):
            continue
        crossing = np.sum(np.asarray(low) > np.asarray(high))
        if crossing:
            raise ValueError(
                f"BoxConstrained: `lower` must not exceed `upper` (got {crossing} "
                "entries that do). No point lies between them."
            )


def _spread(bound, x):
    """A scalar to every entry, a pytree leaf by leaf; of the dtype of `x`."""
    if jtu.tree_structure(bound) != jtu.tree_structure(x):
        leaves = jtu.tree_leaves(bound)
        if len(leaves) != 1 or jnp.ndim(leaves[0]) != 0:
            raise ValueError(
                "BoxConstrained: a bound must be a scalar or a pytree like `x` (got "
                f"{jtu.tree_structure(bound)} for {jtu.tree_structure(x)})."
            )
        bound = jtu.tree_map(lambda _: leaves[0], x)
    return jtu.tree_map(
        lambda b, v: jnp.broadcast_to(jnp.asarray(b, jnp.result_type(v)), jnp.shape(v)),
        bound,
        x,
    )


def _largest(tree, *, default):
    """The largest finite absolute entry, and at least `default`."""
    sizes = [
        jnp.max(jnp.where(jnp.isfinite(v), jnp.abs(v), 0), initial=default)
        for v in jtu.tree_leaves(tree)
    ]
    return jax.lax.stop_gradient(jnp.max(jnp.stack(sizes)))
