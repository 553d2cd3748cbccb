"""What a solve returns: the answer and everything that is known about it."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._certificate import Certificate, format_number
from ._checks import is_traced
from ._problem import Problem
from ._status import Status


class Trace(eqx.Module):
    """The residual along the run, recorded inside the compiled loop.

    Entry 0 is the start; entries beyond the last step are NaN and 0.

    Args:
        residual: The residual after each step.
        evaluations: The evaluations of the condition spent up to there.
    """

    residual: Float[Array, " max_steps+1"]
    evaluations: Int[Array, " max_steps+1"]


class Solution(eqx.Module):
    """The answer of `solve`, one lane of it under `vmap`.

    Args:
        x: The last iterate whose residual was finite. It is an answer only where
            `converged` is true; `require()` insists on that.
        status: An int32 array of `Status` values.
        steps: Steps taken.
        evaluations: Evaluations of the condition (or of something as costly) that
            the solver reported.
        residual: The problem's measure of its condition at `x`.
        trace: The residual along the run.
        certificate: What is known of `x`.
        problem: The problem that was solved.
        tol: The tolerance that was asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import GradientDescent, Smooth, solve
        >>> problem = Smooth(lambda x: jnp.sum((x - 1.0) ** 2))
        >>> solution = solve(problem, GradientDescent(0.4), jnp.zeros(2), tol=1e-3)
        >>> bool(solution.converged), solution.require().round(2).tolist()
        (True, [1.0, 1.0])
        >>> bool(solution.trace.residual[0] > solution.residual)
        True
    """

    x: PyTree[Array]
    status: Int[Array, ""]
    steps: Int[Array, ""]
    evaluations: Int[Array, ""]
    residual: Float[Array, ""]
    trace: Trace
    certificate: Certificate
    problem: Problem
    tol: Float[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether the condition is met to the tolerance."""
        return self.status == Status.CONVERGED

    def require(self) -> PyTree[Array]:
        """`x`, or a runtime error where the run did not converge, under jit too.

        Raises:
            RuntimeError: If any lane did not converge.
        """
        if not is_traced(self.status):
            bad = np.unique(np.asarray(self.status)[~np.asarray(self.converged)])
            if bad.size:
                raise RuntimeError(
                    "solve: " + "; ".join(Status(int(s)).advice for s in bad)
                )
            return self.x
        return eqx.error_if(
            self.x, ~jnp.all(self.converged), "solve: a run did not converge."
        )

    def __str__(self) -> str:
        if is_traced(self.status):
            return "Solution(traced)"
        return "\n".join(
            [
                f"Solution: {_describe_status(self.status)}",
                f"  steps        {format_number(self.steps)}",
                f"  evaluations  {format_number(self.evaluations)}",
                f"  residual     {format_number(self.residual)}"
                f" (tol {format_number(self.tol)})",
                f"  certificate  {self.certificate}",
            ]
        )

    __repr__ = __str__


def _describe_status(status) -> str:
    status = np.asarray(status)
    if status.ndim == 0:
        one = Status(int(status))
        name = one.name.lower().replace("_", " ")
        return name if one == Status.CONVERGED else f"{name}: {one.advice}"
    values, counts = np.unique(status, return_counts=True)
    return ", ".join(
        f"{count} {Status(int(value)).name.lower().replace('_', ' ')}"
        for value, count in zip(values, counts, strict=True)
    )
