"""Training to the end: chunk by chunk, watched, saved, resumed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ._checkpoint import fingerprint, load_checkpoint, save_checkpoint
from ._loop import TrainState, gradient_update, train_epochs

_FILE = "training.checkpoint"


class FitResult(eqx.Module):
    """How a training ended.

    Args:
        state: The last state whose losses are finite; `state.model` is the model.
        losses: The mean batch loss of each epoch of this fit, and of those before
            that its folder held; NaN or infinite at the end where it diverged.
        status: `"finished"`, or `"diverged"` where a loss became NaN or infinite.
    """

    state: TrainState
    losses: Float[np.ndarray, " epochs"]
    status: Literal["finished", "diverged"] = eqx.field(static=True)


def fit(
    state: TrainState,
    loss: Callable[..., Float[Array, ""]],
    data: PyTree[Array],
    optimiser: optax.GradientTransformation,
    *,
    epochs: int,
    batch_size: int,
    chunk: int = 10,
    update: Callable[..., tuple[PyTree, PyTree, Any]] = gradient_update,
    progress: Callable[[int, float], None] | None = None,
    folder: str | os.PathLike | None = None,
) -> FitResult:
    """Trains up to an epoch, shows how it goes, and survives being killed.

    Runs `train_epochs` a chunk at a time; between chunks it reports, saves, and stops
    where the loss is no number any more. With a `folder`, calling it again with the
    same arguments continues after the last whole chunk, and the result is the same to
    the last bit as that of a run that was never stopped.

    Args:
        state: From `start_training`, or from an earlier fit without a folder.
        loss: As for `train_epochs`.
        data: As for `train_epochs`.
        optimiser: The transformation that `state` was started with.
        epochs: The epoch to reach, counted from the start of training, at least 1; it
            may be raised to go on from a finished run.
        batch_size: As for `train_epochs`.
        chunk: Epochs a compiled call, at least 1; one that does not divide `epochs`
            compiles a second time for the rest.
        update: As for `train_epochs`.
        progress: Called after each chunk for each of its epochs with the number of
            epochs done and the loss; `TrainingProgress` is one.
        folder: Where to save after each chunk, and from where to continue; made where
            it does not exist. One folder a training.

    Returns:
        A `FitResult`; read its `status`. Where the training diverged, its state is
        that before the chunk in which it did, and the losses show when.

    Raises:
        ValueError: On bad sizes or data, or a folder whose checkpoint is damaged or
            belongs to another training (other data, start or batch size).

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.train import fit, start_training
        >>> x = jnp.arange(8.0) / 8
        >>> loss = lambda w, batch: jnp.mean((w * batch[0] - batch[1]) ** 2)
        >>> optimiser = optax.sgd(0.5)
        >>> state = start_training(jnp.zeros(()), optimiser, key=jax.random.key(0))
        >>> result = fit(state, loss, (x, 3 * x), optimiser, epochs=50, batch_size=4)
        >>> result.status, round(float(result.state.model), 3)
        ('finished', 3.0)
    """
    if epochs < 1 or chunk < 1:
        raise ValueError(
            f"fit: `epochs` and `chunk` must be at least 1 (got {epochs} and {chunk})."
        )
    data = jtu.tree_map(jnp.asarray, data)
    run = None
    losses: list[float] = []
    if folder is not None:
        run = _Run(Path(folder) / _FILE, state, data, batch_size)
        state, losses = run.read(state)
    status = "finished"
    while int(state.epoch) < epochs:
        length = min(chunk, epochs - int(state.epoch))
        following, values = train_epochs(
            state,
            loss,
            data,
            optimiser,
            epochs=length,
            batch_size=batch_size,
            update=update,
        )
        found = np.asarray(values)
        losses += found.tolist()
        if progress is not None:
            for offset, value in enumerate(found, int(state.epoch) + 1):
                progress(offset, float(value))
        if not np.all(np.isfinite(found)):
            status = "diverged"
            break
        state = following
        if run is not None:
            run.write(state, losses)
    return FitResult(state, np.asarray(losses), status)


class _Run:
    """The checkpoint of one training, and by what it is known."""

    def __init__(self, path: Path, start, data, batch_size: int):
        self.path = path
        self.identity = {
            "start": fingerprint(start),
            "data": fingerprint(data),
            "batch size": batch_size,
        }

    def read(self, start):
        if not self.path.exists():
            return start, []
        state, record = load_checkpoint(self.path, start)
        for name, value in self.identity.items():
            if record.get(name) != value:
                raise ValueError(
                    "fit: `folder` must be empty or hold this training (got "
                    f"{self.path} of one with another {name}). Give each training its "
                    "own folder."
                )
        return state, record["losses"]

    def write(self, state, losses):
        save_checkpoint(self.path, state, {**self.identity, "losses": losses})
