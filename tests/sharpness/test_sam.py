"""Sharpness-aware minimisation: closed forms of its ascent and of one step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from varan.sharpness import asam, sam, usam
from varan.sharpness._sam import ascent

H = jnp.array([[3.0, 1.0], [1.0, -2.0]])


def step(method, w, slope):
    return method.update(slope(w), method.init(w), w, grad_fn=lambda w, i: slope(w))


def slope(w):
    return H @ w


W = jnp.array([1.0, 2.0])


def test_step_on_a_quadratic():
    """d = H w + rho H^2 w / |H w|."""
    updates, _ = step(sam(optax.sgd(1.0), 0.3), W, slope)
    g = H @ W
    expected = g + 0.3 * H @ g / jnp.linalg.norm(g)
    np.testing.assert_allclose(updates, -expected, rtol=1e-12)


def test_unnormalised_step_on_a_quadratic():
    updates, _ = step(usam(optax.sgd(1.0), 0.3), W, slope)
    np.testing.assert_allclose(updates, -(H @ W + 0.3 * H @ H @ W), rtol=1e-12)


def test_adaptive_step():
    """e = rho T^2 g / |T g|, with T = 1 for vectors and |w| + eta for matrices."""
    matrix = jnp.stack([W, -W])
    _, state = step(asam(optax.sgd(1.0), 0.3, eta=0.1), (W, matrix), lambda p: p)
    sizes = jnp.concatenate([jnp.ones(2), jnp.abs(matrix).ravel() + 0.1])
    g = jnp.concatenate([W, matrix.ravel()])
    e = 0.3 * sizes**2 * g / jnp.linalg.norm(sizes * g)
    np.testing.assert_allclose(state.info.ascent_norm, jnp.linalg.norm(e), rtol=1e-12)
    np.testing.assert_allclose(state.info.first_order_gain, g @ e, rtol=1e-12)


def test_own_scale():
    method = sam(optax.sgd(1.0), 0.5, p=math.inf, adaptive=lambda w: 2 * jnp.abs(w))
    updates, _ = step(method, W, slope)
    e = 0.5 * 2 * jnp.abs(W) * jnp.sign(H @ W)
    np.testing.assert_allclose(updates, -H @ (W + e), rtol=1e-12)


@jax.jit
def ball_points(g):
    return [ascent(g, 0.7, p=p) for p in (1, 1.5, 2, 3, jnp.inf)]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.floats(-100, 100), min_size=4, max_size=4))
@example([0.0, 0.0, 0.0, 1e-05])  # its reciprocal times itself is not 1
def test_ascent_is_the_ball_s_best_point(values):
    """It lies on the ball and its gain is rho times the dual norm."""
    g = np.array(values)
    points = ball_points((jnp.asarray(g[:1]), jnp.asarray(g[1:])))
    for p, e in zip((1, 1.5, 2, 3, np.inf), points, strict=True):
        e = np.concatenate(e)
        if not np.any(np.abs(g) > 1e-150):
            continue
        dual = np.inf if p == 1 else 1 if p == np.inf else p / (p - 1)
        length = np.linalg.norm(e, p)
        assert length <= 0.7 * (1 + 1e-9)
        scale = np.max(np.abs(g))
        gain, best = g / scale @ e, 0.7 * np.linalg.norm(g / scale, dual)
        np.testing.assert_allclose(gain, best, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e19, 1e38])
@pytest.mark.parametrize("make", [sam, asam])
def test_radius_of_extreme_gradients(float32, make, scale):
    """Squares of the entries would underflow or overflow in float32."""
    gradient = jnp.asarray([[scale, -scale]], jnp.float32)
    w = jnp.zeros((1, 2), jnp.float32)
    method = make(optax.sgd(1.0), 0.5)
    _, state = method.update(gradient, method.init(w), w, grad_fn=lambda w, i: gradient)
    radius = 0.5 if make is sam else 0.5 * 0.01  # of the size 0 + eta
    np.testing.assert_allclose(state.info.ascent_norm, radius, rtol=1e-6)


def test_signs_move_each_entry_by_the_radius():
    e = ascent(jnp.array([3.0, -1e-9, 0.0]), 0.2, p=jnp.inf)
    np.testing.assert_allclose(e, [0.2, -0.2, 0.0])


def test_two_ascents_stay_in_the_ball():
    method = sam(optax.sgd(1.0), 0.4, ascent_steps=2)
    updates, state = step(method, W, slope)
    half = 0.2 * (H @ W) / jnp.linalg.norm(H @ W)
    g = H @ (W + half)
    e = half + 0.2 * g / jnp.linalg.norm(g)
    np.testing.assert_allclose(updates, -H @ (W + e), rtol=1e-12)
    assert state.info.ascent_norm <= 0.4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rho": -0.1}, "`rho` must not be negative"),
        ({"rho": math.nan}, "`rho` must not be negative"),
        ({"eta": -1.0}, "`eta` must not be negative"),
        ({"p": 0.5}, "`p` must be at least 1"),
        ({"p": math.nan}, "`p` must be at least 1"),
        ({"ascent_steps": 0}, "`ascent_steps` must be at least 1"),
        ({"ascent_steps": 1.5}, "`ascent_steps` must be a whole number"),
        ({"rho": jnp.ones(2)}, "`rho` must be one number"),
        ({"p": 3, "normalize": False}, "so `p` must be 2"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        sam(optax.sgd(0.1), **settings)
