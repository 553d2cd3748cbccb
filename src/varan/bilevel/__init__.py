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
    from ._alternating import Iterate as Iterate
    from ._alternating import Oracles as Oracles
    from ._alternating import trajectory as trajectory
    from ._best_response import best_response_error as best_response_error
    from ._bo_rep import BORep as BORep
    from ._bo_rep import normalized_momentum as normalized_momentum
    from ._data_cleaning import data_cleaning as data_cleaning
    from ._examples import coupled_quadratic_example as coupled_quadratic_example
    from ._examples import linear_lower_example as linear_lower_example
    from ._examples import weighted_svm as weighted_svm
    from ._f2sa import F2SA as F2SA
    from ._hypergradient import Hypergradient as Hypergradient
    from ._hypergradient import hypergradient as hypergradient
    from ._hypergradient import hypergradient_error_bound as hypergradient_error_bound
    from ._hyperparameter import Hyperparameter as Hyperparameter
    from ._implicit_solvers import AIDCG as AIDCG
    from ._implicit_solvers import MASOBA as MASOBA
    from ._implicit_solvers import SOBA as SOBA
    from ._implicit_solvers import TTSA as TTSA
    from ._implicit_solvers import StocBiO as StocBiO
    from ._implicit_solvers import Unrolled as Unrolled
    from ._inexact import InexactHypergradient as InexactHypergradient
    from ._inexact import Smoothness as Smoothness
    from ._inexact import inexact_hypergradient as inexact_hypergradient
    from ._lv_hba import LVHBA as LVHBA
    from ._lv_hba import saddle_stepsize_bound as saddle_stepsize_bound
    from ._maid import HOAG as HOAG
    from ._maid import MAID as MAID
    from ._penalty import Penalty as Penalty
    from ._penalty import SingleLoopPenalty as SingleLoopPenalty
    from ._penalty_gradient import PenaltyGradient as PenaltyGradient
    from ._penalty_gradient import hypergradient_pinv as hypergradient_pinv
    from ._penalty_gradient import penalty_hypergradient as penalty_hypergradient
    from ._problem import BilevelPoint as BilevelPoint
    from ._problem import BilevelProblem as BilevelProblem
    from ._proximal_lagrangian import (
        ProximalLagrangianValue as ProximalLagrangianValue,
    )
    from ._proximal_lagrangian import (
        proximal_lagrangian_value as proximal_lagrangian_value,
    )
    from ._proximal_lagrangian import value_gap as value_gap
    from ._rarts import DARTS as DARTS
    from ._rarts import RARTS as RARTS
    from ._rarts import relaxed_search as relaxed_search
    from ._rarts import search_example as search_example
    from ._sampling import Minibatch as Minibatch
    from ._stn import SelfTuningResult as SelfTuningResult
    from ._stn import self_tuning as self_tuning
    from ._stn_layers import FixedLayer as FixedLayer
    from ._stn_layers import HyperConv as HyperConv
    from ._stn_layers import HyperLinear as HyperLinear
    from ._stn_layers import respond as respond

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "AIDCG": "_implicit_solvers",
        "AiPOD": "_aipod",
        "BORep": "_bo_rep",
        "BilevelPoint": "_problem",
        "BilevelProblem": "_problem",
        "DARTS": "_rarts",
        "F2SA": "_f2sa",
        "FixedLayer": "_stn_layers",
        "HOAG": "_maid",
        "HyperConv": "_stn_layers",
        "HyperLinear": "_stn_layers",
        "Hypergradient": "_hypergradient",
        "Hyperparameter": "_hyperparameter",
        "InexactHypergradient": "_inexact",
        "Iterate": "_alternating",
        "LVHBA": "_lv_hba",
        "MAID": "_maid",
        "MASOBA": "_implicit_solvers",
        "Minibatch": "_sampling",
        "Oracles": "_alternating",
        "Penalty": "_penalty",
        "PenaltyGradient": "_penalty_gradient",
        "ProximalLagrangianValue": "_proximal_lagrangian",
        "RARTS": "_rarts",
        "SOBA": "_implicit_solvers",
        "SelfTuningResult": "_stn",
        "SingleLoopPenalty": "_penalty",
        "Smoothness": "_inexact",
        "StocBiO": "_implicit_solvers",
        "TTSA": "_implicit_solvers",
        "Unrolled": "_implicit_solvers",
        "best_response_error": "_best_response",
        "coupled_quadratic_example": "_examples",
        "data_cleaning": "_data_cleaning",
        "hypergradient": "_hypergradient",
        "hypergradient_error_bound": "_hypergradient",
        "hypergradient_pinv": "_penalty_gradient",
        "inexact_hypergradient": "_inexact",
        "linear_lower_example": "_examples",
        "normalized_momentum": "_bo_rep",
        "penalty_hypergradient": "_penalty_gradient",
        "proximal_lagrangian_value": "_proximal_lagrangian",
        "relaxed_search": "_rarts",
        "respond": "_stn_layers",
        "saddle_stepsize_bound": "_lv_hba",
        "search_example": "_rarts",
        "self_tuning": "_stn",
        "trajectory": "_alternating",
        "value_gap": "_proximal_lagrangian",
        "weighted_svm": "_examples",
    },
)
