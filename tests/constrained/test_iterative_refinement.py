"""Linear systems in low precision, refined."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from varan.constrained import IterativeRefinement

RNG = np.random.default_rng(0)
A = jnp.asarray(RNG.standard_normal((6, 6)) + 3 * np.eye(6))
B = jnp.asarray(RNG.standard_normal(6))


@eqx.filter_jit
def solve(matrix, b, solver=None):
    solver = IterativeRefinement() if solver is None else solver
    operator = lx.MatrixLinearOperator(matrix)
    return lx.linear_solve(operator, b, solver, throw=False)


def test_reaches_high_precision_with_low_precision_factors():
    expected = np.linalg.solve(A, B)
    single = np.linalg.solve(A.astype(jnp.float32), B.astype(jnp.float32))
    answer = solve(A, B)
    assert answer.result == lx.RESULTS.successful
    np.testing.assert_allclose(answer.value, expected, rtol=1e-13)
    assert np.abs(single - expected).max() > 1e-9
    rough = solve(A, B, IterativeRefinement(inner=lx.GMRES(1e-3, 1e-3)))
    np.testing.assert_allclose(rough.value, expected, rtol=1e-10)


def test_scales_of_matrix_and_vector_do_not_matter():
    for scale in (1e-100, 1e100):
        answer = solve(scale * A, B / scale)
        assert answer.result == lx.RESULTS.successful
        np.testing.assert_allclose(
            np.asarray(answer.value) * scale * scale, np.linalg.solve(A, B), rtol=1e-12
        )


def test_too_bad_a_condition_is_said():
    hilbert = 1.0 / (1.0 + jnp.arange(12.0)[:, None] + jnp.arange(12.0)[None, :])
    assert solve(hilbert, jnp.ones(12)).result != lx.RESULTS.successful
    assert solve(jnp.full((2, 2), jnp.nan), B[:2]).result != lx.RESULTS.successful


def test_derivatives_and_batches():
    def entry(matrix, b):
        return solve(matrix, b).value[0]

    expected = jax.grad(lambda m, b: jnp.linalg.solve(m, b)[0], (0, 1))(A, B)
    for got, wanted in zip(jax.grad(entry, (0, 1))(A, B), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10)
    batch = jax.vmap(lambda b: solve(A, b).value)(jnp.stack([B, 2 * B]))
    np.testing.assert_allclose(batch[1], 2 * batch[0], rtol=1e-12)


def test_pytrees_and_symmetric_operators():
    structure = {"x": jax.ShapeDtypeStruct((6,), jnp.float64)}
    S = A @ A.T
    operator = lx.FunctionLinearOperator(
        lambda v: {"x": S @ v["x"]}, structure, lx.positive_semidefinite_tag
    )
    solver = IterativeRefinement(lx.Cholesky())
    answer = lx.linear_solve(operator, {"x": B}, solver)
    np.testing.assert_allclose(answer.value["x"], np.linalg.solve(S, B), rtol=1e-10)


def test_bad_input():
    with pytest.raises(ValueError, match="`operator` must be square"):
        solve(A[:3], B[:3])
    with pytest.raises(ValueError, match="`max_refinements` must be positive"):
        IterativeRefinement(max_refinements=0)
