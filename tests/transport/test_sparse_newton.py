"""What only the sparsified Newton method promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import solve
from varan.transport import EntropicTransport, Sinkhorn, SparseNewton
from varan.transport._sparse_newton import hessian_product, sparsify

N = 12


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    return EntropicTransport(jnp.asarray(rng.uniform(size=(N, N + 3))), epsilon=0.02)


def dense(entries, rows, columns):
    size = rows.size + columns.size
    apply = jax.vmap(
        lambda v: jnp.concatenate(
            hessian_product(entries, rows, columns, v[: rows.size], v[rows.size :])
        )
    )
    return apply(jnp.eye(size))


def test_everything_kept_is_the_hessian_of_the_dual(problem):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=N) * 0.02), jnp.zeros(N + 3)
    plan = problem.plan(x)
    entries, dropped = sparsify(plan, N + 3)
    got = dense(entries, plan.sum(1), plan.sum(0))

    def dual(v):
        return problem.dual_value((v[:N], v[N:]))

    exact = -jax.hessian(dual)(jnp.concatenate(x)) * problem.epsilon
    np.testing.assert_allclose(got, exact, atol=1e-10)
    assert float(dropped) < 1e-12


@pytest.mark.parametrize("keep", [1, 2, 5, "mass"])
def test_sparsified_hessian_is_diagonally_dominant(problem, keep):
    plan = problem.plan(problem.start())
    entries, dropped = sparsify(plan, keep)
    matrix = np.asarray(dense(entries, plan.sum(1), plan.sum(0)))
    off = np.abs(matrix).sum(1) - np.diag(matrix)
    assert np.all(np.diag(matrix) >= off - 1e-15)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-15)
    assert np.linalg.eigvalsh(matrix).min() > -1e-12
    assert 0 <= float(dropped) < 1


def test_mass_keeps_what_it_says(problem):
    x = solve(problem, Sinkhorn(), problem.start(), tol=1e-3).x
    entries, dropped = sparsify(problem.plan(x), "mass")
    assert float(dropped) <= 1e-3
    assert 2 * (N + 3) <= int(jnp.sum(entries[0] > 0)) <= problem.cost.size


def test_without_newton_it_is_sinkhorn_bit_for_bit(problem):
    budget = dict(tol=1e-12, max_steps=30)
    sweeps = solve(problem, SparseNewton(warmup=100), problem.start(), **budget)
    plain = solve(problem, Sinkhorn(sweeps=1), problem.start(), **budget)
    # Its first step looks at the opening sweep, Sinkhorn's adds one to it.
    np.testing.assert_array_equal(
        sweeps.trace.residual[2:31], plain.trace.residual[1:30]
    )


def test_the_dual_never_decreases(problem):
    solver = SparseNewton(warmup=3, keep_per_row=1)
    init, step = jax.jit(solver.init), jax.jit(solver.step)
    state = init(problem, problem.start())
    state = step(problem, state)
    value = float(problem.dual_value(state.x))
    for _ in range(30):
        state = step(problem, state)
        new = float(problem.dual_value(state.x))
        assert new >= value - 1e-14
        value = new
    memory = state.memory
    assert int(memory.newton) > 0
    assert int(memory.newton) + int(memory.sweeps) == 31


def test_all_entries_kept_converge_quadratically(problem):
    run = solve(problem, SparseNewton(10, N + 3), problem.start(), tol=1e-12)
    error = np.asarray(run.trace.residual[: int(run.steps) + 1])
    assert bool(run.converged)
    assert error[-1] < 1e3 * error[-2] ** 2 + 1e-13


def test_gauge_does_not_matter(problem):
    f, g = problem.start()
    moved = solve(problem, SparseNewton(), (f + 3.0, g - 3.0), tol=1e-10)
    plain = solve(problem, SparseNewton(), (f, g), tol=1e-10)
    np.testing.assert_allclose(problem.plan(moved.x), problem.plan(plain.x), atol=1e-9)
