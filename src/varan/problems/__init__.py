"""Problems of the common kinds, beside `Smooth`, `Root` and `FixedPoint`.

| problem | minimise | solvers |
| --- | --- | --- |
| `Composite` | smooth plus proximable | `varan.firstorder` |
| `SetConstrained` | smooth over a set with a projection | `varan.firstorder` |
| `BoxConstrained` | smooth between bounds | `varan.secondorder`, `varan.firstorder` |
| `Constrained` | smooth with smooth constraints | `varan.constrained` |
| `Quadratic` | convex quadratic, linear constraints | `varan.constrained` |
| `GeneralisedLinear` | a loss of `X w`, a penalty by row | `varan.firstorder` |
| `LeastSquares` | half a sum of squares | optimistix's, and every minimiser |

A `GeneralisedLinear` problem is made of a `Loss` (`Squared`, `Huber`, `Logistic`,
`Multinomial`, `SmoothedHinge`) and a `Penalty` (`ElasticNet`, `GroupLasso`).
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._box import BoxConstrained as BoxConstrained
    from ._composite import Composite as Composite
    from ._composite import SetConstrained as SetConstrained
    from ._constrained import Constrained as Constrained
    from ._generalised_linear import GeneralisedLinear as GeneralisedLinear
    from ._least_squares import LeastSquares as LeastSquares
    from ._losses import ElasticNet as ElasticNet
    from ._losses import GroupLasso as GroupLasso
    from ._losses import Huber as Huber
    from ._losses import Logistic as Logistic
    from ._losses import Loss as Loss
    from ._losses import Multinomial as Multinomial
    from ._losses import Penalty as Penalty
    from ._losses import SmoothedHinge as SmoothedHinge
    from ._losses import Squared as Squared
    from ._quadratic import Quadratic as Quadratic

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "BoxConstrained": "_box",
        "Composite": "_composite",
        "Constrained": "_constrained",
        "ElasticNet": "_losses",
        "GeneralisedLinear": "_generalised_linear",
        "GroupLasso": "_losses",
        "Huber": "_losses",
        "LeastSquares": "_least_squares",
        "Logistic": "_losses",
        "Loss": "_losses",
        "Multinomial": "_losses",
        "Penalty": "_losses",
        "Quadratic": "_quadratic",
        "SetConstrained": "_composite",
        "SmoothedHinge": "_losses",
        "Squared": "_losses",
    },
)
