"""Data hyper-cleaning: a weight for each training sample, learned on clean data."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ..core._checks import check_nonnegative
from ..core._problem import as_function
from ._problem import BilevelProblem
from ._sampling import Minibatch


def data_cleaning(
    losses: Callable,
    train: PyTree[Array],
    validation: PyTree[Array],
    *,
    penalty: float | Array = 1e-3,
    batch: tuple[int, int] | None = None,
) -> BilevelProblem:
    """Which training samples deserve trust, judged by a clean validation set.

    `x` holds one number a training sample, `sigmoid(x)` its weight. The lower level
    trains a model on the mean of the weighted losses plus `penalty ||y||^2`; the upper
    level is the mean loss on the validation data.

    Args:
        losses: Function of the model's parameters `y` and data, one loss a sample.
        train: Training data, a pytree of arrays with one leading axis of samples; some
            labels may be wrong.
        validation: Clean data of the same form.
        penalty: Of the squared norm of all parameters, nonnegative.
        batch: Samples of each set that stochastic solvers draw; `None` for all.

    Returns:
        The problem.

    Raises:
        TypeError: if `losses` is not callable.
        ValueError: if `penalty` is negative, a batch size is not positive, data have no
            common axis of samples, or `losses` does not return one number a sample.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.bilevel import data_cleaning
        >>> def losses(w, data):
        ...     return (data[0] * w - data[1]) ** 2
        >>> clean, wrong = jnp.array([1.0, 2.0]), jnp.array([2.0, -4.0])
        >>> problem = data_cleaning(losses, (clean, wrong), (clean, 2 * clean))
        >>> round(float(problem.upper_value(jnp.zeros(2), jnp.array(1.0))), 3)
        2.5

    Source: L. Franceschi, M. Donini, P. Frasconi and M. Pontil (2017), Forward and
        reverse gradient-based hyperparameter optimization, arXiv 1703.01785, section
        5.1; weights by a sigmoid as in A. Shaban et al. (2019), arXiv 1810.10667.
    """
    check_nonnegative("data_cleaning", "penalty", penalty)
    for name, data in (("train", train), ("validation", validation)):
        lengths = sorted({len(leaf) for leaf in jtu.tree_leaves(data)})
        if len(lengths) != 1 or lengths[0] == 0:
            raise ValueError(
                f"data_cleaning: `{name}` must have one leading axis of samples, not "
                f"empty (got lengths {lengths})."
            )
    rows = jnp.arange(jtu.tree_leaves(train)[0].shape[0])
    losses = as_function("data_cleaning", "losses", losses)
    sample = None if batch is None else Minibatch((None, *batch, None))
    return BilevelProblem(
        _upper, _lower, losses, (train, rows), validation, penalty, sample=sample
    )


# Functions of the module, not closures: problems of one shape share compiled code.


def _upper(x, y, losses, train, validation, penalty):
    return jnp.mean(_each(losses, y, validation))


def _lower(x, y, losses, train, validation, penalty):
    data, rows = train
    square = sum(jnp.sum(leaf * leaf) for leaf in jtu.tree_leaves(y))
    # An `x` that is too short gives NaN, not the weight of another sample.
    weights = jax.nn.sigmoid(x.at[rows].get(mode="fill"))
    weighted = weights * _each(losses, y, data)
    return jnp.mean(weighted) + jnp.asarray(penalty, weighted.dtype) * square


def _each(losses, y, data):
    values, count = losses(y, data), len(jtu.tree_leaves(data)[0])
    if jnp.shape(values) != (count,):
        raise ValueError(
            "data_cleaning: `losses` must return one number a sample (got shape "
            f"{jnp.shape(values)} for {count} samples)."
        )
    return values
