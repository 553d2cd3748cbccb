"""The learners that optimistic mirror descent is compared with.

Online gradient descent and its adaptive form pay for all gradients; optimistic
follow-the-regularised-leader pays for the errors of its guesses, like mirror descent,
but from one fixed start; the online Newton step has logarithmic regret on exp-concave
losses, without hints. All are `OnlineLearner`s.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..core._checks import check_nonnegative, check_positive, check_shape
from ._geometry import EntropySimplex, EuclideanBall, EuclideanSpace, Geometry
from ._online import (
    OnlineLearner,
    check_gradient,
    check_start,
    tree_dtype,
)
from ._regimes import ExpConcave


class BaselineState(eqx.Module):
    """What a baseline carries from round to round.

    Args:
        x: The point to play.
        memory: The learner's sums.
        count: The number of the coming round, from 1.
    """

    x: PyTree[Array]
    memory: Any
    count: Int[Array, ""]


class OnlineGradientDescent(OnlineLearner):
    """Projected gradient steps of length `D / (G sqrt(t))`, or `1 / (strength t)`.

    The first has regret at most `3/2 G D sqrt(T)` on convex losses, the second
    `G^2 / (2 strength) (1 + log T)` on strongly convex ones. One projection a round.

    Args:
        geometry: The feasible set; bounded for the first form.
        gradient_bound: `G`, positive. Give this or `strength`.
        strength: The modulus of strong convexity, positive.

    Raises:
        ValueError: if not exactly one of the two is given, or it is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import EuclideanBall, OnlineGradientDescent
        >>> learner = OnlineGradientDescent(EuclideanBall(1.0), strength=1.0)
        >>> state = learner.update(learner.init(jnp.zeros(1)), jnp.array([0.5]))
        >>> learner.predict(state).tolist()
        [-0.5]

    Source: M. Zinkevich, Online Convex Programming and Generalized Infinitesimal
        Gradient Ascent, ICML 2003; E. Hazan, A. Agarwal and S. Kale, Logarithmic
        Regret Algorithms for Online Convex Optimization, Machine Learning 69 (2007).
    """

    geometry: Geometry
    gradient_bound: Float[Array, ""] | float | None = None
    strength: Float[Array, ""] | float | None = None

    def __check_init__(self):
        if (self.gradient_bound is None) == (self.strength is None):
            raise ValueError(
                "OnlineGradientDescent: exactly one of `gradient_bound` and `strength` "
                f"must be given (got {self.gradient_bound} and {self.strength})."
            )
        if self.strength is None:
            check_positive(
                "OnlineGradientDescent", "gradient_bound", self.gradient_bound
            )
            _check_bounded("OnlineGradientDescent", self.geometry)
        else:
            check_positive("OnlineGradientDescent", "strength", self.strength)

    def init(self, start):
        check_start("OnlineGradientDescent", self.geometry, start)
        return BaselineState(start, None, jnp.ones((), jnp.int32))

    def update(self, state, gradient):
        check_gradient("OnlineGradientDescent", state.x, gradient)
        dtype = tree_dtype(gradient)
        count = state.count.astype(dtype)
        if self.strength is None:
            diameter = jnp.asarray(self.geometry.diameter(), dtype)
            stepsize = diameter / jnp.asarray(self.gradient_bound, dtype)
            stepsize = stepsize / jnp.sqrt(count)
        else:
            stepsize = 1 / (jnp.asarray(self.strength, dtype) * count)
        x = self.geometry.move(state.x, gradient, stepsize)
        return BaselineState(x, None, state.count + 1)


class AdaGradNorm(OnlineLearner):
    """Projected gradient steps of length `D / sqrt(2 sum_{s<=t} ||g_s||^2)`.

    Knows no constant but the diameter; its regret is at most
    `sqrt(2) D sqrt(sum ||g_t||^2)`.

    Args:
        geometry: The feasible set, bounded.

    Raises:
        ValueError: if the geometry is not bounded.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import AdaGradNorm, EuclideanBall
        >>> learner = AdaGradNorm(EuclideanBall(1.0))
        >>> state = learner.update(learner.init(jnp.zeros(1)), jnp.array([-9.0]))
        >>> learner.predict(state).tolist()
        [1.0]

    Source: M. Streeter and H. B. McMahan, Less Regret via Online Conditioning, 2010
        (arXiv 1002.4862).
    """

    geometry: Geometry

    def __check_init__(self):
        _check_bounded("AdaGradNorm", self.geometry)

    def init(self, start):
        check_start("AdaGradNorm", self.geometry, start)
        total = jnp.zeros((), tree_dtype(start))
        return BaselineState(start, total, jnp.ones((), jnp.int32))

    def update(self, state, gradient):
        check_gradient("AdaGradNorm", state.x, gradient)
        total = state.memory + self.geometry.dual_norm(gradient) ** 2
        diameter = jnp.asarray(self.geometry.diameter(), total.dtype)
        # No gradient yet, no move: any stepsize does.
        stepsize = diameter / jnp.sqrt(2 * jnp.where(total > 0, total, 1))
        x = self.geometry.move(state.x, gradient, stepsize)
        return BaselineState(x, total, state.count + 1)


class OptimisticFTRL(OnlineLearner):
    """Optimistic follow-the-regularised-leader, the first method for the SEA model.

    Plays `argmin <sum_{s<t} g_s + M_t, x> + ||x - start||^2 / eta_t` with `M_t =
    g_{t-1}` and `eta_t = D^2 / (nu + sum_{s<t} eta_s ||g_s - M_s||^2)`,
    `nu = L D^2 + D G`. One projection a round.

    Args:
        geometry: The feasible set, bounded and Euclidean.
        gradient_bound: `G`, positive.
        smoothness: `L` of the expected losses, non-negative.

    Raises:
        ValueError: if a constant is out of range or the geometry does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import EuclideanBall, OptimisticFTRL
        >>> learner = OptimisticFTRL(EuclideanBall(1.0), gradient_bound=1.0)
        >>> state = learner.update(learner.init(jnp.zeros(1)), jnp.array([0.5]))
        >>> bool(learner.predict(state)[0] < 0)
        True

    Source: S. Sachs, H. Hadiji, T. van Erven and C. Guzman, Between Stochastic and
        Adversarial Online Convex Optimization: Improved Regret Bounds via Smoothness,
        NeurIPS 2022, theorem 5.
    """

    geometry: Geometry
    gradient_bound: Float[Array, ""] | float
    smoothness: Float[Array, ""] | float = 0.0

    def __check_init__(self):
        check_positive("OptimisticFTRL", "gradient_bound", self.gradient_bound)
        check_nonnegative("OptimisticFTRL", "smoothness", self.smoothness)
        _check_bounded("OptimisticFTRL", self.geometry)
        if isinstance(self.geometry, EntropySimplex):
            raise ValueError(
                "OptimisticFTRL: `geometry` must be Euclidean (got EntropySimplex)."
            )

    def init(self, start):
        check_start("OptimisticFTRL", self.geometry, start)
        dtype = tree_dtype(start)
        zero = optax.tree.zeros_like(start)
        diameter = jnp.asarray(self.geometry.diameter(), dtype)
        smooth = jnp.asarray(self.smoothness, dtype) * diameter**2
        nu = smooth + diameter * jnp.asarray(self.gradient_bound, dtype)
        memory = (start, zero, zero, nu)
        return BaselineState(start, memory, jnp.ones((), jnp.int32))

    def update(self, state, gradient):
        check_gradient("OptimisticFTRL", state.x, gradient)
        start, total, hint, weight = state.memory
        square = jnp.asarray(self.geometry.diameter(), weight.dtype) ** 2
        missed = self.geometry.dual_norm(optax.tree.sub(gradient, hint)) ** 2
        weight = weight + square / weight * missed
        total = optax.tree.add(total, gradient)
        ahead = optax.tree.add(total, gradient)
        x = self.geometry.move(start, ahead, square / weight / 2)
        return BaselineState(x, (start, total, gradient, weight), state.count + 1)


class OnlineNewtonStep(OnlineLearner):
    """Newton-like steps `x - A_t^{-1} g_t / gamma` with `A_t = eps I + sum g_s g_s'`.

    `gamma = min(1 / (4 G D), alpha) / 2` and `eps = 1 / (gamma D)^2`; regret
    `O((1 / alpha + G D) d log T)` on alpha-exp-concave losses. One eigenvalue
    decomposition and one projection in the metric `A_t` a round, O(d^3).

    Args:
        geometry: An `EuclideanBall`.
        gradient_bound: `G`, positive.
        strength: The `alpha` for which every `exp(-alpha f_t)` is concave, positive.

    Raises:
        ValueError: if a constant is out of range or the geometry is no ball.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import EuclideanBall, OnlineNewtonStep
        >>> learner = OnlineNewtonStep(EuclideanBall(), gradient_bound=1, strength=1)
        >>> state = learner.update(learner.init(jnp.zeros(1)), jnp.array([1.0]))
        >>> round(float(learner.predict(state)[0]), 4)
        -0.2462

    Source: Hazan, Agarwal and Kale (2007), figure 2.
    """

    geometry: EuclideanBall
    gradient_bound: Float[Array, ""] | float
    strength: Float[Array, ""] | float

    def __check_init__(self):
        check_positive("OnlineNewtonStep", "gradient_bound", self.gradient_bound)
        check_positive("OnlineNewtonStep", "strength", self.strength)
        if not isinstance(self.geometry, EuclideanBall):
            raise ValueError(
                "OnlineNewtonStep: `geometry` must be an EuclideanBall "
                f"(got {type(self.geometry).__name__})."
            )

    def _gamma(self, dtype):
        diameter = jnp.asarray(self.geometry.diameter(), dtype)
        bound = jnp.asarray(self.gradient_bound, dtype)
        strength = jnp.asarray(self.strength, dtype)
        return jnp.minimum(1 / (4 * bound * diameter), strength) / 2, diameter

    def init(self, start):
        check_shape("OnlineNewtonStep", "start", start, (None,))
        check_start("OnlineNewtonStep", self.geometry, start)
        gamma, diameter = self._gamma(start.dtype)
        matrix = jnp.eye(start.size, dtype=start.dtype) / (gamma * diameter) ** 2
        return BaselineState(start, matrix, jnp.ones((), jnp.int32))

    def update(self, state, gradient):
        check_gradient("OnlineNewtonStep", state.x, gradient)
        gamma, _ = self._gamma(gradient.dtype)
        matrix = state.memory + gradient[:, None] * gradient[None, :]
        regime = ExpConcave(self.strength, self.gradient_bound)
        metric = regime.metric(self.geometry, matrix, state.count)
        x = regime.move(self.geometry, metric, state.x, gradient / gamma)
        return BaselineState(x, matrix, state.count + 1)


def _check_bounded(owner, geometry) -> None:
    if isinstance(geometry, EuclideanSpace):
        raise ValueError(f"{owner}: `geometry` must be bounded (got EuclideanSpace).")
