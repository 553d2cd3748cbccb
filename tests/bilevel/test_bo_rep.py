"""BO-REP: its round written out, steps of one length, refinement and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan import Smooth, solve
from varan.bilevel import BilevelProblem, BORep, normalized_momentum, trajectory
from varan.testing import Case, contract

H = np.array([[2.0, 0.4], [0.4, 1.0]])
B = np.array([[1.0, -0.5], [0.3, 0.8]])
T = np.array([1.0, -0.5])


def upper(x, y, scale, noise):
    return scale * (jnp.sum((y - T) ** 2) / 2 + jnp.sum(jnp.cosh(x)))


def lower(x, y, scale, noise):
    return y @ H @ y / 2 - y @ (B @ x) + noise @ y


def problem_with(scale=1.0, **settings):
    return BilevelProblem(upper, lower, jnp.array(scale), jnp.zeros(2), **settings)


PROBLEM = problem_with()
START = PROBLEM.point(jnp.array([1.5, -0.7]), jnp.array([0.1, 0.4]))


def square(w, t):
    return jnp.sum((w - t) ** 2)


def quadratic(target):
    return Smooth(square, jnp.array(target))


test_contract = contract(
    [
        Case(
            lambda: normalized_momentum(0.05, 0.5),
            (quadratic([1.0, 2.0, 0.5]), quadratic([0.3, -1.0, 0.2])),
            jnp.zeros(3),
            kind="optimiser",
            max_steps=10,
            name="normalized_momentum",
        )
    ]
)


def seen(problem, iterate):
    return iterate.x, iterate.y, iterate.adjoint, iterate.oracles.lower


def run(problem=PROBLEM, steps=7, **settings):
    settings = {"refine_epochs": 0, "period": 3, "inner_steps": 2, **settings}
    method = BORep(0.05, 0.3, 0.4, 0.6, **settings)
    return trajectory(problem, method, START, seen, steps=steps)


def test_rounds_are_the_algorithm_written_out():
    last, found = run()
    x, y, w, m = np.array([1.5, -0.7]), np.array([0.1, 0.4]), np.zeros(2), np.zeros(2)
    for k in range(7):
        if k > 0 and k % 3 == 0:
            for _ in range(2):
                y = y - 0.3 * (H @ y - B @ x)
        w, direction = w - 0.4 * (H @ w + y - T), np.sinh(x) - B.T @ w
        m = 0.6 * m + 0.4 * direction
        x = x - 0.05 * m / (np.linalg.norm(m) + 1e-10)
        for got, wanted in zip(found, (x, y, w), strict=False):
            np.testing.assert_allclose(got[k], wanted, atol=1e-12)
    # Updates at rounds 3 and 6, two lower gradients each.
    assert list(found[3]) == [0, 0, 0, 2, 2, 2, 4]
    assert (last.oracles.upper, last.oracles.hessian, last.oracles.cross) == (7, 7, 7)


def test_every_step_has_the_same_length_over_all_leaves():
    split = BilevelProblem(
        lambda x, y: jnp.sum(jnp.cosh(x["a"])) + 100 * x["b"] ** 2 + y**2,
        lambda x, y: (y - x["b"] - jnp.sum(x["a"])) ** 2 / 2,
    )
    start = split.point({"a": jnp.array([9.0, 1.0]), "b": jnp.array(3.0)}, jnp.ones(()))
    method = BORep(0.05, 0.3, 0.4, refine_epochs=0)
    _, x = trajectory(split, method, start, lambda p, i: i.x, steps=5)
    steps = jnp.diff(jnp.concatenate([x["a"], x["b"][:, None]], axis=1), axis=0)
    np.testing.assert_allclose(jnp.linalg.norm(steps, axis=1), 0.05, rtol=1e-9)


def test_scaling_the_upper_level_changes_nothing():
    # The adjoint starts at zero, so that it scales along.
    _, one = run()
    _, other = run(problem_with(1000.0))
    np.testing.assert_allclose(one[0], other[0], atol=1e-9)


def test_without_normalisation_it_descends_to_the_answer():
    method = BORep(0.1, 0.4, 0.5, 0.0, 1, 1, 0, normalise=False)
    solution = solve(PROBLEM, method, START, tol=1e-8)
    assert solution.converged
    x = solution.x.x
    S = np.linalg.solve(H, B)
    np.testing.assert_allclose(np.sinh(x) + S.T @ (S @ x - T), 0, atol=1e-7)
    # z tracks the exact solve.
    force = solution.x.y - T
    np.testing.assert_allclose(
        solution.x.adjoint, -np.linalg.solve(H, force), atol=1e-7
    )


def test_refinement_finds_the_first_lower_answer_and_is_counted():
    method = BORep(0.05, 0.4, 0.4, refine_steps=20)
    first = method.begin(PROBLEM, START)
    wanted = np.linalg.solve(H, B @ START.x)
    # The mean of the last epoch: its first steps still weigh.
    np.testing.assert_allclose(first.y, wanted, atol=5e-3)
    assert first.oracles.lower == 140 and first.oracles.total == 140
    state = method.init(PROBLEM, START)
    assert state.evaluations == 141


def test_the_ball_is_about_where_the_update_began():
    method = BORep(0.05, 0.4, 0.4, refine_epochs=1, refine_steps=20, radius=0.2)
    # The mean of an epoch lies in the ball too; the answer does not.
    first = method.begin(PROBLEM, START)
    assert 0.15 < jnp.linalg.norm(first.y - START.y) <= 0.2
    # Afterwards y moves on from there, by at most the radius an update.
    _, found = run(steps=40, radius=0.01, inner_steps=5)
    moves = jnp.linalg.norm(jnp.diff(found[1], axis=0), axis=1)
    assert 0.0099 < jnp.max(moves) <= 0.01 + 1e-12
    assert jnp.linalg.norm(found[1][-1] - START.y) > 0.05


def test_the_key_decides_the_draws():
    def draw(key, scale, noise):
        return scale, 0.1 * jax.random.normal(key, noise.shape)

    noisy = problem_with(sample=draw)
    ends = [run(noisy, key=jax.random.key(seed))[1][1] for seed in (1, 1, 2)]
    assert np.array_equal(ends[0], ends[1]) and not np.array_equal(ends[0], ends[2])


def test_the_optimiser_takes_the_steps_of_the_solver():
    gradients = [np.array([3.0, 4.0]), np.array([0.0, -1.0])]
    optimiser = normalized_momentum(0.5, 0.6)
    state, m = optimiser.init(jnp.zeros(2)), np.zeros(2)
    for g in gradients:
        updates, state = optimiser.update(jnp.asarray(g), state)
        m = 0.6 * m + 0.4 * g
        np.testing.assert_allclose(updates, -0.5 * m / np.linalg.norm(m), rtol=1e-9)
    still = optax.tree.zeros_like(state)
    updates, _ = optimiser.update(jnp.zeros(2), still)
    assert not np.any(updates)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BORep(0.0), "BORep: `stepsize` must be positive"),
        (lambda: BORep(period=0), "BORep: `period` must be positive"),
        (lambda: BORep(momentum=1.0), r"BORep: `momentum` must lie in \[0, 1\)"),
        (lambda: BORep(radius=-1.0), "BORep: `radius` must be positive"),
        (
            lambda: normalized_momentum(0.1, -0.1),
            r"normalized_momentum: `momentum` must lie in \[0, 1\)",
        ),
        (
            lambda: BORep().begin(problem_with(project_y=jnp.abs), START),
            "BORep: needs a lower level without constraints",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
