"""Entropic transport in one call: the plan, its value, derivatives, certificate."""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..core import Certificate, Solution, Solver, implicit_root, solve
from ..core._certificate import format_number
from ..core._checks import check_choice, check_positive, is_traced
from ._problem import EntropicTransport
from ._rounding import round_to_polytope
from ._schur import DualHessian
from ._semidual_newton import SemiDualNewton
from ._sinkhorn import Sinkhorn
from ._sparse_newton import SparseNewton

# From this share of the largest cost on, over-relaxed Sinkhorn needs a few dozen sweeps
# and no linear solve: measured faster than Newton at n = 500 and 1000.
_MILD = 5e-3
_TOL = {4: 1e-4, 8: 1e-9}
_SMALLEST_SINGLE_TOL = 1e-6


class TransportSolution(eqx.Module):
    """A transport plan, as its potentials and what is known of them.

    Plan and value are computed when they are asked for. Derivatives of `potentials`,
    `plan` and `value` with respect to cost, masses and epsilon are those of the exact
    solution, to any order; where the run did not converge they are NaN.

    Args:
        potentials: The problem's unknown; `(f, g)` with `<a, f> = <b, g>` for
            `EntropicTransport`.
        problem: The problem that was solved.
        solution: The run: status, steps, residual, trace.
    """

    potentials: Any
    problem: Any
    solution: Solution

    @property
    def plan(self) -> Float[Array, "m n"]:
        """The plan; its marginals err by `certificate.value` in L1."""
        return self.problem.plan(self.potentials)

    @property
    def rounded_plan(self) -> Float[Array, "m n"]:
        """A plan with exactly the wanted marginals, next to `plan`."""
        return round_to_polytope(self.plan, self.problem.a, self.problem.b)

    @property
    def value(self) -> Float[Array, ""]:
        """The least regularised cost, from below: the dual's value."""
        return self.problem.dual_value(self.potentials)

    @property
    def cost(self) -> Float[Array, ""]:
        """`<C, P>` of the plan, without the regularisation."""
        return jnp.sum(self.problem.cost * self.plan)

    @property
    def certificate(self) -> Certificate:
        """The problem's certificate: a marginal error and what it proves."""
        return self.solution.certificate

    @property
    def status(self) -> Int[Array, ""]:
        """How the run ended."""
        return self.solution.status

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether the marginal error met the tolerance."""
        return self.solution.converged

    @property
    def stats(self) -> dict[str, Array]:
        """Steps, evaluations (two reads of the matrix each) and the error's trace."""
        run = self.solution
        return {
            "steps": run.steps,
            "evaluations": run.evaluations,
            "errors": run.trace.residual,
        }

    def __str__(self) -> str:
        if is_traced(self.status) or jnp.ndim(self.status):
            return "TransportSolution(traced or batched)"
        lines = str(self.solution).splitlines()
        numbers = [("cost", self.cost), ("value", self.value)]
        numbers += list(self.certificate.details.items())
        shown = [f"  {name:<12} {format_number(v)}" for name, v in numbers]
        return "\n".join(["Transport" + lines[0], *shown, *lines[1:]])

    __repr__ = __str__


def entropic_transport(
    cost: Any,
    a: Float[Array, " m"] | None = None,
    b: Float[Array, " n"] | None = None,
    *,
    epsilon: float | Float[Array, ""] | None = None,
    method: Literal["auto", "sinkhorn", "newton", "sparse-newton"] | Solver = "auto",
    tol: float | None = None,
    max_steps: int = 1000,
) -> TransportSolution:
    """The entropic optimal transport plan between two discrete measures.

    `jit`, `vmap`, `grad` and `jvp` of it work with respect to cost, masses and epsilon;
    a derivative costs one Cholesky factorisation of the size of the shorter side.

    Args:
        cost: (m, n) costs, or an object with `cost_matrix` and `epsilon`.
        a: (m,) positive masses with sum 1; default: equal.
        b: (n,) positive masses with sum 1; default: equal.
        epsilon: Strength of the entropy, in units of the cost.
        method: `"sinkhorn"` (adaptively over-relaxed), `"newton"` (semi-dual),
            `"sparse-newton"`, or any solver of `EntropicTransport`. `"auto"` takes
            Sinkhorn where epsilon is at least 0.005 of the largest cost, and Newton
            below, or where the values are not known because they are traced.
        tol: L1 error of the marginals at which the run stops; default: 1e-9 in
            float64, 1e-4 in float32.
        max_steps: Steps after which it stops unconverged.

    Returns:
        A `TransportSolution`. Read its `status`: `CONVERGED`, `STEP_LIMIT`, `STALLED`
        (the tolerance is below what the dtype reaches at this epsilon), `DIVERGED`.

    Raises:
        ValueError: On bad arrays (see `EntropicTransport`), an unknown method, `tol`
            not positive or, in float32, below 1e-6.
        TypeError: If `epsilon` is missing or `cost` is not floating.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.transport import entropic_transport
        >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> entropic_transport(cost, epsilon=0.2).plan.round(3)
        Array([[0.497, 0.003],
               [0.003, 0.497]], dtype=float32)
        >>> slope = jax.grad(lambda c: entropic_transport(c, epsilon=0.2).value)(cost)
        >>> slope.round(3)
        Array([[0.497, 0.003],
               [0.003, 0.497]], dtype=float32)

    Source:
        Cuturi, 2013 (arXiv 1306.0895); the solvers name their own.
    """
    problem = EntropicTransport(cost, a, b, epsilon)
    tol = _check_tol("entropic_transport", tol, problem.cost.dtype)
    solver = _choose(problem, method)
    return _run(problem, solver, tol, max_steps)


def sinkhorn(
    cost: Any,
    a: Float[Array, " m"] | None = None,
    b: Float[Array, " n"] | None = None,
    *,
    epsilon: float | Float[Array, ""] | None = None,
    mode: Literal["scaling", "log"] = "scaling",
    relaxation: float | Literal["adaptive"] = 1.0,
    tol: float | None = None,
    max_sweeps: int = 10_000,
) -> TransportSolution:
    """Sinkhorn's method, plain unless a relaxation is asked for.

    Args:
        cost: See `entropic_transport`.
        a: See `entropic_transport`.
        b: See `entropic_transport`.
        epsilon: See `entropic_transport`.
        mode: See `Sinkhorn`.
        relaxation: See `Sinkhorn`.
        tol: See `entropic_transport`.
        max_sweeps: Sweeps after which it stops unconverged, rounded up to tens.

    Returns:
        A `TransportSolution`.

    Raises:
        ValueError: As `entropic_transport` and `Sinkhorn`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import sinkhorn
        >>> solution = sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.2)
        >>> bool(solution.converged)
        True

    Source:
        Cuturi, 2013 (arXiv 1306.0895); see `Sinkhorn` for the rest.
    """
    problem = EntropicTransport(cost, a, b, epsilon)
    tol = _check_tol("sinkhorn", tol, problem.cost.dtype)
    solver = Sinkhorn(mode, relaxation)
    return _run(problem, solver, tol, -(-max_sweeps // solver.sweeps))


def sinkhorn_newton_sparse(
    cost: Any,
    a: Float[Array, " m"] | None = None,
    b: Float[Array, " n"] | None = None,
    *,
    epsilon: float | Float[Array, ""] | None = None,
    warmup: int = 20,
    keep_per_row: int | Literal["mass"] = 4,
    tol: float | None = None,
    max_newton: int = 100,
) -> TransportSolution:
    """Sinkhorn-Newton-Sparse: few sweeps, then Newton with a sparsified Hessian.

    Args:
        cost: See `entropic_transport`.
        a: See `entropic_transport`.
        b: See `entropic_transport`.
        epsilon: See `entropic_transport`; the inverse of the paper's `eta`.
        warmup: See `SparseNewton`.
        keep_per_row: See `SparseNewton`.
        tol: See `entropic_transport`.
        max_newton: Newton steps after which it stops unconverged.

    Returns:
        A `TransportSolution`; a step of its `stats` is a sweep or a Newton step.

    Raises:
        ValueError: As `entropic_transport` and `SparseNewton`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import sinkhorn_newton_sparse
        >>> cost = (jnp.arange(4.0)[:, None] - jnp.arange(5.0)[None, :]) ** 2 / 16
        >>> bool(sinkhorn_newton_sparse(cost, epsilon=0.05).converged)
        True

    Source:
        Tang et al., 2024 (arXiv 2401.12253).
    """
    problem = EntropicTransport(cost, a, b, epsilon)
    tol = _check_tol("sinkhorn_newton_sparse", tol, problem.cost.dtype)
    solver = SparseNewton(warmup, keep_per_row)
    return _run(problem, solver, tol, max(warmup, 1) + max_newton)


def _run(problem, solver, tol, max_steps) -> TransportSolution:
    potentials, solution = _solve(problem, solver, tol, max_steps)
    return TransportSolution(potentials, problem, solution)


@eqx.filter_jit
def _solve(problem, solver, tol, max_steps):
    frozen = jax.lax.stop_gradient(problem)
    solution = solve(
        frozen,
        solver,
        frozen.start(),
        tol=tol,
        max_steps=max_steps,
        differentiate="none",
    )
    x = jax.lax.stop_gradient(solution.x)
    # Not solve's own rule: the Schur complement is eight times cheaper than the
    # condition's Jacobian, and keeps its conditioning.
    potentials = implicit_root(
        problem.condition,
        x,
        tags=problem.jacobian_tags,
        reliable=solution.converged,
        linear_solver=DualHessian(frozen, x),
    )
    return potentials, solution


def _choose(problem, method) -> Solver:
    if isinstance(method, Solver):
        return method
    choices = ("auto", "sinkhorn", "newton", "sparse-newton")
    check_choice("entropic_transport", "method", method, choices)
    if method == "auto":
        known = not (is_traced(problem.cost) or is_traced(problem.epsilon))
        mild = known and problem.epsilon >= _MILD * float(jnp.max(problem.cost))
        method = "sinkhorn" if mild else "newton"
    return {
        "sinkhorn": Sinkhorn(relaxation="adaptive"),
        "newton": SemiDualNewton(),
        "sparse-newton": SparseNewton(),
    }[method]


def _check_tol(owner, tol, dtype):
    size = np.dtype(dtype).itemsize
    if tol is None:
        return _TOL.get(size, 1e-2)
    check_positive(owner, "tol", tol)
    if size < 8 and not is_traced(tol) and tol < _SMALLEST_SINGLE_TOL:
        raise ValueError(
            f"{owner}: `tol` must be at least {_SMALLEST_SINGLE_TOL} in {dtype} (got "
            f"{tol}). Use a float64 cost (jax.config.update('jax_enable_x64', True))."
        )
    return tol
