"""Architecture search on two copies of the weights, and the search it replaces.

`min_x F(x, y*(x))`, `y*(x)` in `argmin_y f(x, y)`: `x` the architecture, `F` the loss
on the validation split, `f` that on the training split. `DARTS` follows `F` along one
training step, or ignores the training altogether. `RARTS` gives up the two levels: it
descends

    L(x, y, w) = F(x, y) + lambda f(x, w) + beta / 2 |y - w|^2

with one copy of the weights for each split, and first derivatives only.

Where the least training loss does not depend on `x` (networks that fit their training
data under every architecture; a lower level `|y - g(x)|^2`), the answers of `L` tend to
those of the bilevel problem as `lambda` and `beta` grow. Elsewhere they do not:
`lambda f` then draws `x` to architectures that train well, with a force that grows with
`lambda`. Use `Penalty` or `F2SA`, which subtract the least training loss, when the
bilevel answer itself is wanted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_positive
from ..core._problem import Smooth
from ..core._trees import tree_square
from ._alternating import (
    AbstractAlternating,
    Oracles,
    advanced,
    check_plain,
    conjugate_gradients,
    descend,
    hessian_product,
    lower_gradient,
    lower_step,
    upper_direction,
    upper_gradients,
    upper_step,
)
from ._problem import BilevelPoint, BilevelProblem

Size = Float[Array, ""] | float

# For the adjoint that `solve` measures with; no step of the method needs it.
_ADJOINT_STEPS = 50


def relaxed_search(
    problem: BilevelProblem,
    *,
    training_weight: float | Float[Array, ""] = 10.0,
    coupling: float | Float[Array, ""] = 10.0,
) -> Smooth:
    """The single-level problem that `RARTS` descends, for any smooth solver.

    Its condition at `RARTS`'s iterates is the certificate of the search: the gradient
    of `L`. What it says of the bilevel problem depends on the data; see the topic's
    notes on when the relaxation is exact.

    Args:
        problem: A bilevel problem without constraints and sets.
        training_weight: `lambda`, positive.
        coupling: `beta`, positive.

    Returns:
        A problem whose unknown is the tuple `(x, y, w)`: architecture, weights of the
        upper level, weights of the lower level.

    Raises:
        ValueError: If a weight is not positive or the problem has constraints or sets.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import Newton, solve
        >>> from varan.bilevel import relaxed_search, search_example
        >>> relaxed = relaxed_search(search_example())
        >>> start = (jnp.array(2.0), jnp.array(-2.0), jnp.array(-2.0))
        >>> [round(float(v), 3) for v in solve(relaxed, Newton(), start).x]
        [1.081, 0.919, 1.027]

    Source: F. Xue, Y. Qi and J. Xin (2022), RARTS: an efficient first-order relaxed
        architecture search method, arXiv 2008.03901.
    """
    check_positive("relaxed_search", "training_weight", training_weight)
    check_positive("relaxed_search", "coupling", coupling)
    _check("relaxed_search", problem)
    if problem.project_x is not None:
        raise ValueError(
            "relaxed_search: needs a problem without `project_x`. Parametrise the set "
            "(a softmax for weights that sum to 1)."
        )
    return Smooth(_relaxed, problem, training_weight, coupling)


class RARTS(AbstractAlternating):
    """Relaxed architecture search: gradient steps on two copies of the weights.

    A round moves in turn, each with the newest others, the weights `w` of the training
    split, the weights `y` of the validation split, and the architecture `x`; two
    gradients of each level, no second derivative. `Iterate.y` is `w`, the solution's
    candidate for the lower level; `Iterate.extra` is `y`.

    Under `solve`, the bilevel condition is measured at `(x, w)`, with the adjoint from
    up to 50 conjugate gradients, uncounted. It falls to the bias of the relaxation, of
    order `1 / lambda + 1 / beta` at best, and not to zero: such a run ends `STALLED` or
    at its step limit. `relaxed_search` is the problem that RARTS does solve.

    Args:
        stepsize: Of the architecture `x`.
        lower_stepsize: Of both copies of the weights.
        training_weight: `lambda`, positive; 10 in the paper's solvable model.
        coupling: `beta`, positive; 10 there too.
        prox: `prox(x, stepsize)`, applied to `x` after its step: the proximal operator
            of a penalty on the architecture. With `varan.operators.prox_group_lasso`
            on the scale factors of channels it is the search of widths.
        key: Draws the batches; needed when the problem has `sample`. Both levels and
            both copies see the same draw in a round.

    Raises:
        ValueError: If a setting is not positive, or the problem has constraints, a set
            Y, or `sample` without `key`.
        UserWarning: If both levels are the same function of the same data: the split
            is then no split.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import RARTS, search_example
        >>> problem = search_example()  # its answer is x = 1
        >>> start = problem.point(jnp.array(2.0), jnp.array(-2.0))
        >>> method = RARTS(0.004, 0.004)
        >>> round(float(solve(problem, method, start, max_steps=4000).x.x), 2)
        1.08

    Source: F. Xue, Y. Qi and J. Xin (2022), RARTS: an efficient first-order relaxed
        architecture search method, IEEE Access, arXiv 2008.03901.

    Differences: The search of widths takes one proximal step in the scale factors; the
        paper splits them once more into two copies.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.01
    training_weight: Size = 10.0
    coupling: Size = 10.0
    prox: Callable | None = None
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        for name in ("stepsize", "lower_stepsize", "training_weight", "coupling"):
            check_positive("RARTS", name, getattr(self, name))

    def check(self, problem):
        _check("RARTS", problem)

    def extra(self, problem, start):
        # A copy: the two must not share what the loop overwrites.
        return jtu.tree_map(jnp.copy, start.y)

    def advance(self, problem, iterate):
        key, used = jax.random.split(iterate.key)
        drawn = problem.draw(used)
        x, w, y = iterate.x, iterate.y, iterate.extra
        size, weight = self.lower_stepsize, self.training_weight

        apart = jtu.tree_map(jnp.subtract, w, y)
        w = descend(w, lower_gradient(drawn, x, w), size * weight)
        w = descend(w, apart, size * self.coupling)

        apart = jtu.tree_map(jnp.subtract, y, w)
        y = descend(y, jax.grad(drawn.upper_value, argnums=1)(x, y), size)
        y = descend(y, apart, size * self.coupling)

        slope = jax.grad(drawn.upper_value)(x, y)
        slope = descend(slope, jax.grad(drawn.lower_value)(x, w), -weight)
        x = upper_step(problem, x, slope, self.stepsize)
        if self.prox is not None:
            x = self.prox(x, self.stepsize)
        cost = Oracles(upper=2, lower=2)
        return advanced(iterate, key, cost, x=x, y=w, extra=y)

    def point(self, problem, iterate):
        """The iterate with its adjoint, which the method itself never forms."""
        x, w = iterate.x, iterate.y
        _, force = upper_gradients(problem, x, w)
        start = jtu.tree_map(jnp.zeros_like, w)
        adjoint, _, _ = conjugate_gradients(
            lambda v: hessian_product(problem, x, w, v),
            jtu.tree_map(jnp.negative, force),
            start,
            0.0,
            _ADJOINT_STEPS,
        )
        # A lower level without curvature has no adjoint; zero then shows as not met.
        found = jnp.all(jnp.isfinite(ravel_pytree(adjoint)[0]))
        adjoint = jtu.tree_map(lambda a: jnp.where(found, a, 0), adjoint)
        return BilevelPoint(x, w, adjoint)


class DARTS(AbstractAlternating):
    """Differentiable architecture search: one step of each level in turn.

    The architecture descends `F(x, y - unroll f_y(x, y))`, the loss after one training
    step that is not taken (`order=2`), or `F(x, y)` as if the weights did not depend on
    it (`order=1`); then the weights descend `f`. One upper gradient and one of the
    lower level a round for order 1; for order 2 one lower gradient and one product
    with the mixed derivative more.

    Order 1 finds where `F_x(x, y*(x)) = 0`, which is no answer of the bilevel problem
    unless `y*` is constant there. Order 2 has the adjoint `-unroll F_y`, which is exact
    only where `unroll` times the lower Hessian is the identity.

    Args:
        stepsize: Of the architecture `x`.
        lower_stepsize: Of the weights.
        unroll: The step that order 2 looks ahead; the paper's is `lower_stepsize`.
        order: 1 or 2.
        key: Draws the batches; needed when the problem has `sample`.

    Raises:
        ValueError: If a setting is out of range, or the problem has constraints, a set
            Y, or `sample` without `key`.
        UserWarning: If both levels are the same function of the same data.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import DARTS, search_example
        >>> problem = search_example()  # its answer is x = 1
        >>> start = problem.point(jnp.array(2.0), jnp.array(-2.0))
        >>> def found(method):
        ...     x = solve(problem, method, start, max_steps=4000).x.x
        ...     return round(float(x), 2)
        >>> found(DARTS(0.05, 0.05)), found(DARTS(0.05, 0.05, order=2, unroll=0.1))
        (2.0, 1.67)

    Source: H. Liu, K. Simonyan and Y. Yang (2019), DARTS: differentiable architecture
        search, arXiv 1806.09055, algorithm 1.

    Differences: The product with the mixed derivative is exact; the paper takes a
        finite difference of two gradients. Plain steps instead of Adam and momentum.
    """

    stepsize: Size = 0.01
    lower_stepsize: Size = 0.01
    unroll: Size = 0.01
    order: int = eqx.field(static=True, default=1)
    key: PRNGKeyArray | None = None

    def __check_init__(self):
        for name in ("stepsize", "lower_stepsize", "unroll"):
            check_positive("DARTS", name, getattr(self, name))
        if self.order not in (1, 2):
            raise ValueError(f"DARTS: `order` must be 1 or 2 (got {self.order}).")

    def check(self, problem):
        _check("DARTS", problem)

    def advance(self, problem, iterate):
        key, used = jax.random.split(iterate.key)
        drawn = problem.draw(used)
        x, y, adjoint = iterate.x, iterate.y, iterate.adjoint
        if self.order == 1:
            slope = jax.grad(drawn.upper_value)(x, y)
            cost = Oracles(upper=1, lower=1)
        else:
            ahead = lower_step(drawn, x, y, self.unroll)
            slope, force = upper_gradients(drawn, x, ahead)
            adjoint = descend(jtu.tree_map(jnp.zeros_like, y), force, self.unroll)
            slope = upper_direction(drawn, x, y, adjoint, slope)
            cost = Oracles(upper=1, lower=2, cross=1)
        x = upper_step(problem, x, slope, self.stepsize)
        y = lower_step(drawn, x, y, self.lower_stepsize)
        return advanced(iterate, key, cost, x=x, y=y, adjoint=adjoint)


def search_example() -> BilevelProblem:
    """The solvable model of architecture search: one weight, one architecture number.

    `F(x, y) = x y - 2 x + 1` and `f(x, y) = (y - x)^2`, so that `y*(x) = x` and
    `F(x, y*(x)) = (x - 1)^2`. The answer is `x = y = 1`; `DARTS` of order 1 goes to
    `(2, 2)`, of order 2 to `x = 2 / (1 + 2 unroll)`; `RARTS` goes to
    `x = 2 / (2 - 1 / (2 lambda) - 1 / beta)`.

    Returns:
        The problem; both unknowns are scalars.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import search_example
        >>> one = jnp.array(1.0)
        >>> problem = search_example()
        >>> float(problem.upper_value(one, one)), float(problem.lower_value(one, one))
        (0.0, 0.0)

    Source: H. Liu, K. Simonyan and Y. Yang (2019), arXiv 1806.09055, appendix. The
        limit of RARTS is where the gradient of `relaxed_search` vanishes.
    """
    return BilevelProblem(_example_upper, _example_lower)


def _example_upper(x, y):
    return x * y - 2 * x + 1


def _example_lower(x, y):
    return (y - x) ** 2


def _relaxed(unknown, problem, training_weight, coupling):
    x, y, w = unknown
    gap = tree_square(jtu.tree_map(jnp.subtract, y, w))
    value = problem.upper_value(x, y)
    weight, pull = (jnp.asarray(v, value.dtype) for v in (training_weight, coupling))
    return value + weight * problem.lower_value(x, w) + pull / 2 * gap


def _check(owner: str, problem: BilevelProblem) -> None:
    check_plain(owner, problem)
    if _function(problem.upper) is _function(problem.lower):
        warnings.warn(
            f"{owner}: both levels are the same function of the same data. Give the "
            "upper level a validation split of its own, or nothing is searched for.",
            stacklevel=3,
        )


def _function(callable_):
    return getattr(callable_, "func", callable_)
