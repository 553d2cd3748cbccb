"""How a solve ended, as data under jit and as a sentence outside it."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """How a solve ended.

    A `Solution.status` is an int32 array of these values, one for each lane under
    `vmap`, so `solution.status == Status.CONVERGED` is an array too.
    """

    RUNNING = 0
    CONVERGED = 1
    STEP_LIMIT = 2
    STALLED = 3
    DIVERGED = 4
    INFEASIBLE = 5
    UNBOUNDED = 6

    @property
    def advice(self) -> str:
        """One sentence: what happened and what to try next."""
        return _ADVICE[self]


_ADVICE = {
    Status.RUNNING: "the solver has not finished.",
    Status.CONVERGED: "the optimality condition is met to the tolerance.",
    Status.STEP_LIMIT: (
        "the step or evaluation limit was reached first; raise it, loosen `tol`, "
        "start nearer, or check that a solution exists (an objective may be "
        "unbounded below)."
    ),
    Status.STALLED: (
        "no progress above the tolerance: `tol` may be below what the dtype can reach "
        "(try float64), the objective may be unbounded below, or the solver cannot "
        "go on from here."
    ),
    Status.DIVERGED: (
        "the condition became NaN or infinite; check the data, start nearer, or use "
        "a smaller step."
    ),
    Status.INFEASIBLE: "the solver proved that no point meets the constraints.",
    Status.UNBOUNDED: (
        "the solver proved that the objective falls without bound over the feasible "
        "points."
    ),
}
