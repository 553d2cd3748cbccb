"""How good a response is: how far plain training moves the weights that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_positive
from ..core._trees import tree_norm
from ._hyperparameter import (
    Hyperparameter,
    Tuned,
    check_counts,
    check_responding,
    count_samples,
    repeated,
)
from ._stn_layers import respond


def best_response_error(
    key: PRNGKeyArray,
    model: PyTree,
    h: Float[Array, " hyperparameters"],
    hyperparameters: Mapping[str, Hyperparameter],
    train_loss: Callable[..., Float[Array, ""]],
    train: PyTree[Array],
    *,
    steps: int = 50,
    samples: int = 4,
    stepsize: float = 0.01,
) -> Certificate:
    """How far the response is from the weights that training at fixed `h` leads to.

    Draws some `h` of the perturbation, takes the plain network that the model is
    there, and trains it on: gradient descent on all training data, at that `h` for
    every example. A response that were the best one would not move. An estimate: a few
    steps from the response, not the true minimiser.

    Args:
        key: Random key of the draws and of the training loss.
        model: The responding network.
        h: The hyperparameters around which to draw.
        hyperparameters: As for `self_tuning`.
        train_loss: As for `self_tuning`.
        train: As for `self_tuning`.
        steps: Gradient steps at each draw.
        samples: Draws of `h`.
        stepsize: Of the descent.

    Returns:
        A certificate that is an estimate: the mean over the draws of the distance that
        the weights moved, relative to their norm. Its details have the training losses
        before and after.

    Raises:
        ValueError: If the model has no responding layers or a setting is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.bilevel import HyperLinear, Hyperparameter, best_response_error
        >>> layer = HyperLinear(1, 1, 1, key=jax.random.key(0))
        >>> def loss(model, batch, h, values, key):
        ...     return jnp.mean((jax.vmap(model)(batch, h) - 2 * batch) ** 2)
        >>> certificate = best_response_error(
        ...     jax.random.key(1), layer, jnp.zeros(1), {"none": Hyperparameter(0.0)},
        ...     loss, jnp.ones((4, 1)), stepsize=0.1)
        >>> certificate.proof, bool(certificate.details["loss after"] < 1e-3)
        (False, True)
    """
    owner = "best_response_error"
    check_responding(owner, model, list(hyperparameters))
    check_counts(owner, steps=steps, samples=samples)
    check_positive(owner, "stepsize", stepsize)
    moved, before, after = _fine_tune(
        key,
        model,
        h,
        Tuned(hyperparameters),
        train_loss,
        train,
        jnp.asarray(stepsize, h.dtype),
        steps,
        samples,
    )
    return Certificate(
        "best-response error",
        moved,
        proof=False,
        statement=(
            f"value is how far {steps} gradient steps at fixed hyperparameters move "
            "the weights of the response, relative to their norm"
        ),
        details={"loss before": before, "loss after": after},
    )


@eqx.filter_jit
def _fine_tune(key, model, h, tuned, train_loss, train, stepsize, steps, samples):
    size = count_samples("best_response_error", "train", train)
    raw = tuned.start(h.dtype)[1]

    def one(key):
        for_h, for_loss = jax.random.split(key)
        drawn = tuned.perturbed(for_h, h, raw, 1)
        start, static = eqx.partition(respond(model, drawn[0]), eqx.is_inexact_array)
        rows = repeated(drawn[0], size)

        def loss(params, key):
            net = eqx.combine(params, static)
            return train_loss(net, train, rows, tuned.values(rows), key)

        def step(params, key):
            value, gradient = jax.value_and_grad(loss)(params, key)
            move = lambda p, g: p - stepsize * g  # noqa: E731
            return jtu.tree_map(move, params, gradient), value

        end, values = jax.lax.scan(step, start, jax.random.split(for_loss, steps))
        moved = tree_norm(jtu.tree_map(jnp.subtract, end, start)) / tree_norm(start)
        return moved, values[0], values[-1]

    found = jax.lax.map(one, jax.random.split(key, samples))
    return jtu.tree_map(jnp.mean, found)
