"""What every online learner has, and the loop that plays one against losses."""

from __future__ import annotations

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from ..core._checks import check_finite, check_nonempty, is_traced
from ._geometry import Geometry


class OnlineLearner(eqx.Module):
    """Chooses a point each round, then sees the gradient of that round's loss there.

    The three methods are pure, so a game is a `lax.scan` and many games a `vmap`.
    States differ between learners; all have the current point in `x`.
    """

    @abc.abstractmethod
    def init(self, start: PyTree[Array]) -> PyTree:
        """The state before the first round.

        Args:
            start: A point of the feasible set; the first point played, unless a hint
                moves it.

        Returns:
            The learner's state.
        """

    def predict(self, state) -> PyTree[Array]:
        """The point to play this round.

        Args:
            state: The learner's state.

        Returns:
            A point of the feasible set.
        """
        return state.x

    @abc.abstractmethod
    def update(self, state, gradient: PyTree[Array]) -> PyTree:
        """The state after this round.

        Args:
            state: The state that made this round's point.
            gradient: The gradient of this round's loss at that point, like the point.

        Returns:
            The learner's state for the next round.
        """


def play(
    learner: OnlineLearner,
    gradient: Callable,
    start: PyTree[Array],
    rounds: int,
) -> tuple[PyTree[Array], PyTree[Array], PyTree]:
    """Plays a learner for a number of rounds, in one compiled loop.

    Args:
        learner: Any `OnlineLearner`.
        gradient: `gradient(t, x)`, the gradient of the loss of round t (from 0) at x.
        start: The learner's first point.
        rounds: How many rounds, at least 1.

    Returns:
        The points played and the gradients seen, each with a leading axis of `rounds`,
        and the learner's last state.

    Raises:
        ValueError: if `rounds` is not positive or the start is refused.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import EuclideanBall, OnlineGradientDescent, play
        >>> learner = OnlineGradientDescent(EuclideanBall(1.0), gradient_bound=2.0)
        >>> target = jnp.array([0.5, 0.0])
        >>> points, _, _ = play(learner, lambda t, x: x - target, jnp.zeros(2), 50)
        >>> bool(jnp.allclose(points[-1], target, atol=1e-3))
        True
    """
    if rounds < 1:
        raise ValueError(f"play: `rounds` must be at least 1 (got {rounds}).")

    def step(state, t):
        x = learner.predict(state)
        g = gradient(t, x)
        return learner.update(state, g), (x, g)

    state, (points, gradients) = lax.scan(step, learner.init(start), jnp.arange(rounds))
    return points, gradients, state


def regret(
    loss: Callable,
    points: PyTree[Array],
    comparator: PyTree[Array],
    *,
    geometry: Geometry | None = None,
) -> Float[Array, " rounds"]:
    """The regret after each round: `sum of f_t(x_t) - f_t(u_t)`.

    Args:
        loss: `loss(t, x)`, the loss of round t (from 0) at x.
        points: What was played, leaves with a leading axis of rounds.
        comparator: One point for the static regret, or a sequence like `points` for
            the dynamic regret.
        geometry: The feasible set; if given, a comparator outside of it is refused.

    Returns:
        The cumulative regret, (rounds,).

    Raises:
        ValueError: if the comparator fits neither form or lies outside of the set.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import regret
        >>> points = jnp.array([[1.0], [0.5], [0.0]])
        >>> regret(lambda t, x: x[0], points, jnp.array([0.0])).tolist()
        [1.0, 1.5, 1.5]
    """
    rounds = jax.tree.leaves(points)[0].shape[0]
    moving = _is_sequence(points, comparator)
    if geometry is not None:
        _check_inside(geometry, comparator, moving)
    axes = (0, 0, 0 if moving else None)
    gaps = jax.vmap(lambda t, x, u: loss(t, x) - loss(t, u), axes)(
        jnp.arange(rounds), points, comparator
    )
    return jnp.cumsum(gaps)


def linear_regret(
    geometry: Geometry, points: PyTree[Array], gradients: PyTree[Array]
) -> Float[Array, " rounds"]:
    """The linearised regret after each round, `max over u of sum <g_t, x_t - u>`.

    Bounds the static regret from above when the losses are convex; needs only what the
    learner saw.

    Args:
        geometry: The feasible set, over which the maximum is exact.
        points: What was played, leaves with a leading axis of rounds.
        gradients: What was seen, like `points`.

    Returns:
        The cumulative linearised regret, (rounds,).

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import EuclideanBall, linear_regret
        >>> points, gradients = jnp.zeros((2, 1)), jnp.array([[1.0], [-1.0]])
        >>> linear_regret(EuclideanBall(1.0), points, gradients).tolist()
        [1.0, 0.0]
    """
    products = jax.tree.map(
        lambda g, x: jnp.sum((g * x).reshape(g.shape[0], -1), axis=1), gradients, points
    )
    paid = jnp.cumsum(sum(jax.tree.leaves(products)))
    totals = jax.tree.map(lambda g: -jnp.cumsum(g, axis=0), gradients)
    return paid + jax.vmap(geometry.support)(totals)


def check_start(owner: str, geometry: Geometry, start) -> None:
    """Refuses starts that are empty, not finite or outside of the set."""
    for leaf in jax.tree.leaves(start):
        check_nonempty(owner, "start", leaf)
        check_finite(owner, "start", leaf)
    inside = geometry.contains(start)
    if not is_traced(inside) and not bool(inside):
        raise ValueError(
            f"{owner}: `start` must lie in the feasible set (it is "
            f"{float(geometry.excess(start)):.3g} outside). Project it first."
        )


def check_gradient(owner: str, x, gradient) -> None:
    """Refuses gradients that do not have the point's structure and shapes."""
    if jax.tree.structure(x) != jax.tree.structure(gradient) or any(
        jnp.shape(a) != jnp.shape(b)
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(gradient), strict=True)
    ):
        raise ValueError(
            f"{owner}: `gradient` must have the structure and shapes of the point "
            f"(got {jax.tree.map(jnp.shape, gradient)} for "
            f"{jax.tree.map(jnp.shape, x)})."
        )


def tree_dtype(tree):
    """The one dtype of a tree of floating arrays."""
    return jnp.result_type(*jax.tree.leaves(tree))


def _is_sequence(points, comparator) -> bool:
    played = [leaf.shape for leaf in jax.tree.leaves(points)]
    compared = [jnp.shape(leaf) for leaf in jax.tree.leaves(comparator)]
    if compared == played:
        return True
    if compared == [shape[1:] for shape in played]:
        return False
    raise ValueError(
        "regret: `comparator` must be one point or a sequence like `points` (got "
        f"shapes {compared} for {played})."
    )


def _check_inside(geometry, comparator, moving) -> None:
    contains = jax.vmap(geometry.contains) if moving else geometry.contains
    inside = contains(comparator)
    if not is_traced(inside) and not bool(jnp.all(inside)):
        raise ValueError(
            "regret: `comparator` must lie in the feasible set (it does not in "
            f"{int(jnp.sum(~inside))} of {inside.size} rounds). Project it first."
        )
