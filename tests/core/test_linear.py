"""Linear solves for derivatives: dense and matrix-free agree, or say NaN."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from varan.core import implicit_root
from varan.core._linear import DENSE_SIZE, solve_jacobian
from varan.testing import assert_close

PSD = frozenset({"symmetric", "positive_semidefinite"})
KINDS = {
    "definite": (PSD, True),
    "symmetric": (frozenset({"symmetric"}), True),
    "general": (frozenset(), True),
    "not unique": (PSD, False),
}


def matrix_of(kind, size=12):
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    values = np.linspace(1.0, 3.0, size)
    if kind == "symmetric":
        values[::2] *= -1
    if kind == "not unique":
        values[:3] = 0.0
    matrix = (basis * values) @ basis.T
    if kind == "general":
        matrix = matrix + 0.3 * rng.standard_normal((size, size))
    return jnp.asarray(matrix)


@pytest.fixture(params=["dense", "matrix-free"])
def path(request, monkeypatch):
    """Small systems through either path: the threshold moves, the systems stay."""
    if request.param == "matrix-free":
        monkeypatch.setattr("varan.core._linear.DENSE_SIZE", 4)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_solutions_and_transposes_match_numpy(kind, path):
    tags, unique = KINDS[kind]
    matrix = matrix_of(kind)
    rng = np.random.default_rng(1)
    vector = matrix @ jnp.asarray(rng.standard_normal(12))
    weight = matrix.T @ jnp.asarray(rng.standard_normal(12))

    def answer(vector):
        return solve_jacobian(
            lambda x: matrix @ x, jnp.zeros(12), vector, tags=tags, unique=unique
        )

    @jax.jit
    def both(vector, weight):
        value, pullback = jax.vjp(answer, vector)
        return value, pullback(weight)[0]

    inverse = np.linalg.pinv(np.asarray(matrix), rcond=1e-10)
    wanted = inverse @ np.asarray(vector), inverse.T @ np.asarray(weight)
    assert_close(both(vector, weight), wanted, 1e-8)


def test_outside_the_range_is_nan(path):
    """In reverse mode, where the right-hand side is whatever the loss depends on."""
    matrix = matrix_of("not unique")
    outside = jnp.ones(12)  # has a component along the null space

    def answer(vector):
        return solve_jacobian(
            lambda x: matrix @ x, jnp.zeros(12), vector, tags=PSD, unique=False
        )

    inside = matrix @ outside
    value, pullback = jax.vjp(answer, inside)
    assert np.all(np.isfinite(value))
    assert np.all(np.isnan(pullback(outside)[0]))
    assert np.all(np.isfinite(pullback(inside)[0]))


@pytest.mark.parametrize("kind", ["definite", "general"])
def test_singular_but_promised_unique_is_nan(kind, path):
    tags, _ = KINDS[kind]
    matrix = matrix_of("not unique")

    @jax.jit
    def answer(vector):
        return solve_jacobian(lambda x: matrix @ x, jnp.zeros(12), vector, tags=tags)

    assert np.all(np.isnan(answer(jnp.ones(12))))


def test_ill_conditioned_but_regular_is_answered():
    scales = jnp.geomspace(1e-9, 1.0, 6)
    answer = solve_jacobian(lambda x: scales * x, jnp.zeros(6), jnp.ones(6))
    assert_close(answer * scales, np.ones(6), 1e-6)


@pytest.mark.parametrize("tags", [PSD, frozenset()], ids=["CG", "GMRES"])
def test_above_the_dense_size_derivatives_match_the_closed_form(tags):
    """A tridiagonal system whose Jacobian is never formed."""
    size = DENSE_SIZE + 8

    def condition(x, c):
        side = 0.5 * jnp.roll(x, 1) * (1.0 if not tags else 0.5)
        other = 0.25 * jnp.roll(x, -1) * (0.0 if not tags else 1.0)
        return 2.0 * x - side - other - c

    def root(c):
        frozen = jax.lax.stop_gradient(c)
        matrix = jax.jacfwd(lambda x: condition(x, frozen))(jnp.zeros(size))
        x = jnp.linalg.solve(matrix, frozen)
        return implicit_root(lambda x: condition(x, c), x, tags=tags)

    rng = np.random.default_rng(2)
    c, weight = (jnp.asarray(rng.standard_normal(size)) for _ in range(2))

    @jax.jit
    def derivatives(c):
        tangent = jax.jvp(root, (c,), (weight,))[1]
        return tangent, jax.grad(lambda c: weight @ root(c))(c)

    matrix = np.asarray(
        jax.jacfwd(lambda x: condition(x, jnp.zeros(size)))(jnp.zeros(size))
    )
    weight = np.asarray(weight)
    wanted = np.linalg.solve(matrix, weight), np.linalg.solve(matrix.T, weight)
    assert_close(derivatives(c), wanted, 1e-8)


def test_second_order_through_the_matrix_free_path(path):
    def root(c):
        x = jnp.sqrt(jax.lax.stop_gradient(c))
        tags = frozenset({"symmetric"})
        return implicit_root(lambda x: x**2 - c, x, tags=tags)

    c = jnp.linspace(1.0, 2.0, 6)
    second = jax.jit(jax.grad(lambda c: jax.grad(lambda c: root(c).sum())(c).sum()))
    assert_close(second(c), -0.25 * c**-1.5, 1e-8)


def test_a_linear_solver_of_the_users_choice_is_used():
    matrix = matrix_of("definite")
    solver = lx.CG(rtol=1e-12, atol=1e-12)
    vector = jnp.ones(12)
    answer = solve_jacobian(
        lambda x: matrix @ x, jnp.zeros(12), vector, tags=PSD, linear_solver=solver
    )
    assert_close(matrix @ answer, np.ones(12), 1e-9)


def test_float32_stays_float32(path):
    matrix = matrix_of("general").astype(jnp.float32)
    zero, one = jnp.zeros(12, jnp.float32), jnp.ones(12, jnp.float32)
    answer = solve_jacobian(lambda x: matrix @ x, zero, one)
    assert answer.dtype == jnp.float32
    assert_close(matrix @ answer, np.ones(12), 1e-4)


@pytest.mark.parametrize("kind", ["definite", "symmetric", "general"])
def test_moderate_conditioning_is_answered(kind, path):
    """Condition 2500 is no reason for NaN, for whatever right-hand side."""
    size = 40
    rng = np.random.default_rng(4)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    values = np.linspace(0.02, 50.0, size)
    if kind == "symmetric":
        values[::2] *= -1
    matrix = (basis * values) @ basis.T
    if kind == "general":
        matrix = matrix @ np.linalg.qr(rng.standard_normal((size, size)))[0]
    tags, matrix = KINDS[kind][0], jnp.asarray(matrix)

    @jax.jit
    def answer(vector):
        return solve_jacobian(lambda x: matrix @ x, jnp.zeros(size), vector, tags=tags)

    for vector in (jnp.eye(size)[0], jnp.ones(size), 1e-100 * jnp.ones(size)):
        got = answer(vector) / jnp.linalg.norm(vector)
        wanted = np.linalg.solve(matrix, vector / jnp.linalg.norm(vector))
        assert_close(got, wanted, 1e-5)  # condition times the accepted residual
    assert not np.any(answer(jnp.zeros(size)))
