"""What the penalty method descends on, and the gradient that it approximates.

With `h_s = s F + f`, `l(x, s) = min_{y in Y} h_s(x, y)` and the optimistic value
`psi(x) = min { F(x, y) : y an answer of the lower level at x }`, the penalised value is

    psi_s(x) = (l(x, s) - l(x, 0)) / s <= psi(x).

Where the lower level has a proximal error bound (many answers are allowed, convexity is
not needed), `psi_s` and its gradient are within `O(s)` of `psi` and its gradient; where
it has none, they may stay away however small `s` is.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_positive
from ..core._solve import solve
from ..core._trees import tree_norm
from ._alternating import descend, upper_gradients
from ._hypergradient import Hypergradient, check_multipliers
from ._problem import BilevelPoint, BilevelProblem


class PenaltyGradient(eqx.Module):
    """The penalised value and its gradient, and the two minimisers they rest on.

    Args:
        value: `psi_s(x)`.
        gradient: `grad psi_s(x)`, a pytree like `x`.
        y: Minimiser of `s F + f`.
        z: Minimiser of `f`.
        certificate: How exactly both were minimised, and what follows.
    """

    value: Float[Array, ""]
    gradient: PyTree[Array]
    y: PyTree[Array]
    z: PyTree[Array]
    certificate: Certificate


def penalty_hypergradient(
    problem: BilevelProblem,
    x: PyTree[Array],
    start: PyTree[Array],
    sigma: float | Float[Array, ""],
    *,
    solver: Any = None,
    tol: float | Float[Array, ""] | None = None,
    max_steps: int = 10_000,
) -> PenaltyGradient:
    """The gradient of the penalised value, from first derivatives only.

    `grad_x F(x, y) + (grad_x f(x, y) - grad_x f(x, z)) / sigma`, with `y` the minimiser
    of `sigma F + f` and `z` one of `f` over Y. The error against the true hypergradient
    is of order `sigma` under an error bound; errors of the minimisers enter it divided
    by `sigma`, so `tol` must fall faster than `sigma` does.

    Args:
        problem: A lower level without constraints; `project_y` is honoured.
        x: Upper variables.
        start: Lower variables from which both minimisations begin.
        sigma: The penalty parameter, positive and small.
        solver: Solver of a `varan.problems.SetConstrained` (without `project_y` the
            set is the whole space); default: `varan.firstorder.ProximalGradient()`.
        tol: Residual of both minimisations; default: that of `varan.solve`.
        max_steps: Steps of each.

    Returns:
        A `PenaltyGradient`. Its certificate is met when both minimisations converged.

    Raises:
        ValueError: if `sigma` is not positive or the problem has constraints.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import BilevelProblem, penalty_hypergradient
        >>> problem = BilevelProblem(  # only y[0] + y[1] is determined below
        ...     lambda x, y: jnp.sum(y**2) / 2, lambda x, y: (y[0] + y[1] - x) ** 2 / 2
        ... )
        >>> x, y = jnp.array(1.0), jnp.zeros(2)
        >>> round(float(penalty_hypergradient(problem, x, y, 0.01).gradient), 2)
        0.5

    Source: J. Kwon, D. Kwon, S. Wright and R. Nowak (2024), On penalty methods for
        nonconvex bilevel optimization and first-order stochastic approximation, ICLR
        2024, arXiv 2309.01753, section 3.
    """
    # Imported here: a topic's solvers are not needed to describe a problem.
    from ..firstorder import ProximalGradient
    from ..problems import SetConstrained

    owner = "penalty_hypergradient"
    check_positive(owner, "sigma", sigma)
    check_sets_only(owner, problem)
    solver = ProximalGradient() if solver is None else solver
    dtype = jnp.result_type(*jtu.tree_leaves(start))
    sigma = jnp.asarray(sigma, dtype)

    def least(weight):
        penalised = SetConstrained(_penalised, _project, problem, x, weight)
        settings = {"tol": tol, "max_steps": max_steps, "differentiate": "none"}
        return solve(penalised, solver, start, **settings)

    # One compiled loop for both; z must not start from y, whose choice among the lower
    # answers it would inherit.
    above, below = least(sigma), least(jnp.zeros_like(sigma))
    y, z = above.x, below.x
    gap = problem.lower_value(x, y) - problem.lower_value(x, z)
    value = problem.upper_value(x, y) + gap / sigma
    gradient = penalty_direction(problem, x, y, z, sigma)
    bound = sigma * (problem.upper_value(x, z) - problem.upper_value(x, y))
    certificate = Certificate(
        "residual",
        jnp.maximum(above.residual, below.residual),
        tol=above.tol,
        proof=True,
        statement=(
            "value bounds the conditions of both minimisations; where both are solved "
            "exactly, psi_sigma(x) <= psi(x) and the lower gap is at most its bound"
        ),
        details={"lower gap": gap, "lower gap bound": bound},
    )
    return PenaltyGradient(value, gradient, y, z, certificate)


def hypergradient_pinv(
    problem: BilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    multipliers: Float[Array, " p"] | None = None,
) -> Hypergradient:
    """The gradient of `psi`, also where the lower level has many answers.

    The adjoint equation is solved by the pseudo-inverse of the lower level's optimality
    system, dense: O(n^3) for n lower variables and multipliers. `y` must be the answer
    that the upper level prefers; the formula is right when a nearby `x` has a nearby
    preferred answer (regular solutions), and independent of which multipliers are
    taken.

    Args:
        problem: Constraints and `project_y` are honoured.
        x: Upper variables.
        y: The preferred lower answer.
        multipliers: The lower level's multipliers; needed with constraints.

    Returns:
        A `Hypergradient`. A `residual` above rounding says that `y` is not a preferred
        answer: moving along the lower level's answers would lower `F`.

    Raises:
        ValueError: if multipliers are missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import BilevelProblem, hypergradient_pinv
        >>> problem = BilevelProblem(
        ...     lambda x, y: jnp.sum(y**2) / 2, lambda x, y: (y[0] + y[1] - x) ** 2 / 2
        ... )
        >>> found = hypergradient_pinv(problem, jnp.array(1.0), jnp.array([0.5, 0.5]))
        >>> round(float(found.value), 4), bool(found.residual < 1e-6)
        (0.5, True)

    Source: arXiv 2309.01753, theorem 3.
    """
    check_multipliers("hypergradient_pinv", problem, multipliers)
    return _pinv_gradient(problem, x, y, multipliers)


# One program: taken one by one, the small dense steps cost more to compile.
@eqx.filter_jit
def _pinv_gradient(problem, x, y, multipliers):
    flat, unravel = ravel_pytree((y, multipliers))

    def system(u):
        return ravel_pytree(problem.lower_condition(x, *unravel(u)))[0]

    none = jtu.tree_map(jnp.zeros_like, multipliers)
    force = ravel_pytree((upper_gradients(problem, x, y)[1], none))[0]
    adjoint, multiplier_adjoint = unravel(-_pinv(jax.jacfwd(system)(flat).T) @ force)
    point = BilevelPoint(x, y, adjoint, multipliers, multiplier_adjoint)
    free = eqx.tree_at(
        lambda p: (p.project_x, p.joint),
        problem,
        (None, None),
        is_leaf=lambda node: node is None,
    )
    condition = free.condition(point)
    residual = tree_norm((condition.y, condition.multipliers))
    return Hypergradient(condition.x, point, residual)


def check_sets_only(owner: str, problem: BilevelProblem) -> None:
    """Refuses constraints that couple the lower level to `x`; sets are fine."""
    if problem.constrained:
        raise ValueError(
            f"{owner}: needs a lower level without constraints (`project_y` is fine). "
            "Use LVHBA for constraints."
        )


def penalty_direction(problem, x, y, z, sigma):
    """`grad_x F(x, y) + (grad_x f(x, y) - grad_x f(x, z)) / sigma`."""
    slope = jax.grad(problem.upper_value)(x, y)
    above, below = (jax.grad(problem.lower_value)(x, v) for v in (y, z))
    gap = jtu.tree_map(jnp.subtract, above, below)
    return descend(slope, gap, -1 / sigma)


# Functions of the module, not closures: problems of one shape share compiled code.


def _penalised(y, problem, x, sigma):
    value = problem.lower_value(x, y)
    return value + sigma.astype(value.dtype) * problem.upper_value(x, y)


def _project(v, problem, x, sigma):
    return v if problem.project_y is None else problem.project_y(v)


def _pinv(matrix):
    # Rounding leaves singular values of about n eps; the square root is far above it
    # and below what an error bound with a usable constant allows.
    eps = float(jnp.finfo(matrix.dtype).eps)
    return jnp.linalg.pinv(matrix, rtol=eps**0.5)
