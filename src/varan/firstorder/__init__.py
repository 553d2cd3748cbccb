"""First-order methods for problems that are not smooth, or live on a set.

| method | for |
| --- | --- |
| `ProximalGradient` | `Composite` and `SetConstrained`, accelerated, with line search |
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._proximal_gradient import ProximalGradient as ProximalGradient

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "ProximalGradient": "_proximal_gradient",
    },
)
