"""The heart of varan: problems, solvers, and what follows from a condition."""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._certificate import Certificate as Certificate
    from ._compare import Comparison as Comparison
    from ._compare import compare as compare
    from ._decorators import custom_fixed_point as custom_fixed_point
    from ._decorators import custom_root as custom_root
    from ._ecosystem import FromOptax as FromOptax
    from ._ecosystem import FromOptimistix as FromOptimistix
    from ._implicit import implicit_root as implicit_root
    from ._implicit import root_jvp as root_jvp
    from ._implicit import root_vjp as root_vjp
    from ._newton import Newton as Newton
    from ._newton import NewtonCG as NewtonCG
    from ._problem import FixedPoint as FixedPoint
    from ._problem import Problem as Problem
    from ._problem import Root as Root
    from ._problem import Smooth as Smooth
    from ._solution import Solution as Solution
    from ._solution import Trace as Trace
    from ._solve import solve as solve
    from ._solver import Solver as Solver
    from ._solver import State as State
    from ._solvers import FixedPointIteration as FixedPointIteration
    from ._solvers import GradientDescent as GradientDescent
    from ._stability import Stability as Stability
    from ._stability import stability as stability
    from ._status import Status as Status

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "Certificate": "_certificate",
        "Comparison": "_compare",
        "FixedPoint": "_problem",
        "FromOptax": "_ecosystem",
        "FromOptimistix": "_ecosystem",
        "FixedPointIteration": "_solvers",
        "GradientDescent": "_solvers",
        "Newton": "_newton",
        "NewtonCG": "_newton",
        "Problem": "_problem",
        "Root": "_problem",
        "Smooth": "_problem",
        "Solution": "_solution",
        "Solver": "_solver",
        "Stability": "_stability",
        "State": "_solver",
        "Status": "_status",
        "Trace": "_solution",
        "compare": "_compare",
        "custom_fixed_point": "_decorators",
        "custom_root": "_decorators",
        "implicit_root": "_implicit",
        "root_jvp": "_implicit",
        "root_vjp": "_implicit",
        "solve": "_solve",
        "stability": "_stability",
    },
    ("optimality",),
)
