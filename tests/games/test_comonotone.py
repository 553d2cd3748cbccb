"""Negative comonotonicity: legal steps, bounds above the truth, potentials, input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.games import (
    Extragradient,
    OptimisticGradient,
    ProximalPoint,
    comonotone_bound,
    comonotone_potential,
    comonotone_steps,
    rotation_game,
)

STEPS = 60


@jax.jit
def extragradient_run(length, rho, a, b):
    """Points and operator values on a rotation, which has these constants exactly."""
    game = rotation_game(length, jnp.arccos(-rho * length))
    solver = Extragradient(a, b)
    state = solver.init(game, jnp.array([1.0, 0.0]))

    def advance(state, _):
        return solver.step(game, state), (state.x, state.condition)

    return jax.lax.scan(advance, state, None, length=STEPS)[1]


@pytest.mark.parametrize("rho", [0.0, 0.06, 0.125])
def test_extragradient_stays_below_its_bound_with_every_legal_step(rho):
    low, high = comonotone_steps(1.0, rho)
    assert (low, high) == (4 * rho, 0.5)
    count = jnp.arange(1, STEPS)
    for a in np.linspace(max(low, 0.05), high, 3):
        bound = comonotone_bound("extragradient", count, 1.0, stepsize=a, rho=rho)
        assert bound.proof
        for length in (0.1, 0.5, 1.0):
            z, force = extragradient_run(length, rho, a, a)
            assert jnp.all(jnp.sum(force[1:] ** 2, axis=1) <= bound.value)
            potential = jax.vmap(
                lambda k, z, f, a=a: comonotone_potential(
                    "extragradient", k, z, f, stepsize=a, rho=rho, lipschitz=1.0
                )
            )(jnp.arange(STEPS), z, force)
            assert jnp.max(jnp.diff(potential)) <= 1e-12


def test_two_step_sizes_reach_further():
    rho = 0.45
    low, high = comonotone_steps(1.0, rho, guarantee="best")
    assert (low, high) == (0.9, 1.0)
    a = 0.95
    b = a - 2 * rho
    _, force = extragradient_run(1.0, rho, a, b)
    mean = jnp.mean(jnp.sum(force**2, axis=1))
    assert mean <= 1 / (a * b * (1 - a**2) * STEPS)
    # One step size fails on this operator, whatever it is.
    for same in (0.1, 0.5, 0.9):
        z, _ = extragradient_run(1.0, rho, same, same)
        assert jnp.linalg.norm(z[-1]) > 1


def test_a_potential_unmasks_a_false_promise():
    z, force = extragradient_run(1.0, 0.4, 0.3, 0.3)
    potential = jax.vmap(
        lambda k, z, f: comonotone_potential(
            "extragradient", k, z, f, stepsize=0.3, rho=0.0, lipschitz=1.0
        )
    )(jnp.arange(STEPS), z, force)
    assert jnp.max(jnp.diff(potential)) > 1e-2


def test_optimistic_gradients_potential_and_bound():
    rho, a = 0.06, 1 / 3.1
    game, solver = rotation_game(1.0, float(np.arccos(-rho))), OptimisticGradient(a)
    state = solver.init(game, jnp.array([1.0, 0.0]))
    values, squares = [], []
    step = jax.jit(lambda state: solver.step(game, state))
    for k in range(25):
        force = game.apply(state.memory.base)
        values.append(
            comonotone_potential(
                "optimistic_gradient",
                k,
                state.memory.base,
                force,
                stepsize=a,
                rho=rho,
                lipschitz=1.0,
                mismatch=force - state.memory.known,
            )
        )
        squares.append(jnp.sum(force**2))
        state = step(state)
    assert np.max(np.diff(values)) <= 1e-9
    bound = comonotone_bound(
        "optimistic_gradient", jnp.arange(1, 25), 1.0, stepsize=a, rho=rho
    )
    assert jnp.all(jnp.stack(squares[1:]) <= bound.value)


@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_proximal_points_worst_rotation_attains_what_the_lower_bound_says(rho):
    steps, a = 12, 1.5
    length = (a * (a - 2 * rho) * (steps - 1)) ** -0.5
    game = rotation_game(length, float(np.arccos(-rho * length)))
    solver = ProximalPoint(a)
    state = solver.init(game, jnp.array([1.0, 0.0]))
    step = jax.jit(lambda state: solver.step(game, state))
    for _ in range(steps):
        state = step(state)
    bound = comonotone_bound("proximal_point", steps, 1.0, stepsize=a, rho=rho)
    ratio = jnp.sum(state.condition**2) / bound.value
    np.testing.assert_allclose(ratio, (1 - 1 / steps) ** (steps - 1), rtol=1e-9)


def test_bounds_are_nan_outside_of_their_interval():
    for method, a in (
        ("proximal_point", 0.19),
        ("extragradient", 0.39),
        ("extragradient", 0.51),
        ("optimistic_gradient", 0.33),
    ):
        rho = 0.0 if a == 0.33 else 0.1
        bound = comonotone_bound(method, 5, 1.0, stepsize=a, rho=rho)
        assert not bound.met and jnp.isnan(bound.value)


def test_proximal_point_has_no_longest_step():
    assert comonotone_steps(1.0, 3.0, "proximal_point") == (6.0, math.inf)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.1), "`lipschitz` must be positive"),
        ((1.0, -0.1), "`rho` must not be negative"),
        ((1.0, 0.1, "newton"), "`method` must be one of"),
        ((2.0, 0.25), "For every choice of steps some operator"),
        ((2.0, 0.25, "optimistic_gradient"), "Use ProximalPoint"),
        ((1.0, 0.2), "`rho` must be at most 0.125 for the last iterate"),
        ((1.0, 0.1, "optimistic_gradient"), "at most 0.08065"),
    ],
)
def test_illegal_constants_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        comonotone_steps(*arguments)


def test_settings_without_a_theorem_are_named():
    with pytest.raises(ValueError, match="with one step size"):
        comonotone_steps(1.0, 0.1, "optimistic_gradient", guarantee="best")
    with pytest.raises(ValueError, match="`method` must be one of"):
        comonotone_bound("newton", 1, 1.0, stepsize=1.0, rho=0.0)
