"""TRAM: the radius is the distance, and the ascent that of the adaptive ball."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import elementwise_scale, sam, tram, tram_fisher

KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(KEYS[0], (7, 3))
Y = jnp.arange(7) % 4
W = {"w": jax.random.normal(KEYS[1], (3, 4)), "b": jnp.array([0.5, 1.0, -1.0, 0.2])}
MOVED = jax.tree.map(lambda leaf: 1.3 * leaf, W)


def logits(params, noise=lambda x: x):
    return noise(X) @ params["w"] + params["b"][None]


def loss(params):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params), Y).mean()


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def step(method, params=W, state=None, **extra):
    """The perturbation of one step, and the state after it."""
    seen = []

    def grad_fn(point, i):
        seen.append(flat(point) - flat(params))
        return jax.grad(loss)(point)

    state = method.init(params) if state is None else state
    extra = {"logits_fn": logits} | extra
    _, state = method.update(
        jax.grad(loss)(params), state, params, grad_fn=grad_fn, **extra
    )
    return seen[-1], state


def divergence(p, q):
    p, q = (np.asarray(jax.nn.softmax(z)) for z in (p, q))
    return np.mean(np.sum(p * np.log(p / q), 1))


@pytest.mark.parametrize("distance", ["prev", "init", "ema"])
def test_first_step_is_the_base_and_the_second_has_the_distance_as_radius(distance):
    method = tram(optax.sgd(0.1), distance, decay=0.9)
    e, state = step(method)
    np.testing.assert_array_equal(e, 0.0)
    assert state.rule_state.distance == 0.0
    e, state = step(method, MOVED, state)
    # The running mean has not moved yet: it joins the weights of a step that is done.
    found = divergence(logits(W), logits(MOVED))
    np.testing.assert_allclose(state.rule_state.distance, found, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(e / flat(MOVED)), found, rtol=1e-9)
    _, state = step(method, MOVED, state)
    mean = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, W, MOVED)
    centre = {"prev": MOVED, "init": W, "ema": mean}[distance]
    found = divergence(logits(centre), logits(MOVED))
    np.testing.assert_allclose(state.rule_state.distance, found, rtol=1e-7, atol=1e-15)


def test_input_noise():
    """KL of noisy from clean predictions, for noise of the given deviation."""
    seen = []

    def watched(params, noise):
        seen.append((noise(X) - X, noise(X) - X))
        return logits(params, lambda x: x + seen[-1][0])

    method = tram(optax.sgd(0.1), "input", sigma=0.5)
    e, state = step(method, logits_fn=watched)
    (clean, _), (noisy, again) = seen
    assert not np.any(clean) and np.all(noisy != again)
    # 42 normal numbers: five deviations of their mean square are 1.1.
    np.testing.assert_allclose(np.mean(np.square(noisy)) / 0.25, 1, atol=1.1)
    found = divergence(logits(W, lambda x: x + noisy), logits(W))
    np.testing.assert_allclose(state.rule_state.distance, found, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(e / flat(W)), found, rtol=1e-9)
    # Another step has other noise.
    _, later = step(method, state=state)
    assert later.rule_state.distance != state.rule_state.distance


def test_it_is_asam_with_that_radius():
    method = tram(optax.sgd(0.1), "input")
    e, state = step(method)
    radius = float(state.rule_state.distance)
    scale = partial(elementwise_scale, shifts=True)
    expected, _ = step(sam(optax.sgd(0.1), radius, adaptive=scale))
    np.testing.assert_allclose(e, expected, rtol=1e-12)
    plain, _ = step(tram(optax.sgd(0.1), "input", adaptive=False))
    np.testing.assert_allclose(np.linalg.norm(plain), radius, rtol=1e-12)


def test_factor_and_cap():
    whole, _ = step(tram(optax.sgd(0.1), "input"))
    half, _ = step(tram(optax.sgd(0.1), "input", scale=lambda step: 0.5))
    np.testing.assert_allclose(half, whole / 2, rtol=1e-12)
    capped, state = step(tram(optax.sgd(0.1), "input", max_radius=1e-4))
    np.testing.assert_allclose(np.linalg.norm(capped / flat(W)), 1e-4, rtol=1e-9)
    assert state.rule_state.distance > 1e-4


def test_steps_between_move_the_anchor():
    method = tram(optax.sgd(0.1), "prev", interval=2)
    state = method.init(W)._replace(step=jnp.ones((), jnp.int32))
    slope = jax.grad(loss)
    _, state = method.update(
        slope(MOVED), state, MOVED, grad_fn=lambda p, i: slope(p), logits_fn=logits
    )
    np.testing.assert_array_equal(flat(state.rule_state.anchor), flat(MOVED))


def test_running_mean_of_half_precision_is_kept_in_single():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), W)
    anchor = tram(optax.sgd(0.1), "ema").init(half).rule_state.anchor
    assert anchor["w"].dtype == jnp.float32


def test_fisher_ball():
    """e = rho F^-1 g / sqrt(g F^-1 g) with F = 1 + eta h^2."""
    h = jax.tree.map(jnp.sin, W)
    method = tram_fisher(optax.sgd(0.1), 0.3, eta=2.0)
    e, _ = step(method, noisy_grad_fn=lambda params, noise: h)
    g, F = flat(jax.grad(loss)(W)), 1 + 2 * flat(h) ** 2
    np.testing.assert_allclose(e, 0.3 * g / F / np.sqrt(g @ (g / F)), rtol=1e-9)
    np.testing.assert_allclose(np.sqrt(e @ (F * e)), 0.3, rtol=1e-9)
    e, _ = step(tram_fisher(optax.sgd(0.1), 0.0), noisy_grad_fn=lambda params, noise: h)
    np.testing.assert_array_equal(e, 0.0)


def test_fisher_ball_of_a_zero_gradient():
    zero = jax.tree.map(jnp.zeros_like, W)
    method = tram_fisher(optax.sgd(0.1))
    updates, state = method.update(
        zero,
        method.init(W),
        W,
        grad_fn=lambda params, i: zero,
        noisy_grad_fn=lambda params, noise: jax.tree.map(noise, params),
    )
    np.testing.assert_array_equal(flat(updates), 0.0)
    assert int(state.grad_evals) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": "next"}, "`distance` must be one of"),
        ({"sigma": 0.0}, "`sigma` must be positive"),
        ({"scale": -1.0}, "`scale` must not be negative"),
        ({"max_radius": 0.0}, "`max_radius` must be positive"),
        ({"decay": 1.0}, r"`decay` must lie in \[0, 1\)"),
        ({"microbatch": 2}, "`microbatch` must be left out"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tram(optax.sgd(0.1), **settings)


def test_bad_calls():
    with pytest.raises(ValueError, match="tram: `update` needs `logits_fn`"):
        tram(optax.sgd(0.1)).update(
            W, tram(optax.sgd(0.1)).init(W), W, grad_fn=lambda p, i: p
        )
    with pytest.raises(ValueError, match="two or more classes"):
        step(tram(optax.sgd(0.1)), logits_fn=lambda p, noise: p["w"][:, :1])
    with pytest.raises(ValueError, match=r"of one shape.*\(7, 4\)"):
        step(
            tram(optax.sgd(0.1), "input"),
            logits_fn=lambda p, noise: logits(p)[: 7 - 3 * (noise(X) is X)],
        )
    with pytest.raises(ValueError, match="tram_fisher: `update` needs"):
        step(tram_fisher(optax.sgd(0.1)))
