"""The graph equals the model, for everything that the front end knows."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz import (
    BoundGraph,
    SmoothCurve,
    UnsupportedPrimitive,
    register_activation,
)

KEY = jax.random.key(0)


def conv_net():
    k = jax.random.split(KEY, 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 2, 3, padding=1, key=k[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.AvgPool2d(2, 2),
            eqx.nn.Conv2d(2, 2, 2, stride=1, key=k[1]),
            eqx.nn.MaxPool2d(2, 1),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(2, 3, key=k[2]),
        ]
    )


class Residual(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __call__(self, x):
        return x + self.second(jax.nn.leaky_relu(self.first(x), 0.2))


def residual():
    first, second = jax.random.split(KEY)
    return Residual(eqx.nn.Linear(3, 4, key=first), eqx.nn.Linear(4, 3, key=second))


def arithmetic(x):
    y = jnp.concatenate([x, 2.0 - x, jnp.ones(1)])[::-1]
    y = jnp.pad(y, 1, constant_values=0.5) / 3.0
    y = jnp.maximum(y[1:4], y[2:5]) + jnp.minimum(y[:3], 0.25) - jnp.abs(x)
    return jnp.where(jnp.array([True, False, True]), y, -y).sum() - y


MODELS = {
    "conv": (conv_net, (1, 6, 6)),
    "residual": (residual, (3,)),
    "arithmetic": (lambda: arithmetic, (3,)),
    "batched product": (lambda: lambda x: (x.reshape(2, 3) @ W).T.ravel(), (6,)),
    "identity": (lambda: lambda x: x, (3,)),
}
W = jax.random.normal(KEY, (3, 2))


@pytest.mark.parametrize("name", MODELS)
def test_graph_equals_model(name):
    make, shape = MODELS[name]
    model = make()
    graph = BoundGraph.from_callable(model, jnp.zeros(shape))
    for key in jax.random.split(KEY, 3):
        x = jax.random.normal(key, shape)
        np.testing.assert_allclose(graph(x), model(x), rtol=1e-12, atol=1e-12)


ACTIVATIONS = {
    "relu": (jax.nn.relu, "PiecewiseLinear"),
    "leaky": (jax.nn.leaky_relu, "PiecewiseLinear"),
    "where": (lambda x: jnp.where(x < 0, -0.5 * x, x), "PiecewiseLinear"),
    "abs": (jnp.abs, "PiecewiseLinear"),
    "tanh": (jnp.tanh, "SmoothCurve"),
    "sigmoid": (jax.nn.sigmoid, "SmoothCurve"),
    "silu": (jax.nn.silu, "SmoothCurve"),
    "silu by hand": (lambda x: x * jax.nn.sigmoid(x), "SmoothCurve"),
    "gelu": (jax.nn.gelu, "SmoothCurve"),
    "gelu erf": (lambda x: jax.nn.gelu(x, approximate=False), "SmoothCurve"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_recognised_by_their_expression(name):
    function, kind = ACTIVATIONS[name]
    graph = BoundGraph.from_callable(lambda x: function(2 * x), jnp.zeros(3))
    (index,) = graph.activations
    assert type(graph.nodes[index].curve).__name__ == kind
    x = jnp.linspace(-4.0, 4.0, 3)
    np.testing.assert_allclose(graph(x), function(2 * x), rtol=1e-12)


def test_nearly_an_activation_is_not_one():
    with pytest.raises(UnsupportedPrimitive):
        BoundGraph.from_callable(lambda x: x * jax.nn.sigmoid(1.5 * x), jnp.zeros(3))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (jax.nn.softmax, "logits"),
        (lambda x: jnp.sin(x), "no rule for `sin`"),
        (lambda x: x * x, "no rule for `mul`"),
    ],
)
def test_what_has_no_rule_is_named(model, words):
    with pytest.raises(UnsupportedPrimitive, match=words):
        BoundGraph.from_callable(model, jnp.zeros(3))


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda x: (x, x), TypeError, "one array"),
        (lambda x: jnp.zeros(2), TypeError, "ignores its input"),
        (3, TypeError, "callable or a pair"),
        (([jnp.eye(2)], []), ValueError, "as many weights as biases"),
    ],
)
def test_bad_models_are_refused(model, error, words):
    with pytest.raises(error, match=words):
        BoundGraph.from_callable(model, jnp.zeros(2))


def test_integer_input_is_refused():
    with pytest.raises(TypeError, match="floating"):
        BoundGraph.from_callable(lambda x: x, jnp.zeros(2, int))


def test_a_registered_activation_is_known():
    def bump(z):
        return jnp.tanh(z) + 0.5 * z

    register_activation(
        bump,
        SmoothCurve(
            bump, (0.0,), (-0.65847894846240835, 0.65847894846240835), (0.5, 1.5)
        ),
    )
    graph = BoundGraph.from_callable(bump, jnp.zeros(2))
    assert graph.nodes[graph.activations[-1]].curve.function is bump


def test_raw_layers_are_a_relu_network():
    weights = [jnp.ones((4, 3)), jnp.ones((2, 4))]
    biases = [jnp.zeros(4), jnp.ones(2)]
    graph = BoundGraph.from_callable((weights, biases), jnp.zeros(3))
    np.testing.assert_allclose(graph(jnp.ones(3)), 13.0)
