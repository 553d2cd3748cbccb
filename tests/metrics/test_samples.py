"""Distances of samples: against brute force, scipy, and what they mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

from varan.metrics import mmd, sliced_wasserstein
from varan.testing import Case, contract

KEY = jax.random.key(0)
rng = np.random.default_rng(0)
X, Y = jnp.asarray(rng.standard_normal((7, 2))), jnp.asarray(rng.random((5, 2)) + 1)

test_contract = contract(
    [
        Case(
            lambda: lambda x, y: mmd(x, y, bandwidth=0.8),
            [(X, Y), (Y[:, ::-1][jnp.array([0, 1, 2, 3, 4, 0, 2])] * 2, X[:5])],
            kind="function",
            name="mmd",
        )
    ]
)


def brute(kernel, x, y):
    n, m = len(x), len(y)
    within = sum(
        kernel(s[i], s[j]) / (k * (k - 1))
        for s, k in ((x, n), (y, m))
        for i in range(k)
        for j in range(k)
        if i != j
    )
    return within - 2 * np.mean([[kernel(a, b) for b in y] for a in x])


def test_mmd_is_the_sum_over_pairs():
    x, y = np.asarray(X), np.asarray(Y)
    energy = brute(lambda a, b: -np.linalg.norm(a - b), x, y)
    assert abs(float(mmd(X, Y, kernel="energy")) - energy) < 1e-12
    together = np.concatenate([x, y])
    width = np.median(cdist(together, together)[np.triu_indices(12, 1)])
    gaussian = brute(lambda a, b: np.exp(-((a - b) @ (a - b)) / (2 * width**2)), x, y)
    assert abs(float(mmd(X, Y)) - gaussian) < 1e-12


def test_mmd_has_no_bias():
    # 200 pairs of samples of one distribution: the mean is 0 within 4 deviations,
    # false alarm 6e-5.
    draws = jax.random.normal(KEY, (200, 2, 20, 2))
    for kernel in ("gaussian", "energy"):
        bandwidth = 1.0 if kernel == "gaussian" else None
        values = np.asarray(
            jax.jit(
                jax.vmap(
                    lambda d, k=kernel, b=bandwidth: mmd(
                        d[0], d[1], kernel=k, bandwidth=b
                    )
                )
            )(draws)
        )
        assert abs(values.mean()) < 4 * values.std() / np.sqrt(200)
        assert values.min() < 0


def test_energy_derivative_is_finite_where_points_coincide():
    gradient = jax.grad(lambda x: mmd(x, Y, kernel="energy"))(jnp.zeros((3, 2)))
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.parametrize("sizes", [(6, 6), (6, 4)])
def test_in_one_dimension_it_is_the_wasserstein_distance(sizes):
    x, y = (jnp.asarray(rng.standard_normal((k, 1))) for k in sizes)
    expected = wasserstein_distance(np.asarray(x)[:, 0], np.asarray(y)[:, 0])
    got = sliced_wasserstein(KEY, x, y, p=1.0, directions=3)
    assert abs(float(got) - expected) < 1e-12


def test_a_shift_moves_by_its_mean_square_over_directions():
    # E (theta . v)^2 = |v|^2 / d; 2000 directions: relative deviation below 3 %.
    shift = jnp.array([3.0, 4.0])
    got = sliced_wasserstein(KEY, X, X + shift[None], directions=2000)
    assert abs(float(got) - 5 / np.sqrt(2)) < 0.1
    assert float(sliced_wasserstein(KEY, X, X[::-1])) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd(X[:1], Y), "`x` must hold 2 points at least"),
        (lambda: mmd(X, Y[:, :1]), r"`y` must have shape \(any, 2\)"),
        (lambda: mmd(X, Y, kernel="laplace"), "`kernel` must be one of"),
        (lambda: mmd(X, Y, kernel="energy", bandwidth=1.0), "must be left out"),
        (lambda: mmd(X, Y, bandwidth=0.0), "`bandwidth` must be positive"),
        (lambda: sliced_wasserstein(KEY, X[:0], Y), "must not be empty"),
        (lambda: sliced_wasserstein(KEY, X, Y, p=0.5), "must be at least 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
