"""ADMM with a polish: against enumeration, with proofs where there is no solution."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan import Status, solve
from varan.constrained import OSQP
from varan.problems import Quadratic
from varan.testing import Case, contract

N, P, M = 4, 1, 3


def program(seed, *, rank=N, spread=1.0, margin=None, dtype=np.float64):
    """A feasible program with equalities, inequalities and a box."""
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((N, rank))
    inside = rng.standard_normal(N)
    A, G = rng.standard_normal((P, N)), rng.standard_normal((M, N))
    slack = rng.uniform(0, 1, M) if margin is None else margin
    data = dict(
        Q=half @ half.T,
        c=3 * rng.standard_normal(N),
        A=A,
        b=A @ inside,
        G=G,
        h=G @ inside + slack,
        lower=inside - spread * rng.uniform(0.1, 1, N),
        upper=inside + spread * rng.uniform(0.1, 1, N),
    )
    return {name: jnp.asarray(v, dtype) for name, v in data.items()}


def enumerate_faces(data):
    """The best point over all choices of active rows, by NumPy alone."""
    data = {name: np.asarray(v, float) for name, v in data.items()}
    eye = np.eye(N)
    rows = np.concatenate([data["G"], -eye, eye])
    right = np.concatenate([data["h"], -data["lower"], data["upper"]])
    best = None
    for size in range(N - P + 1):
        for face in itertools.combinations(range(len(rows)), size):
            C = np.concatenate([data["A"], rows[list(face)]])
            d = np.concatenate([data["b"], right[list(face)]])
            K = np.block([[data["Q"], C.T], [C, np.zeros((len(C), len(C)))]])
            x = np.linalg.lstsq(K, np.concatenate([-data["c"], d]))[0][:N]
            if np.all(rows @ x <= right + 1e-7) and np.allclose(C @ x, d, atol=1e-7):
                value = x @ (data["Q"] @ x / 2 + data["c"])
                if best is None or value < best[0]:
                    best = value, x
    return best


@eqx.filter_jit
def run(data, start=None):
    problem = Quadratic(**data)
    start = problem.start() if start is None else start
    return solve(problem, OSQP(), start, tol=1e-9, max_steps=400)


CASE = Case(
    OSQP,
    [Quadratic(**program(seed)) for seed in (0, 1)],
    Quadratic(**program(0)).start(),
    observe=lambda problem, point: point.x,
    project=lambda tree: eqx.tree_at(lambda p: p.Q, tree, (tree.Q + tree.Q.T) / 2),
    max_steps=400,
    xfail={"pytrees": "the unknown is a KKTPoint of vectors, nothing else"},
    name="OSQP",
)
test_contract = contract([CASE])


@given(st.integers(0, 10_000), st.integers(1, N))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_finds_the_best_face(seed, rank):
    data = program(seed, rank=rank)
    solution = run(data)
    value, _ = enumerate_faces(data)
    assert bool(solution.converged)
    details = solution.certificate.details
    assert abs(float(details["objective"]) - value) <= 1e-7 * (1 + abs(value))
    assert float(details["infeasibility"]) <= 1e-8


@given(st.integers(0, 10_000), st.floats(0.01, 1.0))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_claimed_gap_is_never_below_the_true_one(seed, size):
    data = program(seed)
    value, _ = enumerate_faces(data)
    rng = np.random.default_rng(seed)
    problem = Quadratic(**data)
    exact = run(data).x
    point = jax.tree.map(
        lambda v: v + size * jnp.asarray(rng.standard_normal(v.shape)), exact
    )
    certificate = certify(problem, point)
    true = float(problem.objective(point.x)) - value
    assert float(certificate.value) >= true - 1e-9 * (1 + abs(value))
    assert float(certificate.details["dual_bound"]) <= value + 1e-9 * (1 + abs(value))


@eqx.filter_jit
def certify(problem, point):
    return problem.certify(point, problem.condition(point), 1e-8)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_infeasible_programs_carry_their_proof(seed):
    data = program(seed)
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 1, M - 1)
    # The first row contradicts a combination of the others by 0.1, box or no box.
    data["G"] = data["G"].at[0].set(-weights @ data["G"][1:])
    data["h"] = data["h"].at[0].set(-weights @ data["h"][1:] - 0.1)
    solution = run(data)
    assert solution.status == Status.INFEASIBLE
    _check_farkas(data, solution.x)
    assert float(solution.certificate.details["farkas_margin"]) > 0
    assert float(solution.certificate.details["farkas_violation"]) == 0


def _check_farkas(data, point):
    """No point of the box meets the rows' combination: NumPy's own arithmetic."""
    nu, lam = np.asarray(point.equality), np.asarray(point.inequality)
    assert np.all(lam >= 0) and max(np.abs(nu).max(), lam.max()) == 1.0
    pull = nu @ data["A"] + lam @ data["G"]
    right = nu @ data["b"] + lam @ data["h"]
    least = np.sum(np.where(pull > 0, pull * data["lower"], pull * data["upper"]))
    assert least > right + 1e-9


def run_free(data):
    """Rows are filled up with ones that say nothing, to compile once."""
    missing = M - len(data["h"])
    data["G"] = jnp.pad(data["G"], ((0, missing), (0, 0)))
    data["h"] = jnp.pad(data["h"], (0, missing), constant_values=1.0)
    return run(data)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_unbounded_programs_carry_their_ray(seed):
    rng = np.random.default_rng(seed)
    ray = rng.standard_normal(N)
    ray /= np.linalg.norm(ray)
    project = np.eye(N) - np.outer(ray, ray)
    half = project @ rng.standard_normal((N, 2))
    G = rng.standard_normal((M, N))
    G = G - np.outer(np.maximum(G @ ray, 0), ray)
    c = project @ rng.standard_normal(N) - ray
    data = dict(Q=half @ half.T, c=c, G=G, h=G @ rng.standard_normal(N) + 0.5)
    data = {name: jnp.asarray(v) for name, v in data.items()}
    solution = run_free(data)
    assert solution.status == Status.UNBOUNDED
    x = np.asarray(solution.x.x)
    assert np.isclose(np.abs(x).max(), 1.0) and c @ x < -1e-6
    assert np.abs(half.T @ x).max() <= 1e-6
    assert np.all(G @ x <= 1e-8)
    assert float(solution.certificate.details["ray_margin"]) > 0
    assert float(solution.certificate.details["ray_violation"]) <= 1e-8


def test_infeasible_without_a_box():
    data = dict(
        Q=jnp.eye(2),
        c=jnp.zeros(2),
        G=jnp.array([[1.0, 1.0], [-1.0, -1.0]]),
        h=jnp.array([0.0, -1.0]),
    )
    solution = run_free(data)
    assert solution.status == Status.INFEASIBLE
    details = solution.certificate.details
    assert float(details["farkas_margin"]) > 0.9
    assert float(details["farkas_violation"]) <= 1e-10
    with pytest.raises(RuntimeError, match="no point meets the constraints"):
        solution.require()


def test_neither_feasible_nor_bounded_is_infeasible():
    data = dict(
        Q=jnp.zeros((2, 2)),
        c=jnp.array([-1.0, 0.0]),
        G=jnp.array([[0.0, 1.0], [0.0, -1.0]]),
        h=jnp.array([0.0, -1.0]),
    )
    assert run_free(data).status == Status.INFEASIBLE


def test_crossing_bounds_under_jit_are_infeasible():
    data = program(0)
    data["lower"] = data["upper"] + 1.0
    assert run(data).status == Status.INFEASIBLE


def test_a_linear_program_ends_at_its_vertex():
    data = dict(
        Q=jnp.zeros((2, 2)),
        c=jnp.array([-1.0, -2.0]),
        G=jnp.concatenate([jnp.ones((1, 2)), -jnp.eye(2)]),
        h=jnp.array([1.0, 0.0, 0.0]),
    )
    solution = run_free(data)
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.x.x, [0.0, 1.0], atol=1e-9)


def test_a_small_curvature_is_not_called_unbounded():
    data = dict(
        Q=jnp.diag(jnp.array([1.0, 1e-6])),
        c=jnp.array([0.0, -1.0]),
        G=jnp.array([[1.0, 0.0]]),
        h=jnp.array([1.0]),
    )
    solution = run_free(data)
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.x.x[1], 1e6, rtol=1e-6)


def test_warm_start_saves_steps():
    data = program(3)
    first = run(data)
    data["c"] = data["c"] + 1e-3
    cold, warm = run(data), run(data, first.x)
    assert int(warm.steps) <= int(cold.steps)
    assert int(run({**data, "c": data["c"] - 1e-3}, first.x).steps) == 0


def test_badly_scaled_data():
    data = program(5)
    units = jnp.array([1e-3, 1.0, 1e3, 1e2])
    scaled = dict(
        Q=data["Q"] * units[:, None] * units[None, :],
        c=data["c"] * units,
        A=data["A"] * units[None, :],
        b=data["b"],
        G=data["G"] * units[None, :],
        h=data["h"],
        lower=data["lower"] / units,
        upper=data["upper"] / units,
    )
    solution = run(scaled)
    assert bool(solution.converged)
    expected = run(data).x.x / units
    np.testing.assert_allclose(solution.x.x, expected, rtol=1e-5, atol=1e-9)


def test_derivatives_of_the_multipliers():
    data = program(0)

    def lam(h):
        return run({**data, "h": h}).x.inequality

    step = 1e-5 * jnp.ones(M)
    _, tangent = jax.jvp(lam, (data["h"],), (step,))
    difference = (lam(data["h"] + step) - lam(data["h"] - step)) / 2
    np.testing.assert_allclose(tangent, difference, atol=1e-10)


def test_operators_give_the_same_answer():
    data = program(2)
    symmetric = lx.positive_semidefinite_tag
    problem = Quadratic(
        lx.MatrixLinearOperator(data["Q"], symmetric),
        data["c"],
        A=lx.MatrixLinearOperator(data["A"]),
        b=data["b"],
        G=lx.MatrixLinearOperator(data["G"]),
        h=data["h"],
        lower=data["lower"],
        upper=data["upper"],
    )
    solution = solve(problem, OSQP(), problem.start(), tol=1e-6)
    assert bool(solution.converged)
    np.testing.assert_allclose(solution.x.x, run(data).x.x, atol=1e-5)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="OSQP: `relaxation` must be below 2"):
        OSQP(relaxation=2.0)
    with pytest.raises(ValueError, match="OSQP: `rho` must be positive"):
        OSQP(rho=0.0)
    with pytest.raises(ValueError, match="OSQP: `iterations` must be a positive"):
        OSQP(iterations=0)
    with pytest.raises(TypeError, match="OSQP: the problem must be a Quadratic"):
        from varan import Smooth

        solve(Smooth(lambda x: x @ x), OSQP(), jnp.ones(2))


def test_float32(float32):
    data = program(1, dtype=np.float32)
    problem = Quadratic(**data)
    solution = solve(problem, OSQP(), problem.start(), max_steps=400)
    assert bool(solution.converged) and solution.x.x.dtype == jnp.float32
    np.testing.assert_allclose(solution.x.x, enumerate_faces(data)[1], atol=1e-3)
