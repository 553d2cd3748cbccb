"""Layers that respond: the gated form, the plain layer at each h, errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.bilevel import HyperConv, HyperLinear, respond

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 5, 4))


def wide(layer):
    """The layer with gates and scale away from their first values."""
    drawn = jax.random.normal(jax.random.key(2), layer.gates.shape)
    return eqx.tree_at(lambda n: (n.gates, n.scale), layer, (drawn, jnp.array(1.7)))


LINEAR = wide(HyperLinear(4, 3, 2, key=KEY))
CONV = wide(HyperConv(2, 2, 3, 3, 2, stride=2, padding=1, key=KEY))


def test_a_linear_layer_is_the_gated_sum_of_two():
    x, h = X[0, 0], jnp.array([0.5, -2.0])
    weight, bias = np.asarray(LINEAR.gates) @ np.asarray(h)
    base, gated = LINEAR.base, LINEAR.gated
    expected = (
        1.7 * (np.asarray(base.weight) @ x + base.bias)
        + weight * (np.asarray(gated.weight) @ x)
        + bias * gated.bias
    )
    np.testing.assert_allclose(LINEAR(x, h), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "x"), [(LINEAR, X[0, 0]), (CONV, X)], ids=["linear", "convolution"]
)
def test_the_response_is_the_layer_and_affine_in_h(layer, x):
    one, two = jnp.array([0.5, -2.0]), jnp.array([3.0, 1.0])
    np.testing.assert_allclose(layer.response(one)(x), layer(x, one), atol=1e-12)
    middle = layer.response((one + two) / 2)
    for part in ("weight", "bias"):
        ends = getattr(layer.response(one), part) + getattr(layer.response(two), part)
        np.testing.assert_allclose(ends / 2, getattr(middle, part), atol=1e-12)


def test_respond_makes_a_plain_network_that_ignores_h():
    network, h = {"linear": LINEAR, "conv": CONV, "rate": 0.5}, jnp.array([1.0, 2.0])
    plain = respond(network, h)
    np.testing.assert_allclose(plain["conv"](X), CONV(X, h), atol=1e-12)
    far = plain["linear"](X[0, 0], 9 * h)
    np.testing.assert_allclose(far, LINEAR(X[0, 0], h), atol=1e-12)
    arrays = jax.tree.leaves(eqx.filter(plain["linear"], eqx.is_array))
    assert sum(leaf.size for leaf in arrays) == 4 * 3 + 3 and plain["rate"] == 0.5


def test_first_values_are_the_sources():
    layer = HyperLinear(50, 400, 2, key=KEY)
    assert float(layer.scale) == 1.0
    # 1600 draws: the deviation is 0.01 within 10 % but once in a million.
    assert abs(float(jnp.std(layer.gates)) / 0.01 - 1) < 0.1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`hyperparameters` must be at least 1"):
        HyperLinear(2, 2, 0, key=KEY)
    with pytest.raises(ValueError, match=r"`h` must have shape \(2\)"):
        LINEAR(X[0, 0], jnp.zeros(3))
    with pytest.raises(ValueError, match="must hold layers that respond"):
        respond({"plain": eqx.nn.Linear(2, 2, key=KEY)}, jnp.zeros(2))
