"""Online play, saddle points and variational inequalities.

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
    from ._dynamic_omd import DynamicOptimisticOMD as DynamicOptimisticOMD
    from ._dynamic_omd import DynamicOptimisticOMDState as DynamicOptimisticOMDState
    from ._geometry import EntropySimplex as EntropySimplex
    from ._geometry import EuclideanBall as EuclideanBall
    from ._geometry import EuclideanBox as EuclideanBox
    from ._geometry import EuclideanSpace as EuclideanSpace
    from ._geometry import Geometry as Geometry
    from ._online import OnlineLearner as OnlineLearner
    from ._online import linear_regret as linear_regret
    from ._online import play as play
    from ._online import regret as regret
    from ._online_baselines import AdaGradNorm as AdaGradNorm
    from ._online_baselines import OnlineGradientDescent as OnlineGradientDescent
    from ._online_baselines import OnlineNewtonStep as OnlineNewtonStep
    from ._online_baselines import OptimisticFTRL as OptimisticFTRL
    from ._optax_optimistic import (
        scale_by_optimistic_adaptive as scale_by_optimistic_adaptive,
    )
    from ._optimistic_omd import OptimisticOMD as OptimisticOMD
    from ._optimistic_omd import OptimisticOMDState as OptimisticOMDState
    from ._regret_bounds import convex_regret_bound as convex_regret_bound
    from ._regret_bounds import dynamic_regret_bound as dynamic_regret_bound
    from ._regret_bounds import exp_concave_regret_bound as exp_concave_regret_bound
    from ._regret_bounds import (
        strongly_convex_regret_bound as strongly_convex_regret_bound,
    )

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "AdaGradNorm": "_online_baselines",
        "DynamicOptimisticOMD": "_dynamic_omd",
        "DynamicOptimisticOMDState": "_dynamic_omd",
        "EntropySimplex": "_geometry",
        "EuclideanBall": "_geometry",
        "EuclideanBox": "_geometry",
        "EuclideanSpace": "_geometry",
        "Geometry": "_geometry",
        "OnlineGradientDescent": "_online_baselines",
        "OnlineLearner": "_online",
        "OnlineNewtonStep": "_online_baselines",
        "OptimisticFTRL": "_online_baselines",
        "OptimisticOMD": "_optimistic_omd",
        "OptimisticOMDState": "_optimistic_omd",
        "convex_regret_bound": "_regret_bounds",
        "dynamic_regret_bound": "_regret_bounds",
        "exp_concave_regret_bound": "_regret_bounds",
        "linear_regret": "_online",
        "play": "_online",
        "regret": "_online",
        "scale_by_optimistic_adaptive": "_optax_optimistic",
        "strongly_convex_regret_bound": "_regret_bounds",
    },
    ("sea",),
)
