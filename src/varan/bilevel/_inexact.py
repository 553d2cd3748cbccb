"""Hypergradients that are as exact as asked for, and say how exact they are.

The lower level is solved until its gradient proves a distance `epsilon` to the answer,
the adjoint equation until its residual is `delta`. From what was reached (never worse
than what was asked), a computable bound on the hypergradient's error follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..core._certificate import Certificate
from ..core._checks import (
    check_finite,
    check_nonnegative,
    check_positive,
    is_traced,
)
from ..core._trees import tree_norm
from ._alternating import (
    Oracles,
    adjoint_residual,
    check_plain,
    conjugate_gradients,
    descend,
    hessian_product,
    lower_gradient,
    upper_direction,
    upper_gradients,
)
from ._hypergradient import Hypergradient, hypergradient_error_bound
from ._problem import BilevelPoint, BilevelProblem

Size = Float[Array, ""] | float


class Smoothness(eqx.Module):
    """The constants of a bilevel problem that error bounds rest on.

    Args:
        strong_convexity: `mu > 0`: `f(x, .)` is `mu`-strongly convex.
        lower: Lipschitz constant of `grad_y f` in `y`, at least `mu`.
        upper_y: Lipschitz constant of `grad_y F` in `y`.
        upper_x: Lipschitz constant of `grad_x F` in `y`; 0 where F depends on `y`
            alone.
        hessian: Lipschitz constant of `hess_yy f` in `y`; 0 for quadratics.
        cross: Lipschitz constant of `grad_xy f` in `y`; 0 for quadratics.
        mixed: A bound on the norm of `grad_xy f`; `None`: its Frobenius norm at the
            point is computed, for as many products as `x` has entries.
        proof: Whether these are valid bounds. `False` for probed ones: error bounds
            are then estimates.

    Raises:
        ValueError: if `strong_convexity` or `lower` is not positive and finite, or
            the second below the first, or another constant negative.

    Example:
        >>> from varan.bilevel import Smoothness
        >>> float(Smoothness(0.5, lower=2.0, upper_y=1.0).hessian)
        0.0
    """

    strong_convexity: Size
    lower: Size
    upper_y: Size
    upper_x: Size = 0.0
    hessian: Size = 0.0
    cross: Size = 0.0
    mixed: Size | None = None
    proof: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        for name in ("strong_convexity", "lower"):
            check_positive("Smoothness", name, getattr(self, name))
        for name in ("upper_y", "upper_x", "hessian", "cross", "mixed"):
            value = getattr(self, name)
            if value is not None:
                check_nonnegative("Smoothness", name, value)
        least, most = self.strong_convexity, self.lower
        concrete = not (is_traced(least) or is_traced(most))
        if concrete and not np.all(np.asarray(least) <= np.asarray(most)):
            raise ValueError(
                "Smoothness: `lower` must be at least `strong_convexity` (got "
                f"{most} and {least})."
            )


Constants = Smoothness | Callable[[PyTree[Array]], Smoothness]


class InexactHypergradient(eqx.Module):
    """A hypergradient, what it rests on, and how wrong it may be.

    Args:
        value: The gradient, a pytree like `x`.
        y: The lower variables found.
        adjoint: The adjoint found.
        lower_distance: `||grad_y f|| / mu`, at least the distance of `y` to the lower
            answer.
        bound: A `Certificate`: the hypergradient's error is at most its value.
        oracles: Calls spent.
    """

    value: PyTree[Array]
    y: PyTree[Array]
    adjoint: PyTree[Array]
    lower_distance: Float[Array, ""]
    bound: Certificate
    oracles: Oracles


def inexact_hypergradient(
    problem: BilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    constants: Constants,
    *,
    epsilon: Size,
    delta: Size,
    adjoint: PyTree[Array] | None = None,
    max_steps: int = 10_000,
) -> InexactHypergradient:
    """The hypergradient to a given accuracy of its two subproblems, with a bound.

    Accelerated gradient steps on the lower level until `||grad_y f|| <= mu epsilon`,
    conjugate gradients until the adjoint equation's residual is at most `delta`; both
    from a warm start, one gradient or one Hessian product a step.

    Args:
        problem: A lower level without constraints and without `project_y`.
        x: Upper variables.
        y: Where the lower level starts.
        constants: A `Smoothness`, or a function of `x` that returns one.
        epsilon: Distance to the lower answer, positive.
        delta: Residual of the adjoint equation, positive.
        adjoint: Where the adjoint equation starts; default: zero.
        max_steps: Steps of either subproblem at most. Whoever stops there is as exact
            as it got; the bound says so.

    Returns:
        An `InexactHypergradient`.

    Raises:
        ValueError: if a number is out of range or the problem has constraints or sets.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import BilevelProblem, Smoothness, inexact_hypergradient
        >>> problem = BilevelProblem(
        ...     lambda x, y: y**2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> found = inexact_hypergradient(
        ...     problem, jnp.array(1.0), jnp.array(0.0), Smoothness(1.0, 1.0, 1.0),
        ...     epsilon=1e-3, delta=1e-3,
        ... )
        >>> bool(abs(found.value - 4.0) <= found.bound.value)
        True

    Source: M. S. Salehi, S. Mukherjee, L. Roberts and M. J. Ehrhardt (2023), arXiv
        2308.10098, section 2.

    Differences: The bound is taken at the accuracies that were reached, not at those
        asked for; every term is kept (`hypergradient_error_bound`).
    """
    owner = "inexact_hypergradient"
    check_plain(owner, problem)
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        check_positive(owner, name, value)
    for name, tree in (("x", x), ("y", y)):
        for leaf in jtu.tree_leaves(tree):
            check_finite(owner, name, leaf)
    known = constants_at(constants, x)
    y, _, spent = solve_lower(problem, x, y, known, epsilon, max_steps)
    slope, force = upper_gradients(problem, x, y)
    right = jtu.tree_map(jnp.negative, force)
    start = jtu.tree_map(jnp.zeros_like, y) if adjoint is None else adjoint
    dtype = jnp.result_type(*jtu.tree_leaves(y))
    floor = 4 * float(jnp.finfo(dtype).eps) * tree_norm(right)
    adjoint, _, products = conjugate_gradients(
        lambda v: hessian_product(problem, x, y, v),
        right,
        start,
        jnp.maximum(jnp.asarray(delta, dtype), floor),
        max_steps,
    )
    value = upper_direction(problem, x, y, adjoint, slope)
    # Measured anew: the recurrence's residual drifts from the true one.
    residual = tree_norm(adjoint_residual(problem, x, y, adjoint, force))
    found = Hypergradient(value, BilevelPoint(x, y, adjoint), residual)
    bound = hypergradient_error_bound(
        problem,
        found,
        strong_convexity=known.strong_convexity,
        upper_x=known.upper_x,
        upper_y=known.upper_y,
        hessian=known.hessian,
        cross=known.cross,
        mixed=known.mixed,
        proof=known.proof,
    )
    crosses = 1
    if known.mixed is None:
        crosses += sum(leaf.size for leaf in jtu.tree_leaves(x))
    oracles = Oracles(upper=1, lower=spent + 1, hessian=products + 1, cross=crosses)
    distance = bound.details["lower distance"]
    return InexactHypergradient(value, y, adjoint, distance, bound, oracles)


def solve_lower(
    problem, x, y, known: Smoothness, epsilon, max_steps
) -> tuple[Any, Float[Array, ""], Int[Array, ""]]:
    """Accelerated gradient steps until `||grad_y f|| <= mu epsilon`.

    Returns the point, its proved distance to the answer, and the gradients spent.
    """
    dtype = jnp.result_type(*jtu.tree_leaves(y))
    mu, L = (jnp.asarray(v, dtype) for v in (known.strong_convexity, known.lower))
    root = jnp.sqrt(mu / L)
    push = (1 - root) / (1 + root)
    # Not below what rounding lets a gradient reach: the distance is measured anyway.
    floor = 4 * float(jnp.finfo(dtype).eps) * L * (1 + tree_norm(y))
    target = jnp.maximum(mu * jnp.asarray(epsilon, dtype), floor)
    gradient = lower_gradient(problem, x, y)
    # The point at which the gradient is known is the extrapolated one: it is the answer
    # when its gradient is small, so that a step costs one gradient and no more.
    carry = (y, y, gradient, tree_norm(gradient), jnp.array(1))

    def go(carry):
        return (carry[3] > target) & (carry[4] <= max_steps)

    def step(carry):
        v, last, gradient, _, count = carry
        new = descend(v, gradient, 1 / L)
        v = descend(new, jtu.tree_map(jnp.subtract, new, last), -push)
        gradient = lower_gradient(problem, x, v)
        return v, new, gradient, tree_norm(gradient), count + 1

    v, _, _, size, count = jax.lax.while_loop(go, step, carry)
    return v, size / mu, count


def constants_at(constants: Constants, x) -> Smoothness:
    """The constants at `x`."""
    return constants if isinstance(constants, Smoothness) else constants(x)
