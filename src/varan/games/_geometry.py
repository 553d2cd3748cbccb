"""Feasible sets with their mirror maps: what an online learner projects with.

A geometry joins a closed convex set `X` with a strictly convex `psi`. Its divergence is
`B(x, y) = psi(x) - psi(y) - <grad psi(y), x - y>`, and a learner moves by

    argmin over X of  stepsize <g, x> + B(x, anchor).

Euclidean geometries (`psi = ||x||^2 / 2`) take pytrees and one projection a move; the
entropy geometry of the simplex takes vectors and one softmax a move.
"""

from __future__ import annotations

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from ..core._checks import check_positive, is_traced
from ..core._trees import tree_norm
from ..operators import project_box, project_l2_ball


class Geometry(eqx.Module):
    """A closed convex set and the mirror map that a learner moves in.

    Concrete ones: `EuclideanSpace`, `EuclideanBall`, `EuclideanBox`, `EntropySimplex`.
    """

    @abc.abstractmethod
    def diameter(self) -> Float[Array, ""] | float:
        """The `D` of the regret bounds, with `B(u, start) <= D^2 / 2` for all `u`."""

    @abc.abstractmethod
    def move(self, anchor, gradient, stepsize) -> PyTree[Array]:
        """The minimiser over the set of `stepsize <gradient, x> + B(x, anchor)`."""

    @abc.abstractmethod
    def divergence(self, x, y) -> Float[Array, ""]:
        """`B(x, y)`, non-negative, zero at `x = y`."""

    @abc.abstractmethod
    def dual_norm(self, gradient) -> Float[Array, ""]:
        """The norm of gradients in which the map `psi` is 1-strongly convex."""

    @abc.abstractmethod
    def support(self, direction) -> Float[Array, ""]:
        """`max <direction, x>` over the set."""

    @abc.abstractmethod
    def excess(self, x) -> Float[Array, ""]:
        """How far `x` lies outside of the set; zero inside."""

    @abc.abstractmethod
    def comparison(self, before, after) -> tuple[PyTree[Array], Float[Array, ""]]:
        """`(w, c)` with `B(u, before) - B(u, after) = <w, u> + c` for all `u`."""

    def contains(self, x) -> Bool[Array, ""]:
        """Whether `x` lies in the set, up to rounding.

        Args:
            x: A point, with the structure of the set's points.

        Returns:
            A boolean; false for NaN.
        """
        size = 1 + tree_norm(x)
        return self.excess(x) <= 1e3 * jnp.finfo(size.dtype).eps * size


class _Euclidean(Geometry):
    """What the Euclidean geometries share: `psi = ||x||^2 / 2` on pytrees."""

    @abc.abstractmethod
    def project(self, x) -> PyTree[Array]:
        """The nearest point of the set."""

    def move(self, anchor, gradient, stepsize):
        return self.project(optax.tree.add_scale(anchor, -stepsize, gradient))

    def divergence(self, x, y):
        return _square(optax.tree.sub(x, y)) / 2

    def dual_norm(self, gradient):
        return tree_norm(gradient)

    def excess(self, x):
        return tree_norm(optax.tree.sub(x, self.project(x)))

    def comparison(self, before, after):
        return optax.tree.sub(after, before), (_square(before) - _square(after)) / 2


class EuclideanSpace(_Euclidean):
    """The whole space: no projection, no bounded comparator.

    Only learners with a constant stepsize or strongly convex losses make sense here.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import EuclideanSpace
        >>> EuclideanSpace().move(jnp.ones(2), jnp.array([1.0, 0.0]), 0.5).tolist()
        [0.5, 1.0]
    """

    def diameter(self):
        return math.inf

    def project(self, x):
        return x

    def support(self, direction):
        norm = tree_norm(direction)
        return jnp.where(norm > 0, jnp.inf, norm)


class EuclideanBall(_Euclidean):
    """The ball `||x - center|| <= radius`, with the norm over all leaves.

    Args:
        radius: Positive scalar; the diameter of the bounds is twice that.
        center: A pytree like the points; zero by default.

    Raises:
        ValueError: if `radius` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import EuclideanBall
        >>> ball = EuclideanBall(2.0)
        >>> ball.diameter(), float(ball.support(jnp.array([3.0, 4.0])))
        (4.0, 10.0)
    """

    radius: Float[Array, ""] | float = 1.0
    center: PyTree[Array] | None = None

    def __check_init__(self):
        check_positive("EuclideanBall", "radius", self.radius)

    def diameter(self):
        return 2 * self.radius

    def project(self, x):
        return project_l2_ball(x, self.radius, self.center)

    def support(self, direction):
        reach = tree_norm(direction)
        reach = reach * jnp.asarray(self.radius, reach.dtype)
        if self.center is None:
            return reach
        return reach + optax.tree.vdot(direction, self.center)


class EuclideanBox(_Euclidean):
    """The box `lower <= x <= upper`, entry by entry.

    Args:
        lower: A pytree of arrays with the shapes of the points.
        upper: As `lower`, nowhere below it.

    Raises:
        ValueError: if a bound is not finite or the box is empty.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import EuclideanBox
        >>> box = EuclideanBox(jnp.zeros(4), jnp.ones(4))
        >>> float(box.diameter()), box.project(jnp.full(4, 7.0)).tolist()
        (2.0, [1.0, 1.0, 1.0, 1.0])
    """

    lower: PyTree[Array]
    upper: PyTree[Array]

    def __check_init__(self):
        widths = jax.tree.map(jnp.subtract, self.upper, self.lower)
        for width in jax.tree.leaves(widths):
            if is_traced(width):
                continue
            if not np.all(np.isfinite(width)) or np.any(np.asarray(width) < 0):
                raise ValueError(
                    "EuclideanBox: `lower` and `upper` must be finite with "
                    f"lower <= upper (got a width of {np.min(width)}). Use "
                    "EuclideanSpace where there are no bounds."
                )

    def diameter(self):
        return tree_norm(optax.tree.sub(self.upper, self.lower))

    def project(self, x):
        return project_box(x, self.lower, self.upper)

    def support(self, direction):
        best = jax.tree.map(
            lambda d, low, high: jnp.where(d > 0, high, low),
            direction,
            self.lower,
            self.upper,
        )
        return optax.tree.vdot(direction, best)


class EntropySimplex(Geometry):
    """The probability simplex with `psi(x) = sum x log x`: moves are softmaxes.

    With a constant stepsize, optimistic mirror descent here is optimistic Hedge. The
    divergence from a vertex is unbounded: started from the uniform point it is at most
    `log(size)`, which stands for `D^2 / 2`, but with a stepsize that decreases no
    bound follows beforehand; the certificate then reports what the path proves.

    Args:
        size: Number of entries, at least 2.

    Raises:
        ValueError: if `size` is below 2.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import EntropySimplex
        >>> simplex = EntropySimplex(2)
        >>> loss = jnp.array([0.0, jnp.log(3.0)])
        >>> [round(float(p), 2) for p in simplex.move(jnp.full(2, 0.5), loss, 1.0)]
        [0.75, 0.25]
    """

    size: int = eqx.field(static=True)

    def __check_init__(self):
        if self.size < 2:
            raise ValueError(
                f"EntropySimplex: `size` must be at least 2 (got {self.size})."
            )

    def diameter(self):
        return math.sqrt(2 * math.log(self.size))

    def move(self, anchor, gradient, stepsize):
        return jax.nn.softmax(_log(anchor) - stepsize * gradient)

    def divergence(self, x, y):
        return jnp.sum(x * (_log(x) - _log(y)) - x + y)

    def dual_norm(self, gradient):
        return jnp.max(jnp.abs(gradient))

    def support(self, direction):
        return jnp.max(direction)

    def excess(self, x):
        return jnp.sum(jax.nn.relu(-x)) + jnp.abs(jnp.sum(x) - 1)

    def comparison(self, before, after):
        mass = jnp.sum(before) - jnp.sum(after)
        return _log(after) - _log(before), mass


def _square(tree):
    return optax.tree.vdot(tree, tree)


def _log(x):
    # Entries that underflowed count as the least normal number, so that an expert can
    # come back and no 0 * inf arises.
    return jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))
