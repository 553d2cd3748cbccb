"""Coordinate descent on boxes, against SciPy."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from varan import Status, solve
from varan.constrained import BoxCoordinateDescent
from varan.problems import Quadratic
from varan.testing import Case, contract

N = 4


def program(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((N, N)) + 2 * np.eye(N)
    data = dict(
        Q=half @ half.T,
        c=5 * rng.standard_normal(N),
        lower=-rng.uniform(0, 1, N),
        upper=rng.uniform(0, 1, N),
    )
    return {name: jnp.asarray(v, dtype) for name, v in data.items()}


@eqx.filter_jit
def run(data):
    problem = Quadratic(**data)
    return solve(problem, BoxCoordinateDescent(), problem.start(), tol=1e-9)


test_contract = contract(
    [
        Case(
            BoxCoordinateDescent,
            [Quadratic(**program(seed)) for seed in (0, 1)],
            Quadratic(**program(0)).start(),
            project=lambda t: eqx.tree_at(lambda p: p.Q, t, (t.Q + t.Q.T) / 2),
            xfail={"pytrees": "the unknown is a KKTPoint of vectors, nothing else"},
            name="BoxCoordinateDescent",
        )
    ]
)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_agrees_with_bounded_least_squares(seed):
    data = program(seed)
    half = np.linalg.cholesky(data["Q"])
    expected = scipy.optimize.lsq_linear(
        half.T,
        -np.linalg.solve(half, data["c"]),
        (data["lower"], data["upper"]),
        tol=1e-14,
        method="bvls",
    ).x
    solution = run(data)
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.x.x, expected, atol=1e-7)
    assert float(solution.certificate.value) <= 1e-7


def test_linear_coordinates_go_to_their_bound():
    data = program(0)
    data["Q"] = jnp.diag(jnp.array([0.0, 0.0, 0.0, 1.0]))
    data["c"] = jnp.array([1.0, -1.0, 0.0, 0.0])
    solution = run(data)
    assert bool(solution.converged)
    expected = [data["lower"][0], data["upper"][1], 0.0, 0.0]
    np.testing.assert_allclose(solution.x.x, expected, atol=1e-12)


def test_unbounded_coordinates_and_directions():
    data = program(0)
    data["Q"] = jnp.diag(jnp.array([0.0, 1.0, 1.0, 1.0]))
    data["lower"] = jnp.full(N, -jnp.inf)
    data["c"] = jnp.ones(N)
    solution = run(data)
    assert solution.status == Status.UNBOUNDED
    np.testing.assert_allclose(solution.x.x, [-1.0, 0, 0, 0], atol=1e-12)
    pair = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    data["Q"] = jnp.zeros((N, N)).at[:2, :2].set(pair).at[2, 2].set(1).at[3, 3].set(1)
    solution = run(data)
    assert solution.status == Status.UNBOUNDED
    np.testing.assert_allclose(solution.x.x[:2], [-1.0, -1.0], atol=1e-7)


def test_crossing_bounds_under_jit_are_infeasible():
    data = program(0)
    assert run({**data, "upper": data["lower"] - 1}).status == Status.INFEASIBLE


def test_what_it_is_not_made_for():
    problem = Quadratic(jnp.eye(2), jnp.zeros(2), A=jnp.eye(2), b=jnp.ones(2))
    with pytest.raises(TypeError, match=r"BoxCoordinateDescent: .* not have `A`"):
        solve(problem, BoxCoordinateDescent(), problem.start())
    with pytest.raises(ValueError, match="BoxCoordinateDescent: `sweeps` must be"):
        BoxCoordinateDescent(sweeps=0)


def test_float32(float32):
    data = program(1, np.float32)
    problem = Quadratic(**data)
    solution = solve(problem, BoxCoordinateDescent(), problem.start())
    assert bool(solution.converged) and solution.x.x.dtype == jnp.float32
