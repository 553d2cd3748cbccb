"""Diagonal linear networks: what the flow keeps, and its end as predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import DiagonalLinear, gr

ALPHA = 0.1


@pytest.fixture(scope="module")
def net():
    draw = np.random.default_rng(3)
    X = 2.0 + 0.5 * draw.standard_normal((3, 6))
    return DiagonalLinear(jnp.asarray(X), jnp.asarray(X @ np.eye(6)[0]))


@pytest.fixture(scope="module")
def ends(net):
    settings = {"plain": (0.0, 0.0), "F": (0.02, 0.1), "DB": (0.02, 0.0)}
    settings |= {"B": (0.02, -0.1), "too strong": (1.0, 0.0)}
    return {name: (net.flow(ALPHA, *s), s[0]) for name, s in settings.items()}


def interpolating(ends):
    return {name: end for name, end in ends.items() if name != "too strong"}


def test_products_fall_by_the_drift(net, ends):
    for end, gamma in interpolating(ends).values():
        assert end.converged
        predicted = net.predicted_scales(end, ALPHA, gamma)
        np.testing.assert_allclose(end.scales, predicted, rtol=1e-4)


def test_dual_stays_in_the_row_space(net, ends):
    basis = np.linalg.qr(np.asarray(net.X).T)[0]
    for end, _ in interpolating(ends).values():
        outside = end.dual - basis @ (basis.T @ end.dual)
        assert np.linalg.norm(outside) <= 1e-5 * np.linalg.norm(end.dual)
        np.testing.assert_allclose(
            end.dual, np.arcsinh(end.beta / (2 * end.scales**2)), rtol=1e-6
        )


def test_end_is_the_least_potential(net, ends):
    for end, _ in interpolating(ends).values():
        np.testing.assert_allclose(net.least_potential(end.scales), end.beta, atol=1e-4)


def test_forward_is_the_richest(ends):
    plain, forward, exact, backward = (
        float(jnp.mean(ends[name][0].scales)) for name in ("plain", "F", "DB", "B")
    )
    assert forward < exact < backward
    assert exact < plain
    np.testing.assert_allclose(plain, ALPHA, rtol=1e-5)


def test_origin_attracts_where_regularised_too_much(net, ends):
    end, gamma = ends["too strong"]
    assert gamma > net.attracting_gamma
    assert not end.converged
    assert jnp.max(jnp.abs(end.beta)) < 1e-6
    # The linearised rates at the origin change sign there, for every eps.
    worst = jnp.argmin(jnp.abs(net.slope((jnp.zeros(6), jnp.zeros(6)))))
    small = jnp.zeros(6).at[worst].set(1e-6)
    for share, grows in ((0.9, True), (1.1, False)):
        scheme = gr_direction(net, small, share * net.attracting_gamma)
        u, v = (-d[worst] for d in scheme)
        assert (max(u, v) > 0) == grows


def gr_direction(net, small, gamma):
    weights = (small, small)
    slope = jax.grad(net.loss)
    method = gr(optax.sgd(1.0), gamma, scheme="exact")
    updates, _ = method.update(
        slope(weights), method.init(weights), weights, grad_fn=lambda w, i: slope(w)
    )
    return jax.tree.map(jnp.negative, updates)


def test_limits_of_the_potential(net):
    """Large scales give the least Euclidean norm, small ones nearly the least l1."""
    lazy = net.least_potential(100.0)
    np.testing.assert_allclose(lazy, np.linalg.pinv(net.X) @ net.y, atol=1e-4)
    rich = net.least_potential(1e-3)
    np.testing.assert_allclose(net.X @ rich, net.y, atol=1e-6)
    assert jnp.sum(jnp.abs(rich)) < 1.02


def test_no_interpolation_gives_nan(net):
    twice = DiagonalLinear(net.X[jnp.array([0, 0, 1])], jnp.array([0.0, 1.0, 0.0]))
    assert jnp.all(jnp.isnan(twice.least_potential(1.0)))


def test_bad_input(net):
    with pytest.raises(ValueError, match="`y` must have shape"):
        DiagonalLinear(net.X, jnp.ones(2))
    with pytest.raises(ValueError, match="`X` must be finite"):
        DiagonalLinear(net.X.at[0, 0].set(jnp.nan), net.y)
    with pytest.raises(ValueError, match="`alpha` must be positive"):
        net.flow(0.0)
    with pytest.raises(ValueError, match="`gamma` must not be negative"):
        net.flow(0.1, -1.0)
    with pytest.raises(ValueError, match="`scales` must be positive"):
        net.least_potential(jnp.zeros(6))
