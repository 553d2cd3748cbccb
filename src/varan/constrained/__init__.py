"""Quadratic programs: solvers for `varan.problems.Quadratic`.

| | for | one step |
| --- | --- | --- |
| `quadratic_program` | the commonest call | chooses the solver |
| `EqualityQP` | equalities alone, or nothing | one product with a factorisation |
| `BoxCoordinateDescent` | bounds alone | sweeps over the coordinates |
| `OSQP` | everything; operators too | iterations of ADMM, and a polish |
| `AugmentedLagrangian` | nonlinear constraints | a run of an inner solver |
| `IterativeRefinement` | linear systems, as a lineax solver | |

All start from a `KKTPoint` (`problem.start()`, or an earlier answer), recognise
programs that are infeasible or unbounded, and return the proof in the unknown.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._augmented_lagrangian import AugmentedLagrangian as AugmentedLagrangian
    from ._box_coordinate_descent import BoxCoordinateDescent as BoxCoordinateDescent
    from ._equality_qp import EqualityQP as EqualityQP
    from ._iterative_refinement import IterativeRefinement as IterativeRefinement
    from ._osqp import OSQP as OSQP
    from ._quadratic_program import quadratic_program as quadratic_program

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "AugmentedLagrangian": "_augmented_lagrangian",
        "BoxCoordinateDescent": "_box_coordinate_descent",
        "EqualityQP": "_equality_qp",
        "IterativeRefinement": "_iterative_refinement",
        "OSQP": "_osqp",
        "quadratic_program": "_quadratic_program",
    },
)
