"""Self-tuning: what each kind of step does and does not, exact answers, errors."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.bilevel import (
    HyperLinear,
    Hyperparameter,
    best_response_error,
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
    ("low", "high"),
    [(-math.inf, math.inf), (0.5, math.inf), (-math.inf, 3.0), (0.5, 3.0)],
)
def test_ranges_hold_and_the_start_comes_back(low, high):
    spec = Hyperparameter(0.7, low=low, high=high)
    np.testing.assert_allclose(spec.value(jnp.array(spec.unconstrained())), 0.7)
    values = spec.value(jnp.array([-30.0, 0.0, 30.0]))
    assert bool(jnp.all((values >= low) & (values <= high)))
    small = Hyperparameter(1e-9, low=0.0)
    np.testing.assert_allclose(small.value(jnp.array(small.unconstrained())), 1e-9)


def test_the_estimate_never_exceeds_the_distance_to_the_minimiser():
    # One weight, no regularisation: the minimiser is 2 whatever h is.
    inputs = jnp.linspace(-1.0, 1.0, 8)[:, None]
    spec = {"none": Hyperparameter(0.0)}

    def loss(model, batch, h, values, key):
        return jnp.mean((jax.vmap(model)(batch, h) - 2 * batch) ** 2)

    model = HyperLinear(1, 1, 1, key=KEY)
    certify = lambda model, stepsize: best_response_error(  # noqa: E731
        KEY, model, jnp.zeros(1), spec, loss, inputs, stepsize=stepsize
    )
    draws = jax.random.split(KEY, 4)
    truth = []
    for draw in draws:
        for_h, _ = jax.random.split(draw)
        h = 0.5 * jax.random.normal(for_h, (1, 1))[0]
        plain = model.response(h)
        start = jnp.array([plain.weight[0, 0], plain.bias[0]])
        away = jnp.linalg.norm(start - jnp.array([2.0, 0.0]))
        truth.append(away / jnp.linalg.norm(start))
    short, long = certify(model, 0.01), certify(model, 0.5)
    assert not short.proof
    assert 0 < short.value < long.value <= jnp.mean(jnp.array(truth)) + 1e-9
    # A response that is the minimiser does not move.
    exact = eqx.tree_at(
        lambda n: (n.base.weight, n.scale),
        jax.tree.map(lambda leaf: 0 * leaf if eqx.is_array(leaf) else leaf, model),
        (jnp.full((1, 1), 2.0), jnp.ones(())),
    )
    assert float(certify(exact, 0.5).value) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: Hyperparameter(1.0, low=1.0), "`start` must lie inside"),
        (lambda s: Hyperparameter(1.0, scale=0.0), "`scale` must be positive"),
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
