"""Entropic optimal transport as a problem: its condition is the marginal error.

`min_P <C, P> + epsilon sum_ij P_ij log P_ij` over the plans with row sums `a` and
column sums `b`. The optimal plan is `P = exp((f_i + g_j - C_ij) / epsilon)`, and the
potentials `(f, g)` solve the problem exactly when that plan has the right marginals.
They maximise the concave dual `<a, f> + <b, g> - epsilon (sum P - 1)`, whose value is
a lower bound at any `(f, g)`.

The potentials are free up to a constant that moves from `f` to `g`. The gauge
`<a, f> = <b, g>` fixes it: the condition carries a term whose value is always zero
and whose derivative holds that gauge, so its Jacobian is symmetric, positive definite
and factorised by Cholesky; plan and value do not see the gauge at all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special as jsp
import numpy as np
from jaxtyping import Array, Float

from ..core import Certificate, Problem
from ..core._checks import check_finite, check_nonempty, check_positive, is_traced
from ._rounding import rounding, total


class EntropicTransport(Problem):
    """Move mass `a` to mass `b` at least cost plus an entropy, for every solver.

    The unknown is the pair of potentials `(f, g)`; the residual is the L1 error of
    both marginals. One evaluation is one pass of exponentials over the matrix.

    Args:
        cost: (m, n) costs, finite; or an object with `cost_matrix` and `epsilon`, as
            `ott.geometry.geometry.Geometry`.
        a: (m,) positive masses with sum 1; default: equal masses. What rounding
            leaves of the sum is divided out, so derivatives are those of the
            normalised masses.
        b: (n,) positive masses with sum 1; default: equal masses.
        epsilon: Strength of the entropy, positive, in units of the cost (the inverse
            of the `eta` of some papers). May be left out for an object that has one.

    Raises:
        ValueError: On wrong shapes, empty arrays, NaN or infinity, masses that are
            not positive or do not sum to 1, `epsilon` not positive.
        TypeError: If `cost` is not floating, or `epsilon` is missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.transport import EntropicTransport, Sinkhorn
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> problem = EntropicTransport(cost, epsilon=0.2)
        >>> solution = solve(problem, Sinkhorn(), problem.start(), tol=1e-5)
        >>> problem.plan(solution.x).round(3)
        Array([[0.497, 0.003],
               [0.003, 0.497]], dtype=float32)
    """

    cost: Float[Array, "m n"]
    a: Float[Array, " m"]
    b: Float[Array, " n"]
    epsilon: Float[Array, ""]

    def __init__(self, cost: Any, a=None, b=None, epsilon=None):
        if hasattr(cost, "cost_matrix"):
            epsilon = getattr(cost, "epsilon", None) if epsilon is None else epsilon
            cost = cost.cost_matrix
        if epsilon is None:
            raise TypeError(
                "EntropicTransport: `epsilon` must be given (got None). Pass a "
                "positive number in units of the cost."
            )
        self.cost = check_cost("EntropicTransport", cost)
        dtype = self.cost.dtype
        self.a = check_mass("EntropicTransport", "a", a, self.cost.shape[0], dtype)
        self.b = check_mass("EntropicTransport", "b", b, self.cost.shape[1], dtype)
        check_positive("EntropicTransport", "epsilon", epsilon)
        self.epsilon = positive_or_nan(epsilon, dtype)
        if self.epsilon.shape:
            raise ValueError(
                "EntropicTransport: `epsilon` must be a scalar (got shape "
                f"{self.epsilon.shape}). Use jax.vmap for several."
            )

    def start(self) -> tuple[Float[Array, " m"], Float[Array, " n"]]:
        """Zero potentials."""
        return jnp.zeros_like(self.a), jnp.zeros_like(self.b)

    def transpose(self) -> EntropicTransport:
        """The same problem with the roles of rows and columns exchanged."""
        return _replace(self, self.cost.T, self.b, self.a)

    def plan(self, x) -> Float[Array, "m n"]:
        """The plan `exp((f_i + g_j - C_ij) / epsilon)` of the potentials `x`."""
        f, g = x
        return jnp.exp((f[:, None] + g[None, :] - self.cost) / self.epsilon)

    def dual_value(self, x) -> Float[Array, ""]:
        """`<a, f> + <b, g> - epsilon (sum P - 1)`: at most the optimal value."""
        f, g = x
        mass = jnp.sum(self.plan(x))
        return self.a @ f + self.b @ g - self.epsilon * (mass - 1)

    def primal_value(self, plan: Float[Array, "m n"]) -> Float[Array, ""]:
        """`<C, P> + epsilon sum P log P` of a plan."""
        return jnp.sum(self.cost * plan + self.epsilon * jsp.xlogy(plan, plan))

    def gauge(self, x):
        """The same plan's potentials with `<a, f> = <b, g>`."""
        f, g = x
        shift = (self.b @ g - self.a @ f) / 2
        return f + shift, g - shift

    def condition(self, x):
        f, g = x
        plan = self.plan(x)
        gauge = (self.a @ f - self.b @ g) / self.epsilon
        # Zero in value; its derivative is the second rank-one part of the Jacobian.
        pin = gauge - jax.lax.stop_gradient(gauge)
        return plan.sum(1) - self.a + self.a * pin, plan.sum(0) - self.b - self.b * pin

    def residual(self, condition):
        return jnp.sum(jnp.abs(condition[0])) + jnp.sum(jnp.abs(condition[1]))

    @property
    def jacobian_tags(self):
        return frozenset({"symmetric", "positive_semidefinite"})

    def certify(self, x, condition, tol) -> Certificate:
        """Marginal error, with duality gap and cost bound of the rounded plan."""
        upper, cost = self._rounded_values(x)
        dual = self.dual_value(x)
        return Certificate(
            "marginal error",
            self.residual(condition),
            tol=tol,
            proof=True,
            statement=(
                "the L1 error of the plan's marginals is value; the rounded plan is "
                "feasible, its regularised value is within duality_gap of the "
                "optimum, and its cost within cost_gap of the least transport cost"
            ),
            details={
                "duality_gap": jnp.maximum(upper - dual, 0),
                # Entropy is nonnegative, so the dual is below the transport cost too.
                "cost_gap": jnp.maximum(cost - dual, 0),
                "rounded_cost": cost,
                "dual_value": dual,
            },
        )

    def _rounded_values(self, x):
        """An upper bound on the rounded plan's regularised value, and its cost.

        The rounded plan is `Q + E`, `Q = diag(left) P diag(right)` and `E` of mass
        `mass`. As `(q + e) log(q + e) <= q log q + e` for `q + e <= 1`, and as `log Q`
        is known from the potentials, no logarithm of a matrix is needed.
        """
        f, g = x
        plan = self.plan(x)
        left, right, missing_a, missing_b = rounding(plan, self.a, self.b)
        spread = missing_b / total(missing_b)
        added = missing_a @ (self.cost @ spread)
        rows, columns = left * (plan @ right), right * (left @ plan)
        upper = rows @ f + columns @ g + added + self.epsilon * jnp.sum(missing_a)
        upper = upper + self.epsilon * jnp.sum(jsp.xlogy(rows, left))
        upper = upper + self.epsilon * jnp.sum(jsp.xlogy(columns, right))
        kept = left @ jnp.sum(self.cost * plan * right[None, :], axis=1)
        return upper, kept + added


def _replace(problem, cost, a, b):
    # Past the checks: the parts come from a checked problem.
    new = object.__new__(EntropicTransport)
    for name, value in (
        ("cost", cost),
        ("a", a),
        ("b", b),
        ("epsilon", problem.epsilon),
    ):
        object.__setattr__(new, name, value)
    return new


def check_cost(owner, cost) -> Array:
    """Refuses what is no floating, finite matrix."""
    if not is_traced(cost):
        cost = jnp.asarray(cost)
    if not jnp.issubdtype(cost.dtype, jnp.floating):
        raise TypeError(
            f"{owner}: `cost` must be floating (got {cost.dtype}). "
            "Convert it, for instance with jnp.asarray(cost, float)."
        )
    if cost.ndim != 2:
        raise ValueError(
            f"{owner}: `cost` must have shape (any, any) (got "
            f"{cost.shape}). Use jax.vmap for a batch."
        )
    check_nonempty(owner, "cost", cost)
    check_finite(owner, "cost", cost)
    return cost


def positive_or_nan(value, dtype) -> Array:
    """A checked number as an array; a traced one is NaN unless it is positive."""
    array = jnp.asarray(value, dtype)
    return jnp.where(array > 0, array, jnp.nan) if is_traced(value) else array


def check_entropic(owner: str, problem) -> None:
    """Refuses any problem but entropic transport."""
    if not isinstance(problem, EntropicTransport):
        raise TypeError(
            f"{owner}: `problem` must be an EntropicTransport (got "
            f"{type(problem).__name__})."
        )


def check_mass(owner, name, mass, size, dtype) -> Array:
    """Positive masses with sum 1; equal ones for `None`."""
    if mass is None:
        return jnp.full(size, 1 / size, dtype)
    if np.shape(mass) != (size,):
        points = " Two clouds of points make a cost by cost_matrix(x, y)."
        raise ValueError(
            f"{owner}: `{name}` must have shape ({size},), as the cost has "
            f"(got {np.shape(mass)}).{points if np.ndim(mass) == 2 else ''}"
        )
    check_finite(owner, name, mass)
    near = float(np.sqrt(np.finfo(dtype).eps))
    if not is_traced(mass):
        smallest, total = np.min(np.asarray(mass)), float(np.sum(np.asarray(mass)))
        if smallest <= 0:
            raise ValueError(
                f"{owner}: `{name}` must be positive (got minimum "
                f"{smallest}). Drop the points without mass."
            )
        # What rounding of a sum leaves, with room; the rest is a user's mistake.
        if abs(total - 1) > near:
            raise ValueError(
                f"{owner}: `{name}` must sum to 1 (got {total:.6g}). "
                "Divide it by its sum."
            )
    given, mass = mass, jnp.asarray(mass, dtype)
    total = jnp.sum(mass)
    if is_traced(given):
        valid = jnp.all(mass > 0) & (jnp.abs(total - 1) <= near)
        mass = jnp.where(valid, mass, jnp.nan)
    return mass / total
