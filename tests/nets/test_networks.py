"""Classifiers and the convex network: shapes, masks, convexity, errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.nets import (
    Conv1DNet,
    ConvClassifier,
    InputConvex,
    MLPNet,
    TanhCell,
    TextClassifier,
)

KEY = jax.random.key(0)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_convolutions_halve_and_the_mean_forgets_the_place(dimensions):
    model = ConvClassifier(3, dimensions=dimensions, channels=2, widths=(4, 5), key=KEY)
    x = jax.random.normal(KEY, (2, *(8,) * dimensions))
    assert model(x).shape == (3,) and model.features(x).shape == (5,)
    inner = model.convolutions[0](x)
    assert inner.shape == (4, *(4,) * dimensions)
    # A constant bias alone: the features are those of any place.
    weight = model.head.weight @ model.features(x) + model.head.bias
    np.testing.assert_allclose(model(x), weight, atol=1e-12)


@pytest.mark.parametrize("kind", ["perceptron", "convolutions"])
def test_normalised_layers_forget_the_scale_before_them(kind):
    if kind == "perceptron":
        model, layers = MLPNet(40, 3, (6, 5), key=KEY), "hidden"
    else:
        model, layers = Conv1DNet(40, 3, 6, key=KEY), "convolutions"
    first = lambda m: getattr(m, layers)[0]  # noqa: E731
    x = jax.random.normal(KEY, (40,))
    # Without its shift, three times the weight is the same function.
    plain = eqx.tree_at(lambda m: first(m).bias, model, replace_fn=jnp.zeros_like)
    more = eqx.tree_at(lambda m: first(m).weight, plain, replace_fn=lambda w: 3 * w)
    call = eqx.filter_jit(lambda m, x: m(x))
    logits = call(plain, x)
    np.testing.assert_allclose(logits, call(more, x), rtol=1e-3)
    assert logits.shape == (3,) and not np.allclose(logits, call(plain, x[::-1]))


def test_the_sharpness_protocols_network_has_its_published_size():
    model = eqx.filter_eval_shape(MLPNet, 40, 10, key=KEY)
    leaves = jax.tree.leaves(model)
    # 40-128-128-10 with shifts, and a scale and a shift for each hidden unit.
    assert sum(leaf.size for leaf in leaves) == 5248 + 16512 + 1290 + 512


def test_matrix_products_are_the_convolutions():
    model = Conv1DNet(11, 3, 4, (5, 3), key=KEY)
    x = jax.random.normal(KEY, (11,))
    signal = x[None]
    for convolution, norm in zip(model.convolutions, model.norms, strict=True):
        signal = jax.nn.relu(jax.vmap(norm, 1, 1)(convolution(signal)))
    np.testing.assert_allclose(model(x), model.head(signal.ravel()), atol=1e-12)


@pytest.fixture(scope="module", params=["tanh-last", "lstm-mean"])
def text_model(request):
    cell, pooling = request.param.split("-")
    model = TextClassifier(
        9, 3, cell=cell, embedding=4, width=5, pooling=pooling, key=KEY
    )
    return model, jax.jit(lambda row: model(row))


def test_padding_anywhere_changes_nothing(text_model):
    model, call = text_model
    plain = jnp.array([3, 8, 1, 0, 0, 0])
    spread = jnp.array([0, 3, 0, 8, 1, 0])
    np.testing.assert_allclose(call(plain), call(spread), atol=1e-12)
    np.testing.assert_allclose(call(plain), model(jnp.array([3, 8, 1])), atol=1e-12)
    assert not np.allclose(call(plain), call(jnp.array([8, 3, 1, 0, 0, 0])))


def test_a_row_without_words_gives_finite_logits_and_derivatives(text_model):
    model, _ = text_model
    empty = jnp.zeros(6, jnp.int32)
    gradient = eqx.filter_grad(lambda m: jnp.sum(m(empty)))(model)
    for leaf in jax.tree.leaves(eqx.filter(gradient, eqx.is_array)):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    np.testing.assert_array_equal(model.features(empty), np.zeros(5))


def test_the_recurrence_is_elmans():
    cell = TanhCell(2, 3, key=KEY)
    x, hidden = jnp.array([1.0, -1.0]), jnp.array([0.2, 0.1, -0.3])
    expected = np.tanh(
        np.asarray(cell.input_weight) @ x
        + np.asarray(cell.hidden_weight) @ hidden
        + cell.bias
    )
    np.testing.assert_allclose(cell(x, hidden), expected, atol=1e-14)


@pytest.fixture(scope="module")
def convex():
    model = InputConvex(3, (6, 5), strong=0.5, key=KEY)
    arrays, rest = eqx.partition(model, eqx.is_array)

    @jax.jit
    def both(scale, shift, x, y):
        # Any parameters, also far from the first.
        moved = jax.tree.map(lambda leaf: scale * leaf + shift, arrays)
        f = eqx.combine(moved, rest)
        return f(x), f(y), f((x + y) / 2), f.gradient(x), f.gradient(y)

    return both


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    scale=st.floats(-3, 3),
    shift=st.floats(-1, 1),
    points=st.lists(st.floats(-5, 5), min_size=6, max_size=6),
)
def test_convex_whatever_the_parameters(convex, scale, shift, points):
    x, y = jnp.array(points[:3]), jnp.array(points[3:])
    fx, fy, middle, gx, gy = convex(scale, shift, x, y)
    gap = float(jnp.sum((x - y) ** 2))
    slack = 1e-9 * (1 + abs(float(fx)) + abs(float(fy)))
    # Strongly convex with 0.5: midpoint by 0.5/8, gradients by 0.5 of the distance.
    assert middle <= (fx + fy) / 2 - gap / 16 + slack
    assert (gx - gy) @ (x - y) >= 0.5 * gap - slack


def test_the_gradient_map_is_the_derivative(convex):
    x, step = jnp.array([0.3, -0.2, 1.0]), 1e-6
    _, _, _, gradient, _ = convex(1.0, 0.0, x, x)
    for i in range(3):
        move = step * jnp.eye(3)[i]
        up, down, *_ = convex(1.0, 0.0, x + move, x - move)
        assert abs((up - down) / (2 * step) - gradient[i]) < 1e-7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConvClassifier(3, dimensions=3, key=KEY), "must be 1 or 2"),
        (lambda: ConvClassifier(3, widths=(), key=KEY), "at least one of `widths`"),
        (lambda: ConvClassifier(3, kernel=2, key=KEY), "`kernel` must be odd"),
        (lambda: MLPNet(3, 2, (), key=KEY), "MLPNet: .* at least one of `widths`"),
        (lambda: Conv1DNet(0, 2, key=KEY), "Conv1DNet: `length`"),
        (lambda: Conv1DNet(9, 2, kernels=(4,), key=KEY), "`kernels` must be odd"),
        (lambda: TextClassifier(1, 2, key=KEY), "`words` must be at least 2"),
        (lambda: TextClassifier(5, 2, cell="gru", key=KEY), "`cell` must be one of"),
        (lambda: InputConvex(0, key=KEY), "must be positive"),
        (lambda: InputConvex(2, strong=-1.0, key=KEY), "must not be negative"),
    ],
)
def test_bad_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
