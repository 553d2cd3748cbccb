"""Optimal transport: fast plans, with derivatives and certificates.

`entropic_transport` is the short call; `EntropicTransport` the problem behind it, which
`varan.solve` runs with `Sinkhorn`, `SemiDualNewton` or `SparseNewton`. Rules of thumb:
`Sinkhorn(relaxation="adaptive")` down to a hundredth of the largest cost,
`SemiDualNewton` below and for high accuracy, `SparseNewton` where the points are too
many to factorise. Everything takes plain arrays; an object with `cost_matrix` and
`epsilon` is taken too.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._problem import EntropicTransport as EntropicTransport
    from ._rounding import round_to_polytope as round_to_polytope
    from ._semidual_newton import SemiDualNewton as SemiDualNewton
    from ._sinkhorn import Sinkhorn as Sinkhorn
    from ._solve import TransportSolution as TransportSolution
    from ._solve import entropic_transport as entropic_transport
    from ._solve import sinkhorn as sinkhorn
    from ._solve import sinkhorn_newton_sparse as sinkhorn_newton_sparse
    from ._sparse_newton import SparseNewton as SparseNewton

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "EntropicTransport": "_problem",
        "SemiDualNewton": "_semidual_newton",
        "Sinkhorn": "_sinkhorn",
        "SparseNewton": "_sparse_newton",
        "TransportSolution": "_solve",
        "entropic_transport": "_solve",
        "round_to_polytope": "_rounding",
        "sinkhorn": "_solve",
        "sinkhorn_newton_sparse": "_solve",
    },
)
