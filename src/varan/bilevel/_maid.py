"""MAID: inexact hypergradients that choose their own accuracy and step.

Hyperparameters of a strongly convex lower level, without a sequence of accuracies and
without a stepsize to guess. A hypergradient is refined until its own error bound proves
it a descent direction; a backtracking search accepts a step only when upper and lower
bounds on the objective prove the descent; whenever that fails the accuracies are
tightened, and after a success they may relax. `HOAG` is the method it improves on, with
accuracies fixed beforehand and a fixed step.

Cost: a few dozen lower gradients and Hessian products a round, warm-started, more as
the hypergradient vanishes. Use it when the constants of `Smoothness` are known or
bounded; where they are very pessimistic (small smoothing of a total variation), so are
the accuracies it asks for.

Source: M. S. Salehi, S. Mukherjee, L. Roberts and M. J. Ehrhardt (2023), An adaptively
inexact first-order method for bilevel optimization with application to hyperparameter
learning, arXiv 2308.10098.
"""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..core._checks import check_choice, check_positive, is_traced
from ..core._trees import tree_norm, tree_square
from ._alternating import (
    AbstractAlternating,
    Oracles,
    advanced,
    check_plain,
    upper_step,
)
from ._inexact import (
    Constants,
    Smoothness,
    constants_at,
    inexact_hypergradient,
    solve_lower,
)

Size = Float[Array, ""] | float

# Refinements of the accuracy in one round; 0.5 to this power is below any rounding.
_REFINEMENTS = 60
# Trial steps of a round, and one more for every failed round before it.
_TRIALS = 10


class Search(eqx.Module):
    """What MAID keeps besides its point.

    Args:
        epsilon: Accuracy asked of the lower level.
        delta: Accuracy asked of the adjoint equation.
        stepsize: The first step of the next search.
        failures: Rounds without a step since the last one.
        at: Where the last hypergradient was taken.
        direction: That hypergradient.
        error: The bound on its error (infinite before the first round).
        value_bound: A proved upper bound on the objective at the current point.
    """

    epsilon: Float[Array, ""]
    delta: Float[Array, ""]
    stepsize: Float[Array, ""]
    failures: Int[Array, ""]
    at: PyTree[Array]
    direction: PyTree[Array]
    error: Float[Array, ""]
    value_bound: Float[Array, ""]


class MAID(AbstractAlternating):
    """Method of adaptive inexact descent.

    Args:
        constants: A `Smoothness`, or a function of `x` that returns one.
        stepsize: The first step tried (`beta`); later ones follow from the search.
        epsilon: First accuracy of the lower level, a distance in `y`.
        delta: First accuracy of the adjoint equation, a residual.
        descent: `eta` in (0, 1): the error bound stays below `(1 - eta)` times the
            hypergradient's norm.
        decrease: The search wants a proved decrease of `decrease ||x+ - x||^2 / step`.
        shrink: `rho` in (0, 1), of trial steps; the paper takes 0.9, and 0.5 for
            images.
        grow: Of the step after a success, at least 1.
        tighten: `tau` in (0, 1), of the accuracies on a failure.
        relax: `nu`, at least 1, of the accuracies after a success.
        convex: Whether `F` is convex in `y`: its lower bound is then sharper.
        max_inner: Steps of a subproblem at most.

    Raises:
        ValueError: if a setting is out of range, the problem has constraints, sets of
            the lower level, or `sample` (exact oracles are needed).

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import MAID, BilevelProblem, Smoothness
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> method = MAID(Smoothness(1.0, lower=1.0, upper_y=1.0), stepsize=10.0)
        >>> round(float(solve(problem, method, start, tol=1e-3).x.x), 2)
        0.5

    Source: arXiv 2308.10098, algorithms 2.1 and 3.1.

    Differences: Bounds are taken at the accuracies reached, and hold every term of the
        theorem; `F` may depend on `x`, which may be projected; a failed round is one
        step of `solve` that does not move.
    """

    constants: Constants
    stepsize: Size = 0.1
    epsilon: Size = 0.1
    delta: Size = 0.1
    descent: Size = 1e-4
    decrease: Size = 1e-4
    shrink: Size = 0.9
    grow: Size = 10 / 9
    tighten: Size = 0.5
    relax: Size = 1.05
    convex: bool = eqx.field(static=True, default=False)
    max_inner: int = eqx.field(static=True, default=10_000)
    key: PRNGKeyArray | None = eqx.field(init=False, default=None)

    def __check_init__(self):
        for name in ("stepsize", "epsilon", "delta", "decrease", "max_inner"):
            check_positive("MAID", name, getattr(self, name))
        for name in ("descent", "shrink", "tighten"):
            value = getattr(self, name)
            if not is_traced(value) and not 0 < value < 1:
                raise ValueError(f"MAID: `{name}` must lie in (0, 1) (got {value}).")
        for name in ("grow", "relax"):
            value = getattr(self, name)
            if not is_traced(value) and not value >= 1:
                raise ValueError(f"MAID: `{name}` must be at least 1 (got {value}).")

    def check(self, problem):
        _check_exact("MAID", problem)

    def extra(self, problem, start):
        dtype = jnp.result_type(*jtu.tree_leaves(start.y))
        sizes = (self.epsilon, self.delta, self.stepsize)
        at = jtu.tree_map(jnp.copy, start.x)
        zero = jtu.tree_map(jnp.zeros_like, start.x)
        infinite = (jnp.full((), jnp.inf, dtype) for _ in range(2))
        first = (jnp.asarray(size, dtype) for size in sizes)
        return Search(*first, jnp.array(0), at, zero, *infinite)

    def refine(self, problem, iterate):
        # A search from outside X would compare with a value that no point of X has.
        if problem.project_x is None:
            return iterate
        return eqx.tree_at(lambda i: i.x, iterate, problem.project_x(iterate.x))

    def advance(self, problem, iterate):
        x, search = iterate.x, iterate.extra
        found, epsilon, delta, spent = self._gradient(problem, iterate)
        step = self._search(problem, x, found, epsilon, search)
        x_new, y_new, accepted, size, above, more = step

        def either(yes, no):
            return jtu.tree_map(lambda a, b: jnp.where(accepted, a, b), yes, no)

        change = jnp.where(
            accepted,
            jnp.asarray(self.relax, epsilon.dtype),
            jnp.asarray(self.tighten, epsilon.dtype),
        )
        grown = size * jnp.asarray(self.grow, size.dtype)
        after = Search(
            epsilon * change,
            delta * change,
            jnp.where(accepted, grown, search.stepsize),
            jnp.where(accepted, 0, search.failures + 1),
            x,
            found.value,
            found.bound.value,
            jnp.where(accepted, above, search.value_bound),
        )
        return advanced(
            iterate,
            iterate.key,
            jtu.tree_map(jnp.add, spent, more),
            x=either(x_new, x),
            y=either(y_new, found.y),
            adjoint=found.adjoint,
            extra=after,
        )

    def _gradient(self, problem, iterate):
        """A hypergradient that its own bound proves a descent direction."""

        def attempt(y, adjoint, epsilon, delta):
            return inexact_hypergradient(
                problem,
                iterate.x,
                y,
                self.constants,
                epsilon=epsilon,
                delta=delta,
                adjoint=adjoint,
                max_steps=self.max_inner,
            )

        search = iterate.extra
        first = (iterate.y, iterate.adjoint, search.epsilon, search.delta)
        shapes = eqx.filter_eval_shape(attempt, *first)
        empty = jtu.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        empty = eqx.tree_at(lambda f: (f.y, f.adjoint), empty, first[:2])
        keep = jnp.asarray(1 - self.descent, search.epsilon.dtype)
        tau = jnp.asarray(self.tighten, search.epsilon.dtype)

        def go(carry):
            found, _, _, _, count = carry
            # The hypergradient's norm, or where `x` is projected that of its step.
            ahead = upper_step(problem, iterate.x, found.value, search.stepsize)
            move = tree_norm(jtu.tree_map(jnp.subtract, ahead, iterate.x))
            proved = found.bound.value <= keep * move / search.stepsize
            return (count == 0) | (~proved & (count < _REFINEMENTS))

        def refine(carry):
            found, epsilon, delta, spent, count = carry
            # The first attempt is made at the accuracies as they are.
            factor = jnp.where(count == 0, jnp.ones_like(tau), tau)
            epsilon, delta = factor * epsilon, factor * delta
            found = attempt(found.y, found.adjoint, epsilon, delta)
            spent = jtu.tree_map(jnp.add, spent, found.oracles)
            return found, epsilon, delta, spent, count + 1

        carry = (empty, search.epsilon, search.delta, Oracles(), jnp.array(0))
        found, epsilon, delta, spent, _ = jax.lax.while_loop(go, refine, carry)
        return found, epsilon, delta, spent

    def _search(self, problem, x, found, epsilon, search):
        """The longest trial step whose descent the bounds prove."""
        dtype = epsilon.dtype
        rho, wanted = (jnp.asarray(v, dtype) for v in (self.shrink, self.decrease))
        known = constants_at(self.constants, x)
        value, slack = _value(problem, x, found.y, found.lower_distance)
        curved = 0 if self.convex else _curvature(found.lower_distance, known)
        below = value - slack - curved

        def go(carry):
            return ~carry[2] & (carry[-1] < _TRIALS + search.failures)

        def trial(carry):
            _, _, _, size, _, spent, count = carry
            size = jnp.where(count == 0, size, rho * size)
            new = upper_step(problem, x, found.value, size)
            there = constants_at(self.constants, new)
            y, distance, steps = solve_lower(
                problem, new, found.y, there, epsilon, self.max_inner
            )
            value, slack = _value(problem, new, y, distance)
            above = value + slack + _curvature(distance, there)
            moved = tree_square(jtu.tree_map(jnp.subtract, new, x))
            accepted = above - below <= -wanted * moved / size
            cost = Oracles(upper=1, lower=steps)
            spent = jtu.tree_map(jnp.add, spent, cost)
            return new, y, accepted, size, above, spent, count + 1

        no = jnp.asarray(False)
        carry = (x, found.y, no, search.stepsize, value, Oracles(), jnp.array(0))
        return jax.lax.while_loop(go, trial, carry)[:-1]


class HOAG(AbstractAlternating):
    """Hypergradient descent with accuracies that are set beforehand.

    Args:
        constants: A `Smoothness`, or a function of `x` that returns one; only its
            `strong_convexity` and `lower` are read.
        stepsize: Of `x`, fixed.
        epsilon: First accuracy of both subproblems.
        sequence: How it falls with the round `k`: `"geometric"`, like `0.9^k`;
            `"quadratic"`, like `1 / (k + 1)^2`; `"cubic"`, like `1 / (k + 1)^3`.
        max_inner: Steps of a subproblem at most.

    Raises:
        ValueError: as `MAID`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.bilevel import HOAG, BilevelProblem, Smoothness
        >>> problem = BilevelProblem(
        ...     lambda x, y: (y - 1) ** 2 / 2, lambda x, y: (y - 2 * x) ** 2 / 2
        ... )
        >>> start = problem.point(jnp.array(0.0), jnp.array(0.0))
        >>> method = HOAG(Smoothness(1.0, lower=1.0, upper_y=1.0), 0.1)
        >>> round(float(solve(problem, method, start, tol=1e-3).x.x), 2)
        0.5

    Source: F. Pedregosa (2016), Hyperparameter optimization with approximate gradient,
        arXiv 1602.02355, algorithm 1 and the sequences of its section 5.
    """

    constants: Constants
    stepsize: Size = 0.1
    epsilon: Size = 0.1
    sequence: Literal["geometric", "quadratic", "cubic"] = eqx.field(
        static=True, default="geometric"
    )
    max_inner: int = eqx.field(static=True, default=10_000)
    key: PRNGKeyArray | None = eqx.field(init=False, default=None)

    def __check_init__(self):
        for name in ("stepsize", "epsilon", "max_inner"):
            check_positive("HOAG", name, getattr(self, name))
        sequences = ("geometric", "quadratic", "cubic")
        check_choice("HOAG", "sequence", self.sequence, sequences)

    def check(self, problem):
        _check_exact("HOAG", problem)

    def advance(self, problem, iterate):
        dtype = jnp.result_type(*jtu.tree_leaves(iterate.y))
        k = iterate.count.astype(dtype)
        powers = {"quadratic": 2, "cubic": 3}
        fall = (
            0.9**k
            if self.sequence == "geometric"
            else (k + 1) ** -powers[self.sequence]
        )
        accuracy = jnp.asarray(self.epsilon, dtype) * fall
        # Its bound is not read, so that it is not computed either.
        known = eqx.tree_at(
            lambda c: c.mixed,
            constants_at(self.constants, iterate.x),
            0.0,
            is_leaf=lambda leaf: leaf is None,
        )
        found = inexact_hypergradient(
            problem,
            iterate.x,
            iterate.y,
            known,
            epsilon=accuracy,
            delta=accuracy,
            adjoint=iterate.adjoint,
            max_steps=self.max_inner,
        )
        x = upper_step(problem, iterate.x, found.value, self.stepsize)
        return advanced(
            iterate, iterate.key, found.oracles, x=x, y=found.y, adjoint=found.adjoint
        )


def _value(problem, x, y, distance) -> tuple[Any, Any]:
    """`F` and how much it may change to first order within `distance` of `y`."""
    value, slope = jax.value_and_grad(problem.upper_value, argnums=1)(x, y)
    return value, tree_norm(slope) * distance


def _curvature(distance, known: Smoothness):
    """The second-order part of the same."""
    return jnp.asarray(known.upper_y, distance.dtype) * distance**2 / 2


def _check_exact(owner, problem):
    check_plain(owner, problem)
    if problem.sample is not None:
        raise ValueError(
            f"{owner}: needs exact oracles (got a problem with `sample`). Leave "
            "`sample` out, or use a stochastic solver."
        )
