"""Anderson acceleration: linear maps, safeguard, wrapper, and the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import FixedPoint, FixedPointIteration, GradientDescent, Root, Smooth, solve
from varan.secondorder import Anderson
from varan.testing import Case, contract


def tilted(x, c):
    """Contracts at 1/2, with its fixed points away from the origin."""
    return 0.5 * jnp.cos(x) + c


def bowl(x, c):
    return jnp.sum(jnp.cosh(x - c)) + jnp.sum(x) ** 2


POINTS = [FixedPoint(tilted, jnp.asarray(c)) for c in ([20.0, -1.0], [3.0, 4.0])]
BOWLS = [Smooth(bowl, jnp.asarray(c)) for c in ([1.0, -1.0], [0.5, 2.0])]
CASES = [
    Case(lambda: Anderson(), POINTS, jnp.zeros(2), name="map"),
    Case(
        lambda: Anderson(GradientDescent(0.05), history=3, damping=0.9),
        BOWLS,
        jnp.zeros(2),
        name="around gradient descent",
    ),
]
test_contract = contract(CASES)


def linear(n, top, seed=0):
    """A symmetric map with eigenvalues from -0.5 to `top`."""
    rng = np.random.default_rng(seed)
    frame, _ = np.linalg.qr(rng.standard_normal((n, n)))
    M = jnp.asarray(frame @ np.diag(np.linspace(-0.5, top, n)) @ frame.T)
    return FixedPoint(lambda x, M, c: M @ x + c, M, jnp.asarray(rng.standard_normal(n)))


def test_a_linear_map_in_n_dimensions_is_solved_in_n_steps():
    # GMRES in disguise: exact after as many steps as there are dimensions.
    problem = linear(6, 0.99)
    end = solve(problem, Anderson(history=6), jnp.zeros(6), tol=1e-8, max_steps=50)
    assert end.converged and end.steps <= 8


def test_it_takes_far_fewer_maps_than_the_plain_iteration():
    problem = linear(40, 0.99)
    plain = solve(problem, FixedPointIteration(), jnp.zeros(40), max_steps=5000)
    ours = solve(problem, Anderson(history=10), jnp.zeros(40), max_steps=5000)
    assert plain.converged and ours.converged
    assert 5 * ours.evaluations < plain.evaluations
    np.testing.assert_allclose(ours.x, plain.x, atol=1e-5)


def test_one_application_a_step():
    end = solve(POINTS[0], Anderson(), jnp.zeros(2))
    assert end.converged and end.evaluations == end.steps + 1


def test_around_the_plain_iteration_it_makes_the_same_iterates():
    problem = linear(12, 0.9)
    ends = [
        solve(problem, solver, jnp.zeros(12), tol=1e-9)
        for solver in (Anderson(), Anderson(FixedPointIteration()))
    ]
    assert ends[0].steps == ends[1].steps
    np.testing.assert_allclose(ends[0].x, ends[1].x, atol=1e-12)


def test_a_map_that_jumps_is_not_thrown_off():
    """A contraction with kinks, on which extrapolation alone may wander."""
    problem = FixedPoint(lambda x: 0.9 * jnp.abs(x - 3 * jnp.sign(x)) + 1.0)
    plain = solve(problem, FixedPointIteration(), jnp.full(3, 9.0), max_steps=4000)
    ours = solve(problem, Anderson(), jnp.full(3, 9.0), max_steps=4000)
    assert bool(ours.converged) >= bool(plain.converged)


def test_derivatives_do_not_see_the_method():
    def answer(c):
        return solve(FixedPoint(tilted, c), Anderson(), jnp.zeros(2), tol=1e-12).x

    c = jnp.array([3.0, 4.0])
    exact = 1 / (1 + 0.5 * jnp.sin(answer(c)))
    np.testing.assert_allclose(jax.jacobian(answer)(c), jnp.diag(exact), atol=1e-10)


def test_bad_settings_and_problems_are_refused():
    with pytest.raises(ValueError, match="`history` must be a positive integer"):
        Anderson(history=0)
    with pytest.raises(ValueError, match="Anderson: `damping` must be positive"):
        Anderson(damping=0.0)
    with pytest.raises(TypeError, match="without `solver` the problem must be a Fixe"):
        solve(Root(lambda x: x), Anderson(), jnp.ones(2))
