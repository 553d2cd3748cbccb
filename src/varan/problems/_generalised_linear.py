"""Linear models fitted by a convex loss, with a penalty that separates over rows.

`min_w  scale * sum_i loss(x_i'w, y_i) + sum_j penalty_j(w_j)`: lasso, elastic net,
non-negative least squares, group and multi-task lasso, sparse logistic and multinomial
regression, robust regression, support vector machines with a rounded hinge.

That the unknown enters through `X w` alone, and that the penalty separates, is what
coordinate descent lives on; and it gives a dual problem of which any feasible point
bounds the minimum. Here that point is the loss's slope at the predictions, moved and
scaled until it is feasible.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from ..core import Certificate, Problem
from ..core._checks import check_finite, check_nonempty, check_shape
from ..core._control import when
from ._losses import ElasticNet, Loss, Penalty, Squared

# Up to this many columns the gap moves a dual point by a dense factorisation.
_DENSE = 2048


class GeneralisedLinear(Problem):
    """A penalised linear model.

    `min_w scale * sum_i loss(x_i'w, y_i) + sum_j penalty(w_j)`, where `scale` is one
    over the samples, or one. Run `varan.firstorder.BlockCoordinateDescent` on it, or
    `ProximalGradient`; the condition is `w - prox(w - gradient)`.

    Its certificate is a duality gap: `value(w) - min value <= gap`, also where the
    loss or the penalty is not smooth. It is infinite where no dual point was found:
    coefficients without a weight need columns that are independent (and at most 2048
    columns). It costs four products with `X`, and a factorisation of `X'X` where there
    are such coefficients. For a loss or penalty without conjugate the certificate is
    the residual.

    Args:
        X: Shape (n, d); a row for each sample. For an intercept add a column of ones
            whose penalty has no weight.
        y: Targets, shape (n,), or (n, k) for k outputs.
        loss: `Squared`, `Huber`, `Logistic`, `Multinomial`, `SmoothedHinge`, or a
            `Loss` of your own.
        penalty: `ElasticNet`, `GroupLasso`, or a `Penalty` of your own.
        average: Whether losses are averaged over samples, or summed.
        unique: See `varan.Problem`.

    Raises:
        TypeError: If `loss` or `penalty` is of another kind, or `X` not floating.
        ValueError: If shapes do not fit, an array is empty or not finite, or targets
            are not what the loss is made for.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.firstorder import BlockCoordinateDescent
        >>> from varan.problems import ElasticNet, GeneralisedLinear
        >>> X, y = 2 * jnp.eye(2), jnp.array([3.0, 0.2])
        >>> def lasso(l1):
        ...     problem = GeneralisedLinear(X, y, penalty=ElasticNet(l1))
        ...     return solve(problem, BlockCoordinateDescent(), jnp.zeros(2)).x
        >>> lasso(1.0).round(3), jax.jacobian(lasso)(1.0).round(3)
        (Array([1., 0.], dtype=float32), Array([-0.5,  0. ], dtype=float32))

    Source:
        Friedman, Hastie, Tibshirani, 2010, "Regularization paths for generalized
        linear models via coordinate descent"; the gap: Ndiaye, Fercoq, Gramfort,
        Salmon, 2017, "Gap safe screening rules for sparsity enforcing penalties"
        (arXiv 1611.05780), section 2; moving a dual point of non-negative problems:
        Dantas, Soubies, Févotte, 2021 (arXiv 2009.01653).
    """

    X: Float[Array, "n d"]
    y: Float[Array, "n ..."]
    loss: Loss
    penalty: Penalty
    average: bool = eqx.field(static=True)
    _unique: bool = eqx.field(static=True)

    def __init__(
        self,
        X: Float[Array, "n d"],
        y: Float[Array, "n ..."],
        *,
        loss: Loss | None = None,
        penalty: Penalty | None = None,
        average: bool = True,
        unique: bool = True,
    ):
        self.X = X = _as_matrix(X)
        self.y = y = _as_targets(y, X)
        self.loss = _kind("loss", Squared() if loss is None else loss, Loss)
        self.penalty = _kind("penalty", penalty or ElasticNet(), Penalty)
        self.loss.check(y)
        for leaf in jtu.tree_leaves(self.penalty):
            if np.shape(leaf) not in ((), (X.shape[1],)):
                raise ValueError(
                    "GeneralisedLinear: `penalty` must hold scalars or arrays of shape "
                    f"({X.shape[1]},), one number for each row (got {np.shape(leaf)})."
                )
        self.average = average
        self._unique = unique

    @property
    def scale(self) -> float:
        """What one sample's loss is multiplied by."""
        return 1 / self.X.shape[0] if self.average else 1.0

    @property
    def row_penalties(self) -> Penalty:
        """The penalty with one number for each row in every leaf."""
        d = self.X.shape[1]
        return jtu.tree_map(
            lambda leaf: jnp.broadcast_to(jnp.asarray(leaf, self.X.dtype), (d,)),
            self.penalty,
        )

    def predictions(self, w: Float[Array, "d ..."]) -> Float[Array, "n ..."]:
        """`X w`."""
        shape = (self.X.shape[1], *self.y.shape[1:])
        if jnp.shape(w) != shape:
            raise ValueError(
                f"GeneralisedLinear: the unknown must have shape {shape} (got "
                f"{jnp.shape(w)})."
            )
        return self.X @ w

    def loss_at(self, predictions: Float[Array, "n ..."]) -> Float[Array, ""]:
        """The scaled sum of losses."""
        return self.scale * jnp.sum(jax.vmap(self.loss.value)(predictions, self.y))

    def slopes(self, predictions: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """The derivative of `loss_at`."""
        return self.scale * jax.vmap(jax.grad(self.loss.value))(predictions, self.y)

    def curvatures(self, predictions: Float[Array, " n"]) -> Float[Array, " n"]:
        """The second derivative of `loss_at` for one output, by sample."""
        second = jax.vmap(jax.grad(jax.grad(self.loss.value)))
        return self.scale * second(predictions, self.y)

    def penalty_at(self, w: Float[Array, "d ..."]) -> Float[Array, ""]:
        """The sum of penalties."""
        return jnp.sum(jax.vmap(lambda p, row: p.value(row))(self.row_penalties, w))

    def smooth(self, w: Float[Array, "d ..."]) -> Float[Array, ""]:
        """The scaled sum of losses at `w`."""
        return self.loss_at(self.predictions(w))

    def value(self, w):
        """The objective at `w`."""
        return self.smooth(w) + self.penalty_at(w)

    def prox(
        self, v: Float[Array, "d ..."], stepsize: Float[Array, ...] | float
    ) -> Float[Array, "d ..."]:
        """The penalty's proximal operator, with one stepsize or one for each row."""
        steps = jnp.broadcast_to(jnp.asarray(stepsize, v.dtype), v.shape[:1])
        return jax.vmap(lambda p, row, t: p.prox(row, t))(self.row_penalties, v, steps)

    def condition(self, x):
        return self.condition_at(x, self.predictions(x))

    def condition_at(
        self, w: Float[Array, "d ..."], predictions: Float[Array, "n ..."]
    ) -> Float[Array, "d ..."]:
        """The condition, given `X w`."""
        gradient = self.X.T @ self.slopes(predictions)
        return w - self.prox(w - gradient, 1.0)

    def certify(self, x, condition, tol):
        if (
            type(self.loss).conjugate is Loss.conjugate
            or type(self.penalty).conjugate is Penalty.conjugate
        ):
            return super().certify(x, condition, tol)
        return Certificate(
            "duality gap",
            self.gap(x),
            tol=tol,
            proof=True,
            statement="value(w) - min value <= gap",
            details={"residual": self.residual(condition)},
        )

    def gap(self, w: Float[Array, "d ..."]) -> Float[Array, ""]:
        """At least `value(w) - min value`, by Fenchel's duality.

        For every `u` and `v = -X'u` the minimum is at least minus the conjugates of
        `u` and `v`. What is summed are the Fenchel-Young terms `f(a) + f*(b) - a b` of
        each sample and row, none of them negative.
        """
        predictions = self.predictions(w)
        slopes, pull = self._dual_point(self.slopes(predictions))
        by_sample = jax.vmap(self.loss.value)(predictions, self.y) + jax.vmap(
            self.loss.conjugate
        )(slopes / self.scale, self.y)
        by_sample = self.scale * by_sample - _by_row(slopes * predictions)
        by_row = jax.vmap(
            lambda p, row, v: jnp.where(
                p.shrink(v) < 1, jnp.inf, p.value(row) + p.conjugate(v)
            )
        )(self.row_penalties, w, pull) - _by_row(w * pull)
        # What the rounding of the terms may hide.
        rounding = 8 * float(np.finfo(w.dtype).eps) * jnp.abs(self.value(w))
        terms = [jnp.sum(jnp.maximum(terms, 0)) for terms in (by_sample, by_row)]
        total = sum(terms, start=rounding)
        # No factorisation, no dual point: NaN.
        return jnp.where(jnp.isnan(total), jnp.inf, total)

    @property
    def unique(self):
        return self._unique

    def _dual_point(self, slopes):
        """The slopes made feasible, and the pull `-X'u` that they have on the rows."""
        shrink = jax.vmap(lambda p, v: p.shrink(v))
        rows, pull = self.row_penalties, -(self.X.T @ slopes)
        # Rows that no factor above zero helps: without a weight.
        rigid = shrink(rows, jnp.ones_like(pull)) == 0
        if self.X.shape[1] <= _DENSE:
            wrong = _spread(rigid & (shrink(rows, pull) == 0), pull)
            slopes = when(
                jnp.any(wrong),
                lambda u: self._moved(u, jnp.where(wrong, pull, 0), rigid),
                slopes,
            )
        pull = -(self.X.T @ slopes)
        eps = float(np.finfo(pull.dtype).eps)
        rounding = 8 * eps * (jnp.abs(self.X).T @ jnp.abs(slopes))
        hidden = _spread(rigid, pull) & (jnp.abs(pull) <= rounding)
        pull = jnp.where(hidden, 0, pull)
        factor = jnp.min(shrink(rows, pull))
        factor = jnp.where(factor < 1, factor * (1 - 8 * eps), 1)
        return factor * slopes, factor * pull

    def _moved(self, slopes, excess, rigid):
        """The nearest slopes, by columns of rigid rows, that lose the excess pull."""
        both = rigid[:, None] & rigid[None, :]
        matrix = jnp.where(both, self.X.T @ self.X, 0) + jnp.diag(
            jnp.where(rigid, 0, 1).astype(self.X.dtype)
        )
        factor = jax.scipy.linalg.cho_factor(matrix)
        return slopes + self.X @ jax.scipy.linalg.cho_solve(factor, excess)


def _by_row(array):
    return jnp.sum(array.reshape(array.shape[0], -1), axis=1)


def _spread(mask, like):
    column = jnp.reshape(mask, (-1,) + (1,) * (like.ndim - 1))
    return jnp.broadcast_to(column, like.shape)


def _kind(name, value, kind):
    if not isinstance(value, kind):
        raise TypeError(
            f"GeneralisedLinear: `{name}` must be a varan.problems.{kind.__name__} "
            f"(got {type(value).__name__})."
        )
    return value


def _as_matrix(X):
    check_shape("GeneralisedLinear", "X", X, (None, None))
    check_nonempty("GeneralisedLinear", "X", X)
    check_finite("GeneralisedLinear", "X", X)
    X = jnp.asarray(X)
    if not jnp.issubdtype(X.dtype, jnp.floating):
        raise TypeError(
            f"GeneralisedLinear: `X` must be floating (got {X.dtype}). Convert it."
        )
    return X


def _as_targets(y, X):
    check_shape("GeneralisedLinear", "y", y, (X.shape[0], *([None] * (np.ndim(y) - 1))))
    if np.ndim(y) not in (1, 2):
        raise ValueError(
            f"GeneralisedLinear: `y` must have one or two axes (got {np.ndim(y)})."
        )
    check_finite("GeneralisedLinear", "y", y)
    return jnp.asarray(y, X.dtype)
