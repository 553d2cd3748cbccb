"""The training loop: chunks do not change the numbers, bad input is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import sam
from varan.train import epoch_batches, gradient_update, start_training, train_epochs

KEY = jax.random.key(0)


def loss(model, batch):
    inputs, targets = batch
    return jnp.mean((inputs @ model["weight"] - targets) ** 2)


@pytest.fixture(scope="module")
def setting():
    inputs = jax.random.normal(KEY, (30, 3))
    truth = jnp.array([1.0, -2.0, 0.5])
    optimiser = optax.sgd(0.1, momentum=0.5)
    state = start_training(
        {"weight": jnp.zeros(3), "name": "linear"}, optimiser, key=KEY
    )
    return state, (inputs, inputs @ truth), optimiser, truth


def run(setting, epochs, state=None):
    start, data, optimiser, _ = setting
    return train_epochs(
        state or start, loss, data, optimiser, epochs=epochs, batch_size=8
    )


def test_learns(setting):
    state, losses = run(setting, 60)
    assert losses.shape == (60,) and losses[-1] < 1e-6 * losses[0]
    np.testing.assert_allclose(state.model["weight"], setting[3], atol=1e-3)
    assert state.model["name"] == "linear" and int(state.epoch) == 60


def test_chunks_give_the_same_numbers(setting):
    whole, losses = run(setting, 6)
    half, first = run(setting, 3)
    half, second = run(setting, 3, half)
    np.testing.assert_array_equal(losses, jnp.concatenate([first, second]))
    np.testing.assert_array_equal(whole.model["weight"], half.model["weight"])


def test_does_not_compile_again(setting):
    traces = []

    def counted(model, batch):
        traces.append(1)
        return loss(model, batch)

    state, data, optimiser, _ = setting
    for scale in (1.0, 2.0):
        scaled = jax.tree.map(lambda leaf, s=scale: s * leaf, data)
        train_epochs(state, counted, scaled, optimiser, epochs=2, batch_size=8)
    assert len(traces) == 1


def test_vmaps_over_settings(setting):
    state, data, _, _ = setting

    def final(rate):
        optimiser = optax.sgd(rate)
        start = start_training(state.model, optimiser, key=KEY)
        end, _ = train_epochs(start, loss, data, optimiser, epochs=2, batch_size=8)
        return end.model["weight"]

    rates = jnp.array([0.01, 0.1])
    together = jax.vmap(final)(rates)
    for rate, weight in zip(rates, together, strict=True):
        np.testing.assert_allclose(final(rate), weight, rtol=1e-12)


def test_float32_stays():
    model, optimiser = jnp.zeros(3, jnp.float32), optax.sgd(0.1, momentum=0.9)
    data = (jnp.ones((4, 3), jnp.float32), jnp.ones(4, jnp.float32))
    state = start_training(model, optimiser, key=KEY)
    state, losses = train_epochs(
        state,
        lambda m, b: jnp.mean((b[0] @ m - b[1]) ** 2),
        data,
        optimiser,
        epochs=2,
        batch_size=2,
    )
    assert state.model.dtype == losses.dtype == jnp.float32


def test_batches_hold_each_row_at_most_once():
    batches = np.asarray(epoch_batches(KEY, 10, 3))
    assert batches.shape == (3, 3) and len(np.unique(batches)) == 9
    other = np.asarray(epoch_batches(jax.random.fold_in(KEY, 1), 10, 3))
    assert not np.array_equal(batches, other)


def test_diverging_run_shows(setting):
    state, data, _, _ = setting
    optimiser = optax.sgd(1e200)
    start = start_training(state.model, optimiser, key=KEY)
    _, losses = train_epochs(start, loss, data, optimiser, epochs=3, batch_size=8)
    assert not jnp.isfinite(losses[-1])


def test_bad_input(setting):
    state, data, optimiser, _ = setting

    def attempt(data, batch_size):
        train_epochs(state, loss, data, optimiser, epochs=1, batch_size=batch_size)

    with pytest.raises(ValueError, match=r"`batch_size` must lie in 1 \.\. 30"):
        attempt(data, 31)
    with pytest.raises(ValueError, match="one leading axis"):
        attempt((data[0], data[1][:5]), 2)
    with pytest.raises(ValueError, match="nothing to train"):
        start_training({"name": "empty"}, optimiser, key=KEY)
    assert not eqx.is_array(state.model["name"])


def test_a_loss_with_a_key_gets_another_each_step():
    draws = lambda model, batch, key: model + jax.random.uniform(key)  # noqa: E731
    optimiser = optax.sgd(0.0)
    state = start_training(jnp.zeros(()), optimiser, key=KEY)
    data = jnp.arange(4.0)
    _, losses = train_epochs(state, draws, data, optimiser, epochs=5, batch_size=4)
    assert len(set(losses.tolist())) == 5


@pytest.mark.parametrize(
    "optimiser",
    [
        optax.lbfgs(),
        optax.contrib.sam(
            optax.sgd(0.2),
            optax.chain(optax.contrib.normalize(), optax.sgd(0.01)),
            opaque_mode=True,
        ),
    ],
    ids=["line search", "second gradient"],
)
def test_optimisers_that_evaluate_the_loss_themselves(setting, optimiser):
    state, data, _, truth = setting
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        start = start_training(state.model, optimiser, key=KEY)
        end, losses = train_epochs(
            start, loss, data, optimiser, epochs=15, batch_size=30
        )
    assert losses[-1] < 1e-2 * losses[0]
    np.testing.assert_allclose(end.model["weight"], truth, atol=0.1)


def test_an_update_of_ones_own(setting):
    state, data, optimiser, _ = setting

    def signs(loss, params, opt_state, optimiser):
        value, gradient = jax.value_and_grad(loss)(params)
        step = lambda p, g: p - 0.1 * jnp.sign(g)  # noqa: E731
        return jax.tree.map(step, params, gradient), opt_state, value

    end, _ = train_epochs(
        state, loss, data, optimiser, epochs=1, batch_size=30, update=signs
    )
    np.testing.assert_allclose(jnp.abs(end.model["weight"]), 0.1)


def test_gradients_of_parts_of_a_batch_are_refused():
    """The loss is of the whole batch: each part's gradient would be the whole one's."""
    optimiser, start = sam(optax.sgd(0.1), 0.1, microbatch=2), jnp.ones(2)
    with pytest.raises(ValueError, match="microbatch"):
        gradient_update(
            lambda w: jnp.sum(w**2), start, optimiser.init(start), optimiser
        )
