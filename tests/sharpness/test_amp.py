"""Adversarial model perturbation: what the ball does, and what is left without it."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import amp, sam, usam

H = jnp.array([[3.0, 1.0], [1.0, -2.0]])
W = jnp.array([1.0, 2.0])


def step(method, w, slope):
    return method.update(slope(w), method.init(w), w, grad_fn=lambda w, i: slope(w))


def quadratic(w):
    return H @ w


def test_outside_the_ball_it_is_sam():
    ours, state = step(amp(optax.sgd(1.0), 0.3), W, quadratic)
    theirs, _ = step(sam(optax.sgd(1.0), 0.3), W, quadratic)
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    assert state.rule_state.active == 1


def test_inside_the_ball_it_is_unnormalised_sam():
    ours, state = step(amp(optax.sgd(1.0), 1e3, 0.1), W, quadratic)
    theirs, _ = step(usam(optax.sgd(1.0), 0.1), W, quadratic)
    np.testing.assert_array_equal(ours, theirs)
    assert state.rule_state.active == 0


def test_ascents_are_projected_one_by_one():
    """The last two of three ascents start where the ball stopped the one before."""
    _, state = step(amp(optax.sgd(1.0), 0.3, 0.2, 3), W, quadratic)
    d = np.zeros(2)
    for _ in range(3):
        d = d + 0.2 * np.asarray(quadratic(W + d))
        d *= min(1, 0.3 / np.linalg.norm(d))
    np.testing.assert_allclose(state.info.ascent_norm, 0.3, rtol=1e-12)
    np.testing.assert_allclose(state.info.first_order_gain, quadratic(W) @ d)
    assert state.grad_evals == 4


def test_more_ascents_climb_higher():
    gains = []
    for ascents in (1, 3):
        method = amp(optax.sgd(1.0), 1.0, 0.05, ascents, measure_gain=True)
        _, state = method.update(
            quadratic(W),
            method.init(W),
            W,
            grad_fn=lambda w, i: quadratic(w),
            value_fn=lambda w: w @ H @ w / 2,
        )
        gains.append(state.info.actual_gain)
    assert gains[1] > gains[0] > 0


def test_one_ball_for_each_tensor():
    """Only the tensor with the large gradient is held back."""
    params = {"steep": jnp.ones(3), "flat": jnp.full(2, 0.01)}
    method = amp(optax.sgd(1.0), 0.5, ball="leaf")
    updates, state = step(method, params, lambda p: p)
    length = jnp.linalg.norm(params["steep"])
    expected = params["steep"] * (1 + 0.5 / length)
    np.testing.assert_allclose(updates["steep"], -expected, rtol=1e-12)
    np.testing.assert_allclose(updates["flat"], -0.02, rtol=1e-12)
    assert state.rule_state.active == 0.5


def test_no_ascent_is_the_base_with_a_warning():
    with pytest.warns(UserWarning, match="`inner_iter` = 0 is the base alone"):
        method = amp(optax.sgd(1.0), inner_iter=0)
    updates, state = step(method, W, quadratic)
    np.testing.assert_array_equal(updates, -quadratic(W))
    assert state.grad_evals == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"eps": -0.1}, "`eps` must not be negative"),
        ({"inner_lr": -1.0}, "`inner_lr` must not be negative"),
        ({"inner_iter": -1}, "`inner_iter` must not be negative"),
        ({"ball": "layer"}, "`ball` must be one of"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        amp(optax.sgd(0.1), **settings)
