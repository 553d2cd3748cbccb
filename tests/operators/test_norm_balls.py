"""Spheres against sampled points, and the balls' promises at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.operators import (
    project_l1_ball,
    project_l1_sphere,
    project_l2_ball,
    project_l2_sphere,
    project_linf_ball,
    project_linf_sphere,
    prox_l1,
)

SPHERES = {
    "l1": (project_l1_sphere, 1),
    "l2": (project_l2_sphere, 2),
    "maximum": (project_linf_sphere, np.inf),
}
BALLS = {
    "l1": (project_l1_ball, 1),
    "l2": (project_l2_ball, 2),
    "maximum": (project_linf_ball, np.inf),
}


@pytest.mark.parametrize("name", SPHERES)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_no_sampled_point_of_the_sphere_is_nearer(name, scale):
    project, order = SPHERES[name]
    rng = np.random.default_rng(0)
    x = scale * rng.standard_normal((20, 3))
    u = np.asarray(jax.vmap(lambda v: project(v, 1.3))(jnp.array(x)))
    np.testing.assert_allclose(np.linalg.norm(u, order, axis=1), 1.3)
    others = rng.standard_normal((4000, 3))
    others *= 1.3 / np.linalg.norm(others, order, axis=1)[:, None]
    nearest = np.linalg.norm(x[:, None] - others[None], axis=2).min(1)
    assert np.all(np.linalg.norm(x - u, axis=1) <= nearest + 1e-12)


@pytest.mark.parametrize("name", BALLS)
def test_inside_nothing_moves_and_outside_ball_and_sphere_agree(name):
    ball, order = BALLS[name]
    x = jnp.array([0.1, -0.3, 0.2])
    assert jnp.all(ball(x, 1.0) == x)
    far = 10 * x / np.linalg.norm(x, order)
    np.testing.assert_allclose(ball(far), SPHERES[name][0](far), atol=1e-14)


@pytest.mark.parametrize("name", BALLS)
def test_leaves_share_one_ball(name):
    flat = jnp.array([3.0, -4.0, 0.5])
    for table in (BALLS, SPHERES):
        project = table[name][0]
        tree = project({"a": flat[:1], "b": flat[1:, None]})
        together = jnp.concatenate([tree["a"], tree["b"][:, 0]])
        np.testing.assert_allclose(together, project(flat), atol=1e-14)


def test_moreau_ties_the_maximum_norm_to_the_l1_ball():
    # The conjugate of ||.||_1 is the indicator of the maximum norm's ball.
    x = jnp.array([3.0, -0.4, 0.5])
    np.testing.assert_allclose(prox_l1(x) + project_linf_ball(x), x, atol=1e-15)


def test_a_zero_entry_has_a_sign_on_the_l1_sphere():
    u = project_l1_sphere(jnp.zeros(2), 1.0)
    np.testing.assert_allclose(u, 0.5)


@pytest.mark.parametrize(
    "project", [f for f, _ in (*BALLS.values(), *SPHERES.values())]
)
def test_radii_must_be_positive(project):
    with pytest.raises(ValueError, match="`radius` must be positive"):
        project(jnp.ones(2), 0.0)
    assert jnp.any(jnp.isnan(jax.jit(project)(jnp.ones(2), -1.0)))


def test_the_centre_of_the_euclidean_sphere_is_refused():
    with pytest.raises(ValueError, match="must not be zero"):
        project_l2_sphere(jnp.zeros(2))
    assert jnp.all(jnp.isnan(jax.jit(project_l2_sphere)(jnp.zeros(2))))
