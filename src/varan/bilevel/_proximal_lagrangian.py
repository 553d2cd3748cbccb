"""The proximal Lagrangian value function of a constrained lower level.

For `g <= 0` (or `= 0`) and the box `Z = [0, r]^p` (or `[-r, r]^p`),

    v(x, y, z) = min_{t in Y} max_{m in Z} f(x, t) + m . g(x, t)
                 + ||t - y||^2 / (2 gamma1) - ||m - z||^2 / (2 gamma2)

is smooth, although the lower level's value is not: both proximal terms make the saddle
point unique. On feasible points `v <= f`, with equality for some `z` exactly where `y`
solves the lower level (`z` then is a multiplier), so `f - v <= 0` states optimality by
one smooth inequality. Its gradient needs the saddle point and no second derivative.

Source: W. Yao, C. Yu, S. Zeng and J. Zhang (2024), arXiv 2401.16164, section 2.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_positive
from ..core._implicit import implicit_root
from ._problem import BilevelProblem

# Extragradient's stepsize keeps this distance from the local Lipschitz bound.
_SAFETY = 0.9


class ProximalLagrangianValue(eqx.Module):
    """The value function at one point, and how exactly it is known.

    Args:
        value: `v(x, y, z)`; differentiable with respect to `x`, `y`, `z` and the
            problem's parameters, in any order.
        theta: The minimiser `t`, a pytree like `y`.
        multipliers: The maximiser `m`; `None` without constraints.
        error: `|value - v|` is at most this when the lower level is convex (a proof,
            by strong monotonicity of the saddle operator).
        steps: Extragradient steps taken.
        converged: Whether the saddle residual met the tolerance.
    """

    value: Float[Array, ""]
    theta: PyTree[Array]
    multipliers: Float[Array, " p"] | None
    error: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


def saddle_operator(problem, x, y, z, theta, multipliers, gamma1, gamma2):
    """`(d_t, -d_m)` of the saddle function; zero at an interior saddle point."""
    gradient = jax.grad(problem.lagrangian, argnums=1)(x, theta, multipliers)
    down = jtu.tree_map(lambda d, t, v: d + (t - v) / gamma1, gradient, theta, y)
    if not problem.constrained:
        return down, None
    return down, (multipliers - z) / gamma2 - problem.constraints(x, theta)


def project_saddle(problem, x, theta, multipliers, bound):
    """Projects on `Y x Z`."""
    if problem.project_y is not None:
        theta = problem.project_y(theta)
    if not problem.constrained:
        return theta, None
    equality = jnp.arange(multipliers.size) < problem.equalities(x, theta)
    lower = jnp.where(equality, -bound, jnp.zeros_like(bound))
    return theta, jnp.clip(multipliers, lower, bound)


def proximal_lagrangian_value(
    problem: BilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    z: Float[Array, " p"] | None = None,
    *,
    gamma1: float | Float[Array, ""] = 1.0,
    gamma2: float | Float[Array, ""] = 1.0,
    bound: float | Float[Array, ""] = 1e3,
    tol: float | Float[Array, ""] | None = None,
    max_steps: int = 10_000,
) -> ProximalLagrangianValue:
    """Evaluates the proximal Lagrangian value function by an inner extragradient loop.

    The stepsize adapts; the number of steps grows with the condition of the saddle
    operator, whose strong monotonicity is at least `min(1 / gamma1, 1 / gamma2)`.

    Args:
        problem: A lower level that is convex in `y`.
        x: Upper variables.
        y: Proximal centre of the lower variables.
        z: Proximal centre of the multipliers, equalities first; zero by default.
        gamma1: Proximal parameter of the lower variables, positive.
        gamma2: Proximal parameter of the multipliers, positive.
        bound: `r`: multipliers are kept in `[0, r]` (`[-r, r]` for equalities).
        tol: Norm of the saddle residual to reach; default: the square root of the
            dtype's rounding unit.
        max_steps: Steps after which the loop gives up; the value is then as exact as
            `error` says, and its derivatives are NaN.

    Returns:
        A `ProximalLagrangianValue`.

    Raises:
        ValueError: if `gamma1`, `gamma2`, `bound` or `tol` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import BilevelProblem, proximal_lagrangian_value
        >>> problem = BilevelProblem(
        ...     lambda x, y: jnp.sum(y), lambda x, y: jnp.sum((y - x) ** 2) / 2
        ... )
        >>> v = proximal_lagrangian_value(problem, jnp.zeros(1), jnp.full(1, 2.0))
        >>> round(float(v.value), 4)
        1.0

    Source: arXiv 2401.16164, equation 4 and lemma on the gradient of `v`.
    """
    owner = "proximal_lagrangian_value"
    for name, value in (("gamma1", gamma1), ("gamma2", gamma2), ("bound", bound)):
        check_positive(owner, name, value)
    dtype = jnp.result_type(*jtu.tree_leaves(y))
    tol = float(np.sqrt(jnp.finfo(dtype).eps)) if tol is None else tol
    check_positive(owner, "tol", tol)
    gamma1, gamma2, bound, tol = (
        jnp.asarray(v, dtype) for v in (gamma1, gamma2, bound, tol)
    )
    if z is None and problem.constrained:
        z = jnp.zeros_like(problem.constraints(x, y))

    def operator(u, problem, x, y, z):
        return saddle_operator(problem, x, y, z, *u, gamma1, gamma2)

    def project(u, problem, x):
        return project_saddle(problem, x, *u, bound)

    stopped = _stop((problem, x, y, z))
    u, residual, steps = _extragradient(
        lambda u: operator(u, *stopped),
        lambda u: project(u, *stopped[:2]),
        (stopped[2], stopped[3]),
        tol,
        max_steps,
    )

    def natural_map(u):
        moved = jtu.tree_map(jnp.subtract, u, operator(u, problem, x, y, z))
        step = jtu.tree_map(jnp.subtract, u, project(moved, problem, x))
        return ravel_pytree(step)[0]

    theta, multipliers = implicit_root(natural_map, u, reliable=residual <= tol)
    value = problem.lagrangian(x, theta, multipliers)
    value = value + _squared_distance(theta, y) / (2 * gamma1)
    if problem.constrained:
        value = value - _squared_distance(multipliers, z) / (2 * gamma2)
    # q = an element of T(u) + N(u) with norm `residual`; the saddle value is off by
    # at most <q, u - u*> <= ||q||^2 / rho on either side.
    rho = 1 / (jnp.maximum(gamma1, gamma2) if problem.constrained else gamma1)
    return ProximalLagrangianValue(
        value, theta, multipliers, residual**2 / rho, steps, residual <= tol
    )


def value_gap(
    problem: BilevelProblem,
    x: PyTree[Array],
    y: PyTree[Array],
    z: Float[Array, " p"] | None = None,
    *,
    tol: float | Float[Array, ""] | None = None,
    **settings,
) -> Certificate:
    """Certifies how far `y` is from solving the lower level at `x`: `f - v`.

    At a feasible `(x, y)` the gap is nonnegative; it is zero exactly when `y` solves
    the lower level with multipliers `z`. The certificate's value adds the inexactness
    of `v`, so that it is never below the true gap.

    Args:
        problem: A lower level that is convex in `y`.
        x: Upper variables.
        y: Lower variables.
        z: Multipliers; zero by default.
        tol: What the gap should not exceed; `None` for no target.
        **settings: `gamma1`, `gamma2`, `bound`, `max_steps` of
            `proximal_lagrangian_value`.

    Returns:
        A `Certificate` of kind `"value gap"`, with the infeasibility (largest
        violation) and the inexactness of `v` among its details.

    Raises:
        ValueError: as `proximal_lagrangian_value`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import BilevelProblem, value_gap
        >>> problem = BilevelProblem(
        ...     lambda x, y: jnp.sum(y), lambda x, y: jnp.sum((y - x) ** 2) / 2
        ... )
        >>> bool(value_gap(problem, jnp.ones(1), jnp.ones(1), tol=1e-6).met)
        True

    Source: arXiv 2401.16164, section 2.
    """
    v = proximal_lagrangian_value(problem, x, y, z, **settings)
    details = {"inexactness": v.error}
    if problem.constrained:
        values = problem.constraints(x, y)
        equality = jnp.arange(values.size) < problem.equalities(x, y)
        violation = jnp.where(equality, jnp.abs(values), jnp.maximum(values, 0))
        details["infeasibility"] = jnp.max(violation)
    return Certificate(
        "value gap",
        problem.lower_value(x, y) - v.value + v.error,
        tol=tol,
        proof=True,
        statement=(
            "f(x, y) - v(x, y, z) <= value; at a feasible point it is zero only if y "
            "solves the lower level"
        ),
        details=details,
    )


def _extragradient(operator, project, start, tol, max_steps):
    """Projected extragradient with Marcotte's stepsize rule, to residual `tol`."""
    flat, unravel = ravel_pytree(start)
    T = lambda v: ravel_pytree(operator(unravel(v)))[0]  # noqa: E731
    P = lambda v: ravel_pytree(project(unravel(v)))[0]  # noqa: E731

    def step(carry):
        u, size, _, steps = carry
        here = T(u)
        half = P(u - size * here)
        change = T(half) - here
        allowed = _SAFETY * jnp.linalg.norm(half - u)
        fits = size * jnp.linalg.norm(change) <= allowed
        # The element of T + N at the half point; its norm bounds the distance.
        element = (u - half) / size + change
        residual = jnp.where(fits, jnp.linalg.norm(element), jnp.inf)
        done = residual <= tol
        following = jnp.where(done, half, P(u - size * T(half)))
        return (
            jnp.where(fits, following, u),
            jnp.where(fits, jnp.where(done, size, size * 1.1), size / 2),
            residual,
            steps + 1,
        )

    def go(carry):
        *_, residual, steps = carry
        return (residual > tol) & (steps < max_steps)

    infinite = jnp.full((), jnp.inf, flat.dtype)
    carry = (P(flat), jnp.ones((), flat.dtype), infinite, jnp.zeros((), jnp.int32))
    u, size, _, steps = jax.lax.while_loop(go, step, carry)
    # The residual at the very point that is returned, whether or not it converged.
    moved = P(u - size * T(u))
    element = (u - moved) / size + T(moved) - T(u)
    return unravel(moved), jnp.linalg.norm(element), steps


def _squared_distance(a, b):
    parts = jtu.tree_map(lambda u, v: jnp.sum((u - v) ** 2), a, b)
    return sum(jtu.tree_leaves(parts))


def _stop(tree):
    return jtu.tree_map(
        lambda leaf: (
            jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf
        ),
        tree,
    )
