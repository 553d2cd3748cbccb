"""Transport with a hard limit on the nonzeros of every column of the plan.

`min_T <C, T> + gamma / 2 |T|^2` over the plans with row sums `a` and column sums `b`
whose columns have at most k nonzeros. The limit is not convex, yet the dual is concave
and smooth where no two entries tie for the last place: given row potentials `alpha`,
each column solves `max (alpha - c_j)' t - gamma / 2 |t|^2`, whose answer keeps the k
largest entries and projects them on the simplex of size `b_j` (semi-dual), or cuts them
at zero (dual, with column potentials too). k = 1 is the semi-dual of unregularised
transport, shifted by the constant `gamma / 2 |b|^2`; k = m is quadratically regularised
transport.

Use it where a target may serve only so many sources, as an expert its tokens. With
small k the dual has kinks: gradients then converge slowly, or stop short of the
marginals where the optimum itself is a tie. The certificate says which.

Cost: one evaluation is a few passes over the (m, n) matrix, and a partial sort of its
columns where the limit binds.

Source: Liu, Puigcerver, Blondel, 2023 (arXiv 2209.15466).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, Float

from ..core import Certificate, Problem, solve
from ..core._checks import check_choice, check_nonempty, check_positive, check_shape
from ..core._envelope import envelope
from ..operators import project_simplex, project_sparse_simplex
from ._problem import check_cost, check_mass, positive_or_nan
from ._solve import TransportSolution


class SparseTransport(Problem):
    """Move mass `a` to mass `b`, each column of the plan with few nonzeros.

    The unknown is `alpha` of shape (m,) in the semi-dual, the pair `(alpha, beta)` in
    the dual. `value` is the negative dual, convex, so that minimisers run; the
    condition is its gradient, the errors of the marginals, and the residual their L1
    norm. In the semi-dual the columns have no error.

    Args:
        cost: (m, n) costs, finite; the limit is on its columns.
        a: (m,) positive masses with sum 1; default: equal.
        b: (n,) positive masses with sum 1; default: equal.
        max_nonzeros: Nonzeros allowed in a column, from 1 to m.
        gamma: Strength of the quadratic term, positive, in units of the cost over
            those of mass.
        form: `"semidual"` or `"dual"`.

    Raises:
        ValueError: On bad arrays (as `EntropicTransport`), `max_nonzeros` out of range
            or so small that `n max_nonzeros < m` (some row would stay empty), `gamma`
            not positive, or an unknown form.
        TypeError: If `cost` is not floating.

    Example:
        >>> import jax.numpy as jnp, optimistix as optx
        >>> from varan import solve
        >>> from varan.transport import SparseTransport
        >>> cost = jnp.array([[0.0, 1.0], [0.3, 0.0], [1.0, 0.2], [0.1, 1.0]])
        >>> problem = SparseTransport(cost, max_nonzeros=2, gamma=0.1)
        >>> solution = solve(problem, optx.LBFGS(1e-5, 1e-5), problem.start(), tol=1e-5)
        >>> (problem.plan(solution.x) > 0).sum(0).tolist()
        [2, 2]

    Source:
        Liu, Puigcerver, Blondel, 2023 (arXiv 2209.15466), equations 8 to 12.

    Differences:
        None in the objectives. The certificate is ours.
    """

    cost: Float[Array, "m n"]
    a: Float[Array, " m"]
    b: Float[Array, " n"]
    gamma: Float[Array, ""]
    max_nonzeros: int = eqx.field(static=True)
    form: Literal["semidual", "dual"] = eqx.field(static=True)

    def __init__(
        self,
        cost: Float[Array, "m n"],
        a: Float[Array, " m"] | None = None,
        b: Float[Array, " n"] | None = None,
        *,
        max_nonzeros: int,
        gamma: float | Float[Array, ""],
        form: Literal["semidual", "dual"] = "semidual",
    ):
        owner = "SparseTransport"
        self.cost = check_cost(owner, cost)
        m, n = self.cost.shape
        self.a = check_mass(owner, "a", a, m, self.cost.dtype)
        self.b = check_mass(owner, "b", b, n, self.cost.dtype)
        _check_limit(owner, max_nonzeros, m)
        if n * max_nonzeros < m:
            raise ValueError(
                f"{owner}: `max_nonzeros` must be at least {-(-m // n)} (got "
                f"{max_nonzeros}): {n} columns cannot serve {m} rows otherwise."
            )
        check_positive(owner, "gamma", gamma)
        check_shape(owner, "gamma", gamma, ())
        check_choice(owner, "form", form, ("semidual", "dual"))
        self.gamma = positive_or_nan(gamma, self.cost.dtype)
        self.max_nonzeros = max_nonzeros
        self.form = form

    def start(self):
        """Zero potentials."""
        alpha, beta = jnp.zeros_like(self.a), jnp.zeros_like(self.b)
        return alpha if self.form == "semidual" else (alpha, beta)

    @eqx.filter_jit  # a branch outside of `jit` compiles anew with every call
    def plan(self, x) -> Float[Array, "m n"]:
        """The columns that are best for the potentials `x`; at a tie, the first."""
        scores = self._scores(x) / self.gamma
        if self.form == "dual":
            free = jax.nn.relu(scores)
        else:
            free = jax.vmap(project_simplex, (1, 0), 1)(scores, self.b)
        most = self.max_nonzeros
        if most == scores.shape[0]:
            return free
        # Where no column exceeds the limit its answer is the free one, without a sort,
        # which is ten times dearer.
        over = jnp.any(jnp.sum(free > 0, axis=0, dtype=jnp.int32) > most)
        return jax.lax.cond(over, lambda s: self._limited(s), lambda _: free, scores)

    def _limited(self, scores):
        project = partial(project_sparse_simplex, nonzeros=self.max_nonzeros)
        if self.form == "dual":
            return _top_relu(scores, self.max_nonzeros)
        return jax.vmap(lambda s, z: project(s, total=z), (1, 0), 1)(scores, self.b)

    def primal_value(self, plan: Float[Array, "m n"]) -> Float[Array, ""]:
        """`<C, T> + gamma / 2 |T|^2` of a plan."""
        return jnp.sum(self.cost * plan + self.gamma / 2 * plan**2)

    def dual_value(self, x) -> Float[Array, ""]:
        """At most the cost of every plan that meets the limit."""
        return -self.value(x)

    def value(self, x):
        """The negative dual; its derivative is read off the plan."""
        plan = self.plan(x)
        scores = self._scores(x)
        best = jnp.sum(scores * plan - self.gamma / 2 * plan**2)
        square = jnp.sum(plan**2) / 2
        rows, columns = plan.sum(1), plan.sum(0)
        if self.form == "dual":
            value = best - self.a @ x[0] - self.b @ x[1]
            point = x, self.cost, self.gamma, self.a, self.b
            gradient = (rows - self.a, columns - self.b), -plan, -square, -x[0], -x[1]
        else:
            # A column's largest score has its largest entry; both give its level.
            level = jnp.max(scores, axis=0) - self.gamma * jnp.max(plan, axis=0)
            value = best - self.a @ x
            point = x, self.cost, self.gamma, self.a, self.b
            gradient = rows - self.a, -plan, -square, -x, level
        return envelope(jax.lax.stop_gradient(value), gradient, point)

    def condition(self, x):
        plan = self.plan(x)
        rows = plan.sum(1) - self.a
        return rows if self.form == "semidual" else (rows, plan.sum(0) - self.b)

    def residual(self, condition):
        errors = [jnp.sum(jnp.abs(c)) for c in jax.tree_util.tree_leaves(condition)]
        return jnp.asarray(sum(errors))

    @property
    def jacobian_tags(self):
        return frozenset({"symmetric", "positive_semidefinite"})

    @property
    def unique(self):
        # A constant moves between the potentials, and small k leaves more freedom.
        return False

    def certify(self, x, condition, tol) -> Certificate:
        """The marginal error, and what is optimal at it.

        A plan that maximises the Lagrangian is the best one for the masses it has
        (Everett, 1963), however far the limit is from convex and the dual from solved.
        """
        plan = self.plan(x)
        return Certificate(
            "marginal error",
            self.residual(condition),
            tol=tol,
            proof=True,
            statement=(
                "no column of the plan has more than max_nonzeros nonzeros, and the "
                "plan is a global optimum for the masses that it has, which are within "
                "value of a and b in L1; no plan for a and b costs less than "
                "lower_bound"
            ),
            details={
                "lower_bound": self.dual_value(x),
                "objective": self.primal_value(plan),
                "tie_margin": self.tie_margin(x),
            },
        )

    def tie_margin(self, x) -> Float[Array, ""]:
        """By how much the last entry kept beats the first one dropped, in any column.

        In units of the cost; infinite where nothing is dropped. Where it is zero the
        plan is one of several best ones, and only a mixture of them may meet the
        marginals: the dual is then solved, the sparse problem is not.
        """
        scores = self._scores(x)
        if self.max_nonzeros == scores.shape[0]:
            return jnp.asarray(jnp.inf, scores.dtype)
        order = jax.lax.top_k(scores.T, self.max_nonzeros + 1)[0]
        plan = self.plan(x)
        level = order[:, 0] - self.gamma * jnp.max(plan, axis=0)
        if self.form == "dual":
            level = jnp.zeros_like(level)
        # An entry below the level is zero, kept or not.
        return jnp.min(jnp.maximum(order[:, -2], level) - order[:, -1])

    def _scores(self, x):
        if self.form == "semidual":
            return x[:, None] - self.cost
        return x[0][:, None] + x[1][None, :] - self.cost


def topk_relu_conjugate(
    s: Float[Array, " m"], nonzeros: int, gamma: float | Float[Array, ""]
) -> Float[Array, ""]:
    """`max s't - gamma / 2 |t|^2` over `t >= 0` with at most so many nonzeros.

    It is `sum max(s_i, 0)^2 / (2 gamma)` over the `nonzeros` largest entries: the
    smooth, convex term of a column in the dual of `SparseTransport`. Its gradient is
    the maximiser.

    Args:
        s: A vector; use `vmap` for batches.
        nonzeros: From 1 to m.
        gamma: Positive.

    Returns:
        A scalar.

    Raises:
        ValueError: If `s` is not a non-empty vector, `nonzeros` out of range or
            `gamma` not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import topk_relu_conjugate
        >>> float(topk_relu_conjugate(jnp.array([2.0, -1.0, 1.0]), 1, 1.0))
        2.0

    Source:
        Liu, Puigcerver, Blondel, 2023 (arXiv 2209.15466), proposition 2.
    """
    check_shape("topk_relu_conjugate", "s", s, (None,))
    check_nonempty("topk_relu_conjugate", "s", s)
    _check_limit("topk_relu_conjugate", nonzeros, s.shape[0])
    check_positive("topk_relu_conjugate", "gamma", gamma)
    largest = jax.lax.top_k(s, nonzeros)[0]
    return jnp.sum(jax.nn.relu(largest) ** 2) / (2 * gamma)


def sparse_ot(
    cost: Float[Array, "m n"],
    a: Float[Array, " m"] | None = None,
    b: Float[Array, " n"] | None = None,
    *,
    max_nonzeros: int,
    gamma: float | Float[Array, ""],
    form: Literal["semidual", "dual"] = "semidual",
    solver: Any = None,
    tol: float | None = None,
    max_steps: int = 2000,
) -> TransportSolution:
    """A transport plan whose columns have at most so many nonzeros.

    Args:
        cost: See `SparseTransport`.
        a: See `SparseTransport`.
        b: See `SparseTransport`.
        max_nonzeros: See `SparseTransport`.
        gamma: See `SparseTransport`.
        form: See `SparseTransport`; the semi-dual has half the unknowns and takes
            fewer steps.
        solver: Any solver of `varan.solve`; default: `optimistix.LBFGS`.
        tol: L1 error of the marginals at which it stops; default: 1e-6 in float64,
            1e-4 in float32.
        max_steps: Steps after which it stops unconverged.

    Returns:
        A `TransportSolution`. Where it converged, `plan` is a global optimum for
        masses within the tolerance of `a` and `b`. Statuses: `STEP_LIMIT` or `STALLED`
        where the optimum of the dual is a tie: `certificate.details["tie_margin"]` is
        then about zero, the plan keeps the limit and misses the marginals by
        `certificate.value`, and `value` is a lower bound. `rounded_plan` meets the
        marginals and breaks the limit.

    Raises:
        ValueError: As `SparseTransport`; or if `tol` is not positive.
        TypeError: As `SparseTransport` and `varan.solve`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import sparse_ot
        >>> cost = (jnp.arange(6.0)[:, None] - 2.0 * jnp.arange(3.0)[None, :]) ** 2
        >>> solution = sparse_ot(cost / 25, max_nonzeros=2, gamma=0.5)
        >>> bool(solution.converged), (solution.plan > 0).sum(0).tolist()
        (True, [2, 2, 2])

    Source:
        Liu, Puigcerver, Blondel, 2023 (arXiv 2209.15466).
    """
    problem = SparseTransport(
        cost, a, b, max_nonzeros=max_nonzeros, gamma=gamma, form=form
    )
    if tol is None:
        tol = 1e-6 if np.dtype(problem.cost.dtype).itemsize == 8 else 1e-4
    check_positive("sparse_ot", "tol", tol)
    if solver is None:
        # Its own tolerances play no part: the run stops on the condition.
        solver = optx.LBFGS(rtol=tol, atol=tol)
    solution = solve(problem, solver, problem.start(), tol=tol, max_steps=max_steps)
    return TransportSolution(solution.x, problem, solution)


def _top_relu(scores, nonzeros):
    """Every column's largest entries, cut at zero; the rest is zero."""
    largest, places = jax.lax.top_k(scores.T, nonzeros)
    rows = jnp.arange(scores.shape[1])[:, None]
    kept = jnp.zeros_like(scores.T).at[rows, places].set(jax.nn.relu(largest))
    return kept.T


def _check_limit(owner, nonzeros, most):
    name = "max_nonzeros" if owner == "SparseTransport" else "nonzeros"
    if not isinstance(nonzeros, int) or not 1 <= nonzeros <= most:
        raise ValueError(
            f"{owner}: `{name}` must be an integer from 1 to {most} (got {nonzeros!r})."
        )
