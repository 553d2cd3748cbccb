"""Cones and the nuclear norm: optimality, and derivatives at repeated eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from varan.operators import (
    project_positive_semidefinite,
    project_second_order_cone,
    prox_nuclear_norm,
)

shrink = jax.jit(prox_nuclear_norm)
RNG = np.random.default_rng(0)
LEFT, RIGHT = (np.linalg.qr(RNG.standard_normal((4, 3)))[0] for _ in range(2))
MATRIX = RNG.standard_normal((4, 4))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_nuclear_norm_meets_its_optimality_conditions(shape):
    x = RNG.standard_normal(shape)
    u = np.asarray(shrink(jnp.array(x), 0.7, 0.9))
    # (x - u) / step is a subgradient: spectral norm at most the weight, and aligned.
    pull = (x - u) / 0.9
    assert np.linalg.norm(pull, 2) <= 0.7 + 1e-12
    np.testing.assert_allclose(
        np.sum(pull * u), 0.7 * np.linalg.norm(u, "nuc"), rtol=1e-12
    )


def test_cone_and_polar_split_the_point():
    # Moreau: x = P(x) - P(-x) for a self-dual cone, and the parts are orthogonal.
    symmetric = jnp.array(MATRIX + MATRIX.T)
    vector = jnp.array([0.3, 1.0, -2.0])
    for project, x in (
        (project_positive_semidefinite, symmetric),
        (project_second_order_cone, vector),
    ):
        up, down = project(x), project(-x)
        np.testing.assert_allclose(up - down, x, atol=1e-12)
        np.testing.assert_allclose(jnp.vdot(up, down), 0, atol=1e-12)


def test_points_in_the_cone_and_in_its_polar():
    inside, polar = jnp.array([2.0, 1.0, 1.0]), jnp.array([-2.0, 1.0, 1.0])
    assert jnp.all(project_second_order_cone(inside) == inside)
    assert jnp.all(project_second_order_cone(polar) == 0)
    assert jnp.all(project_second_order_cone(jnp.zeros(3)) == 0)


@pytest.mark.parametrize("values", [[2.0, 2.0, 0.3], [0.3, 0.3, 0.0], [3.0, 3.0, 3.0]])
@pytest.mark.parametrize("wide", [False, True])
def test_nuclear_norm_differentiates_at_repeated_singular_values(values, wide):
    x = (LEFT * np.array(values)) @ RIGHT[:3].T
    x = jnp.array(x.T if wide else x)
    check_grads(shrink, (x, jnp.array(0.7)), order=1)


def test_semidefinite_cone_differentiates_at_repeated_eigenvalues():
    basis = np.linalg.qr(MATRIX)[0]
    for values in ([1.0, 1.0, -2.0, -2.0], [1.0, 1.0, 1.0, 1.0]):
        x = jnp.array((basis * np.array(values)) @ basis.T)
        check_grads(project_positive_semidefinite, (x,), order=1)


def test_orthogonal_changes_of_basis_carry_over():
    basis = jnp.array(np.linalg.qr(MATRIX)[0])
    x = jnp.array(MATRIX + MATRIX.T)
    for operator in (project_positive_semidefinite, shrink):
        turned = operator(basis @ x @ basis.T)
        np.testing.assert_allclose(turned, basis @ operator(x) @ basis.T, atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="`x` must have shape"):
        project_positive_semidefinite(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="two entries at least"):
        project_second_order_cone(jnp.ones(1))
    with pytest.raises(ValueError, match="`weight` must not be negative"):
        prox_nuclear_norm(jnp.ones((2, 3)), -1.0)
    for operator, x in (
        (project_positive_semidefinite, jnp.full((2, 2), jnp.nan)),
        (prox_nuclear_norm, jnp.full((2, 2), jnp.nan)),
        (project_second_order_cone, jnp.array([1.0, jnp.nan])),
    ):
        assert jnp.any(jnp.isnan(operator(x)))
