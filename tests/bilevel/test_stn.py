"""Self-tuning: what each kind of step does and does not, counts, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.bilevel import (
    HyperLinear,
    Hyperparameter,
    respond,
    self_tuning,
)

KEY = jax.random.key(0)
EPOCHS, BATCH, WARMUP = 6, 5, 2
# Not in alphabetical order: entries of h are in the order given.
SPECS = {
    "penalty": Hyperparameter(0.3, low=0.0),
    "count": Hyperparameter(2.5, low=1.0, high=5.0, discrete=True),
    "batchwise": Hyperparameter(-1.0, scale=0.2, per_example=False),
}
TRACES = []


def fit(model, batch, h):
    assert h.shape == (batch[1].shape[0], 3)
    return jnp.mean((jax.vmap(model)(batch[0], h)[:, 0] - batch[1]) ** 2)


def regularised(model, batch, h, values, key):
    TRACES.append(1)
    assert values["penalty"].shape == values["count"].shape == (BATCH,)
    assert values["batchwise"].shape == ()
    weights = jax.vmap(lambda row: model.response(row).weight[0])(h)
    strength = values["penalty"] * values["count"]
    return fit(model, batch, h) + jnp.mean(strength * jnp.sum(weights**2, 1))


@pytest.fixture(scope="module")
def setting():
    inputs = jax.random.normal(KEY, (20, 3))
    targets = inputs @ jnp.array([1.0, -2.0, 0.5])
    return HyperLinear(3, 1, 3, key=KEY), (inputs, targets)


# Made once: an optimiser made anew would compile anew.
OPTIMISERS = {
    "optimiser": optax.sgd(0.01, momentum=0.5),
    "hyper_optimiser": optax.sgd(0.05),
}


def tune(setting, key=KEY, entropy_weight=1e-3, scale=1.0, **settings):
    model, (inputs, targets) = setting
    return self_tuning(
        key,
        model,
        SPECS,
        regularised,
        fit,
        (scale * inputs, targets),
        (inputs[:12], targets[:12]),
        epochs=EPOCHS,
        batch_size=BATCH,
        warmup=WARMUP,
        entropy_weight=entropy_weight,
        **{**OPTIMISERS, **settings},
    )


@pytest.fixture(scope="module")
def result(setting):
    return tune(setting)


def test_hyperparameters_start_in_order_rest_in_warmup_and_move_then(result):
    start = [spec.unconstrained() for spec in SPECS.values()]
    for epoch in range(WARMUP):
        np.testing.assert_allclose(result.h_schedule[epoch], start, rtol=1e-12)
    assert bool(jnp.all(result.h_schedule[WARMUP:] != jnp.array(start)[None]))
    np.testing.assert_array_equal(result.h, result.h_schedule[-1])
    np.testing.assert_allclose(result.schedule["penalty"][0], 0.3)
    np.testing.assert_array_equal(result.schedule["count"][:WARMUP], [2.0, 2.0])


def test_counts_best_epoch_and_its_model(result, setting):
    # 20 samples in batches of 5: two rounds of two training steps an epoch.
    assert int(result.train_gradients) == EPOCHS * 4
    assert int(result.valid_gradients) == (EPOCHS - WARMUP) * 2
    best = int(jnp.argmin(result.valid_losses))
    assert int(result.best_epoch) == best and not bool(result.diverged)
    np.testing.assert_array_equal(result.best_h, result.h_schedule[best])
    _, (inputs, targets) = setting
    rows = jnp.broadcast_to(result.best_h[None], (12, 3))
    plain = respond(result.best_model, result.best_h)
    for model in (result.best_model, plain):
        value = fit(model, (inputs[:12], targets[:12]), rows)
        np.testing.assert_allclose(value, result.valid_losses[best], rtol=1e-10)
    assert result.valid_losses[-1] < 0.8 * result.valid_losses[0]


def test_entropy_widens_the_perturbations_and_new_values_compile_nothing(
    result, setting
):
    before = len(TRACES)
    wider = tune(setting, entropy_weight=1.0)
    assert bool(jnp.all(wider.scales > result.scales))
    broken = tune(setting, scale=jnp.nan)
    assert bool(broken.diverged)
    other = tune(setting, key=jax.random.key(1))
    assert not bool(jnp.any(other.h == result.h))
    again = tune(setting)
    np.testing.assert_array_equal(again.h, result.h)
    assert len(TRACES) == before


def test_fixed_scales_stay_and_the_validation_step_is_not_perturbed(setting):
    # Weights that do not move, and a batch that is all of the validation data: then
    # the step in h is descent on the exact validation loss of the response.
    model, (inputs, targets) = setting
    data = (inputs[:BATCH], targets[:BATCH])
    still = optax.sgd(0.0)
    got = self_tuning(
        KEY, model, SPECS, regularised, fit, (inputs, targets), data,
        epochs=1, batch_size=BATCH, warmup=0, tune_scales=False,
        optimiser=still, hyper_optimiser=OPTIMISERS["hyper_optimiser"],
    )  # fmt: skip
    np.testing.assert_allclose(got.scales, [0.5, 0.5, 0.2], rtol=1e-12)
    h = jnp.array([spec.unconstrained() for spec in SPECS.values()])
    loss = lambda h: fit(model, data, jnp.broadcast_to(h[None], (BATCH, 3)))  # noqa: E731
    for _ in range(2):
        h = h - 0.05 * jax.grad(loss)(h)
    np.testing.assert_allclose(got.h, h, rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: tune(s, entropy_weight=-1.0), "must not be negative"),
        (lambda s: tune(s, train_steps=5), "leave 5 batches for `train_steps`"),
        (lambda s: tune(s, valid_steps=0), "must be at least 1"),
        (lambda s: tune((HyperLinear(3, 1, 2, key=KEY), s[1])), "respond to 3"),
        (lambda s: tune((None, s[1])), "got 0 layers"),
    ],
)
def test_bad_input_is_named(call, message, setting):
    with pytest.raises(ValueError, match=message):
        call(setting)


def test_no_hyperparameters_are_refused(setting):
    model, data = setting
    with pytest.raises(ValueError, match="must hold one at least"):
        self_tuning(
            KEY, model, {}, regularised, fit, data, data, epochs=1, batch_size=2
        )
