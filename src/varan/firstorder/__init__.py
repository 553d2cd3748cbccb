"""First-order methods for problems that are not smooth, or live on a set.

| method | for |
| --- | --- |
| `ProximalGradient` | `Composite` and `SetConstrained`, accelerated, with line search |
| `BlockCoordinateDescent` | `GeneralisedLinear`: one coefficient (or row) at a time |
| `lasso`, `elastic_net`, `logistic_l1` | the commonest of those, in one call |
| `MirrorDescent` | `SetConstrained`, on the simplex and other sets of probabilities |
| `scale_by_goldstein_linesearch` | batches: steps that need no schedule, in optax |

Stochastic steps that need no schedule stand in optax already, two of them:

- Polyak's steps are `optax.polyak_sgd` (variants `"sps"` and `"sps+"`), with momentum
  `optax.chain(optax.polyak_sgd(...), optax.trace(momentum))`.
- Armijo's line search on each batch is `optax.chain(optax.sgd(1.0),
  optax.scale_by_backtracking_linesearch(15, slope_rtol=0.1), optax.trace(momentum))`.
  Its `increase_factor` says where a search begins: above 1 a little longer than the
  last step, at 1 there (so that steps only shrink), `math.inf` at the longest step.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._block_coordinate_descent import (
        BlockCoordinateDescent as BlockCoordinateDescent,
    )
    from ._goldstein import GoldsteinState as GoldsteinState
    from ._goldstein import (
        scale_by_goldstein_linesearch as scale_by_goldstein_linesearch,
    )
    from ._lasso import elastic_net as elastic_net
    from ._lasso import lasso as lasso
    from ._lasso import logistic_l1 as logistic_l1
    from ._mirror_descent import MirrorDescent as MirrorDescent
    from ._proximal_gradient import ProximalGradient as ProximalGradient

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "BlockCoordinateDescent": "_block_coordinate_descent",
        "GoldsteinState": "_goldstein",
        "MirrorDescent": "_mirror_descent",
        "ProximalGradient": "_proximal_gradient",
        "elastic_net": "_lasso",
        "lasso": "_lasso",
        "logistic_l1": "_lasso",
        "scale_by_goldstein_linesearch": "_goldstein",
    },
)
