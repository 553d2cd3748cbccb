"""Flatness-aware minimisation: its two differences, and the methods it contains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import fad, gam, sam

H = jnp.array([[3.0, 1.0], [1.0, -2.0]])
W = jnp.array([1.0, 2.0])


def step(method, w, slope):
    return method.update(slope(w), method.init(w), w, grad_fn=lambda w, i: slope(w))


def unit(v):
    return v / jnp.linalg.norm(v)


@jax.grad
def quartic(w):
    return jnp.sum(w**4 + w**3) + w[0] ** 2 * w[1]


def test_direction_on_a_quadratic():
    """h0 = rho H g0 / |g0|, h1 = rho H g2 / |g2|, exactly."""
    updates, state = step(fad(optax.sgd(1.0), 0.4, 0.7, 0.3), W, lambda w: H @ w)
    g0 = H @ W
    h0 = 0.4 * H @ unit(g0)
    g2 = H @ (W + 0.4 * unit(h0))
    h1 = 0.4 * H @ unit(g2)
    expected = g0 + 0.7 * (0.3 * h0 + 0.7 * h1)
    np.testing.assert_allclose(updates, -expected, rtol=1e-12)
    assert state.grad_evals == 4


def test_zeroth_order_alone_is_sam():
    ours, _ = step(fad(optax.sgd(1.0), 0.3, 1.0, 1.0), W, quartic)
    theirs, _ = step(sam(optax.sgd(1.0), 0.3), W, quartic)
    np.testing.assert_array_equal(ours, theirs)


def test_first_order_alone_is_the_term_of_gam():
    """GAM with its second pair alone: g3, and FAD's g0 + (g3 - g2)."""
    ours, _ = step(fad(optax.sgd(1.0), 0.4, 1.0, 0.0, rho_inner=0.1), W, quartic)
    only = gam(optax.sgd(1.0), 0.4, 0.1, betas=(0.0, 1.0, 1.0), gamma=0.0)
    theirs, _ = step(only, W, quartic)
    g0 = quartic(W)
    steep = W + 0.4 * unit(quartic(W + 0.1 * unit(g0)) - g0)
    np.testing.assert_allclose(-ours, g0 + (-theirs - quartic(steep)), rtol=1e-10)


def test_linear_loss_has_no_steepest_point():
    slope = jnp.array([1.0, -2.0])
    updates, state = step(fad(optax.sgd(1.0)), W, lambda w: slope)
    np.testing.assert_array_equal(updates, -slope)
    assert state.info.ascent_norm == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rho": 0.0}, "`rho` must be positive"),
        ({"rho_inner": 0.0}, "`rho_inner` must be positive"),
        ({"alpha": -0.1}, "`alpha` must not be negative"),
        ({"beta": 1.1}, "`beta` must lie in"),
        ({"beta": jnp.nan}, "`beta` must lie in"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        fad(optax.sgd(0.1), **settings)
