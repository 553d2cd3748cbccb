"""The Monge gap: zero for optimal maps, positive for twists, with the right slope."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.transport import exact_monge_gap, fit_map, monge_gap, sinkhorn_divergence

N, D = 12, 2
X = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)))


class Affine(eqx.Module):
    matrix: jax.Array
    shift: jax.Array

    def __call__(self, x):
        return self.matrix @ x + self.shift


def affine(matrix, shift=0.0):
    return Affine(jnp.asarray(matrix), jnp.full(D, shift))


TURN = np.array([[0.0, -1.0], [1.0, 0.0]])


@pytest.fixture(scope="module")
def gap():
    return jax.jit(lambda t, x, e: monge_gap(t, x, epsilon=e, tol=1e-10))


def test_optimal_maps_have_no_gap():
    for matrix in (np.eye(D), np.diag([3.0, 0.2]), np.array([[2.0, 1.0], [1.0, 1.0]])):
        assert float(exact_monge_gap(affine(matrix, 1.0), X).value) < 1e-12


def test_twists_have_their_gap():
    # |x - (-x)|^2 paid; symmetric points are best left where they are.
    symmetric = jnp.concatenate([X, -X])
    paid = 4 * jnp.mean(jnp.sum(symmetric**2, axis=1))
    flipped = exact_monge_gap(affine(-np.eye(D)), symmetric)
    np.testing.assert_allclose(flipped.value, paid, rtol=1e-12)
    assert flipped.proof and float(flipped.details["least"]) < 1e-12
    assert float(exact_monge_gap(affine(TURN), X).value) > 0.1


def test_entropic_gap_is_within_its_bias_of_the_exact_one(gap):
    for matrix in (np.eye(D), TURN, -np.eye(D)):
        exact = float(exact_monge_gap(affine(matrix), X).value)
        for epsilon in (0.01, 0.3):
            value = float(gap(affine(matrix), X, epsilon))
            shift = epsilon * np.log(N)
            assert exact + shift - 1e-9 <= value <= exact + 2 * shift + 1e-9


def test_shifting_the_images_changes_nothing_for_the_squared_distance(gap):
    np.testing.assert_allclose(
        gap(affine(TURN, 2.0), X, 0.3), gap(affine(TURN), X, 0.3), atol=1e-8
    )


def test_gradient_matches_finite_differences(gap):
    direction = jnp.asarray(np.random.default_rng(1).normal(size=(D, D)))
    along = lambda t: gap(affine(TURN + t * direction), X, 0.3)  # noqa: E731
    slope = jax.jit(jax.grad(lambda m: gap(affine(m), X, 0.3)))(jnp.asarray(TURN))
    h = 1e-5
    numeric = (along(h) - along(-h)) / (2 * h)
    np.testing.assert_allclose(jnp.sum(slope * direction), numeric, rtol=1e-6)


def test_other_costs():
    # On a line, with the distance as cost, flipping two points costs what it saves.
    line = jnp.asarray([[0.0], [1.0], [5.0]])
    shift = lambda p: p + 10  # noqa: E731
    assert float(exact_monge_gap(shift, line, cost="euclidean").value) < 1e-12
    # All move right: every order is optimal for the distance, not for its square.
    reverse = lambda p: 15 - p  # noqa: E731
    assert float(exact_monge_gap(reverse, line, cost="euclidean").value) < 1e-12
    assert float(exact_monge_gap(reverse, line).value) > 1
    quartic = lambda p, q: jnp.sum((p - q) ** 4)  # noqa: E731
    assert float(exact_monge_gap(reverse, line, cost=quartic).value) > 1


# optax's Adam relies on JAX's usual promotion.
@jax.numpy_dtype_promotion("standard")
def test_the_regulariser_removes_a_twist():
    """From a half turn, a symmetric target is fitted by the identity only with it."""

    def cloud(key):
        return jax.random.normal(key, (24, D))

    results = {}
    for weight in (0.0, 1.0):
        result = fit_map(
            jax.random.key(0),
            cloud,
            cloud,
            affine(0.9 * TURN),
            fitting=partial(sinkhorn_divergence, epsilon=0.5, tol=1e-4),
            regulariser=partial(monge_gap, epsilon=0.5, tol=1e-4),
            weight=weight,
            steps=80,
            optimiser=optax.adam(0.05),
        )
        assert result.fitting.shape == result.regulariser.shape == (80,)
        results[weight] = float(exact_monge_gap(result.map, X).value)
    assert results[0.0] > 0.2
    assert results[1.0] < 0.2 * results[0.0]


def test_bad_maps_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match="monge_gap: the map must take a point"):
        monge_gap(lambda p: p[:1], X, epsilon=0.1)
    with pytest.raises(ValueError, match="write it for one point"):
        exact_monge_gap(lambda p: jnp.stack([p, p]), X)
    with pytest.raises(ValueError, match="`epsilon` must be positive"):
        monge_gap(affine(TURN), X, epsilon=0.0)
    with pytest.raises(ValueError, match="`x` must have shape"):
        monge_gap(affine(TURN), jnp.zeros(3), epsilon=0.1)
    with pytest.raises(ValueError, match="`cost` must return a scalar"):
        monge_gap(affine(TURN), X, epsilon=0.1, cost=lambda p, q: p - q)
