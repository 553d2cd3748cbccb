"""Equality-constrained quadratic programs against NumPy's least squares."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan import Status, solve
from varan.constrained import EqualityQP, quadratic_program
from varan.problems import Quadratic
from varan.testing import Case, contract

N, P = 5, 2


def program(seed, rank=N, dtype=np.float64):
    rng = np.random.default_rng(seed)
    half, A = rng.standard_normal((N, rank)), rng.standard_normal((P, N))
    data = dict(
        Q=half @ half.T, c=rng.standard_normal(N), A=A, b=A @ rng.standard_normal(N)
    )
    return {name: jnp.asarray(v, dtype) for name, v in data.items()}


@eqx.filter_jit
def run(data):
    problem = Quadratic(**data)
    return solve(problem, EqualityQP(), problem.start(), tol=1e-9, max_steps=20)


def reference(data):
    Q, c, A, b = (np.asarray(data[name], float) for name in "QcAb")
    K = np.block([[Q, A.T], [A, np.zeros((len(A), len(A)))]])
    return np.linalg.lstsq(K, np.concatenate([-c, b]))[0]


test_contract = contract(
    [
        Case(
            EqualityQP,
            [Quadratic(**program(seed)) for seed in (0, 1)],
            Quadratic(**program(0)).start(),
            project=lambda t: eqx.tree_at(lambda p: p.Q, t, (t.Q + t.Q.T) / 2),
            xfail={"pytrees": "the unknown is a KKTPoint of vectors, nothing else"},
            name="EqualityQP",
        )
    ]
)


@given(st.integers(0, 10_000), st.integers(N - P, N))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_solves_the_optimality_system(seed, rank):
    data = program(seed, rank)
    solution = run(data)
    assert bool(solution.converged) and int(solution.steps) <= 3
    # Nearly dependent draws have multipliers of any size: compare values.
    expected = reference(data)[:N]
    x = np.asarray(solution.x.x)
    values = [v @ (data["Q"] @ v / 2 + data["c"]) for v in (x, expected)]
    np.testing.assert_allclose(*values, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_dependent_rows(seed):
    data = program(seed)
    data["A"] = data["A"].at[1].set(-2.0 * data["A"][0])
    data["b"] = data["b"].at[1].set(-2.0 * data["b"][0])
    solution = run(data)
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.x.x, reference(data)[:N], rtol=1e-5, atol=1e-6)
    wrong = run({**data, "b": data["b"].at[1].add(0.1)})
    assert wrong.status == Status.INFEASIBLE
    nu = np.asarray(wrong.x.equality)
    assert np.abs(nu @ data["A"]).max() <= 1e-9
    assert nu @ data["b"].at[1].add(0.1) < -1e-3
    details = wrong.certificate.details
    assert float(details["farkas_margin"]) > 1e-3
    assert float(details["farkas_violation"]) <= 1e-9


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_unbounded_programs_carry_their_ray(seed):
    data = program(seed, rank=2)  # five unknowns, two rows, two curvatures
    solution = run(data)
    assert solution.status == Status.UNBOUNDED
    ray = np.asarray(solution.x.x)
    assert np.isclose(np.abs(ray).max(), 1) and data["c"] @ ray < 0
    assert np.abs(data["Q"] @ ray).max() <= 1e-9
    assert np.abs(data["A"] @ ray).max() <= 1e-9


def test_a_line_of_solutions_is_solved():
    data = program(0, rank=2)
    data["c"] = data["Q"] @ jnp.ones(N)
    solution = run(data)
    assert bool(solution.converged)


def test_without_constraints_it_is_a_linear_system():
    data = program(0)
    solution = quadratic_program(data["Q"], data["c"])
    np.testing.assert_allclose(data["Q"] @ solution.x.x, -data["c"], atol=1e-8)


def test_ill_conditioned_systems_are_refined():
    Q = jnp.diag(10.0 ** -jnp.arange(9.0))
    solution = quadratic_program(Q, -jnp.ones(9), tol=1e-10)
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.x.x, 10.0 ** jnp.arange(9.0), rtol=1e-6)


def test_what_it_is_not_made_for():
    problem = Quadratic(jnp.eye(2), jnp.zeros(2), lower=0.0)
    with pytest.raises(TypeError, match=r"EqualityQP: .* must not have `lower`"):
        solve(problem, EqualityQP(), problem.start())


def test_float32(float32):
    data = program(1, dtype=np.float32)
    problem = Quadratic(**data)
    solution = solve(problem, EqualityQP(), problem.start(), max_steps=20)
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.x.x, reference(data)[:N], rtol=1e-2, atol=1e-2)
    data["A"] = data["A"].at[1].set(data["A"][0])
    problem = Quadratic(**{**data, "b": jnp.array([0.0, 1.0], jnp.float32)})
    solution = solve(problem, EqualityQP(), problem.start(), max_steps=20)
    assert solution.status == Status.INFEASIBLE


def test_hessian_of_the_value():
    """Second derivatives: the value's Hessian in c is that of the answer's map."""
    data = program(2)

    def value(c):
        x = run({**data, "c": c}).x.x
        return x @ (data["Q"] @ x / 2 + c)

    def x_of(c):
        return run({**data, "c": c}).x.x

    np.testing.assert_allclose(jax.grad(value)(data["c"]), x_of(data["c"]), atol=1e-8)
    hessian = jax.jacfwd(jax.grad(value))(data["c"])
    np.testing.assert_allclose(hessian, jax.jacrev(x_of)(data["c"]), atol=1e-7)
