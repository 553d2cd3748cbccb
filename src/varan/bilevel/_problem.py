"""Bilevel problems and what it means to have solved one.

The lower level's answer is described by its own optimality system `K(x, y, m) = 0`
(stationarity, constraints, complementarity), `m` the multipliers. Among all `(x, y)`
that satisfy it, the upper level takes the best: a problem with equality constraints,
whose Lagrangian `L = F(x, y) + w . K(x, y, m)` has the adjoint variables `w`. A
`BilevelPoint` carries `(x, y, w, m)`, and the condition is `grad L = 0`:

- in `w`: `y` solves the lower level at `x`;
- in `y` and `m`: the adjoint equation, the linear system of implicit differentiation;
- in `x`: the hypergradient `grad_x F + (d_x K)' w` vanishes (or its projected step).

For a strongly convex lower level this is the vanishing of the usual hypergradient; for
one with many answers it is the optimistic reading, in which the upper level also
chooses among them. No matrix is formed: one evaluation costs a few gradients and one
Hessian-vector product of the lower level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_finite, is_traced
from ..core._problem import Problem, as_function
from ..core._trees import floats_as_arrays, tree_norm


class BilevelPoint(eqx.Module):
    """A candidate answer of a bilevel problem, with the variables that prove it.

    Args:
        x: Upper variables, a pytree.
        y: Lower variables, a pytree.
        adjoint: Adjoint of the lower level's stationarity, a pytree like `y`; at an
            answer of a strongly convex lower level without constraints it is
            `-(hess_yy f)^-1 grad_y F`.
        multipliers: Multipliers of the lower level's constraints, equalities first;
            `None` without constraints.
        multiplier_adjoint: Adjoint of the constraints; `None` without constraints.
    """

    x: PyTree[Array]
    y: PyTree[Array]
    adjoint: PyTree[Array]
    multipliers: Float[Array, " p"] | None = None
    multiplier_adjoint: Float[Array, " p"] | None = None


class BilevelProblem(Problem):
    """`min_x F(x, y)` over `x` in X, `y` an answer of the lower level at `x`.

    The lower level is `min_y f(x, y)` over `y` in Y subject to
    `inequality(x, y) <= 0` and `equality(x, y) = 0`. The unknown of `solve` is a
    `BilevelPoint`; make the first with `point`.

    Args:
        upper: `F(x, y, *params)`, a scalar.
        lower: `f(x, y, *params)`, a scalar, smooth and convex in `y`.
        *params: Pytrees of arrays; derivatives of the solution are taken with
            respect to these.
        inequality: `g(x, y, *params)`, a vector, convex; `None` for none.
        equality: As `inequality`, affine; `None` for none.
        project_x: The projection on X; `None` for the whole space.
        project_y: The projection on Y; `None` for the whole space.
        joint: The set `{(x, y) in X x Y : constraints}`, for solvers that project on
            it: an object with `project(vector, warm) -> result`, where `vector` is
            `ravel_pytree((x, y))` and the result has `x`, `multipliers`, `residual`
            (`varan.operators.Polyhedron` is one). Rows for the constraints come
            first among its equalities and inequalities. When it is `None`, affine
            constraints without `project_x` and `project_y` are turned into a
            `Polyhedron`.
        sample: How stochastic solvers see the problem: a function of `(key, *params)`
            that returns parameters in place of `params`, a minibatch of data
            (`Minibatch`) or a draw of the noise (which is zero in `params`), such
            that gradients are right on average. Condition and certificate always
            speak of `params` themselves. `None`: every draw is the problem itself.
        unique: Whether the answer, adjoint included, is a single point; `False`
            when the lower level may have many answers. See `varan.Problem`.

    Raises:
        TypeError: if `upper`, `lower`, a constraint or a projection is not callable.
        ValueError: if constraints and projections come together without `joint`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import BilevelProblem
        >>> problem = BilevelProblem(
        ...     lambda x, y, t: jnp.sum((y - t) ** 2) / 2,
        ...     lambda x, y, t: jnp.sum((y - 2 * x) ** 2) / 2,
        ...     jnp.array([4.0]),
        ... )
        >>> answer = problem.point(jnp.array([2.0]), jnp.array([4.0]))
        >>> float(problem.residual(problem.condition(answer)))
        0.0

    Source: The optimality system of the lower level as a constraint: S. Dempe,
        Foundations of Bilevel Programming (2002), chapter 5; multipliers and several
        lower answers as in arXiv 2309.01753, section 3.
    """

    upper: Callable
    lower: Callable
    params: tuple
    inequality: Callable | None
    equality: Callable | None
    project_x: Callable | None
    project_y: Callable | None
    joint: Any
    sample: Callable | None
    _unique: bool = eqx.field(static=True)

    def __init__(
        self,
        upper: Callable,
        lower: Callable,
        *params: PyTree,
        inequality: Callable | None = None,
        equality: Callable | None = None,
        project_x: Callable | None = None,
        project_y: Callable | None = None,
        joint: Any = None,
        sample: Callable | None = None,
        unique: bool = True,
    ):
        def optional(name, function):
            if function is None:
                return None
            return as_function("BilevelProblem", name, function)

        self.upper = as_function("BilevelProblem", "upper", upper)
        self.lower = as_function("BilevelProblem", "lower", lower)
        self.params = floats_as_arrays(params)
        self.inequality = optional("inequality", inequality)
        self.equality = optional("equality", equality)
        self.project_x = optional("project_x", project_x)
        self.project_y = optional("project_y", project_y)
        self.joint = joint
        self.sample = optional("sample", sample)
        self._unique = unique
        sets = project_x is not None or project_y is not None
        if self.constrained and sets and joint is None:
            raise ValueError(
                "BilevelProblem: constraints together with `project_x` or `project_y` "
                "need `joint`, the projection on all of them at once (projecting in "
                "turn is not a projection). Pass a varan.operators.Polyhedron."
            )

    @property
    def constrained(self) -> bool:
        """Whether the lower level has constraints that couple it to `x`."""
        return self.inequality is not None or self.equality is not None

    @property
    def unique(self):
        return self._unique

    @property
    def jacobian_tags(self):
        # The condition is a gradient unless a projection stands between.
        if self.project_x is None:
            return frozenset({"symmetric"})
        return frozenset()

    def upper_value(self, x, y) -> Float[Array, ""]:
        """`F(x, y)`."""
        return self.upper(x, y, *self.params)

    def lower_value(self, x, y) -> Float[Array, ""]:
        """`f(x, y)`."""
        return self.lower(x, y, *self.params)

    def draw(self, key: PRNGKeyArray) -> BilevelProblem:
        """The problem as one call of a stochastic oracle sees it."""
        if self.sample is None:
            return self
        params = tuple(self.sample(key, *self.params))
        return eqx.tree_at(lambda problem: problem.params, self, params)

    def constraints(self, x, y) -> Float[Array, " p"] | None:
        """The constraints' values, equalities first; `None` without constraints."""
        if not self.constrained:
            return None
        parts = [g(x, y, *self.params) for g in (self.equality, self.inequality) if g]
        return jnp.concatenate(parts)

    def equalities(self, x, y) -> int:
        """How many of the constraints are equalities."""
        if self.equality is None:
            return 0
        return jax.eval_shape(self.equality, x, y, *self.params).size

    def lagrangian(self, x, y, multipliers) -> Float[Array, ""]:
        """The lower level's Lagrangian `f + multipliers . g`."""
        if not self.constrained:
            return self.lower_value(x, y)
        return self.lower_value(x, y) + multipliers @ self.constraints(x, y)

    def lower_condition(self, x, y, multipliers=None) -> tuple[PyTree[Array], Any]:
        """`K`: zero exactly where `y` and `multipliers` solve the lower level at `x`.

        The first part is the gradient of the Lagrangian in `y` (with a set Y, the
        step to the projected gradient step). The second is, for an equality, its
        value; for an inequality its value where `multiplier + value > 0` and
        otherwise the multiplier.
        """
        gradient = jax.grad(self.lagrangian, argnums=1)(x, y, multipliers)
        if self.project_y is not None:
            moved = self.project_y(jtu.tree_map(jnp.subtract, y, gradient))
            gradient = jtu.tree_map(jnp.subtract, y, moved)
        if not self.constrained:
            return gradient, None
        values = self.constraints(x, y)
        equality = jnp.arange(values.size) < self.equalities(x, y)
        active = equality | (multipliers + values > 0)
        return gradient, jnp.where(active, values, multipliers)

    def point(self, x, y, multipliers=None) -> BilevelPoint:
        """A start for `solve`: the adjoint, and unless given the multipliers, zero."""
        for name, tree in (("x", x), ("y", y)):
            for leaf in jtu.tree_leaves(tree):
                check_finite("BilevelProblem.point", name, leaf)
        adjoint = jtu.tree_map(jnp.zeros_like, y)
        if not self.constrained:
            return BilevelPoint(x, y, adjoint)
        shape = jax.eval_shape(self.constraints, x, y)
        zeros = jnp.zeros(shape.shape, shape.dtype)
        given = zeros if multipliers is None else multipliers
        return BilevelPoint(x, y, adjoint, given, zeros)

    def condition(self, x: BilevelPoint) -> BilevelPoint:
        check_point("BilevelProblem", x)

        def full_lagrangian(p):
            stationarity, feasibility = self.lower_condition(p.x, p.y, p.multipliers)
            total = self.upper_value(p.x, p.y) + _dot(p.adjoint, stationarity)
            if not self.constrained:
                return total
            return total + p.multiplier_adjoint @ feasibility

        gradient = jax.grad(full_lagrangian)(x)
        if self.project_x is None:
            return gradient
        moved = self.project_x(jtu.tree_map(jnp.subtract, x.x, gradient.x))
        step = jtu.tree_map(jnp.subtract, x.x, moved)
        return eqx.tree_at(lambda p: p.x, gradient, step)

    def certify(self, x, condition, tol) -> Certificate:
        lower = (condition.adjoint, condition.multiplier_adjoint)
        return Certificate(
            "residual",
            self.residual(condition),
            tol=tol,
            proof=True,
            statement=(
                "value is the norm of: the lower level's optimality system at (x, y), "
                "its adjoint equation, and the hypergradient that follows from them"
            ),
            details={
                "lower": tree_norm(lower),
                "adjoint": tree_norm((condition.y, condition.multipliers)),
                "hypergradient": tree_norm(condition.x),
            },
        )

    def joint_set(self, x, y) -> Any:
        """The set of feasible `(x, y)` with its projection; `None` for everything.

        Builds a `Polyhedron` from affine constraints when `joint` was not given, at a
        cost of one decomposition.

        Raises:
            ValueError: if the constraints are not affine (NaN when traced).
        """
        if self.joint is not None:
            return self.joint
        if not self.constrained:
            return _Product(self.project_x, self.project_y, (x, y))
        return _linearise(self, x, y)


def check_point(owner: str, point) -> None:
    """Refuses a start that is no `BilevelPoint`."""
    if not isinstance(point, BilevelPoint):
        raise TypeError(
            f"{owner}: the start must be a BilevelPoint (got {type(point).__name__}). "
            "Pass problem.point(x, y)."
        )


def check_bilevel(owner: str, problem, start) -> None:
    """Refuses problems of one level and starts that are no points of two."""
    if not isinstance(problem, BilevelProblem):
        raise TypeError(
            f"{owner}: `problem` must be a BilevelProblem (got "
            f"{type(problem).__name__})."
        )
    check_point(owner, start)


class _Product(eqx.Module):
    """`X x Y` as a joint set."""

    project_x: Callable | None
    project_y: Callable | None
    example: Any

    def project(self, vector, warm=None):
        del warm
        x, y = ravel_pytree(self.example)[1](vector)
        x = x if self.project_x is None else self.project_x(x)
        y = y if self.project_y is None else self.project_y(y)
        zero = jnp.zeros((), vector.dtype)
        return Projected(ravel_pytree((x, y))[0], None, zero)


class Projected(eqx.Module):
    """What a joint set's `project` returns."""

    x: Array
    multipliers: Any
    residual: Array


def _linearise(problem, x, y):
    from ..operators import Polyhedron

    vector, unravel = ravel_pytree((x, y))

    def rows(function):
        if function is None:
            return None, None
        flat = lambda v: function(*unravel(v), *problem.params)  # noqa: E731
        origin = jnp.zeros_like(vector)
        value, matrix = flat(origin), jax.jacrev(flat)(origin)
        # Affine functions agree with their expansion everywhere; one generic point
        # tells.
        probe = jnp.cos(1.0 + jnp.arange(vector.size, dtype=vector.dtype)) + vector
        expected = value + matrix @ probe
        scale = 1 + jnp.max(jnp.abs(expected)) + jnp.max(jnp.abs(matrix))
        eps = jnp.finfo(vector.dtype).eps
        gap = jnp.max(jnp.abs(flat(probe) - expected)) / scale
        affine = gap <= 1e3 * eps * vector.size**0.5
        if not is_traced(affine) and not bool(affine):
            raise ValueError(
                "BilevelProblem: the constraints are not affine, so their projection "
                "cannot be built. Pass `joint`, an object that projects on them."
            )
        return matrix, jnp.where(affine, -value, jnp.nan)

    A, b = rows(problem.equality)
    G, h = rows(problem.inequality)
    return Polyhedron(A, b, G, h)


def _dot(a, b):
    return sum(jtu.tree_leaves(jtu.tree_map(jnp.vdot, a, b)))
