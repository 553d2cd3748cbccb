"""Broyden's method on the field's test systems, and the contract."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from varan import FixedPoint, Root, solve
from varan.secondorder import Broyden
from varan.testing import Case, contract


def mildly(x, c):
    """A diagonally dominant system with its root away from the origin."""
    return 2 * x + jnp.sin(x) + 0.3 * jnp.roll(x, 1) - c


CASES = [
    Case(
        lambda: Broyden(),
        [Root(mildly, jnp.asarray(c)) for c in ([3.0, -1.0, 2.0], [1.0, 4.0, 0.5])],
        jnp.zeros(3),
        tags={"shift", "permutation", "reflection"},
        name="Broyden",
    ),
]
test_contract = contract(CASES)


def tridiagonal(x):
    """Broyden, 1965."""
    left = jnp.concatenate([jnp.zeros(1), x[:-1]])
    right = jnp.concatenate([x[1:], jnp.zeros(1)])
    return (3 - 2 * x) * x - left - 2 * right + 1


def discrete_boundary(x):
    """Moré, Garbow and Hillstrom, 1981, number 28."""
    h = 1 / (x.size + 1)
    t = h * jnp.arange(1.0, x.size + 1.0)
    ends = jnp.concatenate([jnp.zeros(1), x, jnp.zeros(1)])
    return 2 * x - ends[:-2] - ends[2:] + h**2 * (x + t + 1) ** 3 / 2


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("system", "start"),
    [(tridiagonal, -np.ones(20)), (discrete_boundary, np.zeros(8))],
    ids=["tridiagonal", "discrete boundary"],
)
def test_the_roots_are_scipys(system, start, sign):
    # The sign of a system is nobody's business: the first scale is estimated.
    end = solve(Root(lambda x: sign * system(x)), Broyden(), jnp.asarray(start))
    theirs = scipy.optimize.root(lambda x: np.asarray(system(jnp.asarray(x))), start)
    assert end.converged and theirs.success
    np.testing.assert_allclose(end.x, theirs.x, atol=1e-6)


def test_a_linear_system_is_solved_in_twice_its_dimension():
    # Gay, 1979: full Broyden steps terminate on linear systems within 2 n.
    rng = np.random.default_rng(0)
    A = jnp.asarray(np.eye(5) + 0.2 * rng.standard_normal((5, 5)))
    problem = Root(lambda x: A @ x - jnp.ones(5))
    end = solve(problem, Broyden(history=30), jnp.zeros(5), tol=1e-9)
    assert end.converged and end.steps <= 12


def test_corrections_that_are_full_begin_anew():
    end = solve(Root(tridiagonal), Broyden(history=3), -jnp.ones(20), tol=1e-9)
    assert end.converged


def test_the_residual_never_grows_by_more_than_it_may():
    problem = FixedPoint(lambda x: 3 * jnp.cos(x))
    trace = solve(problem, Broyden(), jnp.full(4, 0.3)).trace.residual
    trace = np.asarray(trace)[np.isfinite(trace)]
    allowed = 1 + 0.5 / np.arange(1, len(trace)) ** 2
    assert np.all(trace[1:] <= allowed * trace[:-1] * (1 + 1e-12))


def test_a_system_without_root_ends_unconverged():
    end = solve(Root(lambda x: x**2 + 1), Broyden(), jnp.ones(2), max_steps=200)
    assert not end.converged


def test_the_history_must_be_positive():
    with pytest.raises(ValueError, match="Broyden: `history` must be a positive"):
        Broyden(history=0)
