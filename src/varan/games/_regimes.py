"""How optimistic mirror descent scales its moves under each kind of curvature.

A regime turns what was learned into the metric of the next round and knows what its
proof adds to the pathwise bound. `OptimisticOMD` states the bounds; the derivations
stand here, beside the lines that evaluate them. All start from one inequality: with
`following` the point `xh_{t+1}` and `anchor` the point `xh_t`, for every `u` in the set

    <g_t, x_t - u> <= <g_t - M_t, x_t - xh_{t+1}>
                      - B_t(xh_{t+1}, x_t) - B_t(x_t, xh_t)
                      + B_t(u, xh_t) - B_t(u, xh_{t+1}),

the sum of the optimality conditions of the two moves of a round. Its first line is
regime-free; the last is what `account` and `prior` bound, together with the losses'
curvature.
"""

from __future__ import annotations

import abc

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..operators._balls import quadratic_on_ball
from ._online import tree_dtype


class Regime(eqx.Module):
    """Memory, metric and bookkeeping of one kind of curvature."""

    def init(self, geometry, start):
        """What has been learned before the first round."""
        return None

    def learn(self, geometry, memory, gradient, hint):
        """What has been learned after a round."""
        return memory

    @abc.abstractmethod
    def metric(self, geometry, memory, count):
        """The metric of round `count` (from 1): here, a stepsize."""

    def move(self, geometry, metric, anchor, gradient):
        return geometry.move(anchor, gradient, metric)

    def divergence(self, geometry, metric, x, y):
        return geometry.divergence(x, y) / metric

    def account(self, geometry, metric, x, anchor, following, gradient):
        """A linear function of `u`, as `(w, c)`, that one round adds to the bound."""
        # Constant and adaptive stepsizes keep the comparison with u exactly: it is
        # linear in u, so the sum over rounds is maximised by one support function.
        w, c = geometry.comparison(anchor, following)
        return optax.tree.scale(1 / metric, w), c / metric

    def prior(self, geometry, tilt, largest):
        """The maximum over `u` of the accounted sum, plus what came before round 1."""
        return geometry.support(tilt)


class Constant(Regime):
    """One stepsize for all rounds."""

    stepsize: Float[Array, ""] | float

    def metric(self, geometry, memory, count):
        return jnp.asarray(self.stepsize, count.dtype)


class Convex(Regime):
    """`eta_t = D / sqrt(10 D^2 L^2 + 4 G^2 + sum_{s<t} ||g_s - M_s||^2)`."""

    gradient_bound: Float[Array, ""] | float
    smoothness: Float[Array, ""] | float

    def init(self, geometry, start):
        return jnp.zeros((), tree_dtype(start))

    def learn(self, geometry, memory, gradient, hint):
        return memory + geometry.dual_norm(optax.tree.sub(gradient, hint)) ** 2

    def metric(self, geometry, memory, count):
        diameter = jnp.asarray(geometry.diameter(), count.dtype)
        smooth = diameter * jnp.asarray(self.smoothness, count.dtype)
        bound = jnp.asarray(self.gradient_bound, count.dtype)
        return diameter / jnp.sqrt(10 * smooth**2 + 4 * bound**2 + memory)


class StronglyConvex(Regime):
    """`eta_t = 2 / (strength t)`.

    With B_t = strength t / 4 ||.||^2 the comparison telescopes to at most
    strength / 4 sum ||u - xh_t||^2 <= strength / 2 sum ||u - x_t||^2
    + strength / 2 sum ||x_t - xh_t||^2: the first sum is the curvature of the losses,
    the second is added here. Nothing precedes the first round.
    """

    strength: Float[Array, ""] | float

    def metric(self, geometry, memory, count):
        return 2 / (jnp.asarray(self.strength, count.dtype) * count)

    def account(self, geometry, metric, x, anchor, following, gradient):
        strength = jnp.asarray(self.strength, metric.dtype)
        return optax.tree.zeros_like(x), strength * geometry.divergence(x, anchor)

    def prior(self, geometry, tilt, largest):
        return jnp.zeros_like(largest)


class ExpConcave(Regime):
    """`H_t = (1 + beta G^2 / 2) I + beta / 2 sum_{s<t} g_s g_s'` on a Euclidean ball.

    `beta = min(1 / (4 G D), alpha) / 2` gives f(x) - f(u) <= <g, x - u>
    - beta / 2 <g, x - u>^2. The comparison telescopes to ||u - xh_1||^2_{H_1} / 2 plus
    beta / 4 sum <g_t, u - xh_{t+1}>^2. With a = <g_t, u - x_t>, e = <g_t, x_t -
    xh_{t+1}> a round leaves beta / 4 (a + e)^2 - beta / 2 a^2 <= beta / 2 e^2, the
    maximum over a, at a = e: that is added here.
    """

    strength: Float[Array, ""] | float
    gradient_bound: Float[Array, ""] | float

    def _constants(self, geometry, dtype):
        diameter = jnp.asarray(geometry.diameter(), dtype)
        bound = jnp.asarray(self.gradient_bound, dtype)
        strength = jnp.asarray(self.strength, dtype)
        beta = jnp.minimum(1 / (4 * bound * diameter), strength) / 2
        return beta, 1 + beta * bound**2 / 2, diameter

    def init(self, geometry, start):
        scale = self._constants(geometry, start.dtype)[1]
        return scale * jnp.eye(start.size, dtype=start.dtype)

    def learn(self, geometry, memory, gradient, hint):
        beta = self._constants(geometry, gradient.dtype)[0]
        return memory + beta / 2 * gradient[:, None] * gradient[None, :]

    def metric(self, geometry, memory, count):
        return jnp.linalg.eigh(memory)

    def move(self, geometry, metric, anchor, gradient):
        values, vectors = metric
        center = jnp.zeros_like(anchor) if geometry.center is None else geometry.center
        free = anchor - vectors @ ((vectors.T @ gradient) / values)
        offset = free - center
        linear = vectors @ (values * (vectors.T @ offset))
        nearest, _ = quadratic_on_ball(values, vectors, linear, geometry.radius)
        inside = jnp.linalg.norm(offset) <= jnp.asarray(geometry.radius, free.dtype)
        return jnp.where(inside, free, center + nearest)

    def divergence(self, geometry, metric, x, y):
        values, vectors = metric
        return jnp.sum(values * (vectors.T @ (x - y)) ** 2) / 2

    def account(self, geometry, metric, x, anchor, following, gradient):
        beta = self._constants(geometry, x.dtype)[0]
        return jnp.zeros_like(x), beta / 2 * (gradient @ (x - following)) ** 2

    def prior(self, geometry, tilt, largest):
        _, scale, diameter = self._constants(geometry, tilt.dtype)
        bound = jnp.asarray(self.gradient_bound, tilt.dtype)
        # The curvature inequality needs gradients within their bound.
        rounding = 1 + 1e3 * jnp.finfo(tilt.dtype).eps
        within = largest <= bound * rounding
        return jnp.where(within, scale * diameter**2 / 2, jnp.inf)
