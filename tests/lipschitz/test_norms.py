"""Bounds of the spectral norm are never below it, estimates never above."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.lipschitz import Ball, spectral_norm_bound, spectral_norm_estimate

METHODS = ("svd", "gram", "holder", "collatz")
LOOSE = {"svd": 1 + 1e-9, "gram": 1.03, "holder": 3.0, "collatz": 3.0}


@jax.jit
def everything(matrix):
    return (
        jnp.stack([spectral_norm_bound(matrix, method=m) for m in METHODS]),
        spectral_norm_estimate(matrix),
    )


def random(seed, scale=1.0, rank=5, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return (
        scale * rng.normal(size=(7, rank)) @ rng.normal(size=(rank, 5)) / np.sqrt(rank)
    ).astype(dtype)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-40, 1e-3, 1.0, 1e40]),
    rank=st.integers(1, 5),
)
def test_estimate_norm_bounds(seed, scale, rank):
    matrix = random(seed, scale, rank)
    truth = np.linalg.svd(matrix)[1][0]
    bounds, estimate = everything(jnp.asarray(matrix))
    assert estimate <= truth * (1 + 1e-12)
    for method, bound in zip(METHODS, np.asarray(bounds), strict=True):
        assert truth <= bound <= LOOSE[method] * truth, method


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5))
def test_single_precision_is_covered(seed, rank):
    """The truth of the very same numbers, in double precision."""
    matrix = random(seed, rank=rank, dtype=np.float32)
    truth = np.linalg.svd(matrix.astype(np.float64))[1][0]
    bounds, _ = everything(jnp.asarray(matrix))
    assert np.all(np.asarray(bounds, np.float64) >= truth)


def test_nonnegative_matrices_are_bounded_closely_by_quotients():
    matrix = np.abs(random(3))
    truth = np.linalg.svd(matrix)[1][0]
    assert truth <= everything(jnp.asarray(matrix))[0][3] <= 1.0001 * truth


def test_zero_and_one_column():
    bounds, estimate = everything(jnp.zeros((7, 5)))
    np.testing.assert_array_equal(bounds, np.zeros(4))
    assert estimate == 0
    column = jnp.asarray([[3.0], [4.0]])
    for method in METHODS[:2]:
        bound = spectral_norm_bound(column, method=method)
        np.testing.assert_allclose(bound, 5, rtol=1e-12)


def test_large_matrices_take_the_powers():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(520, 513)))
    assert spectral_norm_bound(matrix) == spectral_norm_bound(matrix, method="gram")


def test_slopes_are_those_of_the_norm_and_finite_differences():
    matrix, change = jnp.asarray(random(1)), jnp.asarray(random(2))
    slope = jax.jit(jax.jacobian(lambda t: everything(matrix + t * change)))(0.0)
    h = 1e-6
    above, below = everything(matrix + h * change), everything(matrix - h * change)
    differences = jax.tree.map(lambda a, b: (a - b) / (2 * h), above, below)
    # The quotient's vector is held fixed, which is no derivative of a quotient.
    np.testing.assert_allclose(slope[0][:3], differences[0][:3], rtol=1e-5)
    np.testing.assert_allclose(slope[1], differences[1], rtol=1e-3)


def test_nan_stays_nan_under_jit_and_is_refused_outside():
    matrix = jnp.asarray(random(0)).at[0, 0].set(jnp.nan)
    bounds, estimate = everything(matrix)
    assert np.all(np.isnan(bounds)) and np.isnan(estimate)
    for f in (spectral_norm_bound, spectral_norm_estimate):
        with pytest.raises(ValueError, match="`matrix` must be finite"):
            f(matrix)
        with pytest.raises(ValueError, match="`matrix` must have shape"):
            f(jnp.ones(3))
        with pytest.raises(ValueError, match="`matrix` must not be empty"):
            f(jnp.ones((0, 3)))
    with pytest.raises(ValueError, match="`method` must be one of"):
        spectral_norm_bound(jnp.eye(2), method="power")
    with pytest.raises(ValueError, match="`steps` must not be negative"):
        spectral_norm_estimate(jnp.eye(2), steps=-1)


def test_a_ball_lies_in_its_box_and_refuses_bad_numbers():
    ball = Ball(jnp.array([1, 2]), 0.5)
    np.testing.assert_array_equal(ball.box.lower, [0.5, 1.5])
    with pytest.raises(ValueError, match="`radius` must not be negative"):
        Ball(jnp.ones(2), -1.0)
    with pytest.raises(ValueError, match="`centre` must be finite"):
        Ball(jnp.array([jnp.nan]), 1.0)
