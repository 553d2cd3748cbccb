"""Stability numbers against their closed forms, dense and matrix-free."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import GradientDescent, Newton, NewtonCG, Root, Smooth, solve, stability
from varan.testing import assert_close


def quadratic(x, Q, B, c):
    """Minimiser Q^-1 B c."""
    return 0.5 * x @ (Q @ x) - x @ (B @ c)


def instance(seed=0, size=5, data=3):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((size, size))
    Q = factor @ factor.T + 0.5 * np.eye(size)
    return Q, rng.standard_normal((size, data)), rng.standard_normal(data)


def solved(Q, B, c, **settings):
    problem = Smooth(quadratic, *map(jnp.asarray, (Q, B, c)), **settings)
    start = jnp.zeros(len(Q))
    return solve(problem, Newton(), start, tol=1e-9)


def test_quadratic_matches_closed_forms():
    Q, B, c = instance()
    report = stability(solved(Q, B, c, convex=True), lambda p: p.params[2])
    values = np.linalg.eigvalsh(Q)
    assert_close(report.lipschitz, np.linalg.norm(np.linalg.solve(Q, B), 2), 1e-9)
    assert_close(report.curvature, values[0], 1e-9)
    assert_close(report.regularity, values[0], 1e-9)
    assert_close(report.largest, values[-1], 1e-9)
    assert_close(report.condition_number, values[-1] / values[0], 1e-8)
    assert report.exact and report.strongly_regular and report.tilt_stable
    assert report.null_dimension == 0


def test_the_modulus_bounds_how_far_the_answer_moves():
    """And is attained: moves of the data reach it to first order."""
    Q, B, c = instance(1)
    report = stability(solved(Q, B, c), lambda p: p.params[2])
    base = np.linalg.solve(Q, B @ c)
    moves = np.random.default_rng(0).standard_normal((50, 3))
    moves = np.concatenate([moves, np.linalg.svd(np.linalg.solve(Q, B))[2][:1]])
    ratios = [
        np.linalg.norm(np.linalg.solve(Q, B @ (c + m)) - base) / np.linalg.norm(m)
        for m in moves
    ]
    assert max(ratios) <= report.lipschitz * (1 + 1e-9)
    assert_close(max(ratios), report.lipschitz, 1e-9)


def test_every_array_is_data_by_default():
    Q, B, c = instance(2)
    end = solved(Q, B, c)
    x = np.asarray(end.x)
    # dF = dQ x - dB c - B dc; dF/dQ counts both halves: the gradient symmetrises Q.
    by_q = np.stack(
        [
            0.5 * (np.outer(e, x).reshape(5, 5) @ np.eye(5)).reshape(-1)
            + 0.5 * np.outer(x, e).reshape(-1)
            for e in np.eye(5)
        ]
    )
    by_b = -np.stack([np.outer(e, c).reshape(-1) for e in np.eye(5)])
    cross = np.concatenate([by_q, by_b, -B], axis=1)
    wanted = np.linalg.norm(np.linalg.solve(Q, cross), 2)
    assert_close(stability(end).lipschitz, wanted, 1e-8)


def test_a_saddle_is_regular_but_not_tilt_stable():
    problem = Smooth(
        lambda x, c: 0.5 * (2 * x[0] ** 2 - x[1] ** 2) - c @ x, jnp.ones(2)
    )
    report = stability(solve(problem, Newton(), jnp.asarray([0.5, -1.0])))
    assert_close(report.curvature, -1.0, 1e-12)
    assert_close(report.regularity, 1.0, 1e-12)
    assert report.strongly_regular and not report.tilt_stable


def test_a_nonsymmetric_root_has_singular_values_and_no_curvature():
    matrix = jnp.asarray([[2.0, 3.0], [-1.0, 0.5]])
    import optimistix as optx

    newton = optx.Newton(rtol=1e-9, atol=1e-9)
    with jax.numpy_dtype_promotion("standard"):
        end = solve(
            Root(lambda x, c: matrix @ x - c, jnp.ones(2)), newton, jnp.zeros(2)
        )
    report = stability(end)
    singular = np.linalg.svd(matrix)[1]
    assert_close((report.regularity, report.largest), (singular[1], singular[0]), 1e-9)
    assert_close(report.lipschitz, 1 / singular[1], 1e-9)
    assert np.isnan(report.curvature) and not report.tilt_stable


def test_singular_hessian_shows_as_irregular():
    Q = np.diag([2.0, 1.0, 0.0])
    problem = Smooth(
        quadratic, jnp.asarray(Q), jnp.eye(3), jnp.asarray([1.0, 1.0, 0.0])
    )
    report = stability(solve(problem, NewtonCG(), jnp.zeros(3)), lambda p: p.params[2])
    assert report.regularity == 0 and np.isinf(report.lipschitz)
    assert not report.strongly_regular and not report.tilt_stable
    assert report.null_dimension == 1
    assert "not unique" in str(report)


def test_non_unique_solutions_are_measured_in_what_is_unique():
    """Rank-deficient least squares: the fitted part moves at 1 / smallest nonzero."""
    rng = np.random.default_rng(3)
    X = rng.standard_normal((6, 2)) @ rng.standard_normal((2, 4))

    def loss(w, X, y):
        return 0.5 * jnp.sum((X @ w - y) ** 2)

    y = jnp.asarray(rng.standard_normal(6))
    problem = Smooth(loss, jnp.asarray(X), y, convex=True, unique=False)
    end = solve(problem, NewtonCG(), jnp.zeros(4), tol=1e-8)
    assert end.converged
    report = stability(end, lambda p: p.params[1])
    singular = np.linalg.svd(X)[1][:2]
    assert_close(report.lipschitz, 1 / singular[1], 1e-7)
    assert_close(report.curvature, singular[1] ** 2, 1e-7)
    assert_close(report.regularity, singular[1] ** 2, 1e-7)
    assert report.null_dimension == 2


@pytest.mark.parametrize("kind", ["definite", "indefinite", "nonsymmetric"])
def test_matrix_free_agrees_with_dense(kind, monkeypatch):
    size = 40
    rng = np.random.default_rng(4)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    values = np.linspace(0.5, 20.0, size)
    if kind == "indefinite":
        values[1] = -3.0
    matrix = (basis * values) @ basis.T
    if kind == "nonsymmetric":
        matrix = matrix + 0.2 * rng.standard_normal((size, size))
    matrix, B = jnp.asarray(matrix), jnp.asarray(rng.standard_normal((size, 3)))
    x = jnp.linalg.solve(matrix, B @ jnp.ones(3))

    # Called twice, with functions of its own each time: no compiled code is shared.
    def report():
        if kind == "nonsymmetric":
            problem = Root(lambda x, c: matrix @ x - B @ c, jnp.ones(3))
        else:
            problem = Smooth(
                lambda x, c: 0.5 * x @ (matrix @ x) - x @ (B @ c),
                jnp.ones(3),
                convex=kind == "definite",
            )
        return stability(solve(problem, GradientDescent(0.1), x, tol=1e-6))

    dense = report()
    for module in ("_linear", "_stability"):
        monkeypatch.setattr(f"varan.core.{module}.DENSE_SIZE", 8)
    free = report()
    assert dense.exact and not free.exact
    for name in ("lipschitz", "regularity", "largest", "condition_number"):
        assert_close(getattr(free, name) / getattr(dense, name), 1.0, 1e-3)
    if kind != "nonsymmetric":
        assert_close(free.curvature / dense.curvature, 1.0, 1e-3)
        assert bool(free.tilt_stable) == (kind == "definite")


def test_lanes_and_jit():
    Q, B, _ = instance(5)

    @jax.jit
    @jax.vmap
    def moduli(scale):
        problem = Smooth(quadratic, scale * Q, jnp.asarray(B), jnp.ones(3))
        end = solve(problem, Newton(), jnp.zeros(5), tol=1e-8)
        return stability(end, lambda p: p.params[2]).lipschitz

    lanes = moduli(jnp.asarray([1.0, 2.0]))
    assert_close(lanes[0], 2 * lanes[1], 1e-9)


def test_printed_form():
    text = str(stability(solved(*instance())))
    for part in ("Stability (dense)", "Lipschitz modulus", "tilt stable          yes"):
        assert part in text


def test_a_problem_without_data_is_refused():
    end = solve(Smooth(lambda x: jnp.sum((x - 1) ** 2)), Newton(), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"stability: the problem holds no floating"):
        stability(end)
