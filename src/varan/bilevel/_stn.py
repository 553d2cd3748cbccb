"""Self-tuning networks: hyperparameters tuned while the network is trained.

`min_h L_V(w*(h))` with `w*(h)` the weights that training under the hyperparameters `h`
leads to. A network of `HyperLinear` and `HyperConv` layers represents `w(h)` for all
`h` near the present ones, and two kinds of step alternate:

- training steps fit the response: each example draws its own `h` around the present
  ones, is regularised as that `h` says, and is classified by the weights at that `h`;
- a validation step moves `h` down the validation loss through the response, without
  any regularisation.

The training loss is never differentiated with respect to `h`. So dropout rates, data
augmentation and whole numbers can be tuned like any other, and second derivatives
never appear. What comes out is a schedule, not a single value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ..core._checks import check_nonnegative
from ..train import epoch_batches
from ._hyperparameter import (
    Hyperparameter,
    Tuned,
    check_counts,
    check_responding,
    count_samples,
    repeated,
)

# One object each: a new one with every call would compile anew.
_WEIGHTS = optax.sgd(0.01, momentum=0.9)
_HYPER = optax.adam(3e-3)


class SelfTuningResult(eqx.Module):
    """What `self_tuning` found.

    Args:
        model: The responding network at the end of the run.
        h: The unconstrained hyperparameters then.
        scales: The perturbations' standard deviations then.
        best_model: The responding network after the epoch of least validation loss;
            `respond(best_model, best_h)` is the plain network to use.
        best_h: The unconstrained hyperparameters then.
        schedule: Every hyperparameter's value after each epoch, by name.
        h_schedule: The unconstrained hyperparameters after each epoch.
        train_losses: Mean training loss of each epoch, under perturbation.
        valid_losses: Validation loss at the end of each epoch, on all validation data.
        best_epoch: The epoch of least validation loss, counted from 0.
        diverged: Whether a validation loss was NaN or infinite.
        train_gradients: Batch gradients of the training loss that were taken.
        valid_gradients: Batch gradients of the validation loss that were taken.
    """

    model: PyTree
    h: Float[Array, " hyperparameters"]
    scales: Float[Array, " hyperparameters"]
    best_model: PyTree
    best_h: Float[Array, " hyperparameters"]
    schedule: dict[str, Float[Array, " epochs"]]
    h_schedule: Float[Array, "epochs hyperparameters"]
    train_losses: Float[Array, " epochs"]
    valid_losses: Float[Array, " epochs"]
    best_epoch: Int[Array, ""]
    diverged: Bool[Array, ""]
    train_gradients: Int[Array, ""]
    valid_gradients: Int[Array, ""]


def self_tuning(
    key: PRNGKeyArray,
    model: PyTree,
    hyperparameters: Mapping[str, Hyperparameter],
    train_loss: Callable[..., Float[Array, ""]],
    valid_loss: Callable[..., Float[Array, ""]],
    train: PyTree[Array],
    valid: PyTree[Array],
    *,
    epochs: int,
    batch_size: int,
    warmup: int = 5,
    train_steps: int = 2,
    valid_steps: int = 1,
    tune_scales: bool = True,
    entropy_weight: float = 1e-3,
    optimiser: optax.GradientTransformation | None = None,
    hyper_optimiser: optax.GradientTransformation | None = None,
) -> SelfTuningResult:
    """Trains a responding network and tunes its hyperparameters in one run.

    After the warm-up, every `train_steps` gradients of the weights are followed by
    `valid_steps` gradients of the hyperparameters and, where they are tuned, of the
    perturbations' scales: those minimise the validation loss under perturbation minus
    `entropy_weight` times the perturbations' entropy, which keeps them from shrinking
    to nothing. A gradient costs about two of a plain network. One compiled run.

    Args:
        key: Random key of order, perturbations and the training loss.
        model: A network with `HyperLinear` or `HyperConv` layers, as many entries of
            `h` as there are hyperparameters.
        hyperparameters: By name; their order is that of the entries of `h`.
        train_loss: `train_loss(model, batch, h, values, key)`, a scalar: the
            regularised loss. `h` has one row an example; `values` has by name an
            array with one entry an example, or a number where `per_example` is false.
        valid_loss: `valid_loss(model, batch, h)`, a scalar, without regularisation.
        train: Training data, arrays with one leading axis.
        valid: Validation data, likewise.
        epochs: Passes over the training data, warm-up included.
        batch_size: Examples in a batch of either kind.
        warmup: Epochs before the hyperparameters move.
        train_steps: Training steps between validation steps.
        valid_steps: Validation steps in a row.
        tune_scales: Whether the scales move too. Where they do, the validation step is
            perturbed as training is, which is what tells them anything; otherwise it
            is not.
        entropy_weight: Of the perturbations' entropy in the validation step; the
            authors use 1e-3 (their language models) and 1e-5 (image classifiers).
        optimiser: Of the weights; default `sgd(0.01, momentum=0.9)`, the authors'.
        hyper_optimiser: Of hyperparameters and scales; default `adam(3e-3)`, theirs.

    Returns:
        A `SelfTuningResult`; read its `diverged`.

    Raises:
        ValueError: On no hyperparameters, a model without responding layers or with
            layers for another number of hyperparameters, or sizes out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.bilevel import HyperLinear, Hyperparameter, self_tuning
        >>> x = jax.random.normal(jax.random.key(1), (8, 2))
        >>> data = (x, x[:, :1])
        >>> def fit(model, batch, h):
        ...     return jnp.mean((jax.vmap(model)(batch[0], h) - batch[1]) ** 2)
        >>> def ridge(model, batch, h, values, key):
        ...     squares = jax.vmap(lambda h: jnp.sum(model.response(h).weight ** 2))(h)
        ...     return fit(model, batch, h) + jnp.mean(values["penalty"] * squares)
        >>> result = self_tuning(
        ...     jax.random.key(0), HyperLinear(2, 1, 1, key=jax.random.key(2)),
        ...     {"penalty": Hyperparameter(0.1, low=0.0)}, ridge, fit, data, data,
        ...     epochs=7, batch_size=4)
        >>> result.schedule["penalty"].shape, int(result.valid_gradients)
        ((7,), 2)

    Source: M. MacKay, P. Vicol, J. Lorraine, D. Duvenaud, R. Grosse, 2019,
        "Self-tuning networks: bilevel optimization of hyperparameters using structured
        best-response functions", ICLR, arXiv:1903.03088, algorithm 1.

    Differences: The authors' code decays the learning rate when the validation loss
        has not improved for 60 epochs and then stops; here `optimiser` may carry any
        schedule, the run has a fixed length, and the best epoch's model is returned.
    """
    check_responding("self_tuning", model, list(hyperparameters))
    check_counts(
        "self_tuning",
        epochs=epochs,
        batch_size=batch_size,
        train_steps=train_steps,
        valid_steps=valid_steps,
    )
    check_nonnegative("self_tuning", "warmup", warmup)
    check_nonnegative("self_tuning", "entropy_weight", entropy_weight)
    sizes = [
        count_samples("self_tuning", n, d)
        for n, d in (("train", train), ("valid", valid))
    ]
    batches = sizes[0] // batch_size
    if batch_size > min(sizes) or batches < train_steps:
        raise ValueError(
            f"self_tuning: `batch_size` must fit into {min(sizes)} samples and leave "
            f"{train_steps} batches for `train_steps` (got {batch_size})."
        )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tuner = _Tuner(
        static,
        Tuned(hyperparameters),
        train_loss,
        valid_loss,
        train,
        valid,
        optimiser or _WEIGHTS,
        hyper_optimiser or _HYPER,
        jnp.asarray(entropy_weight, _dtype(params)),
        batch_size,
        batches // train_steps,
        (train_steps, valid_steps),
        tune_scales,
    )
    return _run(key, tuner, params, epochs, warmup)


class _Tuner(eqx.Module):
    """The two kinds of step, and how they alternate."""

    static: Any
    tuned: Tuned
    train_loss: Callable
    valid_loss: Callable
    train: Any
    valid: Any
    optimiser: optax.GradientTransformation
    hyper_optimiser: optax.GradientTransformation
    entropy_weight: Array
    batch_size: int
    rounds: int
    steps: tuple[int, int]
    tune_scales: bool

    def init(self, params):
        hyper = self.tuned.start(_dtype(params))
        states = self.optimiser.init(params), self.hyper_optimiser.init(hyper)
        return params, hyper, *states

    def regularised(self, params, hyper, batch, key):
        for_h, for_loss = jax.random.split(key)
        h, raw = hyper
        rows = self.tuned.perturbed(for_h, h, raw, self.batch_size)
        model = eqx.combine(params, self.static)
        return self.train_loss(model, batch, rows, self.tuned.values(rows), for_loss)

    def tuning(self, hyper, params, batch, key):
        h, raw = hyper
        rows = repeated(h, self.batch_size)
        if self.tune_scales:
            rows = self.tuned.perturbed(key, h, raw, self.batch_size)
        value = self.valid_loss(eqx.combine(params, self.static), batch, rows)
        # The entropy up to a constant.
        entropy = jnp.sum(jnp.log(jax.nn.softplus(raw)))
        return value - self.entropy_weight * entropy

    def train_step(self, state, inputs):
        params, hyper, opt_state, hyper_state = state
        rows, key = inputs
        value, gradient = jax.value_and_grad(self.regularised)(
            params, hyper, _take(self.train, rows), key
        )
        updates, opt_state = self.optimiser.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, hyper, opt_state, hyper_state), value

    def valid_step(self, state, inputs):
        params, hyper, opt_state, hyper_state = state
        rows, key = inputs
        batch = _take(self.valid, rows)
        gradient = jax.grad(self.tuning)(hyper, params, batch, key)
        if not self.tune_scales:
            gradient = (gradient[0], jnp.zeros_like(gradient[1]))
        updates, hyper_state = self.hyper_optimiser.update(gradient, hyper_state, hyper)
        hyper = optax.apply_updates(hyper, updates)
        return (params, hyper, opt_state, hyper_state), None

    def epoch(self, state, key, moves):
        """One pass over the training data; the mean training loss."""

        def train_step(state, inputs):
            return self.train_step(state, inputs)

        def valid_step(state, inputs):
            return self.valid_step(state, inputs)

        def one_round(state, inputs):
            state, values = jax.lax.scan(train_step, state, inputs[0])
            state = jax.lax.cond(
                moves,
                lambda state: jax.lax.scan(valid_step, state, inputs[1])[0],
                lambda state: state,
                state,
            )
            return state, values

        sets = (self.train, self.valid)
        inputs = tuple(
            self.inputs(one, count_samples("self_tuning", "data", data), steps)
            for one, data, steps in zip(
                jax.random.split(key), sets, self.steps, strict=True
            )
        )
        state, values = jax.lax.scan(one_round, state, inputs)
        return state, jnp.mean(values)

    def inputs(self, key, size, steps):
        """Row numbers and keys of the steps of an epoch, one leading axis of rounds."""
        for_order, for_steps = jax.random.split(key)
        count = self.rounds * steps
        passes = -(-count // (size // self.batch_size))
        orders = jax.vmap(lambda one: epoch_batches(one, size, self.batch_size))(
            jax.random.split(for_order, passes)
        )
        rows = orders.reshape(-1, self.batch_size)[:count]
        keys = jax.random.split(for_steps, count)
        return (
            rows.reshape(self.rounds, steps, self.batch_size),
            keys.reshape(self.rounds, steps),
        )

    def validation(self, params, h):
        rows = repeated(h, count_samples("self_tuning", "valid", self.valid))
        return self.valid_loss(eqx.combine(params, self.static), self.valid, rows)


@eqx.filter_jit
def _run(key, tuner, params, epochs, warmup):
    def one_epoch(carry, epoch):
        state, best = carry
        state, loss = tuner.epoch(
            state, jax.random.fold_in(key, epoch), epoch >= warmup
        )
        params, hyper, *_ = state
        value = tuner.validation(params, hyper[0])
        now = (value, params, hyper[0], epoch)
        best = jtu.tree_map(lambda a, b: jnp.where(value < best[0], a, b), now, best)
        return (state, best), (hyper[0], loss, value)

    state = tuner.init(params)
    unset = (jnp.full((), jnp.inf, _dtype(params)), params, state[1][0], jnp.int32(0))
    (state, best), (path, train_losses, valid_losses) = jax.lax.scan(
        one_epoch, (state, unset), jnp.arange(epochs, dtype=jnp.int32)
    )
    params, (h, raw), *_ = state
    _, best_params, best_h, best_epoch = best
    train_steps, valid_steps = tuner.steps
    return SelfTuningResult(
        model=eqx.combine(params, tuner.static),
        h=h,
        scales=jax.nn.softplus(raw),
        best_model=eqx.combine(best_params, tuner.static),
        best_h=best_h,
        schedule={
            name: tuner.tuned.specs[i].value(path[:, i])
            for i, name in enumerate(tuner.tuned.names)
        },
        h_schedule=path,
        train_losses=train_losses,
        valid_losses=valid_losses,
        best_epoch=best_epoch,
        diverged=~jnp.all(jnp.isfinite(valid_losses)),
        train_gradients=jnp.int32(epochs * tuner.rounds * train_steps),
        valid_gradients=jnp.int32(max(epochs - warmup, 0) * tuner.rounds * valid_steps),
    )


def _take(data, rows):
    return jtu.tree_map(lambda leaf: leaf[rows], data)


def _dtype(params):
    return jnp.result_type(*jtu.tree_leaves(params))
