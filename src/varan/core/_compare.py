"""Solvers of one problem, side by side under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._solution import Solution
from ._solve import solve
from ._status import Status


class Comparison:
    """What `compare` measured.

    Args:
        solutions: The solution of each solver, by name.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import GradientDescent, Newton, Smooth, compare
        >>> problem = Smooth(lambda x: jnp.sum((x - 1.0) ** 2))
        >>> table = compare(problem, [GradientDescent(0.4), Newton()], jnp.zeros(2))
        >>> list(table.solutions), table.rows()[1]["status"]
        (['GradientDescent', 'Newton'], 'converged')
    """

    def __init__(self, solutions: dict[str, Solution]):
        self.solutions = solutions

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a solver: name, status, steps, evaluations, residual, met."""
        return [
            {
                "solver": name,
                "status": Status(int(solution.status)).name.lower().replace("_", " "),
                "steps": int(solution.steps),
                "evaluations": int(solution.evaluations),
                "residual": float(solution.residual),
                "met": bool(solution.certificate.met),
            }
            for name, solution in self.solutions.items()
        ]

    def __str__(self) -> str:
        rows = [
            [str(v) if not isinstance(v, float) else f"{v:.2e}" for v in row.values()]
            for row in self.rows()
        ]
        table = [list(self.rows()[0]), *rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True))
            for line in table
        )

    __repr__ = __str__

    def plot(self):
        """Residual against evaluations, one curve a solver.

        Returns:
            A matplotlib `Figure`; save it with `figure.savefig(path)`.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for name, solution in self.solutions.items():
            used = np.arange(int(solution.steps) + 1)
            axes.plot(
                np.asarray(solution.trace.evaluations)[used],
                np.asarray(solution.trace.residual)[used],
                label=name,
            )
        axes.set(xlabel="evaluations of the condition", ylabel="residual", yscale="log")
        axes.legend()
        return figure


def compare(
    problem,
    solvers: Mapping[str, Any] | Sequence[Any],
    start,
    *,
    tol: float | None = None,
    max_evaluations: int = 10_000,
) -> Comparison:
    """Runs solvers on one problem from one start under one budget.

    The budget counts evaluations of the condition, or of something as costly, as the
    solvers report them: a step of one method is not a step of another.

    Args:
        problem: A `varan.Problem`.
        solvers: Whatever `solve` takes, in a list or by name.
        start: First iterate of all.
        tol: As for `solve`.
        max_evaluations: The budget of each; no step begins beyond it.

    Returns:
        A `Comparison`: prints as a table, `.rows()` is its data, `.plot()` draws it.

    Raises:
        ValueError: If no solver is given.
        TypeError: If `solvers` is neither a list nor a mapping.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import GradientDescent, Newton, Smooth, compare
        >>> problem = Smooth(lambda x: jnp.sum(jnp.cosh(x - 1.0)))
        >>> table = compare(problem, [GradientDescent(0.5), Newton()], jnp.zeros(2))
        >>> [row["met"] for row in table.rows()]
        [True, True]
    """
    if not isinstance(solvers, (Mapping, Sequence)):
        raise TypeError(
            "compare: `solvers` must be a list or a mapping from names to solvers "
            f"(got {type(solvers).__name__})."
        )
    if not isinstance(solvers, Mapping):
        solvers = _name(solvers)
    if not solvers:
        raise ValueError("compare: `solvers` must hold at least one solver.")
    return Comparison(
        {
            name: solve(
                problem,
                solver,
                start,
                tol=tol,
                # A step costs one evaluation at least: the budget ends the run first.
                max_steps=max_evaluations,
                max_evaluations=max_evaluations,
                differentiate="none",
            )
            for name, solver in solvers.items()
        }
    )


def _name(solvers: Sequence[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for solver in solvers:
        base = name = type(solver).__name__
        count = 2
        while name in named:
            name, count = f"{base} {count}", count + 1
        named[name] = solver
    return named
