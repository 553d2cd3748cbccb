"""Projections and proximal operators: what constrained methods are built from.

A projection is `project_*(x, set data)`, a proximal operator `prox_*(x, function
data, stepsize)`; `prox_from_projection` makes one of the other. All are plain functions
of arrays that jit, vmap and differentiate with respect to the point and the data alike;
at a kink, where the derivative is a set, they return one of its elements. Projections
in relative entropy are `project_kl_*` and take logarithms; `isotonic_*` fit monotone
sequences. A polyhedron has no closed form: `Polyhedron` prepares it once and projects
many times, from a warm start, and reports its residual.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._balls import minimise_quadratic_on_ball as minimise_quadratic_on_ball
    from ._balls import project_l2_ball_in_metric as project_l2_ball_in_metric
    from ._cones import project_positive_semidefinite as project_positive_semidefinite
    from ._cones import project_second_order_cone as project_second_order_cone
    from ._cones import prox_nuclear_norm as prox_nuclear_norm
    from ._isotonic import isotonic_kl as isotonic_kl
    from ._isotonic import isotonic_l2 as isotonic_l2
    from ._norm_balls import project_l1_ball as project_l1_ball
    from ._norm_balls import project_l1_sphere as project_l1_sphere
    from ._norm_balls import project_l2_ball as project_l2_ball
    from ._norm_balls import project_l2_sphere as project_l2_sphere
    from ._norm_balls import project_linf_ball as project_linf_ball
    from ._norm_balls import project_linf_sphere as project_linf_sphere
    from ._polyhedron import Polyhedron as Polyhedron
    from ._polyhedron import PolyhedronProjection as PolyhedronProjection
    from ._polyhedron import project_polyhedron as project_polyhedron
    from ._projections import project_affine as project_affine
    from ._projections import project_box as project_box
    from ._projections import project_halfspace as project_halfspace
    from ._projections import project_hypercube as project_hypercube
    from ._projections import project_hyperplane as project_hyperplane
    from ._projections import project_nonnegative as project_nonnegative
    from ._prox import prox_elastic_net as prox_elastic_net
    from ._prox import prox_from_projection as prox_from_projection
    from ._prox import prox_group_lasso as prox_group_lasso
    from ._prox import prox_l1 as prox_l1
    from ._prox import prox_none as prox_none
    from ._prox import prox_nonnegative_l1 as prox_nonnegative_l1
    from ._prox import prox_nonnegative_ridge as prox_nonnegative_ridge
    from ._prox import prox_ridge as prox_ridge
    from ._simplex import project_box_section as project_box_section
    from ._simplex import project_simplex as project_simplex
    from ._simplex import project_sparse_simplex as project_sparse_simplex
    from ._transport_polytope import project_birkhoff as project_birkhoff
    from ._transport_polytope import project_kl_birkhoff as project_kl_birkhoff
    from ._transport_polytope import project_kl_simplex as project_kl_simplex
    from ._transport_polytope import project_kl_transport as project_kl_transport
    from ._transport_polytope import project_transport as project_transport
    from ._tv import prox_tv1d as prox_tv1d

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "Polyhedron": "_polyhedron",
        "PolyhedronProjection": "_polyhedron",
        "isotonic_kl": "_isotonic",
        "isotonic_l2": "_isotonic",
        "minimise_quadratic_on_ball": "_balls",
        "project_affine": "_projections",
        "project_birkhoff": "_transport_polytope",
        "project_box": "_projections",
        "project_box_section": "_simplex",
        "project_halfspace": "_projections",
        "project_hypercube": "_projections",
        "project_hyperplane": "_projections",
        "project_kl_birkhoff": "_transport_polytope",
        "project_kl_simplex": "_transport_polytope",
        "project_kl_transport": "_transport_polytope",
        "project_l1_ball": "_norm_balls",
        "project_l1_sphere": "_norm_balls",
        "project_l2_ball": "_norm_balls",
        "project_l2_ball_in_metric": "_balls",
        "project_l2_sphere": "_norm_balls",
        "project_linf_ball": "_norm_balls",
        "project_linf_sphere": "_norm_balls",
        "project_nonnegative": "_projections",
        "project_polyhedron": "_polyhedron",
        "project_positive_semidefinite": "_cones",
        "project_second_order_cone": "_cones",
        "project_simplex": "_simplex",
        "project_sparse_simplex": "_simplex",
        "project_transport": "_transport_polytope",
        "prox_elastic_net": "_prox",
        "prox_from_projection": "_prox",
        "prox_group_lasso": "_prox",
        "prox_l1": "_prox",
        "prox_none": "_prox",
        "prox_nonnegative_l1": "_prox",
        "prox_nonnegative_ridge": "_prox",
        "prox_nuclear_norm": "_cones",
        "prox_ridge": "_prox",
        "prox_tv1d": "_tv",
    },
)
