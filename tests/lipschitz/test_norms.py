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


SMALL = np.array([[1, 2], [3, 4]], np.float32)
SUBNORMAL = np.array([[1e-39, 1e-40], [0, 3e-39]], np.float32)


@pytest.mark.parametrize(
    "matrix",
    [
        SMALL * np.float32(1e-22),
        SMALL * np.float32(1e25),
        SMALL * np.float32(4e37),
        SMALL * np.float32(1e-38),
        np.array([[1e20, 1e-20], [1e-20, 1e-20]], np.float32),
        np.array([[1.2e-38, 1.1e-38], [1.1e-38, 1.1e-38]], np.float32),
        SUBNORMAL,
        np.array([[3e-45]], np.float32),
        SMALL.astype(np.float64) * 1e-310,
        SMALL.astype(np.float64) * 2.5e307,
    ],
)
def test_any_scale_is_covered(matrix):
    """Smaller than the least normal number up to the largest, in both precisions."""
    size = np.abs(matrix).max().astype(np.longdouble)
    unit = (matrix.astype(np.longdouble) / size).astype(np.float64)
    truth = np.linalg.svd(unit)[1][0] * size
    bounds, estimate = everything(jnp.asarray(matrix))
    # What is subnormal may count as the smallest normal number.
    spare = 2 * np.finfo(matrix.dtype).smallest_normal
    loose = 1.2 * truth + (spare if np.abs(matrix).min() < spare else 0)
    bounds = np.asarray(bounds).astype(np.longdouble)
    assert np.all(bounds >= truth * (1 - 1e-15)) and np.all(bounds <= loose)
    assert float(estimate) <= truth * (1 + 1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scale", [2.0**-24, 1.0, 3e4])
def test_half_precisions_are_rounded_up(dtype, scale):
    matrix = (jnp.asarray(random(0)) * scale / 5).astype(dtype)
    truth = np.linalg.svd(np.asarray(matrix, np.float64))[1][0]
    for method in METHODS:
        bound = spectral_norm_bound(matrix, method=method)
        assert bound.dtype == dtype and float(bound) >= truth
        assert float(bound) <= LOOSE[method] * 1.02 * truth or truth < 1e-4


@pytest.mark.parametrize("function", [spectral_norm_bound, spectral_norm_estimate])
def test_integers_and_complex_numbers_are_refused(function):
    with pytest.raises(TypeError, match=r"`matrix` must be .* \(got int32\)"):
        function(jnp.eye(2, dtype=jnp.int32))
    with pytest.raises(TypeError, match=r"`matrix` must be .* \(got complex64\)"):
        function(jnp.eye(2, dtype=jnp.complex64))


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
    infinite = everything(matrix.at[0, 0].set(jnp.inf))
    assert not np.any(np.isfinite(infinite[0])) and not np.isfinite(infinite[1])
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
