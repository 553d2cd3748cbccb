"""Methods that learn curvature from differences of gradients and residuals.

| method | for |
| --- | --- |
| `Anderson` | fixed points, or as an accelerator around another solver |
| `Broyden` | systems of equations without a Jacobian |
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._anderson import Anderson as Anderson
    from ._broyden import Broyden as Broyden

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "Anderson": "_anderson",
        "Broyden": "_broyden",
    },
)
