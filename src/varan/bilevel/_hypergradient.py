"""The gradient of `x -> F(x, y(x))`, and how wrong it may be.

With `K` the lower level's optimality system, `y(x)` moves by the implicit function
theorem, and the chain rule needs one linear solve: `(d_y K)' w = -grad_y F`, then
`grad_x F + (d_x K)' w`. The methods differ in how they solve it; unrolling
differentiates the lower level's iterations instead and needs no solve.
"""

from __future__ import annotations

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..core._certificate import Certificate
from ..core._checks import (
    check_choice,
    check_finite,
    check_nonnegative,
    check_positive,
)
from ..core._implicit import implicit_root
from ..core._trees import tree_norm
from ._problem import BilevelPoint, BilevelProblem


class Hypergradient(eqx.Module):
    """A hypergradient and what was solved for it.

    Args:
        value: The gradient, a pytree like `x`.
        point: `x`, `y`, multipliers and the adjoint found. `None` for unrolling.
        residual: Norm of the adjoint equation's residual: zero for an exact solve.
            NaN for unrolling, which solves no equation.
    """

    value: PyTree[Array]
    point: BilevelPoint | None
    residual: Float[Array, ""]


def hypergradient(
    problem: BilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    *,
    method: Literal["implicit", "cg", "neumann", "unroll"] = "implicit",
    multipliers: Float[Array, " p"] | None = None,
    tol: float | Float[Array, ""] | None = None,
    max_steps: int = 100,
    stepsize: float | Float[Array, ""] | None = None,
) -> Hypergradient:
    """The gradient of `F(x, y(x))`, `y` being the lower level's answer or near it.

    - `"implicit"`: the adjoint equation, solved directly up to 512 unknowns and by a
      Krylov method beyond; right with constraints and sets.
    - `"cg"`: at most `max_steps` conjugate gradient steps, matrix-free.
    - `"neumann"`: `max_steps` terms of the Neumann series with `stepsize`, matrix-free.
    - `"unroll"`: the derivative of `max_steps` (projected) gradient steps with
      `stepsize` on the lower level from `y`, in reverse mode; memory grows with the
      steps.

    Args:
        problem: Its `project_y` and constraints are honoured by `"implicit"`;
            `"cg"` and `"neumann"` need a lower level without either.
        x: Upper variables.
        y: Lower variables, near the answer for the first three methods, a start for
            `"unroll"`.
        method: See above.
        multipliers: The lower level's multipliers; needed with constraints.
        tol: Relative residual at which `"cg"` stops; default: the square root of the
            dtype's rounding unit.
        max_steps: Steps of `"cg"`, `"neumann"`, `"unroll"`.
        stepsize: Of `"neumann"` and `"unroll"`, below `2 / L`.

    Returns:
        A `Hypergradient`. Where the linear system is singular, the value of
        `"implicit"` is NaN; with `problem.unique` false only if `F` depends on which
        of the lower level's answers is taken.

    Raises:
        ValueError: if the method is unknown, does not fit the problem, or lacks its
            `stepsize` or `multipliers`, or `x` or `y` is not finite. Where those are
            traced and not finite, the value is NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import BilevelProblem, hypergradient
        >>> problem = BilevelProblem(
        ...     lambda x, y: y**2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> float(hypergradient(problem, jnp.array(1.0), jnp.array(2.0)).value)
        4.0

    Source: M. Blondel et al. (2022), arXiv 2105.15183, section 2.1; Neumann series
        and unrolling as in F. Pedregosa (2016), arXiv 1602.02355, and S. Ghadimi and
        M. Wang (2018), arXiv 1802.02246.
    """
    methods = ("implicit", "cg", "neumann", "unroll")
    check_choice("hypergradient", "method", method, methods)
    for name, tree in (("x", x), ("y", y)):
        for leaf in jtu.tree_leaves(tree):
            check_finite("hypergradient", name, leaf)
    if method in ("neumann", "unroll"):
        if stepsize is None:
            raise ValueError(
                f"hypergradient: method {method!r} needs `stepsize`. Pass one below "
                "2 / L, L the Lipschitz constant of the lower level's gradient."
            )
        check_positive("hypergradient", "stepsize", stepsize)
    plain = not problem.constrained and problem.project_y is None
    if method in ("cg", "neumann") and not plain:
        raise ValueError(
            f"hypergradient: method {method!r} needs a lower level without constraints "
            "and without `project_y`. Use method='implicit'."
        )
    if method == "unroll":
        if problem.constrained:
            raise ValueError(
                "hypergradient: method 'unroll' cannot take constraints. Use "
                "method='implicit'."
            )
        return _or_nan(_unroll(problem, x, y, max_steps, stepsize), x, y)
    check_multipliers("hypergradient", problem, multipliers)
    if method == "implicit":
        adjoint, multiplier_adjoint = _direct(problem, x, y, multipliers)
    else:
        adjoint = _matrix_free(problem, x, y, method, tol, max_steps, stepsize)
        multiplier_adjoint = None
    point = BilevelPoint(x, y, adjoint, multipliers, multiplier_adjoint)
    free = eqx.tree_at(
        lambda p: (p.project_x, p.joint), problem, (None, None), is_leaf=_is_none
    )
    condition = free.condition(point)
    residual = tree_norm((condition.y, condition.multipliers))
    return _or_nan(Hypergradient(condition.x, point, residual), x, y)


def _or_nan(found, x, y):
    """NaN where the point is not finite: affine gradients would not tell."""
    finite = jnp.array(True)
    for leaf in jtu.tree_leaves((x, y)):
        finite &= jnp.all(jnp.isfinite(leaf))
    value = jtu.tree_map(lambda v: jnp.where(finite, v, jnp.nan), found.value)
    return eqx.tree_at(lambda h: h.value, found, value)


def check_multipliers(owner: str, problem: BilevelProblem, multipliers) -> None:
    """Refuses a constrained lower level without multipliers."""
    if problem.constrained and multipliers is None:
        raise ValueError(
            f"{owner}: a constrained lower level needs `multipliers`. Pass those of "
            "its solution."
        )


def _is_none(node):
    return node is None


def _direct(problem, x, y, multipliers):
    """The adjoint is minus the derivative of `F` in a perturbation of `K`."""
    plain = not problem.constrained and problem.project_y is None
    tags = {"symmetric", "positive_semidefinite"} if plain else set()

    def perturbed(shift):
        def system(u):
            return ravel_pytree(problem.lower_condition(x, *u))[0] - shift

        answer, _ = implicit_root(
            system, (y, multipliers), tags=frozenset(tags), unique=problem.unique
        )
        return problem.upper_value(x, answer)

    flat, unravel = ravel_pytree((y, multipliers))
    return unravel(-jax.grad(perturbed)(jnp.zeros_like(flat)))


def _matrix_free(problem, x, y, method, tol, max_steps, stepsize):
    flat, unravel = ravel_pytree(y)
    gradient = lambda v: ravel_pytree(problem.lower_condition(x, unravel(v))[0])[0]  # noqa: E731
    _, hessian = jax.linearize(gradient, flat)
    right = -ravel_pytree(jax.grad(problem.upper_value, argnums=1)(x, y))[0]
    if method == "cg":
        tol = float(jnp.finfo(flat.dtype).eps) ** 0.5 if tol is None else tol
        w, _ = jax.scipy.sparse.linalg.cg(hessian, right, tol=tol, maxiter=max_steps)
        return unravel(w)
    size = jnp.asarray(stepsize, flat.dtype)

    def step(w, _):
        return w - size * (hessian(w) - right), None

    return unravel(jax.lax.scan(step, jnp.zeros_like(flat), None, length=max_steps)[0])


def _unroll(problem, x, y, max_steps, stepsize):
    def value(x):
        def step(y, _):
            gradient = jax.grad(problem.lower_value, argnums=1)(x, y)
            y = jtu.tree_map(
                lambda v, d: v - jnp.asarray(stepsize, v.dtype) * d, y, gradient
            )
            return (y if problem.project_y is None else problem.project_y(y)), None

        end, _ = jax.lax.scan(step, y, None, length=max_steps)
        return problem.upper_value(x, end)

    gradient = jax.grad(value)(x)
    dtype = jnp.result_type(*jtu.tree_leaves(gradient))
    return Hypergradient(gradient, None, jnp.full((), jnp.nan, dtype))


def hypergradient_error_bound(
    problem: BilevelProblem,
    gradient: Hypergradient,
    *,
    strong_convexity: float | Float[Array, ""],
    upper_x: float | Float[Array, ""],
    upper_y: float | Float[Array, ""],
    hessian: float | Float[Array, ""],
    cross: float | Float[Array, ""],
    mixed: float | Float[Array, ""] | None = None,
    proof: bool = True,
) -> Certificate:
    """How far a hypergradient can be from the one at the lower level's exact answer.

    With `e = ||grad_y f|| / mu >= ||y - y(x)||`, `d` the adjoint equation's residual,
    `B` the mixed derivative at `y` and `s = ||w|| + d / mu`, the error is at most

        upper_x e + cross e s + (||B|| + cross e) (hessian s + upper_y) e / mu
        + ||B|| d / mu.

    Args:
        problem: A lower level without constraints and without `project_y`.
        gradient: A `Hypergradient` of `"implicit"`, `"cg"` or `"neumann"`.
        strong_convexity: `mu > 0`: `f(x, .)` is `mu`-strongly convex.
        upper_x: Lipschitz constant of `grad_x F` in `y`.
        upper_y: Lipschitz constant of `grad_y F` in `y`.
        hessian: Lipschitz constant of `hess_yy f` in `y` (0 for quadratics).
        cross: Lipschitz constant of `grad_xy f` in `y` (0 for quadratics).
        mixed: A bound on `||B||`; `None`: the Frobenius norm is computed, for as many
            products as `x` has entries.
        proof: `False` where the constants were probed, not proved.

    Returns:
        A `Certificate`, a proof if the constants are.

    Raises:
        ValueError: if the lower level is constrained, the hypergradient was unrolled,
            or a constant is negative (or `strong_convexity` zero).

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import (
        ...     BilevelProblem, hypergradient, hypergradient_error_bound
        ... )
        >>> problem = BilevelProblem(
        ...     lambda x, y: y**2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> near = hypergradient(problem, jnp.array(1.0), jnp.array(2.1))
        >>> bound = hypergradient_error_bound(
        ...     problem, near, strong_convexity=1.0, upper_x=0.0, upper_y=1.0,
        ...     hessian=0.0, cross=0.0,
        ... )
        >>> round(float(bound.value), 3)
        0.2

    Source: M. S. Salehi, S. Mukherjee, L. Roberts and M. J. Ehrhardt (2023), arXiv
        2308.10098, theorem 2.1, kept term by term.

    Differences: The norm of `B` is bounded by its Frobenius norm; `F` may depend on
        `x`.
    """
    if problem.constrained or problem.project_y is not None or gradient.point is None:
        raise ValueError(
            "hypergradient_error_bound: needs a lower level without constraints and "
            "without `project_y`, and a hypergradient that solved the adjoint "
            "equation (got another). Use method='implicit', 'cg' or 'neumann'."
        )
    owner = "hypergradient_error_bound"
    check_positive(owner, "strong_convexity", strong_convexity)
    constants = {
        "upper_x": upper_x,
        "upper_y": upper_y,
        "hessian": hessian,
        "cross": cross,
        "mixed": 0.0 if mixed is None else mixed,
    }
    for name, value in constants.items():
        check_nonnegative(owner, name, value)
    point = gradient.point
    stationarity, _ = problem.lower_condition(point.x, point.y)
    e = tree_norm(stationarity) / strong_convexity
    d = gradient.residual / strong_convexity
    s = tree_norm(point.adjoint) + d
    if mixed is None:
        system = lambda x: problem.lower_condition(x, point.y)[0]  # noqa: E731
        B = tree_norm(jax.jacfwd(system)(point.x))
    else:
        B = jnp.asarray(mixed, e.dtype)
    value = (
        upper_x * e
        + cross * e * s
        + (B + cross * e) * (hessian * s + upper_y) * e / strong_convexity
        + B * d
    )
    return Certificate(
        "hypergradient error",
        value,
        proof=proof,
        statement=(
            "the hypergradient differs from that at the lower level's exact answer "
            "by at most value, given the constants"
        ),
        details={"lower distance": e, "adjoint distance": d, "mixed norm": B},
    )
