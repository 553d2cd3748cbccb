"""Solvers of games: the contract, closed forms, calls counted, timescales, noise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan import FixedPoint, Solver, Status, compare, solve
from varan.games import (
    Extragradient,
    Game,
    GradientDescentAscent,
    Halpern,
    InverseTime,
    OptimisticGradient,
    PastExtragradient,
    ProximalPoint,
    ReflectedGradient,
    bilinear_game,
    matrix_game,
    rotation_game,
    scale_by_past_extragradient,
)
from varan.testing import Case, contract

M = np.array([[1.0, 2.0, 0.0], [-2.0, 1.0, 0.5], [0.0, -0.5, 1.5]])


def pulled(z, M, b):
    return M @ z + jnp.tanh(z) - b


def pulled_game(seed):
    rng = np.random.default_rng(seed)
    return Game(pulled, jnp.asarray(M), jnp.asarray(rng.standard_normal(3)))


class OneOf(Solver):
    """One of several solvers with equal states; which one is data: one compilation."""

    which: jax.Array
    solvers: tuple[Solver, ...]

    def init(self, problem, start):
        branches = [partial(solver.init, problem) for solver in self.solvers]
        return jax.lax.switch(self.which, branches, start)

    def step(self, problem, state):
        branches = [partial(solver.step, problem) for solver in self.solvers]
        return jax.lax.switch(self.which, branches, state)


SINGLE_CALL = (
    PastExtragradient(0.15),
    ReflectedGradient(0.1),
    OptimisticGradient(0.15),
)
GAMES = [pulled_game(0), pulled_game(1)]
CASES = [
    Case(
        lambda: Extragradient(0.2),
        GAMES,
        jnp.zeros(3),
        tags={"shift", "permutation", "reflection"},
        name="extragradient",
    ),
    *(
        Case(
            lambda number=number: OneOf(jnp.array(number), SINGLE_CALL),
            GAMES,
            jnp.zeros(3),
            name=type(solver).__name__,
        )
        for number, solver in enumerate(SINGLE_CALL)
    ),
    Case(lambda: ProximalPoint(2.0), GAMES, jnp.zeros(3)),
]
test_contract = contract(CASES)

EVERY = {
    "extragradient": (Extragradient(0.2), 2),
    "past": (PastExtragradient(0.2), 1),
    "reflected": (ReflectedGradient(0.15), 1),
    "optimistic": (OptimisticGradient(0.2), 1),
    "descent": (GradientDescentAscent(0.1), 1),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_solver_counts_its_calls_and_finds_the_answer(name):
    solver, calls = EVERY[name]
    game, start = pulled_game(0), jnp.zeros(3)
    end = solve(game, solver, start, tol=1e-9)
    assert end.converged
    assert end.evaluations == 1 + calls * end.steps
    np.testing.assert_allclose(pulled(end.x, *game.params), 0, atol=1e-9)


def step_matrix(solver, angle, steps=2, L=1.0):
    """The linear map of `steps` late steps on a rotation, column by column."""
    game = rotation_game(L, angle)

    def orbit(z):
        state = solver.init(game, z)
        out = [state.x]
        for _ in range(steps):
            state = solver.step(game, state)
            out.append(state.x)
        return jnp.stack(out)

    return np.asarray(jax.vmap(orbit)(jnp.eye(2))).transpose(1, 2, 0)


R = np.array([[np.cos(2.0), -np.sin(2.0)], [np.sin(2.0), np.cos(2.0)]])
I2 = np.eye(2)


def test_steps_are_those_of_the_algorithm_boxes():
    one = lambda solver: step_matrix(solver, 2.0, 1)[1]  # noqa: E731
    np.testing.assert_allclose(one(GradientDescentAscent(0.3)), I2 - 0.3 * R)
    np.testing.assert_allclose(
        one(Extragradient(0.3, 0.2)), I2 - 0.2 * R @ (I2 - 0.3 * R)
    )
    np.testing.assert_allclose(
        one(ProximalPoint(0.3)), np.linalg.inv(I2 + 0.3 * R), atol=1e-14
    )
    slow = np.diag([0.25, 1.0])
    game = Game.from_saddle(lambda x, y: jnp.sum(x * y) - jnp.sum(y**2) / 4)
    z = (jnp.array([1.0]), jnp.array([2.0]))
    solver = Extragradient(0.3, timescale=4.0)
    end = jnp.concatenate(solver.step(game, solver.init(game, z)).x)
    J = slow @ np.array([[0, 1], [-1, 0.5]])
    np.testing.assert_allclose(end, (I2 - 0.3 * J @ (I2 - 0.3 * J)) @ [1.0, 2.0])
    # Two Halpern steps: halfway to the start, then a third of the way.
    halpern = step_matrix(Halpern(0.3), 2.0)
    T = I2 - 0.3 * R
    np.testing.assert_allclose(halpern[1], I2 / 2 + T / 2)
    np.testing.assert_allclose(halpern[2], I2 / 3 + 2 / 3 * T @ (I2 / 2 + T / 2))


def test_single_call_methods_coincide_without_constraints_and_equal_optax():
    orbits = [
        step_matrix(solver(0.3), 1.5, 5)
        for solver in (PastExtragradient, OptimisticGradient)
    ]
    np.testing.assert_allclose(orbits[0], orbits[1], atol=1e-14)
    game = rotation_game(1.0, 1.5)
    for method in (
        optax.optimistic_gradient_descent(0.3),
        optax.chain(scale_by_past_extragradient(0.3), optax.scale(-1.0)),
    ):
        z = jnp.array([1.0, 0.0])
        state = method.init(z)
        for k in range(5):
            np.testing.assert_allclose(z, orbits[0][k][:, 0], atol=1e-14)
            updates, state = method.update(game.apply(z), state)
            z = optax.apply_updates(z, updates)
    # Reflection begins with no move to reflect; from the second point on it is theirs.
    reflected = step_matrix(ReflectedGradient(0.3), 1.5, 5)
    np.testing.assert_allclose(reflected[1], I2, atol=1e-14)
    recursion = [reflected[k + 1] - reflected[k] for k in range(2, 5)]
    J = 0.3 * np.array([[np.cos(1.5), -np.sin(1.5)], [np.sin(1.5), np.cos(1.5)]])
    for k, move in zip(range(2, 5), recursion, strict=True):
        expected = -2 * J @ reflected[k] + J @ reflected[k - 1]
        np.testing.assert_allclose(move, expected, atol=1e-14)


def test_the_optax_transformation_follows_a_schedule():
    schedule = InverseTime(2.0, 4.0)
    game = rotation_game(1.0, 1.5)
    solver = PastExtragradient(schedule)
    method = optax.chain(scale_by_past_extragradient(schedule), optax.scale(-1.0))
    z = jnp.array([1.0, 0.0])
    state, memory = solver.init(game, z), method.init(z)
    for _ in range(4):
        updates, memory = method.update(game.apply(z), memory)
        z = optax.apply_updates(z, updates)
        state = solver.step(game, state)
        np.testing.assert_allclose(z, state.x, atol=1e-14)


def test_with_projections_they_differ_and_all_solve():
    game = matrix_game(jnp.asarray(M))
    start = (jnp.array([1.0, 0, 0]), jnp.array([0, 0, 1.0]))
    solvers = [s(0.15) for s in (PastExtragradient, ReflectedGradient)]
    solvers += [OptimisticGradient(0.15), ProximalPoint(5.0)]
    table = compare(game, solvers, start, tol=1e-7, max_evaluations=20_000)
    assert all(row["residual"] <= 1e-7 for row in table.rows()), table
    for solution in table.solutions.values():
        assert solution.certificate.value < 1e-5
    one, two = (
        s.step(game, s.step(game, s.init(game, start))).x[0]
        for s in (PastExtragradient(0.6), OptimisticGradient(0.6))
    )
    assert jnp.max(jnp.abs(one - two)) > 1e-3


def test_descent_ascent_diverges_where_extragradient_converges():
    game = bilinear_game(jnp.eye(2))
    start = (jnp.ones(2), jnp.ones(2))
    bad = solve(game, GradientDescentAscent(0.5), start, max_steps=300)
    assert not bad.converged and bad.residual > 1e3
    assert solve(game, Extragradient(0.5), start).converged


def test_halpern_keeps_its_bound_at_every_step():
    b = jnp.array([3.0, -1.0])
    game = Game(lambda z, b: jnp.array([1.0, 1e-3]) * (z - b), b)
    end = solve(game, Halpern(2.0), jnp.zeros(2), max_steps=400, tol=1e-12)
    k = jnp.arange(401.0)
    bound = 2 * jnp.linalg.norm(b) / (2.0 * (k + 1))
    assert jnp.all(end.trace.residual[1:] <= bound[1:] * (1 + 1e-12))


def test_proximal_point_counts_newton_and_solves_nonlinear_steps():
    game = pulled_game(0)
    end = solve(game, ProximalPoint(50.0), jnp.zeros(3), tol=1e-9)
    assert end.converged and end.steps <= 8
    # Affine: one Newton iteration a step, three products and a call, and one call.
    linear = rotation_game(1.0, 1.0)
    end = solve(linear, ProximalPoint(3.0), jnp.ones(2), tol=1e-9)
    assert end.evaluations == 1 + 4 * end.steps
    # max(z, 0)^2 - 1 has no zero left of the kink: the step says so.
    stuck = Game(lambda z: jnp.exp(-z) + 1.0)
    end = solve(stuck, ProximalPoint(1.0, max_inner=1), jnp.full(1, -20.0))
    assert end.status == Status.STALLED


def test_a_large_implicit_step_goes_matrix_free():
    size = 600
    game = Game(lambda z: jnp.roll(z, 1) - jnp.roll(z, -1) + 0.1 * z - 1.0)
    end = solve(game, ProximalPoint(20.0), jnp.zeros(size), tol=1e-7)
    assert end.converged
    np.testing.assert_allclose(end.x, jnp.full(size, 10.0), atol=1e-6)


@pytest.mark.parametrize("solver", [Extragradient, PastExtragradient])
def test_noise_is_averaged_out_by_steps_that_shrink(solver):
    game = rotation_game(1.0, 1.0).with_noise(0.1)
    method = solver(InverseTime(4.0, 16.0), key=jax.random.key(3))
    end = solve(game, method, jnp.ones(2), tol=1e-9, max_steps=4000)
    # The rate's constant: 6 scale^2 variance / ((alpha scale - 1) t).
    alpha = float(np.cos(1.0))
    bound = 6 * 16 * 2 * 0.01 / ((4 * alpha - 1) * 4000)
    assert jnp.sum(end.x**2) <= bound
    calls = 2 if solver is Extragradient else 1
    assert int(end.evaluations) == calls * int(end.steps) + (calls == 1)


def test_a_promised_lipschitz_constant_stops_steps_that_are_too_long():
    game = Game(lambda z: 2 * z, lipschitz=2.0)
    end = solve(game, Extragradient(0.6), jnp.ones(2))
    assert end.status == Status.DIVERGED and end.steps == 0
    assert solve(game, PastExtragradient(0.2), jnp.ones(2)).converged


def test_a_fixed_points_displacement_is_turned_round():
    problem = FixedPoint(lambda x: 0.5 * jnp.cos(x))
    end = solve(problem, Extragradient(0.5), jnp.zeros(1), tol=1e-9)
    assert end.converged


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Extragradient(0.0), "Extragradient: `stepsize` must be positive"),
        (lambda: Extragradient(0.1, -1.0), "`update_stepsize` must be positive"),
        (lambda: Extragradient(0.1, timescale=0.5), "`timescale` must be at least 1"),
        (lambda: PastExtragradient(jnp.nan), "PastExtragradient: `stepsize` must be"),
        (lambda: Halpern(-1.0), "Halpern: `stepsize` must be positive"),
        (lambda: ProximalPoint(0.0), "ProximalPoint: `stepsize` must be positive"),
        (
            lambda: solve(
                rotation_game(), Extragradient(0.1, timescale=2.0), jnp.ones(2)
            ),
            r"must be a pair \(x, y\)",
        ),
        (
            lambda: solve(
                FixedPoint(jnp.cos),
                PastExtragradient(0.1, key=jax.random.key(0)),
                jnp.ones(2),
            ),
            "must be a Game with a noisy oracle",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with (
        pytest.raises(ValueError, match=message)
        if "pair" in message
        else (pytest.raises((ValueError, TypeError), match=message))
    ):
        make()
