"""Projections in closed form: nearest, idempotent, firm, and their derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from varan.operators import (
    isotonic_l2,
    project_affine,
    project_birkhoff,
    project_box,
    project_box_section,
    project_halfspace,
    project_hypercube,
    project_hyperplane,
    project_l1_ball,
    project_l2_ball,
    project_linf_ball,
    project_nonnegative,
    project_positive_semidefinite,
    project_second_order_cone,
    project_simplex,
    project_transport,
)

NORMAL = jnp.array([1.0, -2.0, 0.5])
ROWS = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
RIGHT = ROWS @ jnp.array([0.3, -0.2, 0.5])
CENTER = jnp.array([0.5, 0.5, -1.0])

CASES = {
    "box": (
        lambda x: project_box(x, -0.5, jnp.array([1.0, 0.2, jnp.inf])),
        lambda u: np.all(u >= -0.5, -1) & (u[..., 0] <= 1) & (u[..., 1] <= 0.2),
    ),
    "nonnegative": (project_nonnegative, lambda u: np.all(u >= 0, -1)),
    "ball": (
        lambda x: project_l2_ball(x, 0.8, CENTER),
        lambda u: np.linalg.norm(u - np.asarray(CENTER), axis=-1) <= 0.8 + 1e-12,
    ),
    "simplex": (
        lambda x: project_simplex(x, 1.5),
        lambda u: np.all(u >= 0, -1) & (abs(u.sum(-1) - 1.5) < 1e-9),
    ),
    "hyperplane": (
        lambda x: project_hyperplane(x, NORMAL, 0.4),
        lambda u: abs(u @ np.asarray(NORMAL) - 0.4) < 1e-9,
    ),
    "halfspace": (
        lambda x: project_halfspace(x, NORMAL, 0.4),
        lambda u: u @ np.asarray(NORMAL) <= 0.4 + 1e-12,
    ),
    "affine": (
        lambda x: project_affine(x, ROWS, RIGHT),
        lambda u: (
            np.linalg.norm(u @ np.asarray(ROWS.T) - np.asarray(RIGHT), axis=-1) < 1e-9
        ),
    ),
    "hypercube": (
        lambda x: project_hypercube(x, 1.5),
        lambda u: np.all((u >= 0) & (u <= 1.5), -1),
    ),
    "l1 ball": (
        lambda x: project_l1_ball(x, 1.5),
        lambda u: np.sum(abs(u), -1) <= 1.5 + 1e-12,
    ),
    "maximum ball": (
        lambda x: project_linf_ball(x, 0.8),
        lambda u: np.max(abs(u), -1) <= 0.8,
    ),
    "box section": (
        lambda x: project_box_section(x, -0.5, jnp.array([1.0, jnp.inf, 2]), NORMAL, 1),
        lambda u: (
            (abs(u @ np.asarray(NORMAL) - 1) < 1e-9)
            & np.all((u >= -0.5) & (u <= np.array([1.0, np.inf, 2.0])), -1)
        ),
    ),
    "second-order cone": (
        project_second_order_cone,
        lambda u: np.linalg.norm(u[..., 1:], axis=-1) <= u[..., 0] + 1e-12,
    ),
    "semidefinite cone": (
        lambda x: _flat(project_positive_semidefinite(_symmetric(x))),
        lambda u: np.linalg.eigvalsh(np.asarray(jax.vmap(_symmetric)(u)))[:, 0] > -1e-9,
    ),
    "monotone cone": (isotonic_l2, lambda u: np.all(np.diff(u, axis=-1) >= 0, -1)),
}


def _symmetric(x):
    """Coordinates of a symmetric matrix in an orthonormal basis."""
    off = x[1] / np.sqrt(2)
    return jnp.stack([x[0], off, off, x[2]]).reshape(2, 2)


def _flat(matrix):
    return jnp.stack([matrix[0, 0], matrix[0, 1] * np.sqrt(2), matrix[1, 1]])


MATRICES = {
    "Birkhoff": lambda x: project_birkhoff(x.reshape(3, 3)).ravel(),
    "transport": lambda x: project_transport(
        x.reshape(3, 4), jnp.array([0.2, 0.3, 0.5]), jnp.array([0.1, 0.4, 0.3, 0.2])
    ).ravel(),
    "semidefinite": lambda x: project_positive_semidefinite(x.reshape(3, 3)).ravel(),
}


@pytest.mark.parametrize("name", MATRICES)
def test_sets_of_matrices_obey_the_variational_inequality(name):
    project = jax.jit(jax.vmap(MATRICES[name]))
    size = 12 if name == "transport" else 9
    x = np.random.default_rng(0).standard_normal((40, size))
    u = np.asarray(project(jnp.array(x)))
    v = np.asarray(project(jnp.array(np.roll(4 * x, 1, 0))))
    assert np.max(np.einsum("ik,ijk->ij", x - u, v[None] - u[:, None])) < 1e-9
    np.testing.assert_allclose(project(jnp.array(u)), u, atol=1e-9)


@pytest.fixture(params=CASES, scope="module")
def case(request):
    project, inside = CASES[request.param]
    return jax.jit(jax.vmap(project)), inside, project


def points(seed=0, scale=2.0):
    return scale * np.random.default_rng(seed).standard_normal((60, 3))


def test_lands_in_the_set_and_stays(case):
    project, inside, _ = case
    once = np.asarray(project(jnp.array(points())))
    assert np.all(inside(once))
    np.testing.assert_allclose(project(jnp.array(once)), once, atol=1e-12)


def test_no_point_of_the_set_makes_an_acute_angle(case):
    # u = P(x) iff (x - u) . (v - u) <= 0 for all v in the set: the brute force
    # compares with many v of the set.
    project, _, _ = case
    x = points()
    u = np.asarray(project(jnp.array(x)))
    v = np.asarray(project(jnp.array(points(1, 4.0))))
    assert np.max(np.einsum("ik,ijk->ij", x - u, v[None] - u[:, None])) < 1e-9


def test_is_firmly_nonexpansive(case):
    project, _, _ = case
    x, y = points(), points(1)
    d = np.asarray(project(jnp.array(x)) - project(jnp.array(y)))
    assert np.all(np.sum(d * (x - y), 1) >= np.sum(d * d, 1) - 1e-10)


def test_derivatives_agree_with_finite_differences(case):
    _, _, project = case
    for x in points()[:5]:
        check_grads(project, (jnp.array(x),), order=1)


def test_derivatives_with_respect_to_the_set():
    x = jnp.array([2.0, 0.3, -1.0])
    for function, args in (
        (project_l2_ball, (x, jnp.array(0.8), CENTER)),
        (project_simplex, (x, jnp.array(1.5))),
        (project_halfspace, (x, NORMAL, jnp.array(0.4))),
        (project_affine, (x, ROWS[1:], RIGHT[1:])),
    ):
        check_grads(function, args, order=1)


def test_simplex_agrees_with_enumerated_supports():
    for x in points()[:20]:
        best = min(
            (
                u
                for size in (1, 2, 3)
                for support in itertools.combinations(range(3), size)
                if np.all((u := _on_support(x, list(support))) >= -1e-12)
            ),
            key=lambda u: np.sum((u - x) ** 2),
        )
        np.testing.assert_allclose(project_simplex(jnp.array(x)), best, atol=1e-12)


def _on_support(x, support):
    u = np.zeros(3)
    u[support] = x[support] - (x[support].sum() - 1) / len(support)
    return u


def test_simplex_survives_a_large_common_shift():
    x = jnp.array([0.3, 0.2, -1.0])
    np.testing.assert_allclose(project_simplex(x + 1e8), project_simplex(x), atol=1e-7)


def test_affine_takes_dependent_rows_and_refuses_contradictions():
    assert jnp.all(jnp.isfinite(project_affine(jnp.ones(3), ROWS, RIGHT)))
    wrong = RIGHT.at[1].add(1.0)
    with pytest.raises(ValueError, match="must have a solution"):
        project_affine(jnp.ones(3), ROWS, wrong)
    assert jnp.all(jnp.isnan(jax.jit(project_affine)(jnp.ones(3), ROWS, wrong)))


def test_ball_acts_on_pytrees_with_one_norm():
    tree = project_l2_ball({"a": jnp.array([3.0]), "b": jnp.array([4.0])})
    np.testing.assert_allclose([tree["a"][0], tree["b"][0]], [0.6, 0.8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: project_box(jnp.ones(2), 1.0, 0.0), "The box is empty"),
        (lambda: project_l2_ball(jnp.ones(2), 0.0), "`radius` must be positive"),
        (lambda: project_simplex(jnp.ones(0)), "`x` must not be empty"),
        (lambda: project_simplex(jnp.ones((2, 2))), "`x` must have shape"),
        (lambda: project_simplex(jnp.ones(2), -1.0), "`total` must be positive"),
        (lambda: project_halfspace(jnp.ones(2), jnp.zeros(2), 0.0), "must not be zero"),
        (
            lambda: project_hyperplane(jnp.ones(2), jnp.array([jnp.nan, 1]), 0.0),
            "`normal` must be finite",
        ),
        (lambda: project_affine(jnp.ones(2), jnp.ones((1, 3)), jnp.ones(1)), "shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nan_is_not_hidden(case):
    project, _, _ = case
    assert jnp.any(jnp.isnan(project(jnp.full((1, 3), jnp.nan))))


def test_float32_stays_float32():
    x = jnp.ones(3, jnp.float32)
    for u in (project_simplex(x), project_l2_ball(x), project_box(x, 0.0, 0.5)):
        assert u.dtype == jnp.float32
