"""Architecture search: closed-form limits, descent, order of steps, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan import Newton, solve
from varan.bilevel import (
    DARTS,
    RARTS,
    BilevelProblem,
    Minibatch,
    hypergradient,
    relaxed_search,
    search_example,
    trajectory,
)
from varan.operators import prox_group_lasso

MODEL = search_example()
START = MODEL.point(jnp.array(2.0), jnp.array(-2.0))


def upper(x, y, data):
    return jnp.mean((data @ y - 1) ** 2) + 0.05 * jnp.sum((x - y) ** 2)


def lower(x, y, data):
    return jnp.mean((data @ (y - jnp.tanh(x))) ** 2) + 0.5 * jnp.sum((y - x) ** 2)


DATA = jax.random.normal(jax.random.key(0), (12, 3))
PROBLEM = BilevelProblem(upper, lower, DATA)
FIRST = PROBLEM.point(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.2, -0.4]))


def positions(problem, iterate):
    return iterate.x, iterate.y, iterate.extra


@pytest.fixture(scope="module")
def limit():
    @jax.jit
    def run(weight, coupling):
        size = 0.2 / (2 * weight + 2 * coupling + 4)
        method = RARTS(size, size, weight, coupling)
        _, seen = trajectory(
            MODEL, method, START, positions, steps=30_000, every=30_000
        )
        return jax.tree.map(lambda leaf: leaf[0], seen)

    return run


@settings(max_examples=8, deadline=None, derandomize=True)
@given(weight=st.floats(2, 40), coupling=st.floats(2, 40))
def test_the_limit_on_the_solvable_model_is_the_closed_form(limit, weight, coupling):
    x, w, y = limit(weight, coupling)
    exact = 2 / (2 - 1 / (2 * weight) - 1 / coupling)
    np.testing.assert_allclose(x, exact, atol=1e-8)
    np.testing.assert_allclose(y, 2 - exact, atol=1e-8)
    np.testing.assert_allclose(w, exact * (1 - 1 / (2 * weight)), atol=1e-8)


def test_the_relaxed_problem_has_the_same_answer_and_certifies_it(limit):
    relaxed = relaxed_search(MODEL, training_weight=7.0, coupling=11.0)
    solution = solve(relaxed, Newton(), (START.x, START.y, START.y))
    x, w, y = limit(7.0, 11.0)
    np.testing.assert_allclose(jnp.stack(solution.x), jnp.stack([x, y, w]), atol=1e-8)
    certificate = relaxed.certify((x, y, w), relaxed.condition((x, y, w)), 1e-6)
    assert certificate.proof and bool(certificate.met)


def test_a_round_is_gradient_steps_with_the_newest_others():
    method = RARTS(0.03, 0.01, 4.0, 3.0)
    now = method.begin(PROBLEM, FIRST)
    after = method.advance(PROBLEM, now)
    value = relaxed_search(PROBLEM, training_weight=4.0, coupling=3.0).value
    x, w = FIRST.x, FIRST.y
    y = w
    w = w - 0.01 * jax.grad(value)((x, y, w))[2]
    y = y - 0.01 * jax.grad(value)((x, y, w))[1]
    x = x - 0.03 * jax.grad(value)((x, y, w))[0]
    for got, wanted in ((after.x, x), (after.y, w), (after.extra, y)):
        np.testing.assert_allclose(got, wanted, atol=1e-12)
    assert int(after.oracles.upper) == int(after.oracles.lower) == 2
    assert int(after.oracles.hessian) == int(after.oracles.cross) == 0


def test_small_steps_only_lower_the_relaxed_objective():
    method = RARTS(0.005, 0.005)
    _, (x, w, y) = trajectory(PROBLEM, method, FIRST, positions, steps=200)
    value = relaxed_search(PROBLEM).value
    values = jax.vmap(lambda *point: value(point))(x, y, w)
    assert bool(jnp.all(jnp.diff(values) <= 1e-12))
    assert values[-1] < 0.5 * values[0]


@pytest.fixture(scope="module")
def second_order():
    @jax.jit
    def run(unroll):
        method = DARTS(0.01, 0.01, unroll, order=2)
        _, seen = trajectory(MODEL, method, START, positions, steps=6000, every=6000)
        return seen[0][0]

    return run


@pytest.mark.parametrize("unroll", [0.1, 0.5, 0.7])
def test_second_order_darts_goes_to_its_own_limit(second_order, unroll):
    np.testing.assert_allclose(second_order(unroll), 2 / (1 + 2 * unroll), atol=1e-10)


def test_first_order_darts_goes_to_two_and_does_not_claim_to_have_solved():
    end = solve(MODEL, DARTS(0.05, 0.05), START, max_steps=2000)
    np.testing.assert_allclose(end.x.x, 2.0, atol=1e-8)
    assert not bool(end.converged)


def test_second_order_darts_is_exact_where_one_step_solves_the_lower_level():
    # Lower Hessian 2: a step of 1/2 lands on the answer, from anywhere.
    end = solve(MODEL, DARTS(0.05, 0.05, 0.5, order=2), START, tol=1e-9)
    assert bool(end.converged)
    np.testing.assert_allclose(end.x.x, 1.0, atol=1e-8)
    method = DARTS(1.0, 0.1, 0.5, order=2)
    after = method.advance(MODEL, method.begin(MODEL, START))
    answer = hypergradient(MODEL, START.x, START.x)
    np.testing.assert_allclose(START.x - after.x, answer.value, atol=1e-12)
    assert int(after.oracles.total) == 4


def test_solve_measures_the_bilevel_condition_with_the_exact_adjoint():
    end = solve(PROBLEM, RARTS(0.005, 0.005), FIRST, max_steps=3)
    hessian = jax.hessian(lower, argnums=1)(end.x.x, end.x.y, DATA)
    force = jax.grad(upper, argnums=1)(end.x.x, end.x.y, DATA)
    exact = -jnp.linalg.solve(hessian, force)
    np.testing.assert_allclose(end.x.adjoint, exact, atol=1e-8)
    assert not bool(end.converged)


def test_a_penalty_on_groups_closes_channels():
    # Widths: the scale factors of a channel are a group; the second is of no use.
    def lower(x, y):
        return jnp.sum((y - x) ** 2)

    def upper(x, y):
        return jnp.sum((y - jnp.array([[2.0, 1.0], [0.1, 0.05]])) ** 2)

    problem = BilevelProblem(upper, lower)
    start = problem.point(jnp.ones((2, 2)), jnp.ones((2, 2)))

    def prox(x, stepsize):
        return prox_group_lasso(x, 2.0 * stepsize)

    method = RARTS(0.005, 0.005, prox=jax.vmap(prox, (0, None)))
    last, _ = trajectory(problem, method, start, positions, steps=4000, every=4000)
    assert bool(jnp.all(last.x[1] == 0)) and bool(jnp.all(last.x[0] > 0.2))


def test_draws_come_from_the_key():
    problem = BilevelProblem(upper, lower, DATA, sample=Minibatch((4,)))

    def end(seed):
        method = RARTS(0.01, 0.01, key=jax.random.key(seed))
        return trajectory(problem, method, FIRST, positions, steps=5, every=5)[0].x

    first, again, other = end(1), end(1), end(2)
    np.testing.assert_array_equal(first, again)
    assert not bool(jnp.any(first == other))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="RARTS: `training_weight` must be positive"):
        RARTS(training_weight=0.0)
    with pytest.raises(ValueError, match="RARTS: `coupling` must be positive"):
        RARTS(coupling=-1.0)
    with pytest.raises(ValueError, match="DARTS: `order` must be 1 or 2"):
        DARTS(order=3)
    with pytest.raises(ValueError, match="relaxed_search: `coupling` must be positive"):
        relaxed_search(MODEL, coupling=0.0)
    boxed = BilevelProblem(upper, lower, DATA, project_y=lambda y: y)
    with pytest.raises(ValueError, match="RARTS: needs a lower level without"):
        RARTS().begin(boxed, FIRST)
    with pytest.raises(ValueError, match="without `project_x`"):
        relaxed_search(BilevelProblem(upper, lower, DATA, project_x=lambda x: x))
    twins = BilevelProblem(upper, upper, DATA)
    with pytest.warns(UserWarning, match="same function of the same data"):
        RARTS().begin(twins, FIRST)
