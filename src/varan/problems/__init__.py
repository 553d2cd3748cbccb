"""Problems of the common kinds, beside `Smooth`, `Root` and `FixedPoint`.

| problem | minimise | solvers |
| --- | --- | --- |
| `Composite` | smooth plus proximable | `varan.firstorder` |
| `SetConstrained` | smooth over a set with a projection | `varan.firstorder` |
| `Quadratic` | convex quadratic, linear constraints | `varan.constrained` |
| `LeastSquares` | half a sum of squares | optimistix's, and every minimiser |
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._composite import Composite as Composite
    from ._composite import SetConstrained as SetConstrained
    from ._least_squares import LeastSquares as LeastSquares
    from ._quadratic import Quadratic as Quadratic

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "Composite": "_composite",
        "LeastSquares": "_least_squares",
        "Quadratic": "_quadratic",
        "SetConstrained": "_composite",
    },
)
