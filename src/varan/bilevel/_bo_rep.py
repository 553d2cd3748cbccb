"""BO-REP: normalised momentum above, periodic updates below.

For upper levels whose smoothness grows with the gradient (recurrent networks, losses
that grow faster than squares): a step of `x` has a fixed length, however steep the
ground. A step of known length moves the lower answer by a known amount, so that `y`
need not follow every step: it is refined once at the start and then updated once a
period. The adjoint takes one step on its linear system a round, as in SOBA.

Use it where fixed stepsizes of `x` diverge or must be tiny. Where the upper level is
smooth in the usual sense, SOBA and MA-SOBA are simpler and end nearer: a normalised
step never gets shorter than `stepsize`.

Source: J. Hao, X. Gong and M. Liu (2024), Bilevel Optimization under Unbounded
Smoothness: A New Algorithm and Convergence Analysis, ICLR 2024, arXiv 2401.09587.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_nonnegative, check_positive, is_traced
from ..core._trees import tree_norm
from ._alternating import (
    AbstractAlternating,
    Oracles,
    adjoint_residual,
    advanced,
    descend,
    lower_gradient,
    upper_direction,
    upper_gradients,
    upper_step,
)

if TYPE_CHECKING:
    import optax

Size = Float[Array, ""] | float

# Of the norm that a direction is divided by, as in the authors' code: a zero gradient
# is a zero step.
_FLOOR = 1e-10


class BORep(AbstractAlternating):
    """Bilevel optimisation with initialisation refinement and periodic updates.

    One upper gradient, one Hessian and one cross product a round, and `inner_steps`
    lower gradients every `period` rounds. The start costs
    `refine_steps (2^refine_epochs - 1)` lower gradients.

    Args:
        stepsize: `eta`, the length of every step of `x`.
        lower_stepsize: `gamma`, of `y`; below `2 / L`.
        adjoint_stepsize: `nu`, of the adjoint; below `2 / L`.
        momentum: `beta` in [0, 1): how much of the last directions is kept.
        period: Rounds between updates of `y` (`I`).
        inner_steps: Lower steps of an update (`N`).
        refine_epochs: Epochs of the refinement; each has twice the steps of the one
            before, half the stepsize and starts from its mean; 0 for none.
        refine_steps: Lower steps of the first epoch.
        radius: `y` stays in the ball of this radius about where an update began (in
            the refinement it shrinks by `sqrt(2)` an epoch); `None` for no ball.
        normalise: `False` takes steps `stepsize` times the momentum instead.
        key: Draws the batches; needed when the problem has `sample`.

    Raises:
        ValueError: if a setting is out of range, or the problem has constraints, a set
            Y, or `sample` without `key`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import BORep, BilevelProblem, trajectory
        >>> problem = BilevelProblem(  # SOBA overflows here from stepsize 1e-3 on
        ...     lambda x, y: jnp.cosh(x) + (y - 1) ** 2 / 2,
        ...     lambda x, y: (y - 2 * x) ** 2 / 2,
        ... )
        >>> start = problem.point(jnp.array(12.0), jnp.array(0.0))
        >>> method = BORep(0.02, 0.5, 0.5)
        >>> last, _ = trajectory(problem, method, start, lambda p, i: i.x, steps=1000)
        >>> bool(abs(last.x - 0.4) < 0.2)
        True

    Source: arXiv 2401.09587, algorithms 1 (refinement) and 2.

    Differences: An update of `y` ends at its last iterate, as in the authors' code;
        defaults for stepsizes are this code's, too. `normalise=False` is the paper's
        ablation.
    """

    stepsize: Size = 1e-2
    lower_stepsize: Size = 1e-3
    adjoint_stepsize: Size = 1e-2
    momentum: Size = 0.9
    period: int = eqx.field(static=True, default=2)
    inner_steps: int = eqx.field(static=True, default=3)
    refine_epochs: int = eqx.field(static=True, default=3)
    refine_steps: int = eqx.field(static=True, default=50)
    radius: Size | None = None
    normalise: bool = eqx.field(static=True, default=True)
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        for name in (
            "stepsize",
            "lower_stepsize",
            "adjoint_stepsize",
            "period",
            "inner_steps",
            "refine_steps",
        ):
            check_positive("BORep", name, getattr(self, name))
        check_nonnegative("BORep", "refine_epochs", self.refine_epochs)
        if self.radius is not None:
            check_positive("BORep", "radius", self.radius)
        _check_momentum("BORep", self.momentum)

    def extra(self, problem, start):
        return jtu.tree_map(jnp.zeros_like, start.x)

    def refine(self, problem, iterate):
        """Multi-epoch stochastic gradient steps on the lower level, `x` fixed."""
        y, key, spent = iterate.y, iterate.key, 0
        for epoch in range(self.refine_epochs):
            number = self.refine_steps * 2**epoch
            key, used = jax.random.split(key)
            radius = None if self.radius is None else self.radius / 2 ** (epoch / 2)
            size = self.lower_stepsize / 2**epoch
            _, y = self._below(problem, iterate.x, y, used, number, size, radius)
            spent += number
        return eqx.tree_at(
            lambda i: (i.y, i.key, i.oracles), iterate, (y, key, Oracles(lower=spent))
        )

    def advance(self, problem, iterate):
        key, *keys = jax.random.split(iterate.key, 5)
        x, adjoint, count = iterate.x, iterate.adjoint, iterate.count

        def update(y):
            steps, size = self.inner_steps, self.lower_stepsize
            return self._below(problem, x, y, keys[0], steps, size, self.radius)[0]

        due = (count > 0) & (count % self.period == 0)
        y = jax.lax.cond(due, update, lambda y: y, iterate.y)

        lower, upper = problem.draw(keys[1]), problem.draw(keys[2])
        slope, force = upper_gradients(upper, x, y)
        residual = adjoint_residual(lower, x, y, adjoint, force)
        direction = upper_direction(problem.draw(keys[3]), x, y, adjoint, slope)
        adjoint = descend(adjoint, residual, self.adjoint_stepsize)

        momentum = _averaged(iterate.extra, direction, self.momentum)
        step = _unit(momentum) if self.normalise else momentum
        x = upper_step(problem, x, step, self.stepsize)
        spent = jnp.where(due, self.inner_steps, 0)
        cost = Oracles(upper=1, lower=spent, hessian=1, cross=1)
        return advanced(iterate, key, cost, x=x, y=y, adjoint=adjoint, extra=momentum)

    def _below(self, problem, x, start, key, number, stepsize, radius):
        """Lower steps within the ball about `start`: the last iterate and the mean."""

        def one(carry, key):
            y, total = carry
            y = descend(y, lower_gradient(problem.draw(key), x, y), stepsize)
            if radius is not None:
                y = _into_ball(y, start, radius)
            return (y, jtu.tree_map(jnp.add, total, y)), None

        zero = jtu.tree_map(jnp.zeros_like, start)
        keys = jax.random.split(key, number)
        (y, total), _ = jax.lax.scan(one, (start, zero), keys)
        return y, jtu.tree_map(lambda v: v / number, total)


def normalized_momentum(
    stepsize: Any, momentum: float | Array = 0.9
) -> optax.GradientTransformation:
    """Steps of one length along the average of the gradients: BO-REP's upper part.

    `m <- beta m + (1 - beta) g`, update `-stepsize m / ||m||` with the norm over all
    leaves together. For losses whose smoothness grows with the gradient; costs one
    vector of memory.

    Args:
        stepsize: The length of a step, a number or an optax schedule; zero gradients
            give zero steps.
        momentum: `beta` in [0, 1).

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import normalized_momentum
        >>> optimiser = normalized_momentum(0.5)
        >>> gradient = jnp.array([3.0, 4.0])
        >>> updates, _ = optimiser.update(gradient, optimiser.init(gradient))
        >>> updates.round(3).tolist() == jnp.array([-0.3, -0.4]).tolist()
        True

    Source: arXiv 2401.09587, algorithm 2; A. Cutkosky and H. Mehta (2020), arXiv
        2002.03305.
    """
    import optax

    if not callable(stepsize):
        check_positive("normalized_momentum", "stepsize", stepsize)
    _check_momentum("normalized_momentum", momentum)
    zeros = lambda params: jtu.tree_map(jnp.zeros_like, params)  # noqa: E731

    def update(gradients, average, params=None):
        del params
        average = _averaged(average, gradients, momentum)
        return _unit(average), average

    return optax.chain(
        optax.GradientTransformation(zeros, update),
        optax.scale_by_learning_rate(stepsize),
    )


def _averaged(average, direction, momentum):
    """`beta m + (1 - beta) d`."""
    gap = jtu.tree_map(jnp.subtract, average, direction)
    return descend(direction, gap, -momentum)


def _unit(tree):
    """Scaled to norm one over all leaves; zero stays zero."""
    norm = tree_norm(tree)
    return jtu.tree_map(lambda v: v / (norm + _FLOOR).astype(v.dtype), tree)


def _into_ball(y, centre, radius):
    gap = jtu.tree_map(jnp.subtract, y, centre)
    norm = tree_norm(gap)
    shrink = jnp.minimum(1, radius / jnp.where(norm > 0, norm, 1))
    return descend(centre, gap, -shrink)


def _check_momentum(owner, momentum):
    if not is_traced(momentum) and not 0 <= momentum < 1:
        raise ValueError(
            f"{owner}: `momentum` must lie in [0, 1) (got {momentum}). 0 forgets all."
        )
