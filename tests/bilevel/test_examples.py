"""The problems with known answers know them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Newton, Smooth, solve
from varan.bilevel import (
    coupled_quadratic_example,
    linear_lower_example,
    weighted_svm,
)
from varan.operators import Polyhedron


def test_linear_example_has_the_papers_answer():
    problem, (x, y) = linear_lower_example(jnp.ones(4))
    np.testing.assert_allclose(x, -0.3)
    np.testing.assert_allclose(y["y1"], 0.7)
    np.testing.assert_allclose(y["y2"], -0.4)
    np.testing.assert_allclose(problem.upper_value(x, y), 0.05 * 4)


def test_linear_example_no_feasible_neighbour_is_better():
    target = jnp.array([0.3, -1.0, 2.0])
    problem, (x, y) = linear_lower_example(target)
    best = problem.upper_value(x, y)
    for d, e in np.random.default_rng(0).standard_normal((20, 2, 3)):
        # Lower answers at x + d: y1 = x + d + 1, and y2 of the right sum.
        e = e - (e.sum() + 2 * d.sum()) / 3
        moved = {"y1": y["y1"] + d, "y2": y["y2"] + e}
        stationarity, gap = problem.lower_condition(x + d, moved, jnp.array([-3.0]))
        assert abs(gap[0]) < 1e-12 and jnp.linalg.norm(stationarity["y1"]) < 1e-12
        assert problem.upper_value(x + d, moved) > best


def test_coupled_example_knows_its_lower_answer():
    problem, S, basis = coupled_quadratic_example(jax.random.key(1), 8, 6)
    x = basis @ jnp.ones(basis.shape[1])
    y = S @ x
    np.testing.assert_allclose(problem.constraints(x, y), 0, atol=1e-10)
    A = jax.jacobian(problem.constraints, argnums=1)(x, y)
    # Stationarity: y - x lies in the row space of A.
    residual = (jnp.eye(8) - jnp.linalg.pinv(A) @ A) @ (y - x)
    np.testing.assert_allclose(residual, 0, atol=1e-10)
    np.testing.assert_allclose(problem.project_x(x), x, atol=1e-12)
    np.testing.assert_allclose(
        problem.joint.project(jnp.concatenate([x, y])).x,
        jnp.concatenate([x, y]),
        atol=1e-9,
    )


def test_svm_with_and_without_slacks_has_the_same_answer():
    draw = np.random.default_rng(0)
    z, labels = jnp.array(draw.standard_normal((12, 3))), jnp.array([1.0, -1.0] * 6)
    log_weights = jnp.array(draw.uniform(-2, 0, 12))
    reduced = weighted_svm(z, labels, z, labels, slacks=False)
    loss = Smooth(lambda y: reduced.lower_value(log_weights, y))
    begin = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    y = solve(loss, Newton(), begin, tol=1e-12).x
    short = jax.nn.relu(1 - labels * (z @ y["w"] + y["b"]))
    problem = weighted_svm(z, labels, z, labels)
    full = {**y, "xi": short}
    # The gradient in xi alone gives the multipliers.
    scale = -jax.jacobian(problem.constraints, argnums=1)(log_weights, full)["xi"][0, 0]
    multipliers = jnp.exp(log_weights) * short / scale
    stationarity, gap = problem.lower_condition(log_weights, full, multipliers)
    for part in (*jax.tree.leaves(stationarity), gap):
        np.testing.assert_allclose(part, 0, atol=1e-9)
    jacobian = jax.jacobian(problem.constraints, argnums=1)(log_weights, full)
    stacked = jnp.concatenate(
        [jacobian["w"], jacobian["b"][:, None], jacobian["xi"]], axis=1
    )
    np.testing.assert_allclose(jnp.linalg.norm(stacked, ord=2), 1.0)


def test_svm_projection_agrees_with_the_general_one():
    draw = np.random.default_rng(1)
    z, labels = jnp.array(draw.standard_normal((9, 2))), jnp.array([1.0, -1, 1] * 3)
    problem = weighted_svm(z, labels, z, labels)
    vector = jnp.array(draw.standard_normal(9 + 3 + 9))

    def values(v):
        return problem.constraints(v[:9], {"b": v[9], "w": v[10:12], "xi": v[12:]})

    G = jax.jacobian(values)(vector)
    general = Polyhedron(G=G, h=G @ vector - values(vector)).project(vector, tol=1e-11)
    project = jax.jit(lambda v, warm=None: problem.joint.project(v, warm))
    ours = project(vector)
    np.testing.assert_allclose(ours.x, general.x, atol=1e-8)
    np.testing.assert_allclose(ours.multipliers, general.multipliers, atol=1e-6)
    again = project(vector + 0.01, ours.multipliers)
    assert again.residual < 1e-9
    assert jnp.max(values(ours.x)) < 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_lower_example(jnp.ones((2, 2))), "`target` must have shape"),
        (
            lambda: coupled_quadratic_example(jax.random.key(0), 4, 4),
            "`rows` must lie between",
        ),
        (
            lambda: weighted_svm(
                jnp.ones((3, 2)), jnp.ones(2), jnp.ones((3, 2)), jnp.ones(3)
            ),
            "`labels` must have shape",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
