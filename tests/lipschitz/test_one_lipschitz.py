"""Layers of norm one: bounds, closed forms, rounding."""

from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz import AOL, SLL, SpectralNormLinear

KEY = jax.random.key(0)


@eqx.filter_jit
def jitted(function, *arguments):
    return function(*arguments)


@eqx.filter_jit
def slopes(layer, points):
    return jax.vmap(jax.jacobian(layer))(points)


def orthonormal(rows, columns):
    draw = np.random.default_rng(0).normal(size=(rows, columns))
    return jnp.asarray(np.linalg.qr(draw)[0])


class TestSLL:
    def test_slopes_are_at_most_one_and_reach_it(self):
        layer = SLL(4, 6, key=KEY)
        layer = eqx.tree_at(lambda m: m.log_q, layer, jnp.arange(6.0) / 3)
        points = 2 * np.random.default_rng(0).normal(size=(300, 4))
        norms = np.linalg.norm(slopes(layer, jnp.asarray(points)), 2, axis=(1, 2))
        assert 0.9 < norms.max() <= 1 + 1e-12

    def test_sums_dominate_the_gram_matrix(self):
        layer = SLL(4, 6, key=KEY)
        layer = eqx.tree_at(lambda m: m.log_q, layer, jnp.arange(6.0) / 3)
        rest = np.diag(jitted(layer.sums)) - layer.weight.T @ layer.weight
        assert np.linalg.eigvalsh(rest)[0] >= 0

    def test_orthogonal_columns_reflect(self):
        """With W' W = I and every unit active, x becomes x - 2 W W' x."""
        weight = orthonormal(4, 2)
        layer = eqx.tree_at(
            lambda m: (m.weight, m.bias),
            SLL(4, 2, key=KEY),
            (weight, jnp.full(2, 50.0)),
        )
        (slope,) = slopes(layer, jnp.ones((1, 4)))
        np.testing.assert_allclose(slope, np.eye(4) - 2 * weight @ weight.T, atol=1e-12)

    def test_zero_columns_do_nothing(self):
        layer = eqx.tree_at(lambda m: m.weight, SLL(3, 2, key=KEY), jnp.zeros((3, 2)))
        x = jnp.arange(3.0)
        np.testing.assert_array_equal(jitted(layer, x), x)


@pytest.mark.parametrize("make", [AOL, SpectralNormLinear])
class TestLinear:
    def test_norm_in_both_precisions(self, make):
        for double in (True, False):
            with jax.enable_x64(double):
                matrix = jitted(make(4, 6, key=KEY).matrix)
                assert np.linalg.norm(np.asarray(matrix, np.float64), 2) <= 1

    def test_orthogonal_weights_are_left_alone(self, make):
        weight = orthonormal(5, 3)
        layer = eqx.tree_at(lambda m: m.weight, make(3, 5, key=KEY), 7 * weight)
        np.testing.assert_allclose(jitted(layer.matrix), weight, atol=1e-12)

    def test_affine(self, make):
        layer = eqx.tree_at(lambda m: m.bias, make(3, 2, key=KEY), jnp.ones(2))
        x = jnp.arange(3.0)
        np.testing.assert_allclose(jitted(layer, x), jitted(layer.matrix) @ x + 1)

    def test_zero_weights(self, make):
        layer = eqx.tree_at(lambda m: m.weight, make(3, 2, key=KEY), jnp.zeros((2, 3)))
        assert not np.any(jitted(layer.matrix))


SCALES = (1e-35, 1e-25, 1e25, 1e37)


def rescaled(layer, scale):
    return eqx.tree_at(lambda m: m.weight, layer, layer.weight * scale)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AOL(4, 6, key=KEY),
        lambda: SpectralNormLinear(4, 6, method="svd", key=KEY),
        lambda: SpectralNormLinear(4, 6, method="gram", key=KEY),
    ],
)
def test_a_factor_of_the_weight_cancels(float32, make):
    layer = make()
    matrix = jitted(layer.matrix)
    for scale in SCALES:
        found = jitted(rescaled(layer, scale).matrix)
        np.testing.assert_allclose(found, matrix, atol=2e-6)
        assert np.linalg.norm(np.asarray(found, np.float64), 2) <= 1


def test_sll_cancels_a_factor_of_weight_and_bias(float32):
    layer = SLL(4, 6, key=KEY)
    layer = eqx.tree_at(lambda m: m.bias, layer, jnp.linspace(-1.0, 1.0, 6))
    x = jnp.linspace(-1.0, 2.0, 4)
    expected = jitted(layer, x)
    for scale in SCALES:
        other = rescaled(layer, scale)
        other = eqx.tree_at(lambda m: m.bias, other, layer.bias * scale)
        np.testing.assert_allclose(jitted(other, x), expected, atol=2e-6)
        if scale == SCALES[-1]:
            continue  # The derivative in what is activated leaves the range.
        (slope,) = slopes(other, x[None])
        assert np.linalg.norm(np.asarray(slope, np.float64), 2) <= 1 + 1e-6


def test_sll_sums_dominate_where_they_leave_the_range(float32):
    layer = SLL(4, 6, key=KEY)
    assert np.all(np.isposinf(jitted(rescaled(layer, 1e25).sums)))
    assert np.all(np.asarray(jitted(rescaled(layer, 1e-25).sums)) > 0)


@pytest.mark.parametrize("largest", [0.0, 1.0])
def test_products_that_underflow_are_counted(float32, largest):
    """Many columns whose inner products are all below the smallest normal number."""
    weight = jnp.full((40, 40), 1e-19).at[0].set(0).at[:, 0].set(0)
    layer = AOL(40, 40, key=KEY)
    layer = eqx.tree_at(lambda m: m.weight, layer, weight.at[0, 0].set(largest))
    assert np.linalg.norm(np.asarray(jitted(layer.matrix), np.float64), 2) <= 1


def test_aol_closed_form():
    weight = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    layer = eqx.tree_at(lambda m: m.weight, AOL(2, 2, key=KEY), weight)
    # W'W = [[1, 2], [2, 5]]: sums 3 and 7.
    np.testing.assert_allclose(
        jitted(layer.matrix), weight / np.sqrt([[3.0, 7.0]]), rtol=1e-12
    )


def test_gram_bound_stays_close_below_one():
    layer = SpectralNormLinear(6, 6, method="gram", key=KEY)
    assert 0.95 < np.linalg.norm(jitted(layer.matrix), 2) <= 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SLL(0, 2, key=KEY), "`size` must be at least 1"),
        (lambda: SLL(2, 2, activation=jnp.abs, key=KEY), r"slopes in \[0, 1\]"),
        (lambda: AOL(2, 0, key=KEY), "`out_size` must be at least 1"),
        (lambda: SpectralNormLinear(0, 2, key=KEY), "`in_size` must be at least 1"),
        (
            lambda: SpectralNormLinear(2, 2, method=cast("Any", "power"), key=KEY),
            "`method` must be one of",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
