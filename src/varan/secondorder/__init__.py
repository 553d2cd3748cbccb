"""Methods that learn curvature from differences of gradients and residuals.

| method | for |
| --- | --- |
| `Anderson` | fixed points, or as an accelerator around another solver |
| `Broyden` | systems of equations without a Jacobian |
| `LBFGSB` | smooth minimisation between bounds |
| `nonlinear_cg` | smooth minimisation in very many unknowns |
| `scale_by_hager_zhang_linesearch` | a line search, also for `optax.lbfgs` |

Newton's method is `varan.Newton`; L-BFGS is `optax.lbfgs` or `optimistix.LBFGS`, and
`optimistix.BFGS`, `GaussNewton` and `LevenbergMarquardt` run on varan's problems as
they are.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._anderson import Anderson as Anderson
    from ._broyden import Broyden as Broyden
    from ._hager_zhang import HagerZhangInfo as HagerZhangInfo
    from ._hager_zhang import ScaleByHagerZhangState as ScaleByHagerZhangState
    from ._hager_zhang import (
        scale_by_hager_zhang_linesearch as scale_by_hager_zhang_linesearch,
    )
    from ._lbfgsb import LBFGSB as LBFGSB
    from ._nonlinear_cg import ScaleByNonlinearCGState as ScaleByNonlinearCGState
    from ._nonlinear_cg import nonlinear_cg as nonlinear_cg
    from ._nonlinear_cg import scale_by_nonlinear_cg as scale_by_nonlinear_cg

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "Anderson": "_anderson",
        "Broyden": "_broyden",
        "HagerZhangInfo": "_hager_zhang",
        "LBFGSB": "_lbfgsb",
        "ScaleByHagerZhangState": "_hager_zhang",
        "ScaleByNonlinearCGState": "_nonlinear_cg",
        "nonlinear_cg": "_nonlinear_cg",
        "scale_by_hager_zhang_linesearch": "_hager_zhang",
        "scale_by_nonlinear_cg": "_nonlinear_cg",
    },
)
