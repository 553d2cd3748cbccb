"""Losses and penalties that a `GeneralisedLinear` problem is made of.

A loss is of one sample's prediction and target, a penalty of one row of the unknown
(one coefficient, or one for each of k outputs). Each knows its conjugate, from which
the problem makes a duality gap; one of your own may leave it out.

Source: Boyd, Vandenberghe, 2004, "Convex Optimization", section 3.3; the smoothed
hinge: Shalev-Shwartz, Zhang, 2013, "Stochastic dual coordinate ascent methods for
regularized loss minimization", section 5.
"""

from __future__ import annotations

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from ..core._checks import check_nonnegative, check_positive, is_traced
from ..core._trees import tree_norm
from ..operators import prox_elastic_net, prox_group_lasso

# How far rows of probabilities may miss one: float32's rounding, to half the digits.
_ROOT_EPS = 3.5e-4


class Loss(eqx.Module):
    """A convex loss of one sample; subclass it for one of your own.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.problems import Loss
        >>> class LogCosh(Loss):
        ...     curvature = 1.0
        ...     def value(self, prediction, target):
        ...         return jnp.logaddexp(prediction - target, target - prediction)
        >>> round(float(LogCosh().value(jnp.array(1.0), jnp.array(1.0))), 3)
        0.693
    """

    @property
    @abc.abstractmethod
    def curvature(self) -> float | Float[Array, ""]:
        """At least the largest eigenvalue of the second derivative."""

    @property
    def quadratic(self) -> bool:
        """Whether the second derivative is `curvature`, times one, everywhere."""
        return False

    @abc.abstractmethod
    def value(
        self, prediction: Float[Array, ...], target: Float[Array, ...]
    ) -> Float[Array, ""]:
        """The loss."""

    def conjugate(
        self, slope: Float[Array, ...], target: Float[Array, ...]
    ) -> Float[Array, ""]:
        """`max_p slope'p - value(p, target)`, infinite where there is no maximum."""
        raise NotImplementedError

    def check(self, target: Float[Array, "n ..."]) -> None:
        """Refuses targets that the loss is not made for."""
        del target


class Squared(Loss):
    """`||prediction - target||^2 / 2`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.problems import Squared
        >>> float(Squared().value(jnp.array(3.0), jnp.array(1.0)))
        2.0
    """

    @property
    def curvature(self):
        return 1.0

    @property
    def quadratic(self):
        return True

    def value(self, prediction, target):
        return jnp.sum((prediction - target) ** 2) / 2

    def conjugate(self, slope, target):
        return jnp.sum(slope * (slope / 2 + target))


class Huber(Loss):
    """Squared within `delta` of the target, linear beyond: robust regression.

    Args:
        delta: Positive, in units of the target.

    Raises:
        ValueError: If `delta` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.problems import Huber
        >>> float(Huber(1.0).value(jnp.array(3.0), jnp.array(0.0)))
        2.5
    """

    delta: float | Float[Array, ""] = 1.0

    def __check_init__(self):
        check_positive("Huber", "delta", self.delta)

    @property
    def curvature(self):
        return 1.0

    def value(self, prediction, target):
        gap = prediction - target
        delta = jnp.asarray(self.delta, gap.dtype)
        near = jnp.clip(gap, -delta, delta)
        return jnp.sum(near * (gap - near / 2))

    def conjugate(self, slope, target):
        # A last place more than `delta` is the rounding of a slope on the linear part.
        delta = jnp.asarray(self.delta, slope.dtype) * _slack(slope)
        inside = jnp.all(jnp.abs(slope) <= delta)
        return jnp.where(inside, jnp.sum(slope * (slope / 2 + target)), jnp.inf)


class Logistic(Loss):
    """`log(1 + exp(prediction)) - target * prediction`, with targets in [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.problems import Logistic
        >>> round(float(Logistic().value(jnp.array(0.0), jnp.array(1.0))), 3)
        0.693
    """

    @property
    def curvature(self):
        return 0.25

    def value(self, prediction, target):
        return jnp.sum(jax.nn.softplus(prediction) - target * prediction)

    def conjugate(self, slope, target):
        return _negative_entropies(slope + target)

    def check(self, target):
        if is_traced(target):
            return
        target = np.asarray(target)
        if np.any((target < 0) | (target > 1)):
            raise ValueError(
                "Logistic: `y` must be in [0, 1] (got "
                f"{np.min(target):.3g} to {np.max(target):.3g}). Labels are 0 and 1."
            )


class Multinomial(Loss):
    """`logsumexp(prediction) - target . prediction`, with targets on the simplex.

    Targets are rows of probabilities, for instance `jax.nn.one_hot(label, k)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.problems import Multinomial
        >>> loss = Multinomial().value(jnp.zeros(2), jnp.array([1.0, 0.0]))
        >>> round(float(loss), 3)
        0.693
    """

    @property
    def curvature(self):
        return 0.5

    def value(self, prediction, target):
        return jax.nn.logsumexp(prediction) - jnp.sum(target * prediction)

    def conjugate(self, slope, target):
        p = slope + target
        near = float(p.size * 4 * np.finfo(p.dtype).eps)
        inside = jnp.all(p >= -near) & (jnp.abs(jnp.sum(p) - 1) <= near)
        p = jnp.clip(p, 0, 1)
        return jnp.where(inside, jnp.sum(xlogy(p, p)), jnp.inf)

    def check(self, target):
        if np.ndim(target) != 2:
            raise ValueError(
                "Multinomial: `y` must have a row of probabilities for each sample "
                f"(got shape {np.shape(target)}). Encode labels with jax.nn.one_hot."
            )
        if not is_traced(target) and not np.allclose(
            np.sum(np.asarray(target), 1), 1, atol=_ROOT_EPS
        ):
            raise ValueError("Multinomial: `y` must have rows that sum to one.")


class SmoothedHinge(Loss):
    """The hinge of support vector machines, its corner rounded; targets are 0 and 1.

    With the margin `m = (2 target - 1) * prediction`: zero from `m = 1` on, linear of
    slope -1 below `1 - smoothing`, a parabola between.

    Args:
        smoothing: Positive, the parabola's length in units of the prediction; the
            loss is nowhere more than `smoothing / 2` below the hinge.

    Raises:
        ValueError: If `smoothing` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.problems import SmoothedHinge
        >>> float(SmoothedHinge(1.0).value(jnp.array(0.0), jnp.array(1.0)))
        0.5
    """

    smoothing: float | Float[Array, ""] = 1.0

    def __check_init__(self):
        check_positive("SmoothedHinge", "smoothing", self.smoothing)

    @property
    def curvature(self):
        return 1 / self.smoothing

    def value(self, prediction, target):
        short = 1 - (2 * target - 1) * prediction
        width = jnp.asarray(self.smoothing, short.dtype)
        bent = jnp.clip(short, 0, width)
        return jnp.sum(bent * (short - bent / 2) / width)

    def conjugate(self, slope, target):
        weight = -(2 * target - 1) * slope
        inside = jnp.all((weight >= 0) & (weight <= _slack(slope)))
        width = jnp.asarray(self.smoothing, slope.dtype)
        value = jnp.sum(weight * (width * weight / 2 - 1))
        return jnp.where(inside, value, jnp.inf)

    def check(self, target):
        if is_traced(target):
            return
        if not np.all(np.isin(np.asarray(target), (0, 1))):
            raise ValueError("SmoothedHinge: `y` must be 0 or 1 (got other values).")


class Penalty(eqx.Module):
    """A convex penalty of one row of the unknown; subclass it for one of your own.

    Its arrays are scalars, or hold one number for each row; its methods see one row
    and that row's numbers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.problems import Penalty
        >>> class Box(Penalty):
        ...     side: jax.Array
        ...     def value(self, row):
        ...         return jnp.where(jnp.all(jnp.abs(row) <= self.side), 0.0, jnp.inf)
        ...     def prox(self, row, stepsize):
        ...         return jnp.clip(row, -self.side, self.side)
        >>> float(Box(jnp.array(1.0)).prox(jnp.array(3.0), 0.1))
        1.0
    """

    @abc.abstractmethod
    def value(self, row: Float[Array, ...]) -> Float[Array, ""]:
        """The penalty, infinite outside its domain."""

    @abc.abstractmethod
    def prox(
        self, row: Float[Array, ...], stepsize: Float[Array, ""]
    ) -> Float[Array, ...]:
        """Its proximal operator."""

    def conjugate(self, slope: Float[Array, ...]) -> Float[Array, ""]:
        """`max_r slope'r - value(r)`; where `shrink` is below one it is not asked."""
        raise NotImplementedError

    def shrink(self, slope: Float[Array, ...]) -> Float[Array, ""]:
        """The largest factor up to one that makes the conjugate of `slope` finite."""
        del slope
        return jnp.ones(())


class ElasticNet(Penalty):
    """`l1 * |w| + l2 * w^2 / 2` of every entry, and non-negative where asked.

    With `l2 = 0` the lasso; with `l1 = 0` ridge; both zero and `nonnegative`:
    non-negative least squares.

    Args:
        l1: Not negative; a scalar, or one for each row (0 for an intercept's).
        l2: Likewise.
        nonnegative: Whether entries must not be negative.

    Raises:
        ValueError: If a weight is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.problems import ElasticNet
        >>> float(ElasticNet(1.0, 2.0).value(jnp.array(-3.0)))
        12.0
    """

    l1: float | Float[Array, ...] = 0.0
    l2: float | Float[Array, ...] = 0.0
    nonnegative: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        _check_weights("ElasticNet", self.l1, self.l2)

    def value(self, row):
        total = self.l1 * jnp.sum(jnp.abs(row)) + self.l2 * jnp.sum(row**2) / 2
        if self.nonnegative:
            return jnp.where(jnp.all(row >= 0), total, jnp.inf)
        return total

    def prox(self, row, stepsize):
        moved = prox_elastic_net(row, self.l1, self.l2, stepsize)
        return jax.nn.relu(moved) if self.nonnegative else moved

    def conjugate(self, slope):
        return _half_squares(self._size(slope) - self.l1, self.l2)

    def shrink(self, slope):
        return _shrink(jnp.max(self._size(slope)), self.l1, self.l2)

    def _size(self, slope):
        return slope if self.nonnegative else jnp.abs(slope)


class GroupLasso(Penalty):
    """`l1 * ||row|| + l2 * ||row||^2 / 2`: rows are zero as a whole, or not at all.

    Args:
        l1: Not negative; a scalar, or one for each row.
        l2: Likewise.

    Raises:
        ValueError: If a weight is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.problems import GroupLasso
        >>> float(GroupLasso(2.0).value(jnp.array([3.0, 4.0])))
        10.0
    """

    l1: float | Float[Array, ...] = 0.0
    l2: float | Float[Array, ...] = 0.0

    def __check_init__(self):
        _check_weights("GroupLasso", self.l1, self.l2)

    def value(self, row):
        return self.l1 * tree_norm(row) + self.l2 * jnp.sum(row**2) / 2

    def prox(self, row, stepsize):
        shrunk = prox_group_lasso(row, self.l1, stepsize)
        return prox_elastic_net(shrunk, 0.0, self.l2, stepsize)

    def conjugate(self, slope):
        return _half_squares(tree_norm(slope) - self.l1, self.l2)

    def shrink(self, slope):
        return _shrink(tree_norm(slope), self.l1, self.l2)


def _check_weights(owner, l1, l2):
    for name, weight in (("l1", l1), ("l2", l2)):
        # jax may rebuild a module with placeholders in the place of its arrays.
        if eqx.is_array_like(weight):
            check_nonnegative(owner, name, weight)


def _half_squares(excess, l2):
    """The conjugate of `l2 / 2` squares beyond a dead zone, where it is finite."""
    return jnp.sum(jax.nn.relu(excess) ** 2) / (2 * jnp.where(l2 > 0, l2, jnp.inf))


def _shrink(size, l1, l2):
    outside = (size > l1) & (l2 <= 0)
    return jnp.where(outside, l1 / jnp.where(outside, size, 1), 1)


def _negative_entropies(p):
    near = float(4 * np.finfo(p.dtype).eps)
    inside = jnp.all((p >= -near) & (p <= 1 + near))
    p = jnp.clip(p, 0, 1)
    return jnp.where(inside, jnp.sum(xlogy(p, p) + xlogy(1 - p, 1 - p)), jnp.inf)


def _slack(array) -> float:
    return 1 + 4 * float(np.finfo(array.dtype).eps)
