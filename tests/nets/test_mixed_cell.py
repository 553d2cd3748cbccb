"""The mixed cell: the mixture is the sum, discretising keeps the strongest."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.nets import MixedCell, Zero

KEY = jax.random.key(0)
KINDS = [
    lambda key: Zero(),
    lambda key: eqx.nn.Identity(),
    lambda key: eqx.nn.Linear(3, 3, key=key),
]


@pytest.fixture(scope="module")
def cell():
    return MixedCell(KINDS, nodes=3, key=KEY)


def test_edges_and_their_own_weights(cell):
    assert cell.alpha_shape == (6, 3)
    first, second = cell.edges[0][2].weight, cell.edges[1][2].weight
    assert not np.allclose(first, second)


def test_the_mixture_is_the_weighted_sum_over_all_edges(cell):
    x, alpha = jnp.array([1.0, -2.0, 0.5]), jax.random.normal(KEY, (6, 3))
    weights = np.asarray(jax.nn.softmax(alpha))
    values, edge = [np.asarray(x)], 0
    for node in range(3):
        total = np.zeros(3)
        for earlier in values[: node + 1]:
            linear = cell.edges[edge][2]
            total = (
                total
                + weights[edge, 1] * earlier
                + weights[edge, 2] * (np.asarray(linear.weight) @ earlier + linear.bias)
            )
            edge += 1
        values.append(total)
    np.testing.assert_allclose(cell(x, alpha), np.concatenate(values[1:]), atol=1e-12)


def test_discretise_keeps_the_strongest_edges_with_their_best_operation(cell):
    alpha = jnp.array(
        [
            [9.0, 1.0, 0.0],  # into node 1: Zero is strongest and yet not chosen
            [0.0, 5.0, 0.0],
            [0.0, 0.0, 4.0],
            [0.0, 1.0, 0.0],  # into node 3: the weakest of three
            [0.0, 0.0, 2.0],
            [0.0, 3.0, 0.0],
        ]
    )
    expected = [[0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    np.testing.assert_array_equal(
        jax.jit(lambda a: cell.discretise(a))(alpha), expected
    )
    one = cell.discretise(alpha, keep=1)
    np.testing.assert_array_equal(np.sum(one, 1), [1, 1, 0, 0, 0, 1])


def test_the_pruned_network_is_the_mixture_at_its_weights(cell):
    weights = cell.discretise(jax.random.normal(KEY, (6, 3)))
    small, x = cell.prune(weights), jnp.array([0.4, 1.0, -1.0])
    np.testing.assert_allclose(small(x), cell.mix(x, weights), atol=1e-14)
    assert sum(len(edge) for edge in small.edges) == 5
    with pytest.raises(ValueError, match="must be concrete"):
        jax.jit(lambda w: cell.prune(w)(x))(weights)


def test_bad_input_is_named(cell):
    with pytest.raises(ValueError, match="at least one of `operations`"):
        MixedCell([], key=KEY)
    with pytest.raises(ValueError, match=r"`weights` must have shape \(6, 3\)"):
        cell(jnp.zeros(3), jnp.zeros((5, 3)))
    with pytest.raises(ValueError, match="`keep` must be at least 1"):
        cell.discretise(jnp.zeros((6, 3)), keep=0)
    with pytest.raises(ValueError, match="operation beside Zero"):
        MixedCell(KINDS[:1], key=KEY).discretise(jnp.zeros((3, 1)))
    narrowing = MixedCell([lambda key: eqx.nn.Linear(3, 2, key=key)], key=KEY)
    with pytest.raises(ValueError, match="must keep the shape"):
        narrowing(jnp.zeros(3), jnp.zeros((3, 1)))
