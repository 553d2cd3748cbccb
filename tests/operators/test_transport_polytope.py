"""Transport polytopes: sums met, optimality, and honest refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.operators import (
    project_birkhoff,
    project_kl_birkhoff,
    project_kl_transport,
    project_transport,
)

squares = jax.jit(project_transport)
entropy = jax.jit(project_kl_transport)
birkhoff = jax.jit(project_birkhoff)


def instance(scale, seed=0, shape=(8, 6)):
    rng = np.random.default_rng(seed)
    rows, columns = rng.uniform(0.5, 1.5, shape[0]), rng.uniform(0.5, 1.5, shape[1])
    rows *= columns.sum() / rows.sum()
    x = scale * rng.standard_normal(shape)
    return tuple(map(jnp.asarray, (x, rows, columns)))


def rank_one_rest(rest):
    """How far a matrix is from `f_i + g_j`."""
    double = rest - rest.mean(0) - rest.mean(1)[:, None] + rest.mean()
    return np.max(np.abs(double))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("project", [squares, entropy])
def test_sums_are_met(project, scale):
    x, rows, columns = instance(scale)
    plan = np.asarray(project(x, rows, columns))
    assert np.all(plan >= 0)
    np.testing.assert_allclose(plan.sum(1), rows, atol=1e-10)
    np.testing.assert_allclose(plan.sum(0), columns, atol=1e-10)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_entropic_plan_is_a_scaling_of_the_kernel(scale):
    x, rows, columns = instance(scale)
    plan = np.asarray(entropy(x, rows, columns))
    assert rank_one_rest(np.log(plan) - np.asarray(x)) < 1e-9 * (1 + scale)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_quadratic_plan_beats_all_others(scale):
    x, rows, columns = instance(scale)
    plan = np.asarray(squares(x, rows, columns))
    for seed in range(20):
        rival = squares(instance(10.0 * scale, seed + 1)[0], rows, columns)
        # The variational inequality, at vertices and near them.
        assert np.sum((np.asarray(x) - plan) * (np.asarray(rival) - plan)) < 1e-8


def test_orientation_and_order_do_not_matter():
    x, rows, columns = instance(1.0)
    order = np.random.default_rng(0).permutation(8)
    for project in (squares, entropy):
        plan = project(x, rows, columns)
        turned = project(x.T, columns, rows).T
        np.testing.assert_allclose(turned, plan, atol=1e-9)
        mixed = project(x[order], rows[order], columns)
        np.testing.assert_allclose(mixed, plan[order], atol=1e-9)


def test_birkhoff_is_transport_between_ones():
    x = instance(1.0, shape=(5, 5))[0]
    one = jnp.ones(5)
    np.testing.assert_allclose(birkhoff(x), squares(x, one, one), atol=1e-10)
    np.testing.assert_allclose(project_kl_birkhoff(x), entropy(x, one, one), atol=1e-10)


def test_near_a_permutation_the_derivative_is_zero():
    order = np.random.default_rng(0).permutation(5)
    x = jnp.asarray(10.0 * np.eye(5)[order])
    np.testing.assert_allclose(birkhoff(x), np.eye(5)[order], atol=1e-12)
    jacobian = jax.jacrev(project_birkhoff)(x)
    np.testing.assert_allclose(jacobian, 0, atol=1e-9)


def test_no_derivative_by_the_sums_where_the_support_falls_apart():
    x, half = jnp.eye(2), jnp.full(2, 0.5)
    tangent = jnp.array([0.1, -0.1])
    _, moved = jax.jvp(lambda r: squares(x, r, half), (half,), (tangent,))
    assert jnp.all(jnp.isnan(moved[0, 0]))


def test_float32_batches():
    lanes = [instance(1.0, seed) for seed in range(4)]
    batch = [jnp.stack(v).astype(jnp.float32) for v in zip(*lanes, strict=True)]
    for project in (squares, entropy):
        plans = jax.vmap(project)(*batch)
        assert plans.dtype == jnp.float32
        for lane, plan in zip(lanes, plans, strict=True):
            np.testing.assert_allclose(plan, project(*lane), atol=2e-4)


def test_calls_outside_of_jit_compile_once():
    compiled = []
    listen = lambda name, *_, **__: compiled.append("compile" in name)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    project_transport(*instance(1.0, 1))
    before = sum(compiled)
    project_transport(*instance(1.0, 2))
    assert sum(compiled) == before > 0


def test_empty_polytopes_are_refused():
    x, rows, columns = instance(1.0)
    for project in (project_transport, project_kl_transport):
        with pytest.raises(ValueError, match="must have the same total"):
            project(x, 2 * rows, columns)
        with pytest.raises(ValueError, match="`rows` must be positive"):
            project(x, 0 * rows, columns)
    assert jnp.all(jnp.isnan(squares(x, 2 * rows, columns)))
    assert jnp.all(jnp.isnan(entropy(x.at[0, 0].set(jnp.nan), rows, columns)))
