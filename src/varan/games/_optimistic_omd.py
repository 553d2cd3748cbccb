"""Optimistic online mirror descent: one learner between stochastic and adversarial.

Each round the learner guesses the coming gradient by the last one, `M_t = g_{t-1}`
(`M_1 = 0`), and makes two moves, both from the anchor `xh_t`:

    x_t      = argmin over X of  <M_t, x> + B_t(x, xh_t)      (played)
    xh_{t+1} = argmin over X of  <g_t, x> + B_t(x, xh_t)      (g_t: gradient at x_t)

What it pays is the error of the guesses, `sum ||g_t - M_t||^2`. If the losses are drawn
round by round from distributions with smooth expectations `F_t` (the stochastically
extended adversarial model), that error is at most the noise `sum sigma_t^2`, the drift
`sum sup ||grad F_t - grad F_{t-1}||^2` and the learner's own motion, which the
divergence terms pay for. So one algorithm is as good as stochastic gradient descent on
i.i.d. losses, as gradual-variation methods on adversarial ones, and interpolates
between.

Use it when gradients are predictable from the last one; against an adversary who makes
them unpredictable it is as good as gradient descent up to a constant. One round costs
two projections; with exp-concave losses one eigenvalue decomposition, O(d^3), as well.

Source: S. Chen, Y.-J. Zhang, W.-W. Tu, P. Zhao and L. Zhang, Optimistic Online Mirror
Descent for Bridging Stochastic and Adversarial Online Convex Optimization, ICML 2023
and JMLR 25 (2024), arXiv 2302.04552.
"""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..core import Certificate
from ..core._checks import check_choice, check_nonnegative, check_positive, check_shape
from ._geometry import EntropySimplex, EuclideanBall, EuclideanSpace, Geometry
from ._online import (
    OnlineLearner,
    check_gradient,
    check_start,
    tree_dtype,
)
from ._regimes import Constant, Convex, ExpConcave, Regime, StronglyConvex

RegimeName = Literal["convex", "strongly_convex", "exp_concave", "constant"]

_LINEAR = (
    "sum <g_t, x_t - u> <= value for every u in the set; so the regret is, if every "
    "loss is convex, and its expectation, if the expected losses are"
)
_STATEMENTS = {
    "convex": _LINEAR,
    "strongly_convex": (
        "sum f_t(x_t) - f_t(u) <= value for every u in the set, if every loss is "
        "strongly convex; its expectation, if the expected losses are"
    ),
    "exp_concave": (
        "sum f_t(x_t) - f_t(u) <= value for every u in the set, if every loss is "
        "exp-concave"
    ),
    "constant": _LINEAR,
}


class OptimisticOMDState(eqx.Module):
    """What `OptimisticOMD` carries from round to round.

    Args:
        x: The point to play.
        anchor: The point `xh_t` that both moves of the round start from.
        hint: The guess `M_t` of the coming gradient.
        memory: What the regime has learned (a sum, a matrix or nothing).
        metric: The stepsize, or the decomposed matrix, of the coming round.
        tilt: The part of the pathwise bound that is linear in the comparator.
        slack: The rest of the pathwise bound.
        largest: The largest dual norm of a gradient so far.
        count: The number of the coming round, from 1.
    """

    x: PyTree[Array]
    anchor: PyTree[Array]
    hint: PyTree[Array]
    memory: Any
    metric: Any
    tilt: PyTree[Array]
    slack: Float[Array, ""]
    largest: Float[Array, ""]
    count: Int[Array, ""]


class OptimisticOMD(OnlineLearner):
    """Optimistic online mirror descent with the stepsizes of the SEA model.

    Stepsizes, and what `certificate` proves on every path (with `D` the diameter and
    `v_t = ||g_t - M_t||^2`):

    - `"convex"`: `eta_t = D / sqrt(10 D^2 L^2 + 4 G^2 + v_1 + ... + v_{t-1})`; at most
      `D^2 / (2 eta_T) + sum eta_t v_t / 2 <= 3/2 D sqrt(10 D^2 L^2 + 4 G^2 + V_T)`
      on Euclidean sets.
    - `"strongly_convex"`: `eta_t = 2 / (strength t)`; at most `sum v_t / (strength t)`.
    - `"exp_concave"`: the matrix metric `H_t = (1 + beta G^2/2) I + beta/2 sum_{s<t}
      g_s g_s'` with `beta = min(1/(4GD), strength) / 2`; at most
      `(1 + beta G^2/2) D^2 / 2 + 3/2 sum ||g_t - M_t||^2` in the norm of `H_t^{-1}`.
    - `"constant"`: `eta_t = stepsize`; at most `D^2 / (2 stepsize) + stepsize/2 sum
      v_t`.

    The certificate keeps what these formulae drop, so it is smaller. No stepsize looks
    at the current gradient.

    Args:
        geometry: The feasible set with its mirror map. `"convex"` needs a finite
            diameter, `"strongly_convex"` a Euclidean one, `"exp_concave"` an
            `EuclideanBall`.
        regime: Which curvature the losses have; see above.
        gradient_bound: `G`, a bound on the dual norm of all gradients, positive.
            Needed by `"convex"` and `"exp_concave"`.
        smoothness: `L` of the expected losses, non-negative; only `"convex"` reads it.
        strength: The modulus of strong convexity, or the `alpha` for which every
            `exp(-alpha f_t)` is concave; positive.
        stepsize: Of `"constant"`, positive.
        optimistic: Whether to guess the last gradient; if not, `M_t = 0`, and a
            constant stepsize gives online gradient descent.

    Raises:
        ValueError: if a constant that the regime needs is missing or out of range, or
            the geometry does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import EuclideanBall, OptimisticOMD, play
        >>> learner = OptimisticOMD(EuclideanBall(1.0), "convex", gradient_bound=1.0)
        >>> slope = jnp.array([0.6, -0.8])
        >>> points, _, state = play(learner, lambda t, x: slope, jnp.zeros(2), 100)
        >>> bool(jnp.allclose(points[-1], -slope, atol=1e-3))
        True
        >>> bool(learner.certificate(state).value < 4.0)
        True

    Source: Chen et al., 2023 (arXiv 2302.04552), the static regret.

    Differences: the pathwise bounds are ours (`_regimes` derives them); those of the
        paper hold in expectation, see `convex_regret_bound` and its siblings. The
        entropy geometry and `"constant"` are the textbook method.
    """

    geometry: Geometry
    regime: Regime
    name: str = eqx.field(static=True)
    optimistic: bool = eqx.field(static=True)

    def __init__(
        self,
        geometry: Geometry,
        regime: RegimeName = "convex",
        *,
        gradient_bound: Float[Array, ""] | float | None = None,
        smoothness: Float[Array, ""] | float = 0.0,
        strength: Float[Array, ""] | float | None = None,
        stepsize: Float[Array, ""] | float | None = None,
        optimistic: bool = True,
    ):
        owner = "OptimisticOMD"
        check_choice(owner, "regime", regime, tuple(_STATEMENTS))
        self.geometry = geometry
        self.name = regime
        self.optimistic = optimistic
        if regime == "convex":
            _require(owner, regime, "gradient_bound", gradient_bound)
            check_nonnegative(owner, "smoothness", smoothness)
            _refuse(geometry, EuclideanSpace, regime, "a bounded set")
            self.regime = Convex(gradient_bound, smoothness)
        elif regime == "strongly_convex":
            _require(owner, regime, "strength", strength)
            _refuse(geometry, EntropySimplex, regime, "a Euclidean geometry")
            self.regime = StronglyConvex(strength)
        elif regime == "exp_concave":
            _require(owner, regime, "gradient_bound", gradient_bound)
            _require(owner, regime, "strength", strength)
            if not isinstance(geometry, EuclideanBall):
                _refuse(geometry, Geometry, regime, "an EuclideanBall")
            self.regime = ExpConcave(strength, gradient_bound)
        else:
            _require(owner, regime, "stepsize", stepsize)
            self.regime = Constant(stepsize)

    def init(self, start: PyTree[Array]) -> OptimisticOMDState:
        """The state before the first round, with the hint zero.

        Args:
            start: A point of the feasible set (a vector for `"exp_concave"`).

        Returns:
            The learner's state.

        Raises:
            ValueError: if the start is not finite or outside of the set.
        """
        if self.name == "exp_concave":
            check_shape("OptimisticOMD", "start", start, (None,))
        check_start("OptimisticOMD", self.geometry, start)
        zero = jnp.zeros((), tree_dtype(start))
        hint = optax.tree.zeros_like(start)
        memory = self.regime.init(self.geometry, start)
        metric = self.regime.metric(self.geometry, memory, zero + 1)
        count = jnp.ones((), jnp.int32)
        return OptimisticOMDState(
            start, start, hint, memory, metric, hint, zero, zero, count
        )

    def hinted(
        self, state: OptimisticOMDState, hint: PyTree[Array]
    ) -> OptimisticOMDState:
        """The same round with another guess of its gradient.

        Args:
            state: A state whose round has not been played.
            hint: `M_t`, like the point.

        Returns:
            The state with that hint and its point.
        """
        check_gradient("OptimisticOMD.hinted", state.x, hint)
        x = self.regime.move(self.geometry, state.metric, state.anchor, hint)
        return eqx.tree_at(lambda s: (s.x, s.hint), state, (x, hint))

    def update(
        self, state: OptimisticOMDState, gradient: PyTree[Array]
    ) -> OptimisticOMDState:
        """The state after a round, its next point made with the hint `gradient`.

        Args:
            state: The state that made this round's point.
            gradient: The gradient of this round's loss at that point, like the point.

        Returns:
            The learner's state for the next round; NaN after a gradient that is not
            finite.

        Raises:
            ValueError: if the gradient does not have the point's shape.
        """
        check_gradient("OptimisticOMD", state.x, gradient)
        geometry, regime, metric = self.geometry, self.regime, state.metric
        following = regime.move(geometry, metric, state.anchor, gradient)
        missed = optax.tree.sub(gradient, state.hint)
        gap = optax.tree.vdot(missed, optax.tree.sub(state.x, following))
        gap -= regime.divergence(geometry, metric, following, state.x)
        gap -= regime.divergence(geometry, metric, state.x, state.anchor)
        w, c = regime.account(
            geometry, metric, state.x, state.anchor, following, gradient
        )
        memory = regime.learn(geometry, state.memory, gradient, state.hint)
        count = state.count + 1
        after = OptimisticOMDState(
            x=following,
            anchor=following,
            hint=optax.tree.zeros_like(gradient),
            memory=memory,
            metric=regime.metric(geometry, memory, count.astype(gap.dtype)),
            tilt=optax.tree.add(state.tilt, w),
            slack=state.slack + gap + c,
            largest=jnp.maximum(state.largest, geometry.dual_norm(gradient)),
            count=count,
        )
        return self.hinted(after, gradient) if self.optimistic else after

    def certificate(self, state: OptimisticOMDState) -> Certificate:
        """A proved bound on the regret so far, from what the learner saw alone.

        Args:
            state: The state after any round.

        Returns:
            A certificate without a target: `value` bounds the regret against every
            fixed point of the set, as its statement says. Its details are the largest
            gradient norm seen, to hold against the `gradient_bound` given: the
            exp-concave value is infinite when that was exceeded, the others stay
            proved.

        Example:
            >>> import jax.numpy as jnp
            >>> from varan.games import EuclideanBall, OptimisticOMD
            >>> learner = OptimisticOMD(EuclideanBall(), "constant", stepsize=0.5)
            >>> state = learner.update(learner.init(jnp.zeros(1)), jnp.ones(1))
            >>> float(learner.certificate(state).value)
            1.0
        """
        prior = self.regime.prior(self.geometry, state.tilt, state.largest)
        return Certificate(
            "regret bound",
            state.slack + prior,
            proof=True,
            statement=_STATEMENTS[self.name],
            details={"largest gradient norm": state.largest},
        )


def _require(owner, regime, name, value) -> None:
    if value is None:
        raise ValueError(f"{owner}: `{name}` must be given for {regime!r} (got None).")
    check_positive(owner, name, value)


def _refuse(geometry, kind, regime, wanted) -> None:
    if isinstance(geometry, kind):
        raise ValueError(
            f"OptimisticOMD: `geometry` must be {wanted} for {regime!r} "
            f"(got {type(geometry).__name__})."
        )
