"""Goldstein's line search on batches: both tests, the contract, interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_breast_cancer

from varan import Smooth
from varan.firstorder import scale_by_goldstein_linesearch
from varan.testing import Case, contract


def coshes(x, scales):
    return jnp.sum(scales * jnp.cosh(x - 1.0))


def bowl(seed):
    return Smooth(coshes, jnp.asarray(np.random.default_rng(seed).uniform(0.5, 8.0, 4)))


def descent(**settings):
    return optax.chain(optax.sgd(1.0), scale_by_goldstein_linesearch(**settings))


CASES = [
    Case(
        descent,
        [bowl(0), bowl(1)],
        jnp.zeros(4),
        kind="optimiser",
        xfail={"accumulates": "optax.MultiSteps passes no extra arguments on"},
        name="goldstein",
    )
]
test_contract = contract(CASES)


@pytest.mark.parametrize("curvature", [1e-3, 1.0, 37.0, 1e4])
def test_the_step_passes_both_tests(curvature):
    def loss(w):
        return curvature * jnp.sum(w**2) / 2

    method = scale_by_goldstein_linesearch(0.1, max_stepsize=1e6, max_trials=120)
    w = jnp.array([1.0, -2.0])
    grad = jax.grad(loss)(w)
    arguments = {"value": loss(w), "grad": grad, "value_fn": loss}
    updates, state = method.update(-grad, method.init(w), w, **arguments)
    t, slope = state.stepsize, -jnp.sum(grad**2)
    np.testing.assert_allclose(updates, -t * grad)
    change = loss(w + updates) - loss(w)
    assert 0.9 * t * slope <= change <= 0.1 * t * slope


def test_it_lengthens_what_backtracking_alone_keeps_short():
    def loss(w):
        return 1e-3 * jnp.sum(w**2) / 2

    w = jnp.ones(2)
    method = scale_by_goldstein_linesearch(max_stepsize=1e4, max_trials=50)
    # As after a batch of which the curvature was a thousand times that of this one.
    state = method.init(w)._replace(stepsize=jnp.asarray(1.0))
    grad = jax.grad(loss)(w)
    _, state = method.update(-grad, state, w, value=loss(w), grad=grad, value_fn=loss)
    assert state.stepsize >= 2 * 0.1 / 1e-3


def test_a_search_out_of_trials_takes_what_it_knows():
    def loss(w):
        return 1e12 * jnp.sum(w**2)

    w = jnp.ones(2)
    method = scale_by_goldstein_linesearch(max_trials=3)
    grad = jax.grad(loss)(w)
    updates, state = method.update(
        -grad, method.init(w), w, value=loss(w), grad=grad, value_fn=loss
    )
    assert np.all(updates == 0) and state.trials == 3
    assert state.stepsize < 1  # the next search goes on from here


def test_losses_that_are_not_finite_are_stepped_back_from():
    def loss(w):
        return jnp.sum(w - jnp.log(w))

    w = jnp.full(2, 0.1)
    method = scale_by_goldstein_linesearch()
    updates, _ = method.update(
        jnp.array([-1.0, -1.0]), method.init(w), w,
        value=loss(w), grad=jnp.array([1.0, 1.0]), value_fn=loss,
    )  # fmt: skip
    assert jnp.all(w + updates > 0)


def test_batches_of_real_data_are_interpolated():
    X, y = load_breast_cancer(return_X_y=True)
    X, y = X[:100], y[:100]
    # A kernel's features: 100 of them for 100 samples, so that all can be fitted.
    X = (X - X.mean(0)) / X.std(0)
    X = np.exp(-((X[:, None] - X[None]) ** 2).sum(-1) / 10)
    X, sign = jnp.asarray(X), jnp.asarray(2.0 * y - 1)

    def loss(w, rows):
        return jnp.mean(jax.nn.relu(1 - sign[rows] * (X[rows] @ w)) ** 2)

    method = optax.chain(
        optax.sgd(1.0), scale_by_goldstein_linesearch(max_stepsize=100.0)
    )

    def step(carry, rows):
        w, state = carry
        value, grad = jax.value_and_grad(loss)(w, rows)
        updates, state = method.update(
            grad, state, w, value=value, grad=grad, value_fn=lambda w: loss(w, rows)
        )
        return (optax.apply_updates(w, updates), state), None

    rng = np.random.default_rng(0)
    batches = np.concatenate([rng.permutation(100).reshape(5, 20) for _ in range(150)])
    start = jnp.zeros(100)
    with jax.numpy_dtype_promotion("standard"):
        (w, _), _ = jax.lax.scan(
            step, (start, method.init(start)), jnp.asarray(batches)
        )
    rows = jnp.arange(100)
    assert loss(w, rows) < 1e-3 * loss(start, rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slope_rtol": 0.5}, "`slope_rtol` must be in"),
        ({"decrease_factor": 1.0}, "`decrease_factor` must be in"),
        ({"increase_factor": 1.0}, "`increase_factor` must be above 1"),
        ({"max_trials": 0}, "`max_trials` must be at least 1"),
        ({"max_stepsize": 0.0}, "`max_stepsize` must be positive"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        scale_by_goldstein_linesearch(**settings)
