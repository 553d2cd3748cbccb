"""The top of the Hessian's spectrum along full-batch training, in one compiled loop."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..core import Status
from ..train import gradient_update
from ._hessian import hessian_top
from ._vectors import norm


class TopEigs(eqx.Module):
    """What `track_top_eigs` saw, at the start and after each so many steps.

    Args:
        steps: Steps done at each of the T looks.
        values: The k largest eigenvalues at each, NaN where training never came.
        residuals: `||H v - theta v||`: an eigenvalue lies that near each value.
        losses: The loss.
        grad_norms: The gradient's norm.
        params: The last parameters.
        status: `Status.CONVERGED` after all steps, or `Status.DIVERGED`.
    """

    steps: Int[Array, " T"]
    values: Float[Array, "T k"]
    residuals: Float[Array, "T k"]
    losses: Float[Array, " T"]
    grad_norms: Float[Array, " T"]
    params: PyTree
    status: Int[Array, ""]


def track_top_eigs(
    loss_fn: Callable[[PyTree, PyTree], Float[Array, ""]],
    params: PyTree,
    batch: PyTree,
    optimiser: optax.GradientTransformation,
    *,
    steps: int,
    every: int = 100,
    k: int = 1,
    tol: float = 1e-3,
    key: PRNGKeyArray,
) -> TopEigs:
    """Trains on the whole batch and looks at the top eigenvalues as it goes.

    Each look costs one gradient and the Hessian-vector products of `hessian_top`, some
    ten to thirty. Under `jax.jit`, with the optimiser's settings as arguments, other
    settings compile nothing new. A run that diverges stops, and keeps its curve.

    Args:
        loss_fn: `(params, batch) -> scalar`.
        params: Any pytree; its floating arrays are trained.
        batch: What the loss is evaluated on.
        optimiser: Any optax transformation; `sam` and its relatives get their further
            gradients.
        steps: Steps of the optimiser, a multiple of `every`.
        every: Steps from look to look, at least 1.
        k: Number of eigenvalues.
        tol: Relative residual at which Lanczos stops.
        key: Random key of the Lanczos starts.

    Returns:
        The curves, the last parameters and a status.

    Raises:
        ValueError: If `steps` is no positive multiple of `every`, or as `hessian_top`.
            A loss or gradient that is not finite is a status.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.sharpness import track_top_eigs
        >>> loss = lambda w, b: jnp.sum(b * w**2) / 2
        >>> track = track_top_eigs(loss, jnp.ones(3), jnp.array([1.0, 2.0, 5.0]),
        ...     optax.sgd(0.1), steps=20, every=10, key=jax.random.key(0))
        >>> track.steps.tolist(), round(float(track.values[-1, 0]), 2)
        ([0, 10, 20], 5.0)
    """
    if every < 1 or steps < every or steps % every:
        raise ValueError(
            "track_top_eigs: `steps` must be a positive multiple of `every` (got "
            f"{steps} and {every})."
        )
    arrays, static = eqx.partition(params, eqx.is_inexact_array)
    looks = steps // every + 1

    def loss(arrays):
        return loss_fn(eqx.combine(arrays, static), batch)

    def look(arrays, index):
        value, gradient = jax.value_and_grad(loss)(arrays)
        top = hessian_top(
            lambda arrays, _: loss(arrays),
            arrays,
            None,
            k=k,
            tol=tol,
            key=jax.random.fold_in(key, index),
        )
        return top.values, top.residuals, value, norm(gradient)

    def one_step(_, train):
        arrays, state, _ = train
        return gradient_update(loss, arrays, state, optimiser)

    def unfinished(carry):
        _, index, _, healthy = carry
        return (index < looks) & healthy

    def chunk(carry):
        train, index, seen, _ = carry
        # The first look is at the start.
        train = jax.lax.fori_loop(0, jnp.where(index == 0, 0, every), one_step, train)
        found = look(train[0], index)
        seen = jtu.tree_map(lambda rows, row: rows.at[index].set(row), seen, found)
        healthy = jnp.isfinite(found[2]) & jnp.isfinite(found[3])
        return train, index + 1, seen, healthy

    shapes = jax.eval_shape(look, arrays, 0)
    seen = jtu.tree_map(
        lambda leaf: jnp.full((looks, *leaf.shape), jnp.nan, leaf.dtype), shapes
    )
    train = arrays, optimiser.init(arrays), jnp.zeros((), seen[2].dtype)
    (arrays, _, _), _, seen, healthy = jax.lax.while_loop(
        unfinished, chunk, (train, jnp.zeros((), jnp.int32), seen, jnp.asarray(True))
    )
    values, residuals, losses, grad_norms = seen
    return TopEigs(
        every * jnp.arange(looks, dtype=jnp.int32),
        values,
        residuals,
        losses,
        grad_norms,
        eqx.combine(arrays, static),
        jnp.where(healthy, Status.CONVERGED, Status.DIVERGED).astype(jnp.int32),
    )
