"""Gradient norm aware minimisation: its gradients on quadratics, its two modes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import first_order_flatness, gam, sharpness
from varan.sharpness._engine import Call
from varan.sharpness._four_gradients import four_gradients
from varan.sharpness._gam import orthogonal

H = jnp.array([[3.0, 1.0], [1.0, -2.0]])
W = jnp.array([1.0, 2.0])


def step(method, w, slope):
    return method.update(slope(w), method.init(w), w, grad_fn=lambda w, i: slope(w))


def quadratic(w):
    return H @ w


def unit(v):
    return v / jnp.linalg.norm(v)


@jax.grad
def quartic(w):
    return jnp.sum(w**4 + w**3) + w[0] ** 2 * w[1]


def test_released_direction():
    """The four gradients put together as the released code does."""
    method = gam(optax.sgd(1.0), 0.4, 0.1, betas=(0.5, 2.0, 1.5), gamma=0.3)
    updates, state = step(method, W, quartic)
    g0 = quartic(W)
    g1 = quartic(W + 0.1 * unit(g0))
    steep = W + 0.4 * unit(g1 - g0)
    g2 = quartic(steep)
    g3 = quartic(steep + 0.1 * unit(g2))
    s, m = 0.5 * g1 + 1.5 * g3, g0 + 2.0 * g2
    v = m - (m @ s) / (s @ s) * s
    np.testing.assert_allclose(updates, -(s - 0.3 * v), rtol=1e-10)
    np.testing.assert_allclose(state.info.ascent_norm, 0.4, rtol=1e-12)


def test_without_gamma_it_is_the_sum_of_two():
    plain = gam(optax.sgd(1.0), gamma=0.0)
    halved = gam(optax.sgd(1.0), gamma=0.0, normalize_scale=True)
    call = Call(None, None, lambda tree: tree, None, {})
    g = four_gradients(quartic(W), W, 0.2, (0.02, 0.02), quartic, call)
    updates, _ = step(plain, W, quartic)
    np.testing.assert_allclose(updates, -(g.up + g.steep_up), rtol=1e-12)
    mean, _ = step(halved, W, quartic)
    np.testing.assert_allclose(mean, updates / 2, rtol=1e-12)


def test_with_sam():
    """g1 at SAM's radius; the other three as before."""
    both, _ = step(gam(optax.sgd(1.0), gamma=0.0, sam_rho=0.3), W, quartic)
    g0 = quartic(W)
    g1 = quartic(W + 0.3 * unit(g0))
    g2 = quartic(steep := W + 0.2 * unit(g1 - g0))
    g3 = quartic(steep + 0.02 * unit(g2))
    np.testing.assert_allclose(both, -(g1 + g3), rtol=1e-10)


def test_difference_is_the_curvature_along_the_slope():
    """(g3 - g2) / r' tends to H g2 / |g2|, both steps keeping their own length."""
    call = Call(None, None, lambda tree: tree, None, {})
    g = four_gradients(quartic(W), W, 0.2, (1e-3, 1e-3), quartic, call)
    product = jax.jacobian(quartic)(W + g.e) @ unit(g.steep)
    difference = (g.steep_up - g.steep) / 1e-3
    assert unit(product) @ unit(difference) > 0.999
    np.testing.assert_allclose(jnp.linalg.norm(g.e), 0.2, rtol=1e-12)


def test_exact_mode_on_a_quadratic():
    method = gam(optax.sgd(1.0), 0.4, mode="hvp", alpha=0.7)
    updates, state = step(method, W, quadratic)
    g = H @ W
    steepest = H @ (W + 0.4 * unit(H @ unit(g)))
    expected = g + 0.7 * 0.4 * H @ unit(steepest)
    np.testing.assert_allclose(updates, -expected, rtol=1e-12)
    assert state.grad_evals == 6


def test_adaptive_ball_is_relative():
    """e = rho w^2 h / | |w| h |."""
    _, state = step(gam(optax.sgd(1.0), 0.4, adaptive=True), W, quadratic)
    g = H @ W
    up = 0.02 * W**2 * g / jnp.linalg.norm(W * g)
    h = H @ up
    e = 0.4 * W**2 * h / jnp.linalg.norm(W * h)
    np.testing.assert_allclose(state.info.ascent_norm, jnp.linalg.norm(e), rtol=1e-9)


def test_orthogonal_part():
    part = orthogonal(W, H[0])
    assert abs(part @ H[0]) < 1e-14
    np.testing.assert_allclose((W - part) @ H[1], (W @ H[0]) / 10 * (H[0] @ H[1]))
    np.testing.assert_array_equal(orthogonal(W, jnp.zeros(2)), W)


def test_flatness_that_it_seeks():
    """At a quadratic's minimum rho^2 lambda, twice the worst rise of the loss."""

    def loss(w, batch):
        return w @ batch @ w / 2

    hessian = jnp.array([[3.0, 1.0], [1.0, 2.0]])
    key, rho = jax.random.key(0), 0.3
    top = jnp.linalg.eigvalsh(hessian)[-1]
    first = first_order_flatness(loss, jnp.zeros(2), hessian, rho=rho, key=key)
    zeroth = sharpness(loss, jnp.zeros(2), hessian, rho=rho, key=key)
    np.testing.assert_allclose(first.value, rho**2 * top, rtol=1e-3)
    np.testing.assert_allclose(zeroth.value, rho**2 * top / 2, rtol=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rho": 0.0}, "`rho` must be positive"),
        ({"rho_inner": -1.0}, "`rho_inner` must be positive"),
        ({"sam_rho": 0.0}, "`sam_rho` must be positive"),
        ({"gamma": -1.0}, "`gamma` must not be negative"),
        ({"alpha": -1.0}, "`alpha` must not be negative"),
        ({"betas": (1.0, 1.0)}, r"`betas` must have shape \(3\)"),
        ({"betas": (1.0, -1.0, 1.0)}, "`betas` must not be negative"),
        ({"betas": (0.0, 1.0, 0.0)}, "`betas` must not both be zero"),
        ({"mode": "double"}, "`mode` must be one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        gam(optax.sgd(0.1), **settings)
