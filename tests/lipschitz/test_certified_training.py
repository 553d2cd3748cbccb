"""Interval losses: they bound every perturbation, and training with them certifies."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.lipschitz import ibp_initialise, ibp_loss, ibp_margins, sabr_loss


@pytest.fixture(scope="module")
def setting():
    net = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (12, 4))
    return net, x, jnp.arange(12) % 3


def cross_entropy(net, x, y):
    logits = jax.vmap(net)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def test_no_perturbation_exceeds_the_bounds(setting):
    net, x, y = setting
    leads = ibp_margins(net, x, y, 0.1, clip=(0.0, 1.0))
    bound = ibp_loss(net, x, y, 0.1, clip=(0.0, 1.0))
    assert np.all(leads[jnp.arange(12), y] == 0)

    @jax.jit
    @jax.vmap
    def attacked(key):
        moved = x + 0.1 * jax.random.choice(key, jnp.array([-1.0, 1.0]), x.shape)
        moved = jnp.clip(moved, 0, 1)
        logits = jax.vmap(net)(moved)
        return logits[jnp.arange(12), y][:, None] - logits, cross_entropy(net, moved, y)

    found, losses = attacked(jax.random.split(jax.random.key(2), 300))
    assert np.all(found >= leads[None] - 1e-12)
    assert np.max(losses) <= bound


def test_radius_zero_is_the_sample(setting):
    net, x, y = setting
    clean = cross_entropy(net, x, y)
    np.testing.assert_allclose(ibp_loss(net, x, y, 0.0), clean, rtol=1e-9)
    np.testing.assert_allclose(ibp_loss(net, x, y, 0.3, kappa=1.0), clean, rtol=1e-12)


def test_last_layer_is_merged(setting):
    """The lead's bound is that of |c W| and not of |c| |W|."""
    net, x, y = setting
    lead = ibp_margins(net, x[:1], y[:1], 0.05)[0]
    hidden_low, hidden_high = interval_hidden(net, x[0], 0.05)
    last = net.layers[-1]
    rows = last.weight[y[0]][None] - last.weight
    shift = last.bias[y[0]] - last.bias
    middle, radius = (hidden_low + hidden_high) / 2, (hidden_high - hidden_low) / 2
    expected = rows @ middle + shift - jnp.abs(rows) @ radius
    np.testing.assert_allclose(lead, expected, rtol=1e-9, atol=1e-12)


def interval_hidden(net, x, epsilon):
    low, high = x - epsilon, x + epsilon
    for layer in net.layers[:-1]:
        middle = layer.weight @ ((low + high) / 2) + layer.bias
        radius = jnp.abs(layer.weight) @ ((high - low) / 2)
        low, high = jax.nn.relu(middle - radius), jax.nn.relu(middle + radius)
    return low, high


def test_small_boxes_lie_between_attack_and_bound(setting):
    net, x, y = setting
    whole = ibp_loss(net, x, y, 0.1)
    small = sabr_loss(net, x, y, 0.1, share=0.2)
    assert cross_entropy(net, x, y) < small < whole
    full = sabr_loss(net, x, y, 0.1, share=1.0)
    np.testing.assert_allclose(full, whole, rtol=1e-9)


def test_training_certifies(setting):
    """Two classes on a line, 0.5 apart: certified at 0.2 after training, not before."""
    places = jnp.linspace(0.0, 0.25, 4)
    x = jnp.concatenate([places, places + 0.75])[:, None]
    y = jnp.arange(8) // 4
    net = ibp_initialise(
        eqx.nn.MLP(1, 2, 8, 2, key=jax.random.key(0)), key=jax.random.key(5)
    )
    optimiser = optax.sgd(0.1, momentum=0.9)
    params, static = eqx.partition(net, eqx.is_inexact_array)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            slope = jax.grad(lambda p: ibp_loss(eqx.combine(p, static), x, y, 0.2))
            updates, state = optimiser.update(slope(params), state)
            return (optax.apply_updates(params, updates), state), None

        start = (params, optimiser.init(params))
        return jax.lax.scan(step, start, None, length=300)[0][0]

    def certified(params):
        leads = ibp_margins(eqx.combine(params, static), x, y, 0.2)
        return int(jnp.sum(jnp.sum(leads > 0, 1) == 1))

    assert certified(params) < 8
    assert certified(train(params)) == 8


def test_bad_input(setting):
    net, x, y = setting
    with pytest.raises(ValueError, match="`epsilon` must not be negative"):
        ibp_loss(net, x, y, -0.1)
    with pytest.raises(ValueError, match="`share` must lie in"):
        sabr_loss(net, x, y, 0.1, share=0.0)
