"""Flattest networks on the exclusive or: the bound, who attains it, what they know."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.sharpness import (
    TwoLayer,
    flatness_certificate,
    flattest_generalizer,
    flattest_memorizer,
    hessian_trace,
    interpolation_trace,
    label_noise,
    make_xor,
    trace_lower_bound,
)
from varan.train import start_training, train_epochs

D = 6
CUBE = jnp.array(list(itertools.product([-1.0, 1.0], repeat=D)))
RULE = CUBE[:, 0] * CUBE[:, 1]
SAMPLE, LABELS = make_xor(D, 9, key=jax.random.key(0))
outputs = eqx.filter_jit(lambda net, x: jax.vmap(net)(x))
certify = eqx.filter_jit(flatness_certificate)
trace = eqx.filter_jit(interpolation_trace)


def squared_error(net, batch):
    return jnp.mean((jax.vmap(net)(batch[0]) - batch[1]) ** 2)


def scaled(net, size):
    """Each hidden unit times a size, its head over it: the same function."""
    parts = [net.weight, net.head] + ([] if net.bias is None else [net.bias])
    found = [size * parts[0], parts[1] / size] + [size * bias for bias in parts[2:]]
    where = lambda n: [n.weight, n.head, n.bias][: len(parts)]  # noqa: E731
    return eqx.tree_at(where, net, found)


@pytest.mark.parametrize("variant", ["bias", "layernorm"])
def test_memorizer_fits_the_sample_and_knows_nothing_else(variant):
    net = flattest_memorizer(SAMPLE, LABELS, variant=variant)
    known = jnp.any(jnp.all(CUBE[:, None] == SAMPLE[None], axis=2), axis=1)
    found = outputs(net, CUBE)
    np.testing.assert_allclose(found[known], RULE[known], rtol=1e-12)
    np.testing.assert_array_equal(found[~known], 0.0)


@pytest.mark.parametrize("variant", ["plain", "bias", "layernorm"])
def test_generalizer_knows_the_rule(variant):
    net = flattest_generalizer(D, variant=variant)
    np.testing.assert_allclose(outputs(net, CUBE), RULE, rtol=1e-12)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.floats(0.3, 3.0), st.integers(0, 2))
def test_certificate_is_one_for_the_flattest_and_larger_for_all_others(size, which):
    net = [
        flattest_memorizer(SAMPLE, LABELS),
        flattest_generalizer(D),
        flattest_generalizer(D, variant="plain"),
    ][which]
    found = certify(scaled(net, size), SAMPLE, LABELS).value
    # Either sum of the inequality of the means moves by the square of the size.
    np.testing.assert_allclose(found, (size**2 + size**-2) / 2, rtol=1e-10)
    assert found >= 1 - 1e-12


def test_traces_at_the_sizes_of_the_paper_are_the_bound():
    x, y = make_xor(30, 40, key=jax.random.key(1))
    nets = flattest_memorizer(x, y), flattest_generalizer(30)
    for net in nets:
        np.testing.assert_allclose(trace(net, x), 22.271057, rtol=1e-7)
    assert round(trace_lower_bound(30), 6) == 22.271057
    assert trace_lower_bound(30, "plain") == 4 * np.sqrt(30)


@pytest.mark.parametrize("variant", ["plain", "bias"])
def test_no_network_is_below_the_bound(variant):
    def slack(key):
        net = TwoLayer(D, 5, variant, key=key)
        root = trace_lower_bound(D, variant) / 2
        gradients = eqx.filter_vmap(lambda x: eqx.filter_grad(lambda n: n(x))(net))
        leaves = jax.tree.leaves(gradients(CUBE))
        squares = sum(jnp.sum(leaf.reshape(len(CUBE), -1) ** 2, 1) for leaf in leaves)
        return squares - root * jnp.abs(jax.vmap(net)(CUBE))

    slacks = jax.jit(jax.vmap(slack))(jax.random.split(jax.random.key(2), 50))
    assert jnp.min(slacks) > -1e-12


def test_trace_is_that_of_the_hessian_where_the_error_is_zero():
    net = scaled(flattest_memorizer(SAMPLE, LABELS), 1.3)
    found = hessian_trace(
        squared_error, net, (SAMPLE, LABELS), key=jax.random.key(0)
    ).value
    np.testing.assert_allclose(found, trace(net, SAMPLE), rtol=1e-9)


def test_order_of_units_is_irrelevant():
    net = TwoLayer(D, 7, "layernorm", key=jax.random.key(3))
    order = np.random.default_rng(0).permutation(7)
    other = jax.tree.map(lambda leaf: leaf[order], net)
    np.testing.assert_allclose(outputs(net, CUBE), outputs(other, CUBE), atol=1e-12)
    np.testing.assert_allclose(trace(net, SAMPLE), trace(other, SAMPLE), rtol=1e-12)


def test_normalised_networks_attain_their_bound_whatever_the_first_layer():
    for net in (
        flattest_memorizer(SAMPLE, LABELS, variant="layernorm"),
        flattest_generalizer(D, variant="layernorm"),
    ):
        larger = eqx.tree_at(lambda n: [n.weight, n.bias], net, replace_fn=double)
        for each in (net, larger):
            found = certify(each, SAMPLE, LABELS).value
            np.testing.assert_allclose(found, 1.0, rtol=1e-12)


def double(leaf):
    return 2 * leaf


def test_normalised_traces_fall_to_the_bound_as_the_first_layer_grows():
    net = TwoLayer(D, 7, "layernorm", key=jax.random.key(3))
    larger = eqx.tree_at(lambda n: n.weight, net, 10 * net.weight)
    np.testing.assert_allclose(outputs(net, CUBE), outputs(larger, CUBE), rtol=1e-10)
    excess = [trace(n, CUBE) - trace_lower_bound(D, "layernorm") for n in (net, larger)]
    assert excess[1] > 0
    np.testing.assert_allclose(excess[0] / excess[1], 100.0, rtol=1e-8)


def test_dead_normalised_unit_has_a_finite_gradient():
    net = TwoLayer(D, 3, "layernorm", key=jax.random.key(0))
    dead = eqx.tree_at(lambda n: n.bias, net, jnp.full(3, -100.0))
    assert float(trace(dead, SAMPLE)) == 0.0


def test_who_does_not_fit_is_not_certified():
    unfit = TwoLayer(D, 5, key=jax.random.key(0))
    found = certify(unfit, SAMPLE, LABELS)
    assert np.isinf(found.value) and not found.met
    assert found.details["error"] > 0.1


def test_repeated_samples_get_one_unit():
    net = flattest_memorizer(
        jnp.concatenate([SAMPLE, SAMPLE]), jnp.concatenate([LABELS, LABELS])
    )
    assert net.head.shape == (len(jnp.unique(SAMPLE, axis=0)),)
    np.testing.assert_allclose(outputs(net, SAMPLE), LABELS, rtol=1e-12)


def test_label_noise_moves_labels_afresh_and_trains():
    def loss(w, batch):
        return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    noisy = label_noise(loss, 0.5)
    x, y = jnp.eye(4), jnp.zeros(4)
    values = jax.jit(jax.vmap(lambda key: jax.grad(noisy)(jnp.zeros(4), (x, y), key)))(
        jax.random.split(jax.random.key(0), 400)
    )
    # The gradient is -sigma / 2 times the signs: of size 1/4, of either sign.
    np.testing.assert_allclose(jnp.abs(values), 0.25)
    assert jnp.max(jnp.abs(jnp.mean(values, 0))) < 4 * 0.25 / np.sqrt(400)
    optimiser = optax.sgd(0.1)
    state = start_training(jnp.zeros(4), optimiser, key=jax.random.key(1))
    state, _ = train_epochs(state, noisy, (x, y), optimiser, epochs=2, batch_size=2)
    assert jnp.all(state.model != 0)


def test_values_are_checked():
    x, y = SAMPLE, LABELS
    for call in (
        lambda: make_xor(1, 3, key=jax.random.key(0)),
        lambda: trace_lower_bound(1),
        lambda: flattest_generalizer(1),
    ):
        with pytest.raises(ValueError, match="`d` must be at least 2"):
            call()
    with pytest.raises(ValueError, match="`n` must be at least 1"):
        make_xor(3, 0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="equal rows of `inputs` must have equal"):
        flattest_memorizer(jnp.ones((2, 3)), jnp.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="`inputs` must be -1 or 1"):
        flattest_memorizer(0.5 * x, y)
    with pytest.raises(ValueError, match="`labels` must be -1 or 1"):
        flatness_certificate(flattest_generalizer(D), x, 2 * y)
    with pytest.raises(ValueError, match="`labels` must have shape"):
        flattest_memorizer(x, y[1:])
    with pytest.raises(ValueError, match="`variant` must be one of"):
        TwoLayer(3, 4, "batchnorm", key=jax.random.key(0))
    with pytest.raises(ValueError, match="`width` must be at least 1"):
        TwoLayer(3, 0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="`sigma` must not be negative"):
        label_noise(squared_error, -0.5)
    with pytest.raises(TypeError, match="function of parameters and a batch"):
        label_noise(lambda w: w, 0.5)
    with pytest.raises(ValueError, match="`inputs` must not be empty"):
        interpolation_trace(flattest_generalizer(D), jnp.zeros((0, D)))
    with pytest.raises(TypeError, match="must be concrete"):
        jax.jit(flattest_memorizer)(x, y)
