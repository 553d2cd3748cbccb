"""L-BFGS-B against scipy, its parts against brute force, and the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from varan import Smooth, solve
from varan.problems import BoxConstrained
from varan.secondorder import LBFGSB
from varan.secondorder._hager_zhang import Found
from varan.secondorder._lbfgsb import (
    _cauchy_point,
    _Memory,
    _Model,
    _remember,
    _subspace_minimum,
)
from varan.testing import Case, contract


def bowl(x, c):
    return jnp.sum(jnp.cosh(x - c)) + 0.5 * jnp.sum(x) ** 2


def boxed(c, lower=-0.5, upper=0.75):
    return BoxConstrained(bowl, jnp.full(3, lower), jnp.full(3, upper), jnp.asarray(c))


CASES = [
    Case(
        lambda: LBFGSB(history=4),
        (boxed([2.0, 0.1, -3.0]), boxed([0.3, -1.5, 1.0])),
        jnp.zeros(3),
        bounds=(-0.5, 0.75),
        xfail={"pytrees": "a problem in another dress shows no bounds; see below"},
        name="box",
    )
]
test_contract = contract(CASES)


def valley(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


BOUNDS = [(-np.inf, np.inf), (-1.5, 0.5), (-2.0, 0.9), (0.2, np.inf), (-np.inf, 0.7)]


@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_minimum_is_scipys(bounds):
    start = np.tile([-1.2, 1.0], 5)
    end = solve(BoxConstrained(valley, *bounds), LBFGSB(), jnp.asarray(start))
    function = jax.jit(jax.value_and_grad(valley))
    peer = scipy.optimize.minimize(
        lambda x: tuple(np.asarray(v) for v in function(x)),
        np.clip(start, *bounds),
        jac=True,
        method="L-BFGS-B",
        bounds=[bounds] * 10,
        options={"gtol": 1e-9, "ftol": 0},
    )
    assert end.converged
    np.testing.assert_allclose(valley(end.x), peer.fun, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(end.x, peer.x, atol=1e-6)
    assert end.evaluations <= 2 * peer.nfev


def test_non_negative_least_squares_is_scipys():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((30, 12)), rng.standard_normal(30)
    problem = BoxConstrained(
        lambda x, A, b: jnp.sum((A @ x - b) ** 2) / 2,
        0.0,
        jnp.inf,
        jnp.asarray(A),
        jnp.asarray(b),
    )
    end = solve(problem, LBFGSB(), jnp.ones(12), tol=1e-10)
    x = scipy.optimize.nnls(A, b)[0]
    np.testing.assert_allclose(end.x, x, atol=1e-9)
    # Active bounds are met exactly, not in the limit.
    assert np.array_equal(np.asarray(end.x) == 0, x == 0)


def model_of(seed, n=6, m=3):
    """A model with a full memory, and the dense matrix by BFGS's own formula."""
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((n, n))
    A = jnp.asarray(half @ half.T + np.eye(n))
    rows = jnp.zeros((m, n))
    memory = _Memory(jnp.zeros(()), jnp.zeros(n), rows, rows, jnp.zeros((), jnp.int32))
    x = jnp.zeros(n)
    for _ in range(m):
        s = jnp.asarray(rng.standard_normal(n))
        x = x + s
        found = Found(
            jnp.ones(()), jnp.zeros(()), A @ x, jnp.asarray(True), jnp.asarray(1)
        )
        memory = _remember(memory, jnp.asarray(True), s, found)
    y = memory.changes[-1]
    B = (y @ y) * np.eye(n)
    for s, y in zip(np.asarray(memory.steps), np.asarray(memory.changes), strict=True):
        Bs = B @ s
        B = B - np.outer(Bs, Bs) / (s @ Bs) + np.outer(y, y) / (s @ y)
    return _Model.make(memory), B


def test_the_compact_form_is_bfgs():
    model, B = model_of(0)
    compact = model.theta * jnp.eye(6) + model.V.T @ jnp.diag(model.signs) @ model.V
    np.testing.assert_allclose(compact, B, atol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_the_cauchy_point_is_the_first_minimum_along_the_path(seed):
    model, B = model_of(seed)
    rng = np.random.default_rng(seed + 100)
    x, g = rng.uniform(-0.3, 0.3, 6), 3 * rng.standard_normal(6)
    lower, upper = np.full(6, -0.4), np.full(6, 0.5)
    lower[0], upper[1] = -np.inf, np.inf
    point, free = _cauchy_point(model, *map(jnp.asarray, (x, g, lower, upper)))

    def along(t):
        z = np.clip(x - t * g, lower, upper) - x
        return g @ z + z @ B @ z / 2

    times = np.linspace(0, 1.0, 40001)
    values = np.array([along(t) for t in times])
    first = np.argmax(np.diff(values) > 0)  # where it first rises
    path = np.clip(x - times[first] * g, lower, upper)
    np.testing.assert_allclose(point, path, atol=2e-4)
    assert np.array_equal(
        np.asarray(free), (point > lower) & (point < upper) & (g != 0)
    )


@pytest.mark.parametrize("seed", range(4))
def test_with_room_the_step_is_newtons_with_bfgs_matrix(seed):
    model, B = model_of(seed)
    rng = np.random.default_rng(seed)
    x, g = rng.standard_normal(6), rng.standard_normal(6)
    far = np.full(6, 1e6)
    target = _subspace_minimum(model, *map(jnp.asarray, (x, g, -far, far)))
    np.testing.assert_allclose(target, x - np.linalg.solve(B, g), atol=1e-8)


def test_fixed_entries_stay():
    lower, upper = jnp.array([0.3, -1.0]), jnp.array([0.3, 1.0])
    problem = BoxConstrained(lambda x: jnp.sum(jnp.cosh(x - 3.0)), lower, upper)
    end = solve(problem, LBFGSB(), jnp.zeros(2))
    assert end.converged and np.array_equal(end.x, [0.3, 1.0])


def test_pytrees_with_bounds_of_their_own():
    def objective(x, c):
        return jnp.sum((x["a"] - c) ** 2) + jnp.sum((x["b"] + c) ** 2)

    lower = {"a": jnp.zeros(2), "b": jnp.full(3, -jnp.inf)}
    problem = BoxConstrained(objective, lower, 1.0, 2.0)
    end = solve(problem, LBFGSB(), {"a": jnp.zeros(2), "b": jnp.zeros(3)})
    np.testing.assert_allclose(end.x["a"], 1.0)
    np.testing.assert_allclose(end.x["b"], -2.0, atol=1e-7)


def test_an_objective_without_minimum_ends_unconverged():
    problem = BoxConstrained(lambda x: -jnp.sum(x), 0.0, jnp.inf)
    assert not solve(problem, LBFGSB(), jnp.ones(2), max_steps=50).converged


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="LBFGSB: `history` must be a positive"):
        LBFGSB(history=0)
    with pytest.raises(TypeError, match="LBFGSB: the problem must be a BoxConstr"):
        solve(Smooth(jnp.sum), LBFGSB(), jnp.ones(2))
