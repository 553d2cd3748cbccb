"""Optimistic mirror descent against a moving comparator, in two layers.

The best stepsize against a comparator that moves by `P` in all depends on `P`, which
nobody knows. So `N = O(log T)` base learners run with stepsizes that double, all on
the same gradient, and an optimistic Hedge mixes their points. The motion of the mixture
would spoil the bound; a correction `2 L ||x_{t,i} - x_{t-1,i}||^2` in the losses of the
mixture makes it prefer learners that move little, and what remains is paid for by their
own negative terms. One round costs one gradient and `2 N` projections.

Source: Chen et al., 2023 (arXiv 2302.04552), dynamic regret; the layers are those of
P. Zhao, Y.-J. Zhang, L. Zhang and Z.-H. Zhou, Adaptivity and Non-stationarity:
Problem-dependent Dynamic Regret for Online Convex Optimization, JMLR 25 (2024), arXiv
2112.14368.
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..core import Certificate
from ..core._checks import check_nonnegative, check_positive
from ._geometry import EntropySimplex, EuclideanSpace, Geometry
from ._online import (
    OnlineLearner,
    check_gradient,
    check_start,
    tree_dtype,
)


class DynamicOptimisticOMDState(eqx.Module):
    """What `DynamicOptimisticOMD` carries from round to round.

    Args:
        x: The point to play, the mixture of the base learners' points.
        anchors: The base learners' anchors, leaves with a leading axis N.
        points: The base learners' points, likewise.
        hint: The guess of the coming gradient.
        moved: How far each base learner has just moved, squared, (N,).
        losses: Each base learner's corrected losses so far, (N,).
        missed: The squared errors of the mixture's guesses so far.
        behind: What the mixture has lost to each base learner so far, (N,).
        slack: Each base learner's own pathwise bound, without its comparator, (N,).
        count: The number of the coming round, from 1.
    """

    x: PyTree[Array]
    anchors: PyTree[Array]
    points: PyTree[Array]
    hint: PyTree[Array]
    moved: Float[Array, " N"]
    losses: Float[Array, " N"]
    missed: Float[Array, ""]
    behind: Float[Array, " N"]
    slack: Float[Array, " N"]
    count: Int[Array, ""]


class DynamicOptimisticOMD(OnlineLearner):
    """Two-layer optimistic mirror descent with small regret against moving comparators.

    Base stepsizes `min(1 / (8 L), 2^i D / (G sqrt(8 T)))`, i = 0 ... N - 1; the mixture
    weighs by `exp(-rate_t (sum of corrected losses + hint))` with `rate_t = min(1 / (8
    L D^2), sqrt(log N) / sqrt((D G)^2 + sum_{s<t} e_s^2))`, `e_s` half the spread of
    the errors of the base learners' guessed losses. The expected regret against `u_1,
    ..., u_T` with path length `P` is O(P + sqrt(1 + P) (sqrt(sum sigma_t^2) + sqrt(sum
    Sigma_t^2))); `dynamic_regret_bound` has the constants.

    Args:
        geometry: The feasible set, bounded and Euclidean.
        horizon: The number of rounds that the stepsizes are laid out for, at least 1.
            It must be known, as it fixes the number of base learners.
        gradient_bound: `G`, a bound on the norm of all gradients, positive, known.
        smoothness: `L` of the expected losses, positive, known. Linear losses are
            smooth for every positive number.

    Raises:
        ValueError: if a constant is out of range or the geometry does not fit.
        TypeError: if a constant is only known inside a transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import DynamicOptimisticOMD, EuclideanBall, play
        >>> learner = DynamicOptimisticOMD(EuclideanBall(1.0), 200,
        ...                                gradient_bound=2.0, smoothness=1.0)
        >>> def gradient(t, x):
        ...     return x - jnp.where(t < 100, 0.5, -0.5)
        >>> points, _, _ = play(learner, gradient, jnp.zeros(1), 200)
        >>> bool(points[99, 0] > 0.45), bool(points[-1, 0] < -0.45)
        (True, True)

    Source: Chen et al., 2023 (arXiv 2302.04552), the dynamic regret.

    Differences: the constants are those for which `dynamic_regret_bound` is derived.
        Correction and caps are those that the two-layer method's authors publish; the
        spread in the mixture's rate, where they take the largest entry, does not
        depend on where the origin lies.
    """

    geometry: Geometry
    stepsizes: Float[Array, " N"]
    gradient_bound: float
    smoothness: float

    def __init__(
        self,
        geometry: Geometry,
        horizon: int,
        *,
        gradient_bound: float,
        smoothness: float,
    ):
        owner = "DynamicOptimisticOMD"
        check_positive(owner, "horizon", horizon)
        check_positive(owner, "gradient_bound", gradient_bound)
        check_positive(owner, "smoothness", smoothness)
        if isinstance(geometry, EuclideanSpace | EntropySimplex):
            raise ValueError(
                f"{owner}: `geometry` must be a bounded Euclidean set "
                f"(got {type(geometry).__name__})."
            )
        self.geometry = geometry
        self.gradient_bound = float(gradient_bound)
        self.smoothness = float(smoothness)
        self.stepsizes = _stepsizes(
            float(geometry.diameter()), horizon, self.gradient_bound, self.smoothness
        )

    def init(self, start: PyTree[Array]) -> DynamicOptimisticOMDState:
        """The state before the first round, all base learners at `start`.

        Args:
            start: A point of the feasible set.

        Returns:
            The learner's state.

        Raises:
            ValueError: if the start is not finite or outside of the set.
        """
        check_start("DynamicOptimisticOMD", self.geometry, start)
        n = self.stepsizes.size
        zeros = jnp.zeros(n, tree_dtype(start))
        stacked = jax.tree.map(lambda v: jnp.broadcast_to(v, (n, *v.shape)), start)
        return DynamicOptimisticOMDState(
            x=start,
            anchors=stacked,
            points=stacked,
            hint=optax.tree.zeros_like(start),
            moved=zeros,
            losses=zeros,
            missed=zeros[0],
            behind=zeros,
            slack=zeros,
            count=jnp.ones((), jnp.int32),
        )

    def update(
        self, state: DynamicOptimisticOMDState, gradient: PyTree[Array]
    ) -> DynamicOptimisticOMDState:
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
        check_gradient("DynamicOptimisticOMD", state.x, gradient)
        stepsizes = self.stepsizes.astype(state.losses.dtype)
        anchors = self._move(state.anchors, gradient, stepsizes)
        points = self._move(anchors, gradient, stepsizes)
        # What each guessed loss was off by: the correction stands in both and cancels.
        errors = _products(optax.tree.sub(gradient, state.hint), state.points)
        spread = (jnp.max(errors) - jnp.min(errors)) / 2
        correction = 2 * jnp.asarray(self.smoothness, spread.dtype)
        paid = _products(gradient, state.points)
        losses = state.losses + paid + correction * state.moved
        missed = state.missed + spread**2
        moved = _squares(optax.tree.sub(points, state.points))
        ahead = losses + _products(gradient, points) + correction * moved
        weights = jax.nn.softmax(-self._rate(missed) * ahead)
        return DynamicOptimisticOMDState(
            x=jax.tree.map(lambda v: jnp.tensordot(weights, v, 1), points),
            anchors=anchors,
            points=points,
            hint=gradient,
            moved=moved,
            losses=losses,
            missed=missed,
            behind=state.behind + optax.tree.vdot(gradient, state.x) - paid,
            slack=state.slack + self._gaps(state, anchors, gradient, stepsizes),
            count=state.count + 1,
        )

    def certificate(
        self,
        state: DynamicOptimisticOMDState,
        path_length: Float[Array, ""] | float = 0.0,
    ) -> Certificate:
        """A proved bound on the dynamic regret so far, from what the learner saw alone.

        For each base learner, what the mixture has lost to it is known exactly, and
        its own regret against any comparators whose path has length `P` is at most
        `(D^2 + 2 D P) / (2 stepsize)` plus what its path sums to. The least of these
        sums over the base learners is the bound.

        Args:
            state: The state after any round.
            path_length: `P`, the sum of `||u_t - u_{t-1}||`, non-negative.

        Returns:
            A certificate without a target.

        Raises:
            ValueError: if `path_length` is negative.
        """
        check_nonnegative("certificate", "path_length", path_length)
        stepsizes = self.stepsizes.astype(state.losses.dtype)
        diameter = jnp.asarray(self.geometry.diameter(), stepsizes.dtype)
        path = jnp.asarray(path_length, stepsizes.dtype)
        comparison = diameter * (diameter + 2 * path) / (2 * stepsizes)
        bounds = state.behind + state.slack + comparison
        return Certificate(
            "dynamic regret bound",
            jnp.min(bounds),
            proof=True,
            statement="sum <g_t, x_t - u_t> <= value for all u_1, u_2, ... of the set "
            "whose path is not longer than the given length; so the dynamic regret is, "
            "if every loss is convex, and its expectation, if the expected losses are",
            details={"best base learner": jnp.argmin(bounds)},
        )

    def _rate(self, missed):
        diameter = jnp.asarray(self.geometry.diameter(), missed.dtype)
        bound = jnp.asarray(self.gradient_bound, missed.dtype)
        cap = 1 / (8 * jnp.asarray(self.smoothness, missed.dtype) * diameter**2)
        scale = math.sqrt(math.log(self.stepsizes.size))
        # The first term is the largest that one round can add, so that the rate of a
        # round need not know the round.
        largest = (diameter * bound) ** 2
        return jnp.minimum(cap, scale / jnp.sqrt(largest + missed))

    def _move(self, anchors, gradient, stepsizes):
        return jax.vmap(self.geometry.move, (0, None, 0))(anchors, gradient, stepsizes)

    def _gaps(self, state, following, gradient, stepsizes):
        """What this round adds to each base learner's bound; see `_regimes`."""
        missed = optax.tree.sub(gradient, state.hint)
        back = _products(missed, optax.tree.sub(state.points, following))
        steps = _squares(optax.tree.sub(following, state.points))
        steps += _squares(optax.tree.sub(state.points, state.anchors))
        return back - steps / (2 * stepsizes)


def _stepsizes(diameter, horizon, bound, smoothness):
    """From the best for still comparators and the worst gradients up to `1 / (8 L)`."""
    cap = 1 / (8 * smoothness)
    least = diameter / (bound * math.sqrt(8 * horizon))
    n = max(math.ceil(math.log2(cap / least)), 0) + 1
    return jnp.asarray([min(cap, least * 2**i) for i in range(n)])


def _products(gradient, points):
    return jax.vmap(lambda x: optax.tree.vdot(gradient, x))(points)


def _squares(points):
    return jax.vmap(lambda x: optax.tree.vdot(x, x))(points)
