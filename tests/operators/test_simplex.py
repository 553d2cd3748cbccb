"""Simplex, sparse simplex and box section against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from varan.operators import (
    project_box_section,
    project_kl_simplex,
    project_simplex,
    project_sparse_simplex,
)

simplex = jax.jit(project_simplex)
section = jax.jit(project_box_section)


def sorted_projection(x, total):
    """By sorting, in extended precision."""
    x = np.asarray(x, np.longdouble)
    descending = np.sort(x)[::-1]
    cuts = (np.cumsum(descending) - total) / np.arange(1, x.size + 1)
    return np.maximum(x - cuts[np.sum(descending > cuts) - 1], 0)


@pytest.mark.parametrize("kind", ["normal", "ties", "powers", "offset"])
def test_simplex_agrees_with_sorting(kind):
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = {
            "normal": rng.standard_normal(50),
            "ties": rng.integers(-2, 3, 50).astype(float),
            # Every Newton step loses few entries only.
            "powers": 2.0 ** -rng.permutation(50),
            "offset": rng.standard_normal(50) + 1e6,
        }[kind]
        expected = sorted_projection(x, 1.5).astype(float)
        np.testing.assert_allclose(simplex(jnp.array(x), 1.5), expected, atol=1e-9)


def test_simplex_commutes_with_permutations_and_scales():
    rng = np.random.default_rng(0)
    x, order = jnp.array(rng.standard_normal(50)), rng.permutation(50)
    u = simplex(x, 1.5)
    np.testing.assert_allclose(simplex(x[order], 1.5), u[order], atol=1e-14)
    np.testing.assert_allclose(simplex(8 * x, 12.0), 8 * u, atol=1e-14)


def test_sparse_simplex_agrees_with_all_supports():
    for x in np.random.default_rng(0).standard_normal((10, 5)):
        candidates = []
        for support in itertools.combinations(range(5), 2):
            u = np.zeros(5)
            u[list(support)] = sorted_projection(x[list(support)], 1.0)
            candidates.append(u)
        best = min(candidates, key=lambda u: np.sum((u - x) ** 2))
        got = project_sparse_simplex(jnp.array(x), 2)
        np.testing.assert_allclose(got, best, atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_box_section_meets_its_optimality_conditions(seed):
    rng = np.random.default_rng(seed)
    x, normal = 3 * rng.standard_normal((2, 30))
    lower, upper = -rng.uniform(0, 1, 30), rng.uniform(0, 1, 30)
    upper[:5] = np.inf
    offset = normal @ rng.uniform(lower, np.minimum(upper, 1))
    u = np.asarray(section(*map(jnp.asarray, (x, lower, upper, normal, offset))))
    assert np.all((u >= lower) & (u <= upper))
    np.testing.assert_allclose(normal @ u, offset, atol=1e-10)
    shift = np.median(((u - x) / normal)[(u > lower) & (u < upper)])
    np.testing.assert_allclose(u, np.clip(x + shift * normal, lower, upper), atol=1e-9)


def test_box_section_is_the_simplex_and_a_corner():
    x = jnp.array([0.3, 1.2, -0.5])
    u = section(x, 0.0, jnp.inf, jnp.ones(3), 1.0)
    np.testing.assert_allclose(u, project_simplex(x), atol=1e-14)
    np.testing.assert_allclose(section(x, 0.0, 1.0, jnp.ones(3), 3.0), 1.0)


def test_box_section_differentiates_with_respect_to_all_data():
    args = (
        jnp.array([0.3, 1.2, -0.5, 2.0]),
        jnp.array([-0.2, 0.0, 0.0, -1.0]),
        jnp.array([0.5, 0.7, 3.0, 1.0]),
        jnp.array([1.0, 2.0, 1.5, -0.5]),
        jnp.array(1.3),
    )
    check_grads(project_box_section, args, order=1)


def test_entropy_on_the_simplex_minimises_the_divergence():
    x = jnp.array([0.3, 1.2, -0.5])
    p = project_kl_simplex(x, 2.0)
    np.testing.assert_allclose(jnp.sum(p), 2.0)
    # The gradient log p - x of the objective is constant.
    np.testing.assert_allclose(jnp.diff(jnp.log(p) - x), 0, atol=1e-14)


def test_empty_sets_are_refused():
    ones = jnp.ones(3)
    with pytest.raises(ValueError, match="The section is empty"):
        project_box_section(ones, 0.0, 1.0, ones, 4.0)
    assert jnp.all(jnp.isnan(section(ones, 0.0, 1.0, ones, 4.0)))
    assert jnp.all(jnp.isnan(simplex(ones, -1.0)))
    with pytest.raises(ValueError, match="`nonzeros` must be within"):
        project_sparse_simplex(ones, 4)


def test_nan_is_not_hidden():
    x = jnp.array([1.0, jnp.nan, 0.0])
    assert jnp.any(jnp.isnan(simplex(x, 1.0)))
    assert jnp.any(jnp.isnan(project_sparse_simplex(x, 1)))
    assert jnp.any(jnp.isnan(section(x, 0.0, 1.0, jnp.ones(3), 1.0)))


def test_points_of_the_simplex_end_the_climb():
    # Entries at the cut within rounding once came and went for ever.
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.dirichlet(np.full(5, 0.3), 4000), np.zeros((1, 5))])
    x[-1] = [0, 0.91350112, 0.08649888, 0, 0]
    x[::2] = np.where(x[::2] < 0.1, 0, x[::2])
    x /= x.sum(1, keepdims=True)
    for shift in (0.0, -0.1):
        once = jax.jit(jax.vmap(project_simplex))(jnp.array(x + shift))
        np.testing.assert_allclose(once, x, atol=1e-15)
