"""Noises: densities that integrate to one constant, draws that follow them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import integrate, stats

from varan.fenchel_young import Gumbel, Normal

CASES = {"normal": (Normal(), stats.norm()), "gumbel": (Gumbel(), stats.gumbel_r())}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_log_density_up_to_a_constant(case):
    noise, known = case
    z = np.linspace(-2, 5, 9)
    gap = np.asarray(noise.log_prob(jnp.array(z))) - known.logpdf(z)
    np.testing.assert_allclose(gap, gap[0], atol=1e-12)
    check_grads(noise.log_prob, (jnp.array(0.3),), order=2)


def test_draws_follow_the_density(case):
    noise, known = case
    draws = np.asarray(noise.sample(jax.random.key(0), (4000,), jnp.float64))
    # A false alarm has the probability 1e-6; the seed is fixed.
    assert stats.kstest(draws, known.cdf).pvalue > 1e-6


def test_the_score_has_mean_zero(case):
    noise, known = case
    score = jax.grad(noise.log_prob)
    mean, _ = integrate.quad(lambda z: float(score(z)) * known.pdf(z), -6, 30)
    assert abs(mean) < 1e-6


def test_dtype_and_shape_are_as_asked(case):
    noise, _ = case
    for dtype in (jnp.float32, jnp.float64):
        z = noise.sample(jax.random.key(0), (2, 3), dtype)
        assert z.shape == (2, 3) and noise.log_prob(z).dtype == z.dtype == dtype
