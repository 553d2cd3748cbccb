"""Linear models, one coefficient (or row of coefficients) after the other.

Each update minimises the objective over one row exactly, its loss replaced by a
quadratic: `w_j <- prox(w_j - g_j / c_j, 1 / c_j)` with the row's gradient `g_j` and
curvature `c_j`. There are two ways to know `g_j`:

- From maintained predictions `X w`: a row costs O(n). The quadratic bounds the loss
  from above, so that no update raises the objective.
- From `X'HX` with the curvatures `H` of the losses: a row costs O(d). The quadratic is
  the loss's own, of the second order; each step minimises it approximately, by sweeps
  and by a Newton step on the rows that the sweeps left free, then searches the line.
  Where the loss is quadratic (or has several outputs: there a bound takes the place of
  `H`), `X'HX` is computed once.

Use the second for many more samples than columns, the first for many columns. Where
the matrix is only known by its products, take `ProximalGradient`.

Cost: a sweep takes 4 n d flops from predictions, 2 d^2 from `X'HX`, and that matrix
itself n d^2.

Source: Tseng, Yun, 2009, "A coordinate gradient descent method for nonsmooth separable
minimization"; Friedman, Hastie, Tibshirani, 2010, "Regularization paths for generalized
linear models via coordinate descent".
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from ..core import Solver, State
from ..problems import GeneralisedLinear

# Up to this many columns `X'HX` is made unasked, where there are as many samples.
_GRAM = 1024
# Up to this many unknowns a Newton step costs no more than the sweeps do.
_NEWTON = 512
# Curvatures below this part of the loss's largest are taken as that: the quadratic
# must have a minimum also where the loss is flat.
_FLAT = 1e-6
_DECREASE = 1e-4
# Of a Newton step; a whole one is best only when the rows that are zero are known.
_FRACTIONS = tuple(2.0**-k for k in range(6))
_HALVINGS = 30


class _Memory(eqx.Module):
    """Columns of X as rows, or `X'HX` where it is constant."""

    columns: Float[Array, "d n"] | None
    gram: Float[Array, "d d"] | None


class BlockCoordinateDescent(Solver):
    """Cyclic coordinate (row) descent for `GeneralisedLinear` problems.

    Args:
        sweeps: Over all rows, in one step; the condition is looked at once a step.
        gram: Whether rows are updated from `X'HX`, or from the predictions. Left out,
            it is, for at most 1024 columns and at least as many samples.

    Raises:
        TypeError: In `solve`, if the problem is no `GeneralisedLinear`.
        ValueError: If `sweeps` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.firstorder import BlockCoordinateDescent
        >>> from varan.problems import ElasticNet, GeneralisedLinear
        >>> X, y = jnp.array([[1.0, 1.0], [0.0, 2.0]]), jnp.array([1.0, -2.0])
        >>> nnls = GeneralisedLinear(X, y, penalty=ElasticNet(nonnegative=True))
        >>> solve(nnls, BlockCoordinateDescent(), jnp.ones(2)).x.round(3)
        Array([1., 0.], dtype=float32)

    Source:
        Tseng, Yun, 2009, "A coordinate gradient descent method for nonsmooth separable
        minimization"; the quadratic with its line search: Lee, Sun, Saunders, 2014,
        "Proximal Newton-type methods for minimizing composite functions" (arXiv
        1206.1623).

    Differences:
        For one output and up to 512 columns, sweeps on the quadratic are followed by
        one Newton step on its optimality condition, as far as that lowers the
        quadratic: at the end, when the rows that are zero no longer change, to its
        exact minimum.
    """

    sweeps: int = eqx.field(static=True, default=10)
    gram: bool | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise ValueError(
                "BlockCoordinateDescent: `sweeps` must be a positive integer (got "
                f"{self.sweeps!r})."
            )

    def init(self, problem, start):
        if not isinstance(problem, GeneralisedLinear):
            raise TypeError(
                "BlockCoordinateDescent: the problem must be a GeneralisedLinear (got "
                f"{type(problem).__name__}). For others take ProximalGradient."
            )
        condition = problem.condition(start)
        if not self._uses_gram(problem):
            return State(start, condition, _Memory(problem.X.T, None))
        if not _is_constant(problem):
            return State(start, condition, _Memory(None, None))
        weights = jnp.full_like(problem.X[:, 0], problem.scale * problem.loss.curvature)
        return State(
            start,
            condition,
            _Memory(None, _gram(problem.X, weights)),
            evaluations=1 + _gram_work(problem),
        )

    def step(self, problem, state):
        if not self._uses_gram(problem):
            x = self._sweep_predictions(problem, state.x, state.memory.columns)
            work = self.sweeps + 1
        elif _is_constant(problem):
            x = self._minimise_model(problem, state.x, state.memory.gram)
            work = 3
        else:
            x = self._newton(problem, state.x)
            work = 3 + _gram_work(problem)
        condition = problem.condition(x)
        return State(x, condition, state.memory, evaluations=work)

    def _uses_gram(self, problem):
        n, d = problem.X.shape
        return d <= min(n, _GRAM) if self.gram is None else self.gram

    def _sweep_predictions(self, problem, x, columns):
        rows, d = problem.row_penalties, x.shape[0]
        bounds = problem.scale * problem.loss.curvature * jnp.sum(columns**2, axis=1)

        def update(index, carry):
            x, predictions = carry
            j = index % d
            gradient = columns[j] @ problem.slopes(predictions)
            new = _minimum(rows, j, x[j], gradient, bounds[j])
            moved = jnp.multiply.outer(columns[j], new - x[j])
            return x.at[j].set(new), predictions + moved

        carry = x, problem.predictions(x)
        return jax.lax.fori_loop(0, self.sweeps * d, update, carry)[0]

    def _minimise_model(self, problem, x, gram, predictions=None):
        """Lowers `gradient'(x - w) + (x - w)'gram(x - w) / 2 + penalty(x)`."""
        if predictions is None:
            predictions = problem.predictions(x)
        gradient = problem.X.T @ problem.slopes(predictions)
        rows, d, bounds = problem.row_penalties, x.shape[0], jnp.diagonal(gram)

        def update(index, carry):
            x, gradient = carry
            j = index % d
            new = _minimum(rows, j, x[j], gradient[j], bounds[j])
            moved = jnp.multiply.outer(gram[j], new - x[j])
            return x.at[j].set(new), gradient + moved

        carry = x, gradient
        x, gradient = jax.lax.fori_loop(0, self.sweeps * d, update, carry)
        if x.ndim == 1 and d <= _NEWTON:
            x = _newton_on_model(problem, x, gradient, gram)
        return x

    def _newton(self, problem, x):
        """Minimises the quadratic of the second order, and searches the line to it."""
        predictions = problem.predictions(x)
        floor = _FLAT * problem.scale * problem.loss.curvature
        weights = jnp.maximum(problem.curvatures(predictions), floor)
        gram = _gram(problem.X, weights)
        end = self._minimise_model(problem, x, gram, predictions)
        direction = end - x
        along = problem.predictions(direction)
        penalty = problem.penalty_at(x)
        value = problem.loss_at(predictions) + penalty
        slope = problem.slopes(predictions) @ along + problem.penalty_at(end) - penalty
        noise = 8 * float(np.finfo(x.dtype).eps) * jnp.abs(value)

        def at(t):
            # At the whole step the end itself, whose zeros are exact.
            moved = jnp.where(t < 1, x + t * direction, end)
            new = problem.loss_at(predictions + t * along) + problem.penalty_at(moved)
            return moved, new <= value + _DECREASE * t * slope + noise

        def proceed(carry):
            _, _, good, count = carry
            return ~good & (count < _HALVINGS)

        def halve(carry):
            t, _, _, count = carry
            return t / 2, *at(t / 2), count + 1

        t = jnp.ones((), x.dtype)
        carry = (t, *at(t), jnp.asarray(0, jnp.int32))
        _, moved, good, _ = jax.lax.while_loop(proceed, halve, carry)
        return jnp.where(good, moved, x)


def _is_constant(problem):
    """Whether one quadratic serves for all points: the loss's own, or a bound."""
    return problem.loss.quadratic or problem.y.ndim > 1


def _gram(X, weights):
    return X.T @ (weights[:, None] * X)


def _gram_work(problem) -> int:
    """The cost of `X'HX` in gradients."""
    return -(-problem.X.shape[1] // 2)


def _minimum(rows, j, row, gradient, bound):
    """Of the quadratic plus the penalty, over one row."""
    step = 1 / jnp.where(bound > 0, bound, 1)
    penalty = jtu.tree_map(lambda leaf: leaf[j], rows)
    return penalty.prox(row - step * gradient, step)


def _newton_on_model(problem, x, gradient, gram):
    """A Newton step on `x = prox(x - steps * gradient, steps)`, as far as it is good.

    Rows whose proximal operator is flat there (those that stay zero) go where it sends
    them; the others' system is symmetric and, where their minimum is one point,
    definite.
    """
    diagonal = jnp.diagonal(gram)
    steps = 1 / jnp.where(diagonal > 0, diagonal, 1)
    fixed, slope = jax.jvp(
        lambda v: problem.prox(v, steps), (x - steps * gradient,), (jnp.ones_like(x),)
    )
    move, free = fixed - x, slope > 0
    scale = jnp.where(free, slope * steps, 1)
    right = jnp.where(free, move / scale - gram @ jnp.where(free, 0, move), 0)
    matrix = jnp.where(free[:, None] & free[None, :], gram, 0)
    # Columns may be dependent: a little is added, against the factorisation's failure.
    little = float(np.sqrt(np.finfo(x.dtype).eps)) * diagonal
    matrix = matrix + jnp.diag(jnp.where(free, (1 - slope) / scale + little, 1))
    solved = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), right)
    move = jnp.where(free, solved, move)
    points = x[None] + jnp.asarray(_FRACTIONS, x.dtype)[:, None] * move[None]
    # Who would change sign stops at zero, where most penalties bend.
    points = jnp.where(x[None] * points < 0, 0, points)
    moves = points - x[None]
    change = moves @ gradient + jnp.sum(moves * (moves @ gram), axis=1) / 2
    change = change + jax.vmap(problem.penalty_at)(points) - problem.penalty_at(x)
    best = jnp.argmin(change)
    return jnp.where(change[best] < 0, points[best], x)
