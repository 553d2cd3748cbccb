"""Minibatch training as a chain of compiled chunks.

A chunk is a scan over epochs of a scan over batches; between chunks the whole state is
one pytree of arrays. The order of epoch e depends on the key and on e alone, so a run
cut into chunks gives the same numbers as one that is not, and a state that was saved
continues as if it had never stopped.

What a step does with a batch is an update function. The default takes the gradient and
asks the optimiser; optimisers that want more (a line search, a second gradient) find
the batch's loss and its gradient among optax's extra arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

# Added to an epoch: the key of its steps.
_STEPS = np.uint32(2**31)


class TrainState(eqx.Module):
    """What the next epoch needs.

    Args:
        model: The model, any pytree; its floating arrays are trained.
        opt_state: The optimiser's state.
        key: The key from which every epoch derives its order.
        epoch: Epochs done.
    """

    model: PyTree
    opt_state: PyTree
    key: PRNGKeyArray
    epoch: Int[Array, ""]


def start_training(
    model: PyTree, optimiser: optax.GradientTransformation, *, key: PRNGKeyArray
) -> TrainState:
    """The state before the first epoch.

    Args:
        model: The model, any pytree with floating arrays.
        optimiser: An optax transformation.
        key: Random key for the order of the samples.

    Returns:
        The state to pass to `train_epochs`.

    Raises:
        ValueError: If the model has no floating array.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.train import start_training
        >>> state = start_training(jnp.zeros(2), optax.sgd(0.1), key=jax.random.key(0))
        >>> int(state.epoch)
        0
    """
    params = eqx.filter(model, eqx.is_inexact_array)
    if not jtu.tree_leaves(params):
        raise ValueError(
            "start_training: `model` must hold floating arrays (got none): there is "
            "nothing to train."
        )
    return TrainState(model, optimiser.init(params), key, jnp.zeros((), jnp.int32))


def gradient_update(
    loss: Callable[[PyTree], Float[Array, ""]],
    params: PyTree[Array],
    opt_state: PyTree,
    optimiser: optax.GradientTransformation,
) -> tuple[PyTree[Array], PyTree, Float[Array, ""]]:
    """One step of an optax optimiser: the update function that training uses.

    One gradient, and whatever the optimiser evaluates besides: it is handed `value`,
    `grad`, `value_fn(params)` and `grad_fn(params)` of the same batch as extra
    arguments (optax's names), which line searches and sharpness-aware methods use and
    all others ignore.

    Args:
        loss: The batch's loss, a scalar function of the parameters.
        params: The parameters.
        opt_state: The optimiser's state.
        optimiser: An optax transformation, with or without extra arguments.

    Returns:
        The next parameters, the next state, and the loss before the step.

    Raises:
        ValueError: If the optimiser asks for the gradients of parts of the batch.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from varan.train import gradient_update
        >>> descent, start = optax.sgd(0.5), jnp.array(3.0)
        >>> params, _, value = gradient_update(
        ...     lambda x: x**2, start, descent.init(start), descent)
        >>> float(params), float(value)
        (0.0, 9.0)
    """
    value, gradient = jax.value_and_grad(loss)(params)

    def grad_fn(params, i=0, *chunk):
        if chunk:
            raise ValueError(
                "gradient_update: the optimiser must take gradients of whole batches "
                "(it asks for a chunk's). Leave its `microbatch` out, or write the "
                "update with `varan.sharpness.grad_fn_from`."
            )
        return jax.grad(loss)(params)

    # optax's line search insists that `value_fn` takes, by name, what it does not use
    # itself; its sharpness-aware wrapper passes a counter.
    offered = {
        "value": value,
        "grad": gradient,
        "value_fn": lambda params, grad_fn=None: loss(params),
        "grad_fn": grad_fn,
    }
    updates, opt_state = optimiser.update(
        gradient, opt_state, params, **_wanted(optimiser.update, offered)
    )
    return optax.apply_updates(params, updates), opt_state, value


@eqx.filter_jit
def train_epochs(
    state: TrainState,
    loss: Callable[..., Float[Array, ""]],
    data: PyTree[Array],
    optimiser: optax.GradientTransformation,
    *,
    epochs: int,
    batch_size: int,
    update: Callable[..., tuple[PyTree, PyTree, Any]] = gradient_update,
) -> tuple[TrainState, Float[Array, " epochs"]]:
    """Trains for some epochs in one compiled scan.

    Call it again with the returned state to continue. The same `loss` and `optimiser`
    objects do not compile again.

    Args:
        state: From `start_training` or from an earlier call.
        loss: Scalar function of the model and a batch, a pytree like `data`. One that
            has an argument `key` (dropout, sampled noise) gets a fresh one each step.
        data: Pytree of arrays with one leading axis of samples.
        optimiser: The transformation that `state` was started with.
        epochs: Epochs to run.
        batch_size: Samples in a batch, at most the number of samples. What does not
            fill a last batch is left out of that epoch; every epoch draws a new order.
        update: What a step does: called as `gradient_update` is, it returns what that
            returns. For methods that are no optax transformation.

    Returns:
        The next state, and the mean batch loss of each epoch. NaN stays visible in
        both: nothing is caught.

    Raises:
        ValueError: On empty data, leading axes that differ, or a batch size outside
            1 .. samples.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.train import start_training, train_epochs
        >>> x = jnp.arange(8.0) / 8
        >>> loss = lambda w, batch: jnp.mean((w * batch[0] - batch[1]) ** 2)
        >>> optimiser = optax.sgd(0.5)
        >>> state = start_training(jnp.zeros(()), optimiser, key=jax.random.key(0))
        >>> state, losses = train_epochs(
        ...     state, loss, (x, 3 * x), optimiser, epochs=50, batch_size=4)
        >>> round(float(state.model), 3)
        3.0
    """
    size = _check_data(data, batch_size)
    params, static = eqx.partition(state.model, eqx.is_inexact_array)
    keyed = bool(_wanted(loss, {"key": None}))

    def one_step(carry, inputs):
        params, opt_state = carry
        chosen, key = inputs
        batch = jtu.tree_map(lambda leaf: leaf[chosen], data)
        more = {"key": key} if keyed else {}

        def batch_loss(params):
            return loss(eqx.combine(params, static), batch, **more)

        params, opt_state, value = update(batch_loss, params, opt_state, optimiser)
        return (params, opt_state), value

    def one_epoch(carry, epoch):
        order = epoch_batches(jax.random.fold_in(state.key, epoch), size, batch_size)
        # The upper half of the numbers: no epoch's own key comes out again.
        step_key = jax.random.fold_in(state.key, epoch.astype(jnp.uint32) + _STEPS)
        keys = jax.random.split(step_key, order.shape[0])
        carry, values = jax.lax.scan(one_step, carry, (order, keys))
        return carry, jnp.mean(values)

    (params, opt_state), losses = jax.lax.scan(
        one_epoch,
        (params, state.opt_state),
        state.epoch + jnp.arange(epochs, dtype=jnp.int32),
    )
    model = eqx.combine(params, static)
    return TrainState(model, opt_state, state.key, state.epoch + epochs), losses


def epoch_batches(
    key: PRNGKeyArray, size: int, batch_size: int
) -> Int[Array, "batches batch_size"]:
    """Row numbers of the batches of one epoch, in a new random order.

    Args:
        key: Random key of this epoch.
        size: Number of samples.
        batch_size: Samples in a batch; what does not fill a last batch is left out.

    Returns:
        One row a batch, no number twice.

    Example:
        >>> import jax
        >>> from varan.train import epoch_batches
        >>> epoch_batches(jax.random.key(0), 10, 4).shape
        (2, 4)
    """
    batches = size // batch_size
    order = jax.random.permutation(key, size)[: batches * batch_size]
    return order.reshape(batches, batch_size)


def _wanted(function, offered):
    """Those of the offered arguments that a function takes by name."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


def _check_data(data, batch_size):
    sizes = sorted({np.shape(leaf)[0] for leaf in jtu.tree_leaves(data)})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(
            "train_epochs: the arrays of `data` must have one leading axis of samples, "
            f"not empty (got lengths {sizes})."
        )
    if not 1 <= batch_size <= sizes[0]:
        raise ValueError(
            f"train_epochs: `batch_size` must lie in 1 .. {sizes[0]} (got "
            f"{batch_size})."
        )
    return sizes[0]
