"""Games, saddle points and variational inequalities; online play.

A `Game` asks for `z` with `0 in F(z) + G(z)`; `Extragradient`, its single-call forms,
`ProximalPoint`, `Halpern` and `GradientDescentAscent` run on it under `varan.solve`.

Online learners choose a point each round and then see a gradient there; `play` runs
one against losses, `regret` and `linear_regret` say how it did, and a learner's
`certificate` proves, from what it saw alone, how bad it can have been. `OptimisticOMD`
guesses the next gradient by the last one and so adapts between stochastic and
adversarial losses; `DynamicOptimisticOMD` follows a moving comparator;
`varan.games.sea` makes losses whose noise and drift are known exactly.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._adversarial import adversarial_duality_gap as adversarial_duality_gap
    from ._adversarial import adversarial_ot_lower_bound as adversarial_ot_lower_bound
    from ._adversarial_line import AdversarialFlow as AdversarialFlow
    from ._adversarial_line import LineClassifier as LineClassifier
    from ._adversarial_line import adversarial_flow_1d as adversarial_flow_1d
    from ._adversarial_line import adversarial_risk_1d as adversarial_risk_1d
    from ._adversarial_line import bayes_classifier_1d as bayes_classifier_1d
    from ._adversarial_plane import PlaneClassifier as PlaneClassifier
    from ._adversarial_plane import PlaneFlow as PlaneFlow
    from ._adversarial_plane import levelset_flow as levelset_flow
    from ._comonotone import comonotone_bound as comonotone_bound
    from ._comonotone import comonotone_potential as comonotone_potential
    from ._comonotone import comonotone_steps as comonotone_steps
    from ._constants import estimate_comonotonicity as estimate_comonotonicity
    from ._constants import estimate_lipschitz as estimate_lipschitz
    from ._constants import estimate_monotonicity as estimate_monotonicity
    from ._dynamic_omd import DynamicOptimisticOMD as DynamicOptimisticOMD
    from ._dynamic_omd import DynamicOptimisticOMDState as DynamicOptimisticOMDState
    from ._examples import bilinear_game as bilinear_game
    from ._examples import degenerate_minimax as degenerate_minimax
    from ._examples import matrix_game as matrix_game
    from ._examples import quadratic_game as quadratic_game
    from ._examples import quartic_saddle as quartic_saddle
    from ._examples import rotation_game as rotation_game
    from ._extragradient import Extragradient as Extragradient
    from ._extragradient import GradientDescentAscent as GradientDescentAscent
    from ._game import Game as Game
    from ._geometry import EntropySimplex as EntropySimplex
    from ._geometry import EuclideanBall as EuclideanBall
    from ._geometry import EuclideanBox as EuclideanBox
    from ._geometry import EuclideanSpace as EuclideanSpace
    from ._geometry import Geometry as Geometry
    from ._halpern import Halpern as Halpern
    from ._minimax import MinimaxPoint as MinimaxPoint
    from ._minimax import classify_minimax as classify_minimax
    from ._minimax import stability_radius as stability_radius
    from ._moves import InverseTime as InverseTime
    from ._online import OnlineLearner as OnlineLearner
    from ._online import linear_regret as linear_regret
    from ._online import play as play
    from ._online import regret as regret
    from ._online_baselines import AdaGradNorm as AdaGradNorm
    from ._online_baselines import OnlineGradientDescent as OnlineGradientDescent
    from ._online_baselines import OnlineNewtonStep as OnlineNewtonStep
    from ._online_baselines import OptimisticFTRL as OptimisticFTRL
    from ._optax_extragradient import (
        scale_by_past_extragradient as scale_by_past_extragradient,
    )
    from ._optax_optimistic import (
        scale_by_optimistic_adaptive as scale_by_optimistic_adaptive,
    )
    from ._optimistic_omd import OptimisticOMD as OptimisticOMD
    from ._optimistic_omd import OptimisticOMDState as OptimisticOMDState
    from ._proximal_point import ProximalPoint as ProximalPoint
    from ._regret_bounds import convex_regret_bound as convex_regret_bound
    from ._regret_bounds import dynamic_regret_bound as dynamic_regret_bound
    from ._regret_bounds import exp_concave_regret_bound as exp_concave_regret_bound
    from ._regret_bounds import (
        strongly_convex_regret_bound as strongly_convex_regret_bound,
    )
    from ._single_call import OptimisticGradient as OptimisticGradient
    from ._single_call import PastExtragradient as PastExtragradient
    from ._single_call import ReflectedGradient as ReflectedGradient
    from ._small_gain import SmallGainCertificate as SmallGainCertificate
    from ._small_gain import small_gain_certificate as small_gain_certificate
    from ._small_gain_flow import RungeKutta as RungeKutta
    from ._small_gain_weights import small_gain_band as small_gain_band
    from ._small_gain_weights import small_gain_margin as small_gain_margin
    from ._small_gain_weights import small_gain_weights as small_gain_weights
    from ._vr_halpern import InexactHalpern as InexactHalpern
    from ._vr_halpern import (
        VarianceReducedExtragradient as VarianceReducedExtragradient,
    )
    from ._vr_halpern import VarianceReducedHalpern as VarianceReducedHalpern
    from ._vr_halpern import vr_halpern as vr_halpern

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "AdaGradNorm": "_online_baselines",
        "AdversarialFlow": "_adversarial_line",
        "DynamicOptimisticOMD": "_dynamic_omd",
        "DynamicOptimisticOMDState": "_dynamic_omd",
        "EntropySimplex": "_geometry",
        "EuclideanBall": "_geometry",
        "EuclideanBox": "_geometry",
        "EuclideanSpace": "_geometry",
        "Extragradient": "_extragradient",
        "Game": "_game",
        "Geometry": "_geometry",
        "GradientDescentAscent": "_extragradient",
        "Halpern": "_halpern",
        "InexactHalpern": "_vr_halpern",
        "InverseTime": "_moves",
        "LineClassifier": "_adversarial_line",
        "MinimaxPoint": "_minimax",
        "OnlineGradientDescent": "_online_baselines",
        "OnlineLearner": "_online",
        "OnlineNewtonStep": "_online_baselines",
        "OptimisticFTRL": "_online_baselines",
        "OptimisticGradient": "_single_call",
        "OptimisticOMD": "_optimistic_omd",
        "OptimisticOMDState": "_optimistic_omd",
        "PastExtragradient": "_single_call",
        "PlaneClassifier": "_adversarial_plane",
        "PlaneFlow": "_adversarial_plane",
        "ProximalPoint": "_proximal_point",
        "ReflectedGradient": "_single_call",
        "RungeKutta": "_small_gain_flow",
        "SmallGainCertificate": "_small_gain",
        "VarianceReducedExtragradient": "_vr_halpern",
        "VarianceReducedHalpern": "_vr_halpern",
        "adversarial_duality_gap": "_adversarial",
        "adversarial_flow_1d": "_adversarial_line",
        "adversarial_ot_lower_bound": "_adversarial",
        "adversarial_risk_1d": "_adversarial_line",
        "bayes_classifier_1d": "_adversarial_line",
        "bilinear_game": "_examples",
        "classify_minimax": "_minimax",
        "comonotone_bound": "_comonotone",
        "comonotone_potential": "_comonotone",
        "comonotone_steps": "_comonotone",
        "convex_regret_bound": "_regret_bounds",
        "degenerate_minimax": "_examples",
        "dynamic_regret_bound": "_regret_bounds",
        "estimate_comonotonicity": "_constants",
        "estimate_lipschitz": "_constants",
        "estimate_monotonicity": "_constants",
        "exp_concave_regret_bound": "_regret_bounds",
        "levelset_flow": "_adversarial_plane",
        "linear_regret": "_online",
        "matrix_game": "_examples",
        "play": "_online",
        "quadratic_game": "_examples",
        "quartic_saddle": "_examples",
        "regret": "_online",
        "rotation_game": "_examples",
        "scale_by_optimistic_adaptive": "_optax_optimistic",
        "scale_by_past_extragradient": "_optax_extragradient",
        "small_gain_band": "_small_gain_weights",
        "small_gain_certificate": "_small_gain",
        "small_gain_margin": "_small_gain_weights",
        "small_gain_weights": "_small_gain_weights",
        "stability_radius": "_minimax",
        "strongly_convex_regret_bound": "_regret_bounds",
        "vr_halpern": "_vr_halpern",
    },
    ("sea",),
)
