"""Projection on a polyhedron against enumeration of active sets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from varan.operators import (
    Polyhedron,
    project_affine,
    project_box,
    project_polyhedron,
    project_simplex,
)

RNG = np.random.default_rng(0)
A, G = RNG.standard_normal((1, 4)), RNG.standard_normal((5, 4))
INSIDE = RNG.standard_normal(4)
B, H = A @ INSIDE, G @ INSIDE + 0.3
POINTS = 3 * RNG.standard_normal((8, 4))


@pytest.fixture(scope="module")
def polyhedron():
    return Polyhedron(jnp.array(A), jnp.array(B), jnp.array(G), jnp.array(H))


@pytest.fixture(scope="module")
def project(polyhedron):
    return jax.jit(lambda x, warm=None: polyhedron.project(x, warm, tol=1e-10))


def brute_force(x):
    """The nearest feasible point among the projections on all faces."""
    best = None
    for size in range(4):
        for face in itertools.combinations(range(5), size):
            M = np.concatenate([A, G[list(face)]])
            r = np.concatenate([B, H[list(face)]])
            u = x - np.linalg.pinv(M) @ (M @ x - r)
            feasible = np.all(G @ u <= H + 1e-9)
            if feasible and (best is None or np.sum((u - x) ** 2) < best[0]):
                best = (np.sum((u - x) ** 2), u)
    return best[1]


def test_finds_the_nearest_point(project):
    for x in POINTS:
        result = project(jnp.array(x))
        assert bool(result.converged)
        np.testing.assert_allclose(result.x, brute_force(x), atol=1e-7)


def test_multipliers_explain_the_answer(project, polyhedron):
    result = project(jnp.array(POINTS[0]))
    pull = polyhedron.matrix.T @ result.multipliers
    np.testing.assert_allclose(POINTS[0] - result.x, pull, atol=1e-8)
    assert np.all(result.multipliers[1:] >= 0)


def test_warm_start_saves_steps(project):
    x = jnp.array(POINTS[0])
    cold = project(x)
    warm = project(x + 1e-6, cold.multipliers)
    assert int(warm.steps) < int(cold.steps)


def test_idempotent_and_firmly_nonexpansive(project):
    u = np.stack([project(jnp.array(x)).x for x in POINTS])
    np.testing.assert_allclose(project(jnp.array(u[0])).x, u[0], atol=1e-8)
    dx, du = POINTS[1:] - POINTS[:-1], u[1:] - u[:-1]
    assert np.all(np.sum(du * dx, 1) >= np.sum(du * du, 1) - 1e-7)


def test_agrees_with_closed_forms():
    x = jnp.array(POINTS[1])
    simplex = project_polyhedron(
        x, jnp.ones((1, 4)), jnp.ones(1), -jnp.eye(4), jnp.zeros(4), tol=1e-11
    )
    np.testing.assert_allclose(simplex.x, project_simplex(x), atol=1e-8)
    box = project_polyhedron(x, G=jnp.eye(4), h=jnp.ones(4), tol=1e-11)
    np.testing.assert_allclose(box.x, project_box(x, -jnp.inf, 1.0), atol=1e-8)
    affine = project_polyhedron(x, jnp.array(A), jnp.array(B), tol=1e-11)
    expected = project_affine(x, jnp.array(A), jnp.array(B))
    np.testing.assert_allclose(affine.x, expected, atol=1e-8)


def test_derivative_agrees_with_finite_differences():
    def answer(x, b, h):
        return project_polyhedron(x, jnp.array(A), b, jnp.array(G), h, tol=1e-11).x

    args = (jnp.array(POINTS[0]), jnp.array(B), jnp.array(H))
    check_grads(answer, args, order=1, eps=1e-4, atol=1e-5, rtol=1e-5)


def test_derivative_survives_a_repeated_row():
    def answer(x):
        G = jnp.array([[1.0, 0.0], [1.0, 0.0]])
        return project_polyhedron(x, G=G, h=jnp.ones(2), tol=1e-10).x

    jacobian = jax.jacrev(answer)(jnp.array([2.0, 3.0]))
    np.testing.assert_allclose(jacobian, np.diag([0.0, 1.0]), atol=1e-8)


def test_vmap_equals_a_loop(polyhedron, project):
    batch = jax.vmap(lambda x: polyhedron.project(x, tol=1e-10).x)(jnp.array(POINTS))
    for x, u in zip(POINTS, batch, strict=True):
        np.testing.assert_allclose(u, project(jnp.array(x)).x, atol=1e-7)


def test_an_empty_set_never_converges_and_has_no_derivative():
    def answer(x):
        G = jnp.array([[1.0], [-1.0]])
        return project_polyhedron(x, G=G, h=jnp.array([0.0, -1.0]), max_steps=300)

    assert not bool(answer(jnp.ones(1)).converged)
    assert bool(jnp.isnan(jax.grad(lambda x: answer(x).x[0])(jnp.ones(1))[0]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Polyhedron(), "at least one row"),
        (lambda: Polyhedron(A=jnp.ones((1, 2))), "must come together"),
        (
            lambda: Polyhedron(
                jnp.ones((1, 2)), jnp.ones(1), jnp.ones((1, 3)), jnp.ones(1)
            ),
            "as many columns",
        ),
        (lambda: Polyhedron(G=jnp.zeros((1, 2)), h=jnp.ones(1)), "may be zero"),
        (lambda: Polyhedron(G=jnp.ones((1, 2)), h=jnp.full(1, jnp.nan)), "finite"),
        (
            lambda: project_polyhedron(jnp.ones(3), G=jnp.eye(2), h=jnp.ones(2)),
            "`point` must have shape",
        ),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
