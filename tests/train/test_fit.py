"""Fitting to the end: the same bits after a kill, a stop at NaN, watched, refused."""

import io
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from varan.train import (
    TrainingProgress,
    fit,
    load_checkpoint,
    start_training,
)

KEY = jax.random.key(0)
OPTIMISER = optax.sgd(0.05, momentum=0.9)


def noisy(weight, batch, key):
    """A loss that draws: its keys must come out the same after a pause."""
    inputs, targets = batch
    noise = 0.1 * jax.random.normal(key, targets.shape)
    return jnp.mean((inputs @ weight - targets - noise) ** 2)


def setting():
    inputs = jax.random.normal(KEY, (20, 3))
    data = (inputs, inputs @ jnp.array([1.0, -2.0, 0.5]))
    return start_training(jnp.zeros(3), OPTIMISER, key=KEY), data


def train(folder=None, epochs=6, progress=None, loss=noisy, data=None):
    state, own = setting()
    return fit(
        state,
        loss,
        own if data is None else data,
        OPTIMISER,
        epochs=epochs,
        batch_size=8,
        chunk=2,
        folder=folder,
        progress=progress,
    )


@pytest.fixture(scope="module")
def whole():
    return train()


def assert_same(one, other):
    assert one.status == other.status == "finished"
    np.testing.assert_array_equal(one.losses, other.losses)
    for a, b in zip(
        jax.tree.leaves(one.state), jax.tree.leaves(other.state), strict=True
    ):
        assert bool(jnp.all(a == b))


def test_resumes_after_an_interruption_to_the_last_bit(whole, tmp_path):
    def interrupt(epoch, loss):
        if epoch == 3:  # in the second chunk: the first is saved, this one is lost
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=interrupt)
    seen = []
    resumed = train(tmp_path, progress=lambda epoch, loss: seen.append(epoch))
    assert seen == [3, 4, 5, 6]
    assert_same(resumed, whole)


def test_resumes_after_a_kill_to_the_last_bit(whole, tmp_path):
    script = f"""
        import importlib.util, os, signal, jax
        jax.config.update("jax_enable_x64", True)
        spec = importlib.util.spec_from_file_location("this", {__file__!r})
        this = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(this)
        def kill(epoch, loss):
            if epoch == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        this.train({str(tmp_path)!r}, progress=kill)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["training.checkpoint"]
    assert_same(train(tmp_path), whole)


def test_a_finished_training_goes_on_when_epochs_are_raised(whole, tmp_path):
    train(tmp_path, epochs=4)
    again = train(tmp_path, epochs=4)
    assert again.losses.shape == (4,) and int(again.state.epoch) == 4
    assert_same(train(tmp_path), whole)


def test_diverging_stops_and_keeps_curve_and_last_good_state(tmp_path):
    def breaks(weight, batch, key):
        # Leaves the numbers once the weights have moved far enough.
        far = jnp.sum(jnp.abs(weight)) > 2.5
        return noisy(weight, batch, key) + jnp.where(far, jnp.nan, 0.0)

    seen = []
    result = train(tmp_path, 20, lambda *told: seen.append(told), breaks)
    assert result.status == "diverged"
    bad = np.flatnonzero(~np.isfinite(result.losses))
    assert bad.size and bad[0] >= 1 and len(seen) == result.losses.size < 20
    assert int(result.state.epoch) == result.losses.size - 2
    assert bool(jnp.all(jnp.isfinite(result.state.model)))
    saved, record = load_checkpoint(tmp_path / "training.checkpoint", setting()[0])
    assert int(saved.epoch) == int(result.state.epoch) == len(record["losses"])


def test_another_training_in_the_folder_is_refused(tmp_path):
    train(tmp_path, epochs=2)
    _, (inputs, targets) = setting()
    with pytest.raises(ValueError, match="another data"):
        train(tmp_path, data=(inputs, targets + 1))
    with pytest.raises(ValueError, match="must be at least 1"):
        train(epochs=0)


def test_progress_is_a_bar_on_a_terminal_and_sparse_lines_elsewhere():
    seconds = iter([0.0, 1.0, 12.0, 13.0, 14.0])
    out = io.StringIO()
    console = Console(file=out, width=80)
    with TrainingProgress(4, console, lambda: next(seconds)) as progress:
        for epoch in range(1, 5):
            progress(epoch, 1 / epoch)
    assert out.getvalue().splitlines() == [
        "epoch 2 of 4: loss 0.5 (12 s)",
        "epoch 4 of 4: loss 0.25 (14 s)",
    ]
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    with TrainingProgress(4, console) as progress:
        progress(3, 0.125)
        progress._bar.refresh()
    assert "3/4 epochs, loss 0.125" in out.getvalue()
