"""Proximal operators: what makes them proximal, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.optimize import minimize_scalar

from varan.operators import (
    project_box,
    project_l2_ball,
    project_simplex,
    prox_elastic_net,
    prox_from_projection,
    prox_group_lasso,
    prox_l1,
    prox_none,
    prox_nonnegative_l1,
    prox_nonnegative_ridge,
    prox_ridge,
)

CASES = {
    "l1": (lambda x, t: prox_l1(x, 0.7, t), lambda u: 0.7 * abs(u)),
    "ridge": (lambda x, t: prox_ridge(x, 0.7, t), lambda u: 0.35 * u**2),
    "elastic net": (
        lambda x, t: prox_elastic_net(x, 0.7, 1.3, t),
        lambda u: 0.7 * abs(u) + 0.65 * u**2,
    ),
    "nonnegative l1": (
        lambda x, t: prox_nonnegative_l1(x, 0.7, t),
        lambda u: 0.7 * u if u >= 0 else 1e3 * (1 - u),
    ),
    "nonnegative ridge": (
        lambda x, t: prox_nonnegative_ridge(x, 0.7, t),
        lambda u: 0.35 * u**2 if u >= 0 else 1e3 * (1 - u),
    ),
    "group lasso": (
        lambda x, t: prox_group_lasso(x, 0.7, t),
        lambda u: 0.7 * abs(u),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def points(count=40):
    return 3 * np.random.default_rng(0).standard_normal((count, 4))


def test_solves_its_minimisation(case):
    prox, penalty = case
    for v in (-2.3, -0.2, 0.1, 0.9, 4.0):
        best = minimize_scalar(
            lambda u, v=v: penalty(u) + (u - v) ** 2 / (2 * 0.6),
            bounds=(-6, 6),
            options={"xatol": 1e-10},
            method="bounded",
        )
        # A minimiser is found to about the root of the machine's eps.
        np.testing.assert_allclose(prox(jnp.array(v), 0.6), best.x, atol=1e-6)


def test_is_firmly_nonexpansive(case):
    prox, _ = case
    x, y = points(), points()[::-1]
    d = np.asarray(prox(jnp.array(x), 0.6) - prox(jnp.array(y), 0.6))
    assert np.all(np.sum(d * (x - y), 1) >= np.sum(d * d, 1) - 1e-12)


def test_moreau_identity_of_the_absolute_value():
    # The conjugate of w|.| is the indicator of [-w, w].
    x = jnp.array(points())
    np.testing.assert_allclose(
        prox_l1(x, 0.7, 0.6) + 0.6 * project_box(x / 0.6, -0.7, 0.7), x, atol=1e-14
    )


def test_moreau_identity_of_the_square():
    # The conjugate of w u^2 / 2 is u^2 / (2 w).
    x = jnp.array(points())
    np.testing.assert_allclose(
        prox_ridge(x, 0.7, 0.6) + 0.6 * prox_ridge(x / 0.6, 1 / 0.7, 1 / 0.6),
        x,
        atol=1e-14,
    )


def test_derivatives_agree_with_finite_differences(case):
    prox, _ = case
    x = jnp.array([-2.3, -0.2, 0.1, 0.9, 4.0])
    check_grads(prox, (x, jnp.array(0.6)), order=1)


def test_acts_on_pytrees_and_keeps_float32(case):
    prox, _ = case
    out = prox({"a": jnp.ones(2, jnp.float32), "b": jnp.ones((2, 1), jnp.float32)}, 0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {np.dtype(np.float32)}


def test_nan_stays_nan(case):
    prox, _ = case
    assert jnp.isnan(prox(jnp.array(jnp.nan), 0.5))


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="`l1` must not be negative"):
        prox_l1(jnp.ones(2), -1.0)


def test_moreau_identity_of_the_norm():
    # The conjugate of w ||.|| is the indicator of the ball of radius w.
    x = jnp.array(points())
    shrink = jax.vmap(lambda v: prox_group_lasso(v, 0.7, 0.6))
    project = jax.vmap(lambda v: project_l2_ball(v / 0.6, 0.7))
    np.testing.assert_allclose(shrink(x) + 0.6 * project(x), x, atol=1e-14)


def test_group_lasso_treats_all_leaves_as_one_group_and_zero_is_safe():
    tree = prox_group_lasso({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, 2.5)
    np.testing.assert_allclose([tree["a"][0], tree["b"][0]], [1.5, 2.0])
    jacobian = jax.jacrev(prox_group_lasso)(jnp.zeros(2))
    assert jnp.all(jacobian == 0)
    assert jnp.all(prox_group_lasso(jnp.zeros(2), 0.0) == 0)


def test_a_projection_is_a_proximal_operator_whatever_the_step():
    prox = prox_from_projection(project_simplex)
    x = jnp.array([0.3, 1.2, -0.5])
    assert jnp.all(prox(x, 0.1) == project_simplex(x))
    assert jnp.all(prox(x, 7.0, 2.0) == project_simplex(x, 2.0))


def test_nothing_is_the_identity():
    x = {"a": jnp.ones(2)}
    assert prox_none(x, 0.3) is x
