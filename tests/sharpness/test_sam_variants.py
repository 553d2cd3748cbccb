"""Relatives of SAM: what each makes of the two gradients, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import averaged_weights, gsam, looksam, lsam, sam, wasam

H = jnp.array([[3.0, 1.0], [1.0, -2.0]])
W = jnp.array([1.0, 2.0])


def run(method, steps=1, w=W):
    """The updates of some steps on a quadratic, the weights, and the state."""
    state, updates = method.init(w), []
    for _ in range(steps):
        update, state = method.update(H @ w, state, w, grad_fn=lambda w, i: H @ w)
        w = w + update
        updates.append(np.asarray(update))
    return updates, w, state


def both_gradients(rho):
    g = np.asarray(H @ W)
    return g, np.asarray(H @ (W + rho * g / np.linalg.norm(g)))


def orthogonal(a, b):
    return a - (a @ b) / (b @ b) * b


def test_the_gap_shrinks_along_what_the_ascent_leaves():
    g, p = both_gradients(0.3)
    updates, _, state = run(gsam(optax.sgd(1.0), 0.3, 0.4))
    np.testing.assert_allclose(updates[0], -(p - 0.4 * orthogonal(g, p)), rtol=1e-12)
    np.testing.assert_allclose((updates[0] + p) @ p, 0, atol=1e-12)
    np.testing.assert_allclose(state.info.ascent_norm, 0.3)


def test_without_weight_of_the_gap_it_is_sam():
    one, two = run(gsam(optax.sgd(0.1), 0.3, 0.0), 3), run(sam(optax.sgd(0.1), 0.3), 3)
    np.testing.assert_array_equal(one[1], two[1])


def test_the_look_is_remembered():
    g, p = both_gradients(0.3)
    updates, _, state = run(looksam(optax.sgd(0.01), 0.3, 0.7, interval=3), 2)
    np.testing.assert_allclose(updates[0], -0.01 * p, rtol=1e-12)
    kept = orthogonal(p, g)
    now = np.asarray(H @ (W + updates[0]))
    step = now + 0.7 * np.linalg.norm(now) * kept / np.linalg.norm(kept)
    np.testing.assert_allclose(updates[1], -0.01 * step, rtol=1e-12)
    assert int(state.grad_evals) == 3


def test_looking_always_is_sam():
    one = run(looksam(optax.sgd(0.1), 0.3, interval=1), 3)
    np.testing.assert_array_equal(one[1], run(sam(optax.sgd(0.1), 0.3), 3)[1])


def test_far_is_sam_with_a_large_radius():
    np.testing.assert_array_equal(
        run(lsam(optax.sgd(0.1)))[1], run(sam(optax.sgd(0.1), 0.4))[1]
    )


def test_averages_are_those_of_the_weights_passed():
    _, end, state = run(wasam(optax.sgd(0.1), 0.3, start=1, every=2), 6)
    passed, w = [], W
    for _ in range(6):
        _, w, _ = run(sam(optax.sgd(0.1), 0.3), 1, w)
        passed.append(np.asarray(w))
    np.testing.assert_array_equal(end, passed[-1])
    mean = np.mean(passed[1::2], axis=0)
    np.testing.assert_allclose(averaged_weights(state, end), mean, rtol=1e-12)


def test_averages_of_half_precision_keep_moving():
    """A step of 1/256 at 1 is lost in bfloat16's running mean, not in ours."""
    method = wasam(optax.sgd(1.0), 0.0)
    w = jnp.ones(1, jnp.bfloat16)

    def step(carry, index):
        w, state = carry
        g = jnp.where(index == 0, -1.0, 0.0).astype(w.dtype)[None]
        update, state = method.update(g, state, w, grad_fn=lambda w, i: g)
        return (optax.apply_updates(w, update), state), None

    (w, state), _ = jax.lax.scan(step, (w, method.init(w)), jnp.arange(3))
    average = averaged_weights(state, w)
    assert average.dtype == jnp.bfloat16 and float(average[0]) == 2.0
    assert state.base_state[-1].average.dtype == jnp.float32


@pytest.mark.parametrize(
    "outer",
    [
        lambda method: optax.chain(optax.clip(100.0), method),
        lambda method: optax.MultiSteps(method, 1).gradient_transformation(),
    ],
)
def test_averages_inside_other_transformations(outer):
    method = wasam(optax.sgd(0.1), 0.3)
    expected = averaged_weights(run(method, 2)[2], W)
    with jax.numpy_dtype_promotion("standard"):  # optax's own counters
        _, _, state = run(outer(method), 2)
    np.testing.assert_allclose(averaged_weights(state, W), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e19])
def test_gap_of_extreme_gradients(scale):
    """In float32 the squares that the orthogonal part is made of would be lost."""
    g, p = both_gradients(0.3)
    hessian, w = scale * H.astype(jnp.float32), W.astype(jnp.float32)
    slope, method = lambda w, i=0: hessian @ w, gsam(optax.sgd(1.0), 0.3, 0.4)
    updates, _ = method.update(slope(w), method.init(w), w, grad_fn=slope)
    expected = -(p - 0.4 * orthogonal(g, p))
    np.testing.assert_allclose(updates / scale, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: looksam(base, alpha=-1.0), "looksam: `alpha` must not be"),
        (lambda base: looksam(base, interval=0), "`interval` must be at least 1"),
        (lambda base: gsam(base, rho=-0.1), "gsam: `rho` must not be negative"),
        (lambda base: wasam(base, start=-1), "wasam: `start` must not be negative"),
        (lambda base: wasam(base, every=0), "wasam: `every` must be at least 1"),
        (
            lambda base: averaged_weights(sam(base).init(W), W),
            "`state` must be of `wasam`",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make(optax.sgd(0.1))
