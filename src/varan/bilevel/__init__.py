"""Bilevel problems: an upper level that waits for the answer of a lower level.

`min_{x in X} F(x, y)` with `y` in `argmin_{y in Y} { f(x, y) : g(x, y) <= 0 }`:
hyperparameters, data cleaning, learned regularisers, Stackelberg games.
`BilevelProblem` states the problem and its optimality condition; every solver of the
topic runs on it. `hypergradient` differentiates `F(x, y(x))`, with a bound on its
error where the lower level's constants are known.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._aipod import AiPOD as AiPOD
    from ._examples import coupled_quadratic_example as coupled_quadratic_example
    from ._examples import linear_lower_example as linear_lower_example
    from ._examples import weighted_svm as weighted_svm
    from ._hypergradient import Hypergradient as Hypergradient
    from ._hypergradient import hypergradient as hypergradient
    from ._hypergradient import hypergradient_error_bound as hypergradient_error_bound
    from ._lv_hba import LVHBA as LVHBA
    from ._lv_hba import saddle_stepsize_bound as saddle_stepsize_bound
    from ._problem import BilevelPoint as BilevelPoint
    from ._problem import BilevelProblem as BilevelProblem
    from ._proximal_lagrangian import (
        ProximalLagrangianValue as ProximalLagrangianValue,
    )
    from ._proximal_lagrangian import (
        proximal_lagrangian_value as proximal_lagrangian_value,
    )
    from ._proximal_lagrangian import value_gap as value_gap

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "AiPOD": "_aipod",
        "BilevelPoint": "_problem",
        "BilevelProblem": "_problem",
        "Hypergradient": "_hypergradient",
        "LVHBA": "_lv_hba",
        "ProximalLagrangianValue": "_proximal_lagrangian",
        "coupled_quadratic_example": "_examples",
        "hypergradient": "_hypergradient",
        "hypergradient_error_bound": "_hypergradient",
        "linear_lower_example": "_examples",
        "proximal_lagrangian_value": "_proximal_lagrangian",
        "saddle_stepsize_bound": "_lv_hba",
        "value_gap": "_proximal_lagrangian",
        "weighted_svm": "_examples",
    },
)
