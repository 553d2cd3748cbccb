"""Closed forms for Gaussians, held against one another and against sampling."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.testing import Case, contract
from varan.transport import (
    bures_wasserstein,
    bw_uvp,
    gaussian_entropic_plan,
    gaussian_map,
    l2_uvp,
    ornstein_uhlenbeck,
)

D = 3


def law(seed):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(D, D))
    covariance = jnp.asarray(factor @ factor.T + 0.3 * np.eye(D))
    return jnp.asarray(rng.normal(size=D)), covariance


LAWS = (*law(0), *law(1))


def symmetric(direction):
    return tuple((v + v.T) / 2 if v.ndim == 2 else v for v in direction)


test_contract = contract(
    [
        Case(
            lambda: bures_wasserstein,
            (LAWS, (*law(2), *law(3))),
            kind="function",
            project=symmetric,
        )
    ]
)


def test_the_map_pushes_forward_at_the_distance():
    mean0, covariance0, mean1, covariance1 = LAWS
    matrix, shift = gaussian_map(*LAWS)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(matrix @ mean0 + shift, mean1, atol=1e-12)
    np.testing.assert_allclose(matrix @ covariance0 @ matrix, covariance1, atol=1e-11)
    # E |x - T(x)|^2 for x of the first law.
    moved = jnp.eye(D) - matrix
    cost = jnp.trace(moved @ covariance0 @ moved) + jnp.sum((mean0 - mean1) ** 2)
    np.testing.assert_allclose(bures_wasserstein(*LAWS), cost, rtol=1e-10)
    assert float(bures_wasserstein(*LAWS[:2], *LAWS[:2])) < 1e-12


def test_second_derivative_at_a_repeated_eigenvalue():
    mean0, _, mean1, covariance1 = LAWS
    direction = jnp.diag(jnp.asarray([1.0, 2.0, -1.0]))

    def slope(t):
        at = lambda s: bures_wasserstein(mean0, s, mean1, covariance1)  # noqa: E731
        gradient = jax.grad(at)(jnp.eye(D) + t * direction)
        return jnp.sum(gradient * direction)

    compiled, h = jax.jit(slope), 1e-5
    numeric = (compiled(h) - compiled(-h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(slope))(0.0), numeric, rtol=1e-6)


def test_entropic_plan_satisfies_its_optimality_condition():
    epsilon = 0.7
    mean, joint = gaussian_entropic_plan(*LAWS, epsilon=epsilon)
    np.testing.assert_allclose(mean, np.concatenate([LAWS[0], LAWS[2]]))
    cross = joint[:D, D:]
    # A Gaussian plan exp((f(x) + g(y) - |x - y|^2 / 2) / epsilon): the off-diagonal
    # block of its precision is -1 / epsilon, and that determines it.
    precision = jnp.linalg.inv(joint)
    np.testing.assert_allclose(precision[:D, D:], -np.eye(D) / epsilon, atol=1e-9)
    _, small = gaussian_entropic_plan(*LAWS, epsilon=1e-6)
    matrix, _ = gaussian_map(*LAWS)
    np.testing.assert_allclose(small[:D, D:], LAWS[1] @ matrix, atol=1e-5)
    _, large = gaussian_entropic_plan(*LAWS, epsilon=1e6)
    assert float(jnp.max(jnp.abs(large[:D, D:]))) < 1e-4 < float(jnp.max(abs(cross)))


def test_the_flow_solves_its_differential_equation():
    mean0, covariance0, mean1, covariance1 = LAWS
    flow = jax.jit(
        lambda t: ornstein_uhlenbeck(mean0, covariance0, mean1, covariance1, time=t)
    )
    (mean, covariance), (speed, change) = jax.jvp(flow, (0.4,), (1.0,))
    precision = jnp.linalg.inv(covariance1)
    np.testing.assert_allclose(speed, precision @ (mean1 - mean), atol=1e-10)
    drift = precision @ covariance
    np.testing.assert_allclose(change, 2 * np.eye(D) - drift - drift.T, atol=1e-9)
    np.testing.assert_allclose(flow(0.0)[1], covariance0, atol=1e-12)
    np.testing.assert_allclose(flow(200.0)[1], covariance1, atol=1e-8)


def test_unexplained_variance():
    rng = np.random.default_rng(5)
    exact = jnp.asarray(rng.normal(size=(200, D)))
    constant = jnp.broadcast_to(exact.mean(0), exact.shape)
    np.testing.assert_allclose(l2_uvp(constant, exact), 100.0)
    assert float(l2_uvp(exact, exact)) == 0
    mean, covariance = law(6)
    samples = jnp.asarray(rng.multivariate_normal(mean, covariance, 20_000))
    assert float(bw_uvp(samples, mean, covariance)) < 0.1
    # A shift by v costs |v|^2 over half the variance.
    shift = jnp.asarray([1.0, 0.0, 0.0])
    moved = float(bw_uvp(samples + shift[None], mean, covariance))
    np.testing.assert_allclose(moved, 200 / float(jnp.trace(covariance)), rtol=0.05)


def test_bad_input_is_refused_in_one_sentence():
    mean, covariance = law(0)
    with pytest.raises(ValueError, match=r"`covariance0` must have shape \(3, 3\)"):
        bures_wasserstein(mean, jnp.eye(2), mean, covariance)
    with pytest.raises(ValueError, match="`covariance1` must be symmetric"):
        gaussian_map(mean, covariance, mean, covariance + jnp.triu(covariance))
    with pytest.raises(ValueError, match="`mean1` must be finite"):
        bures_wasserstein(mean, covariance, mean * jnp.nan, covariance)
    with pytest.raises(ValueError, match="`epsilon` must be positive"):
        gaussian_entropic_plan(mean, covariance, mean, covariance, epsilon=0.0)
    with pytest.raises(ValueError, match="`time` must not be negative"):
        ornstein_uhlenbeck(mean, covariance, mean, covariance, time=-1.0)
    with pytest.raises(ValueError, match=r"`mapped` must have shape \(4, 2\)"):
        l2_uvp(jnp.zeros((3, 2)), jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match="`samples` must be two or more"):
        bw_uvp(jnp.zeros((1, 3)), mean, covariance)


def test_matrices_that_are_no_covariances_are_refused_and_nan_under_jit():
    zero, one = jnp.zeros(2), jnp.eye(2)
    bad = jnp.array([[1.0, 2.0], [2.0, 1.0]])
    calls = (
        bures_wasserstein,
        gaussian_map,
        partial(gaussian_entropic_plan, epsilon=1.0),
        partial(ornstein_uhlenbeck, time=1.0),
    )
    for call in calls:
        for first, second in ((bad, one), (one, bad)):
            with pytest.raises(ValueError, match="must be positive semidefinite"):
                call(zero, first, zero, second)
    for first, second in ((bad, one), (one, bad)):
        assert bool(jnp.isnan(jax.jit(bures_wasserstein)(zero, first, zero, second)))
