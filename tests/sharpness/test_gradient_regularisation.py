"""Gradient regularisation: its four schemes against closed forms, and flooding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import flooding, gr, usam

H = jnp.array([[3.0, 1.0], [1.0, -2.0]])
W = jnp.array([1.0, 2.0])
SCHEMES = ("forward", "backward", "central", "exact")


def step(method, w, slope):
    return method.update(slope(w), method.init(w), w, grad_fn=lambda w, i: slope(w))


def quadratic(w):
    return H @ w


@jax.grad
def quartic(w):
    return jnp.sum(w**4 + w**3) + w[0] ** 2 * w[1]


def penalty(w, scheme, eps=None):
    """What the scheme takes for H g."""
    updates, _ = step(gr(optax.sgd(1.0), 1.0, eps, scheme=scheme), w, quartic)
    return -updates - quartic(w)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_schemes_agree_on_a_quadratic(scheme):
    method = gr(optax.sgd(1.0), 0.3, 0.7, scheme=scheme)
    updates, _ = step(method, W, quadratic)
    g = H @ W
    np.testing.assert_allclose(updates, -(g + 0.3 * H @ g), rtol=1e-12)


@pytest.mark.parametrize(
    "scheme, order", [("forward", 1), ("backward", 1), ("central", 2)]
)
def test_order_of_the_differences(scheme, order):
    exact = jax.jacobian(quartic)(W) @ quartic(W)
    errors = [jnp.linalg.norm(penalty(W, scheme, eps) - exact) for eps in (1e-4, 2e-4)]
    np.testing.assert_allclose(errors[1] / errors[0], 2.0**order, rtol=0.02)
    np.testing.assert_allclose(penalty(W, "exact"), exact, rtol=1e-12)


def test_length_of_the_strength_is_unnormalised_sam():
    ours, _ = step(gr(optax.sgd(0.1), 0.3), W, quartic)
    explicit, _ = step(gr(optax.sgd(0.1), 0.3, 0.3), W, quartic)
    theirs, _ = step(usam(optax.sgd(0.1), 0.3), W, quartic)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(explicit, theirs)


def test_schedules_are_of_the_step():
    method = gr(optax.sgd(1.0), lambda t: jnp.where(t > 0, 0.1, 0.0), lambda t: 0.5)
    state = method.init(W)
    for strength in (0.0, 0.1):
        updates, state = method.update(
            H @ W, state, W, grad_fn=lambda w, i: quadratic(w)
        )
        expected = -(H @ W + strength * H @ H @ W)
        np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_mask_restricts_the_penalised_part():
    method = gr(optax.sgd(1.0), 0.3, scheme="exact", mask=jnp.array([True, False]))
    updates, _ = step(method, W, quadratic)
    g = H @ W
    expected = -(g + 0.3 * H @ (g * jnp.array([1.0, 0.0])))
    np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_lost_precision_is_counted():
    """A perturbation below rounding is reported, by the weights' own precision."""
    for dtype, eps, lost in (
        ("float32", 1e-5, 1),
        ("float64", 1e-5, 0),
        ("float32", 1e-2, 0),
        ("bfloat16", 1e-2, 1),
    ):
        w = jnp.asarray(W, dtype)
        _, state = step(gr(optax.sgd(0.1), 0.1, eps), w, lambda w: w)
        assert int(state.rule_state.imprecise) == lost
    _, state = step(gr(optax.sgd(0.1), 0.1), W, jnp.zeros_like)
    assert int(state.rule_state.imprecise) == 0


def test_flooding_regularises_the_gradient_in_two_steps():
    """Down and up is -eta^2 times the backward penalty, up and down the forward."""
    eta = 0.01

    def loss(w):
        return jnp.sum(w**4 + w**3) + w[0] ** 2 * w[1]

    here = float(loss(W))
    for levels, scheme in (
        ((here - 1, here + 1), "backward"),
        ((here + 1, here - 1), "forward"),
    ):
        w = W
        for level in levels:
            w = w - eta * jax.grad(flooding(loss, level))(w)
        expected = W - eta**2 * penalty(W, scheme, eta)
        np.testing.assert_allclose(w, expected, rtol=1e-12)


def test_flooded_loss_never_falls_below_the_level():
    losses = jnp.linspace(-1.0, 3.0, 9)
    flooded = flooding(lambda w: w, 0.5)(losses)
    assert jnp.min(flooded) == 0.5
    np.testing.assert_allclose(flooded[losses >= 0.5], losses[losses >= 0.5])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gamma": -0.1}, "`gamma` must not be negative"),
        ({"gamma": 0.1, "eps": 0.0}, "`eps` must be positive"),
        ({"gamma": 0.1, "eps": -0.1}, "`eps` must be positive"),
        ({"gamma": 0.1, "scheme": "double"}, "`scheme` must be one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        gr(optax.sgd(0.1), **settings)


def test_bad_level():
    with pytest.raises(ValueError, match="`level` must be finite"):
        flooding(lambda w: w, math.nan)
