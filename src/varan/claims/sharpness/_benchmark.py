"""The topic's shared benchmark: one task, one budget, one way to tune, for every arm.

Task: MNIST-1D, 4000 signals to train on and 10 000 to test, standardised by the
training signals; the signals are those of one fixed key of `varan.data.mnist1d`, in
place of the published file. Column "clean" has the true labels; in column "noisy" each
training label is replaced, with probability 0.4, by a class drawn uniformly. A seed
decides the noise, the network's start and the order of the batches, the same for all
arms, so that differences between arms are paired. Training: batches of 128, a cosine
from the learning rate to zero, momentum 0.9 and a weight decay of 5e-4 in the base
optimiser.

Budget: `gradients` evaluations of a batch's gradient; an arm that takes c a step makes
`gradients // c` steps. The other accounting is `steps`, the same for all.

**A row's experiment**, one seed a call; the lab does the statistics:

    def experiment(scale, seed):
        data = column("noisy", seed, train=scale["train"])
        budget = {"gradients": scale["gradients"]}
        sgd, sam = (run_arm(ARMS[n], data, seed, **budget) for n in ("sgd", "sam"))
        gain = sgd.points - sam.points  # paired: positive where SAM is better
        return Measurements({"gain": gain, **flatness(sam, data)}, [loss_curve(sam)])

**A new arm** is an `Arm` in the table of `_arms.py`: how to make its optimiser from the
learning rate's schedule and one parameter (both traced numbers, so that all settings
share one compiled training), the gradients a step, five values of the parameter. Then

    python benchmarks/sharpness_comparison.py --tune NAME

chooses learning rate and parameter on held-out training points for both columns and
stores them in `_tuned.toml`; `run_arm` takes them from there unless it is given others.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from varan.claims import Curve
from varan.data import mnist1d, standardise
from varan.metrics import accuracy, negative_log_likelihood
from varan.nets import Conv1DNet, MLPNet
from varan.sharpness import (
    LogitLoss,
    first_order_flatness,
    hessian_top,
    hessian_trace,
    sharpness,
)
from varan.train import epoch_batches, gradient_update

COLUMNS = ("clean", "noisy")
GRADIENTS, STEPS = 6000, 3000
LEARNING_RATES = (0.03, 0.1, 0.3)
HELD_OUT = 500
TUNED = Path(__file__).with_name("_tuned.toml")
_DATA_KEY, _SAMPLES, _TRAIN, _NOISE = 42, 14_000, 4000, 0.4
_CLASSES, _BATCH, _MOMENTUM, _DECAY, _POINTS = 10, 128, 0.9, 5e-4, 60
_NETS = {"mlp": MLPNet, "conv": Conv1DNet}


class Data(NamedTuple):
    """One column: what to train on and what to test on."""

    column: str
    train: tuple[Float[Array, "samples 40"], Int[Array, " samples"]]
    test: tuple[Float[Array, "samples 40"], Int[Array, " samples"]]


def column(
    name: Literal["clean", "noisy"],
    seed: int,
    *,
    train: int = _TRAIN,
    held_out: int = 0,
) -> Data:
    """The data of a column for a seed.

    Args:
        name: `"clean"`, or `"noisy"` with 40 % symmetric label noise.
        seed: Of the label noise.
        train: Signals to train on, at most 4000.
        held_out: If positive, so many of them are taken away from training and are
            the test set, their labels as noisy as the others: for tuning.

    Returns:
        Training and test pairs.
    """
    if name not in COLUMNS or not held_out < train <= _TRAIN:
        raise ValueError(
            "column: `name` must be 'clean' or 'noisy' and held_out < train <= "
            f"{_TRAIN} (got {name!r}, {held_out} and {train})."
        )
    x, y, x_test, y_test = _signals()
    x, y = x[:train], y[:train]
    if name == "noisy":
        where, what = jax.random.split(jax.random.key(seed))
        replaced = jax.random.bernoulli(where, _NOISE, (train,))
        drawn = jax.random.randint(what, (train,), 0, _CLASSES, y.dtype)
        y = jnp.where(replaced, drawn, y)
    if held_out:
        x, x_test = x[held_out:], x[:held_out]
        y, y_test = y[held_out:], y[:held_out]
    return Data(name, (x, y), (x_test, y_test))


@lru_cache(maxsize=1)
def _signals():
    signals, labels = map(np.asarray, mnist1d(jax.random.key(_DATA_KEY), _SAMPLES))
    x, x_test = standardise(signals[:_TRAIN], signals[_TRAIN:])
    return tuple(map(jnp.asarray, (x, labels[:_TRAIN], x_test, labels[_TRAIN:])))


def cross_entropy(logits, labels, parameter):
    """The mean cross-entropy of a batch; the arm's parameter plays no part."""
    del parameter
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def momentum_sgd(schedule, weight_decay=_DECAY) -> optax.GradientTransformation:
    """The base of all arms; the weight decay is added to what the base is given."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum=_MOMENTUM),
    )


@dataclass(frozen=True)
class Arm:
    """One optimiser of the comparison.

    Args:
        name: As it stands in the tables.
        make: `(schedule, parameter) -> optax transformation`. The schedule gives the
            learning rate of a step; the parameter is a traced number.
        cost: Gradients of a batch that a step takes.
        grid: Five values of the parameter; one where there is nothing to tune.
        default: The paper's value, for the row "paper default, untuned" (learning
            rate 0.1).
        loss: `(logits, labels, parameter) -> scalar`, what is trained on.
        share: `parameter -> share of the budget that is used` (early stopping).
        update: As for `varan.train.train_epochs`, for an optimiser that wants more
            than `gradient_update` offers.
        train: A training in place of the compiled one, for another library's
            optimiser: the same arguments and results as `_train`.
    """

    name: str
    make: Callable[[Any, Any], optax.GradientTransformation]
    cost: int
    grid: tuple[float, ...]
    default: float | None = None
    loss: Callable[..., Array] = cross_entropy
    share: Callable[[float], float] = lambda parameter: 1.0
    update: Callable[..., tuple[PyTree, PyTree, Any]] = gradient_update
    train: Callable[..., tuple[PyTree, Any, Any, Any]] | None = None


class Run(NamedTuple):
    """How one training ended.

    `status` is "diverged" where a batch's loss stopped being finite: the training
    stopped there, the curve shows it, the errors are those of chance.
    """

    arm: str
    params: PyTree
    steps: int
    gradients: int  # of a batch; counted by the optimiser where it counts
    curve: np.ndarray  # gradients so far, mean loss since: about sixty points
    test_error: float
    test_nll: float
    train_error: float
    train_loss: float
    status: Literal["finished", "diverged"]

    @property
    def points(self) -> float:
        """The test error in per cent."""
        return 100 * self.test_error


def run_arm(
    arm: Arm,
    data: Data,
    seed: int,
    *,
    gradients: int | None = None,
    steps: int | None = None,
    setting: tuple[float, float] | None = None,
    net: Literal["mlp", "conv"] = "mlp",
) -> Run:
    """Trains one arm for one seed in one compiled loop, and evaluates it.

    Settings, seeds, budgets and data of one size share the compiled training.

    Args:
        arm: The arm.
        data: From `column`.
        seed: Of the network's start and the batches' order.
        gradients: The budget in gradients of a batch; or
        steps: the budget in steps. Give one of them.
        setting: Learning rate and parameter; by default the tuned ones of the column.
        net: The network.

    Returns:
        A `Run`.

    Raises:
        ValueError: If not exactly one budget is given, or the arm is not tuned.
    """
    rate, parameter = setting or tuned(arm, data.column)
    if steps is None and gradients is not None:
        steps = gradients // arm.cost
    elif steps is None or gradients is not None:
        raise ValueError("run_arm: give either `gradients` or `steps`.")
    length = max(int(steps * arm.share(parameter)), 1)
    dtype = data.train[0].dtype
    numbers = (jnp.asarray(rate, dtype), jnp.asarray(parameter, dtype))
    for_net, for_order = jax.random.split(jax.random.key(seed))
    start = _start(net, data.train[0].shape[1], for_net)
    order = _order(for_order, data.train[1].size, -(-length // GRADIENTS))
    train = arm.train or _train
    params, taken, spent, curve = train(arm, start, data.train, order, numbers, length)
    test_error, test_nll, train_error, train_loss = (
        float(number)
        for part in (data.test, data.train)
        for number in _evaluate(params, part)
    )
    diverged = bool(taken < length) or not np.isfinite(train_loss)
    if diverged:
        test_error = train_error = 1 - 1 / _CLASSES
    return Run(
        arm=arm.name,
        params=params,
        steps=int(taken),
        gradients=int(spent),
        curve=_means(np.asarray(curve), arm.cost * length),
        test_error=test_error,
        test_nll=float(_finite(test_nll)),
        train_error=train_error,
        train_loss=float(_finite(train_loss)),
        status="diverged" if diverged else "finished",
    )


def _means(sums_and_counts, gradients):
    sums, counts = sums_and_counts
    reached = np.flatnonzero(counts)
    ends = gradients * (reached + 1) / counts.size
    return np.stack([ends, _finite(sums[reached] / counts[reached])])


def _finite(value):
    """What is no number counts as infinitely bad."""
    return np.where(np.isnan(value), np.inf, value)


def logits_fn(
    params: MLPNet | Conv1DNet, x: Float[Array, "samples 40"]
) -> Float[Array, "samples 10"]:
    """The logits of a batch. The networks hold nothing but their parameters."""
    return jax.vmap(params)(x)


# What all arms share is compiled for itself, once and not for every arm.
@partial(jax.jit, static_argnums=(0, 1))
def _start(net, inputs, key):
    return _NETS[net](inputs, _CLASSES, key=key)


@partial(jax.jit, static_argnums=(1, 2))
def _order(key, size, budgets):
    """The batches of so many whole budgets: a shorter training takes the first."""
    epochs = -(-budgets * GRADIENTS // (size // _BATCH))
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(epochs))
    batches = jax.vmap(partial(epoch_batches, size=size, batch_size=_BATCH))(keys)
    return batches.reshape(-1, _BATCH)


@jax.jit
def _evaluate(params, part):
    inputs, labels = part
    logits = logits_fn(params, inputs)
    return 1 - accuracy(logits, labels), negative_log_likelihood(logits, labels)


# Steps instead of `train_epochs`: budgets are no multiples of an epoch's 31 batches,
# and a length that is data lets every budget share one compiled loop.
@partial(jax.jit, static_argnums=0)
def _train(arm, params, train, order, numbers, length):
    x, y = train
    rate, parameter = numbers
    whole = jnp.asarray(length, x.dtype)

    def schedule(step):
        return rate * (1 + jnp.cos(jnp.pi * jnp.asarray(step, x.dtype) / whole)) / 2

    optimiser = arm.make(schedule, parameter)

    def one_step(carry):
        step, params, state, curve, _ = carry
        inputs, labels = x[order[step]], y[order[step]]

        def loss(params):
            return arm.loss(logits_fn(params, inputs), labels, parameter)

        params, state, value = arm.update(loss, params, state, optimiser)
        part = step * _POINTS // length
        curve = curve.at[:, part].add(jnp.stack([value, jnp.ones_like(value)]))
        return step + 1, params, state, curve, jnp.isfinite(value)

    step, params, state, curve, _ = jax.lax.while_loop(
        lambda carry: (carry[0] < length) & carry[-1],
        one_step,
        (
            jnp.zeros((), jnp.int32),
            params,
            optimiser.init(params),
            jnp.zeros((2, _POINTS), x.dtype),
            jnp.ones((), bool),
        ),
    )
    spent = optax.tree.get(state, "grad_evals", arm.cost * step)
    return params, step, spent, curve


def flatness(
    run: Run,
    data: Data,
    *,
    only: tuple[str, ...] = (
        "lambda_max",
        "trace_per_parameter",
        "sharpness",
        "adaptive_sharpness",
        "first_order_flatness",
    ),
) -> dict[str, float]:
    """The measures of flatness at a run's end, of the training loss; inf if diverged.

    Args:
        run: From `run_arm`.
        data: What it was trained on.
        only: Which measures: the largest Hessian eigenvalue (residual at most 1 % of
            it), trace over number of parameters, worst rise within 0.05 (l2) and
            within 0.002 of each weight's size (l-infinity), `first_order_flatness`
            within 0.05. They print the training loss beside it: without it the
            largest eigenvalue says nothing.

    Returns:
        Name to number.
    """
    if run.status == "diverged":
        return dict.fromkeys(only, np.inf)
    key, params, batch = jax.random.key(0), run.params, data.train
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    measures = {
        "lambda_max": lambda: hessian_top(
            TRAINING_LOSS, params, batch, tol=0.01, key=key
        ).values[0],
        "trace_per_parameter": lambda: (
            hessian_trace(TRAINING_LOSS, params, batch, key=key).value / size
        ),
        "sharpness": lambda: (
            sharpness(TRAINING_LOSS, params, batch, rho=0.05, key=key).value
        ),
        "adaptive_sharpness": lambda: (
            sharpness(
                TRAINING_LOSS,
                params,
                batch,
                rho=0.002,
                p=np.inf,
                adaptive=True,
                key=key,
            ).value
        ),
        "first_order_flatness": lambda: (
            first_order_flatness(TRAINING_LOSS, params, batch, rho=0.05, key=key).value
        ),
    }
    return {name: float(measures[name]()) for name in only}


# One object: the measures compile once for it.
TRAINING_LOSS = LogitLoss(logits_fn)


def loss_curve(run: Run, plot: str = "training loss") -> Curve:
    """The curve of a run, over gradients of a batch; a diverged one ends early."""
    return Curve(
        run.curve[0].tolist(),
        run.curve[1].tolist(),
        run.arm,
        plot,
        "gradients of a batch",
        "mean loss of the batches",
        log_y=True,
    )


def tuned(arm: Arm, name: str) -> tuple[float, float]:
    """The stored choice of learning rate and parameter for a column.

    Raises:
        ValueError: If there is none, or it was made for other data, another network
            or another grid.
    """
    entry = read_choices().get(name, {}).get(arm.name)
    if entry is None or entry["hash"] != protocol_hash(arm):
        state = "none" if entry is None else "one of another protocol or grid"
        raise ValueError(
            f"tuned: the arm {arm.name!r} must have a tuned choice for {name!r} (got "
            f"{state}). Run benchmarks/sharpness_comparison.py --tune {arm.name}."
        )
    return entry["learning_rate"], entry["parameter"]


def protocol_hash(arm: Arm) -> str:
    """Twelve digits that change with data, network, training or the arm's grid."""
    protocol = [
        _DATA_KEY, _SAMPLES, _TRAIN, _NOISE, HELD_OUT,
        "MLPNet 40-128-128-10", _CLASSES, _BATCH, _MOMENTUM, _DECAY, GRADIENTS,
        LEARNING_RATES, arm.grid, arm.cost,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(protocol).encode()).hexdigest()[:12]


def read_choices() -> dict[str, Any]:
    """Column to arm to the stored choice."""
    return tomllib.loads(TUNED.read_text()) if TUNED.exists() else {}
