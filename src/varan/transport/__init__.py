"""Optimal transport: fast plans, with derivatives and certificates.

`entropic_transport` is the short call; `EntropicTransport` the problem behind it, which
`varan.solve` runs with `Sinkhorn`, `SemiDualNewton` or `SparseNewton`. Rules of thumb:
`Sinkhorn(relaxation="adaptive")` down to a hundredth of the largest cost,
`SemiDualNewton` below and for high accuracy, `SparseNewton` where the points are too
many to factorise. Everything takes plain arrays; an object with `cost_matrix` and
`epsilon` is taken too.

Beside it: plans with few nonzeros a column (`sparse_ot`), losses between samples
(`sinkhorn_divergence`), maps (`fit_map`, `monge_gap`), plans and flows of sampled
measures (`energy_ot`, `jko_flow`), closed forms for Gaussians, Langevin chains.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._divergence import cost_matrix as cost_matrix
    from ._divergence import entropic_cost as entropic_cost
    from ._divergence import sinkhorn_divergence as sinkhorn_divergence
    from ._energy_transport import EnergyFit as EnergyFit
    from ._energy_transport import EnergyPlan as EnergyPlan
    from ._energy_transport import energy_ot as energy_ot
    from ._energy_transport import half_sqeuclidean as half_sqeuclidean
    from ._functionals import Functional as Functional
    from ._functionals import Reference as Reference
    from ._functionals import jensen_shannon as jensen_shannon
    from ._functionals import kl_to_density as kl_to_density
    from ._functionals import kl_to_samples as kl_to_samples
    from ._functionals import porous_medium as porous_medium
    from ._gaussian import bures_wasserstein as bures_wasserstein
    from ._gaussian import gaussian_entropic_plan as gaussian_entropic_plan
    from ._gaussian import gaussian_map as gaussian_map
    from ._gaussian import ornstein_uhlenbeck as ornstein_uhlenbeck
    from ._jko import FlowResult as FlowResult
    from ._jko import jko_flow as jko_flow
    from ._langevin import LangevinRun as LangevinRun
    from ._langevin import ReplayBuffer as ReplayBuffer
    from ._langevin import langevin as langevin
    from ._monge_gap import MapResult as MapResult
    from ._monge_gap import exact_monge_gap as exact_monge_gap
    from ._monge_gap import fit_map as fit_map
    from ._monge_gap import monge_gap as monge_gap
    from ._problem import EntropicTransport as EntropicTransport
    from ._rounding import round_to_polytope as round_to_polytope
    from ._routing import Routing as Routing
    from ._routing import route_tokens as route_tokens
    from ._semidual_newton import SemiDualNewton as SemiDualNewton
    from ._sinkhorn import Sinkhorn as Sinkhorn
    from ._solve import TransportSolution as TransportSolution
    from ._solve import entropic_transport as entropic_transport
    from ._solve import sinkhorn as sinkhorn
    from ._solve import sinkhorn_newton_sparse as sinkhorn_newton_sparse
    from ._sparse_newton import SparseNewton as SparseNewton
    from ._sparse_transport import SparseTransport as SparseTransport
    from ._sparse_transport import sparse_ot as sparse_ot
    from ._sparse_transport import topk_relu_conjugate as topk_relu_conjugate
    from ._uvp import bw_uvp as bw_uvp
    from ._uvp import l2_uvp as l2_uvp

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "EnergyFit": "_energy_transport",
        "EnergyPlan": "_energy_transport",
        "EntropicTransport": "_problem",
        "FlowResult": "_jko",
        "Functional": "_functionals",
        "LangevinRun": "_langevin",
        "MapResult": "_monge_gap",
        "Reference": "_functionals",
        "ReplayBuffer": "_langevin",
        "Routing": "_routing",
        "SemiDualNewton": "_semidual_newton",
        "Sinkhorn": "_sinkhorn",
        "SparseNewton": "_sparse_newton",
        "SparseTransport": "_sparse_transport",
        "TransportSolution": "_solve",
        "bures_wasserstein": "_gaussian",
        "bw_uvp": "_uvp",
        "cost_matrix": "_divergence",
        "energy_ot": "_energy_transport",
        "entropic_cost": "_divergence",
        "entropic_transport": "_solve",
        "exact_monge_gap": "_monge_gap",
        "fit_map": "_monge_gap",
        "gaussian_entropic_plan": "_gaussian",
        "gaussian_map": "_gaussian",
        "half_sqeuclidean": "_energy_transport",
        "jensen_shannon": "_functionals",
        "jko_flow": "_jko",
        "kl_to_density": "_functionals",
        "kl_to_samples": "_functionals",
        "l2_uvp": "_uvp",
        "langevin": "_langevin",
        "monge_gap": "_monge_gap",
        "ornstein_uhlenbeck": "_gaussian",
        "porous_medium": "_functionals",
        "round_to_polytope": "_rounding",
        "route_tokens": "_routing",
        "sinkhorn": "_solve",
        "sinkhorn_divergence": "_divergence",
        "sinkhorn_newton_sparse": "_solve",
        "sparse_ot": "_sparse_transport",
        "topk_relu_conjugate": "_sparse_transport",
    },
)
