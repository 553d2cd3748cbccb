"""What a teleportation looks for along the orbit: steepness, flatness, curvature."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core._checks import check_positive, is_traced
from ..core._trees import tree_norm
from ._group_actions import GroupAction
from ._vectors import inner, moved, of_length


class TeleportObjective(eqx.Module):
    """What `teleport` raises or lowers along an orbit; subclass it for other aims."""

    @abc.abstractmethod
    def costs(self) -> tuple[int, int]:
        """Gradients of the batch that a value and a derivative along the orbit cost.

        A Hessian-vector product counts as two, a loss without its gradient as one.
        """

    @abc.abstractmethod
    def __call__(
        self, loss_fn: Callable, params: PyTree, batch: Any
    ) -> Float[Array, ""]:
        """The objective at the parameters."""


class GradNorm(TeleportObjective):
    """The squared norm of the batch's gradient: how fast the loss falls from here.

    Cost: one gradient for a value; a Hessian-vector product, two gradients, for its
    own gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import GradNorm
        >>> float(GradNorm()(lambda w, batch: jnp.sum(w**2), jnp.ones(3), None))
        12.0

    Source: arXiv 2305.13404, the objective for faster convergence.
    """

    def costs(self):
        return 1, 2

    def __call__(self, loss_fn, params, batch):
        gradient = jax.grad(loss_fn)(params, batch)
        return inner(gradient, gradient)


class PerturbedLoss(TeleportObjective):
    """The mean loss around the parameters, at random places of given distances.

    `phi(w) = mean_{t, d} L(w + t d)` with unit directions `d` drawn once, isotropic,
    the same at every call. Cost: `len(lengths) * directions` losses or gradients.

    Args:
        lengths: The distances `t`, positive.
        directions: Directions for each distance, at least 1.
        key: From which the directions are drawn.

    Raises:
        ValueError: If a length is not positive or `directions` below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import PerturbedLoss
        >>> phi = PerturbedLoss((0.5,), 8, key=jax.random.key(0))
        >>> round(float(phi(lambda w, batch: jnp.sum(w**2), jnp.zeros(3), None)), 3)
        0.25

    Source: arXiv 2305.13404, equation 4.

    Differences: The released code draws directions with entries uniform on [0, 1], so
        that it looks into the positive orthant only.
    """

    lengths: Float[Array, " t"]
    directions: int = eqx.field(static=True)
    key: PRNGKeyArray

    def __init__(self, lengths=(0.1, 0.3, 0.5), directions: int = 4, *, key):
        check_positive("PerturbedLoss", "lengths", lengths)
        if directions < 1:
            raise ValueError(
                f"PerturbedLoss: `directions` must be at least 1 (got {directions})."
            )
        self.lengths = jnp.atleast_1d(jnp.asarray(lengths, jnp.result_type(float)))
        self.directions = directions
        self.key = key

    def costs(self):
        places = self.lengths.shape[0] * self.directions
        return places, places

    def __call__(self, loss_fn, params, batch):
        vector, unravel = ravel_pytree(params)
        shape = (self.lengths.shape[0], self.directions, vector.size)
        drawn = jax.random.normal(self.key, shape, vector.dtype)
        units = drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
        steps = self.lengths.astype(vector.dtype)[:, None, None] * units
        steps = steps.reshape(-1, vector.size)
        losses = jax.lax.map(lambda s: loss_fn(moved(params, unravel(s)), batch), steps)
        return jnp.mean(losses)


class OrbitCurvature(TeleportObjective):
    """The mean curvature of random curves `exp(t M) . w` in the orbit, at `w`.

    Each curve's `M` has independent normal coordinates, of unit norm for each leaf,
    drawn once. Cost: two directional derivatives of the action a curve; the loss is
    not evaluated.

    Args:
        action: The group.
        curves: How many, at least 1.
        key: From which the directions are drawn.

    Raises:
        ValueError: If `curves` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import EllipsoidRotation, OrbitCurvature
        >>> circles = EllipsoidRotation(jnp.eye(2))
        >>> psi = OrbitCurvature(circles, 3, key=jax.random.key(0))
        >>> round(float(psi(None, jnp.array([0.0, 4.0]), None)), 3)
        0.25

    Source: arXiv 2305.13404, equation 5.

    Differences: The released code draws the entries of `M` uniform on [0, 1].
    """

    action: GroupAction
    curves: int = eqx.field(static=True)
    key: PRNGKeyArray

    def __init__(self, action: GroupAction, curves: int = 8, *, key: PRNGKeyArray):
        if curves < 1:
            raise ValueError(
                f"OrbitCurvature: `curves` must be at least 1 (got {curves})."
            )
        self.action = action
        self.curves = curves
        self.key = key

    def costs(self):
        return 0, 0

    def __call__(self, loss_fn, params, batch):
        leaves, structure = jtu.tree_flatten(self.action.identity(params))

        def one(key):
            keys = jax.random.split(key, len(leaves))
            drawn = [
                of_length(jax.random.normal(k, leaf.shape, leaf.dtype), 1.0)
                for k, leaf in zip(keys, leaves, strict=True)
            ]
            direction = jtu.tree_unflatten(structure, drawn)
            return curvature(
                lambda t: self.action.act(
                    params, self.action.curve(direction, t), batch
                )
            )

        return jnp.mean(jax.vmap(one)(jax.random.split(self.key, self.curves)))


def curvature(
    curve: Callable[[Float[Array, ""]], PyTree[Array]], t: float = 0.0
) -> Float[Array, ""]:
    """Curvature of a parametrised curve: one over the radius of its osculating circle.

    `sqrt(|y'|^2 |y''|^2 - (y' . y'')^2) / |y'|^3`, whatever the speed of the
    parametrisation. Cost: two nested directional derivatives.

    Args:
        curve: From the parameter to a pytree of floating arrays, twice differentiable.
        t: Where.

    Returns:
        The curvature, at least 0; NaN under jit where the curve stands still.

    Raises:
        ValueError: If the curve stands still at `t` (`M = 0` in an orbit): it has no
            curvature there.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.sharpness import curvature
        >>> circle = lambda t: 5.0 * jnp.stack([jnp.cos(3 * t), jnp.sin(3 * t)])
        >>> round(float(curvature(circle, 0.4)), 3)
        0.2

    Source: arXiv 2305.13404, equation 47.
    """
    dtype = jnp.result_type(float)
    at = jnp.asarray(t, dtype)
    one = jnp.ones((), dtype)

    def velocity(t):
        return jax.jvp(lambda s: ravel_pytree(curve(s))[0], (t,), (one,))[1]

    first, second = jax.jvp(velocity, (at,), (one,))
    square = jnp.sum(first * first)
    if not is_traced(square) and not np.asarray(square) > 0:
        raise ValueError(
            "curvature: `curve` must move at `t` (got zero velocity). Choose a "
            "direction other than zero."
        )
    # The normal part of the acceleration: no cancellation, and a derivative at 0.
    normal = second - jnp.sum(first * second) / square * first
    return tree_norm(normal) / square
