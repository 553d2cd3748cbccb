"""Projections and proximal operators: what constrained methods are built from.

A projection is `project_*(x, set data)`, a proximal operator `prox_*(x, function
data, stepsize)`. All are plain functions of arrays that jit, vmap and differentiate
with respect to the point and the data alike; at a kink, where the derivative is a set,
they return one of its elements. A polyhedron has no closed form: `Polyhedron` prepares
it once and projects many times, from a warm start, and reports its residual.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._balls import minimise_quadratic_on_ball as minimise_quadratic_on_ball
    from ._balls import project_l2_ball_in_metric as project_l2_ball_in_metric
    from ._polyhedron import Polyhedron as Polyhedron
    from ._polyhedron import PolyhedronProjection as PolyhedronProjection
    from ._polyhedron import project_polyhedron as project_polyhedron
    from ._projections import project_affine as project_affine
    from ._projections import project_box as project_box
    from ._projections import project_halfspace as project_halfspace
    from ._projections import project_hyperplane as project_hyperplane
    from ._projections import project_l2_ball as project_l2_ball
    from ._projections import project_nonnegative as project_nonnegative
    from ._projections import project_simplex as project_simplex
    from ._prox import prox_elastic_net as prox_elastic_net
    from ._prox import prox_l1 as prox_l1
    from ._prox import prox_ridge as prox_ridge

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "Polyhedron": "_polyhedron",
        "PolyhedronProjection": "_polyhedron",
        "minimise_quadratic_on_ball": "_balls",
        "project_affine": "_projections",
        "project_box": "_projections",
        "project_halfspace": "_projections",
        "project_hyperplane": "_projections",
        "project_l2_ball": "_projections",
        "project_l2_ball_in_metric": "_balls",
        "project_nonnegative": "_projections",
        "project_polyhedron": "_polyhedron",
        "project_simplex": "_projections",
        "prox_elastic_net": "_prox",
        "prox_l1": "_prox",
        "prox_ridge": "_prox",
    },
)
