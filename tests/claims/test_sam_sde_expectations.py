"""Expectations without sampling: two ways to the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from varan.claims.sharpness import _sam_sde_expectations as exact
from varan.sharpness import SamSDE

GENERATOR = np.random.default_rng(0)
BATCHES = GENERATOR.standard_normal((4, 2)), GENERATOR.standard_normal(4)
START = jnp.array([1.0, 2.0])


@pytest.fixture(scope="module")
def sde():
    loss = lambda x, batch: (batch[0] @ x - batch[1]) ** 2 / 2  # noqa: E731
    return SamSDE(loss, jax.tree.map(jnp.asarray, BATCHES), 0.05, 0.1, "usam")


@pytest.fixture(scope="module")
def quadratic():
    rows = np.concatenate([BATCHES[0], -BATCHES[1][:, None]], axis=1)
    return rows.T @ rows / 8


def test_collocation_of_the_algorithm_equals_closed_moments(sde, quadratic):
    @jax.jit
    def both(x):
        found = exact.algorithm_expectation(sde, x, 20, 20)
        return found, exact.affine_algorithm_moments(sde, x, 20)

    found, moments = both(START)
    np.testing.assert_allclose(found, np.sum(quadratic * moments), rtol=1e-9)


def test_collocation_of_the_diffusion_equals_closed_moments(sde, quadratic):
    @jax.jit
    def both(x):
        return exact.sde_expectation(sde, x), exact.affine_sde_generator(sde, 2)

    found, generator = both(START)
    moments = expm(np.asarray(generator)) @ np.outer([*START, 1], [*START, 1]).ravel()
    # Runge-Kutta's error, of fourth order in steps of 0.01.
    np.testing.assert_allclose(found, quadratic.ravel() @ moments, rtol=1e-6)
