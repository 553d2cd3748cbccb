"""Mirror descent: closed forms on the simplex, transport, and the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Root, solve
from varan.firstorder import MirrorDescent, ProximalGradient
from varan.operators import (
    project_kl_transport,
    project_nonnegative,
    project_simplex,
    project_transport,
)
from varan.problems import SetConstrained
from varan.testing import Case, contract

START = jnp.array([0.3, 0.3, 0.4])


def free_energy(p, cost):
    return p @ cost + jnp.sum(jax.scipy.special.xlogy(p, p))


def onto_simplex(v, cost):
    return project_simplex(v)


def gibbs(seed):
    cost = jnp.asarray(np.random.default_rng(seed).standard_normal(3))
    return SetConstrained(free_energy, onto_simplex, cost)


def distance(p, target):
    return jnp.sum((p - target) ** 2) / 2


CASES = [
    Case(
        lambda: MirrorDescent(0.3),
        [gibbs(0), gibbs(1)],
        START,
        bounds=(0.0, 1.0),
        xfail={
            "pytrees": "the default sets are simplices of leaves, which a split changes"
        },
        name="mirror descent",
    )
]
test_contract = contract(CASES)


def test_the_free_energy_is_least_at_the_softmax():
    problem = gibbs(2)
    end = solve(problem, MirrorDescent(0.5), START, tol=1e-10)
    np.testing.assert_allclose(end.x, jax.nn.softmax(-problem.params[0]), atol=1e-9)
    # Relative to the entropy the objective's curvature is one: a step of one is exact.
    once = solve(problem, MirrorDescent(1.0, iterations=1), START, tol=1e-10)
    assert once.converged and once.steps == 1


def test_a_solution_on_the_boundary_and_its_derivative():
    target = jnp.array([0.9, 0.5, -0.6])

    def nearest(target):
        problem = SetConstrained(distance, onto_simplex, target)
        return solve(problem, MirrorDescent(1.0), START, tol=1e-9).x

    np.testing.assert_allclose(nearest(target), project_simplex(target), atol=1e-8)
    np.testing.assert_allclose(
        jax.jacobian(nearest)(target), jax.jacobian(project_simplex)(target), atol=1e-6
    )


def test_a_schedule_is_asked_at_every_iteration():
    cost = jnp.array([1.0, 0.0, 0.5])
    problem = SetConstrained(lambda p, c: p @ c, onto_simplex, cost)
    solver = MirrorDescent(
        lambda k: 1.0 / jnp.sqrt(k.astype(float) + 1.0), iterations=4
    )
    state = solver.init(problem, START)
    for _ in range(2):
        state = solver.step(problem, state)
    total = np.sum(1 / np.sqrt(np.arange(1, 9)))
    wanted = jax.nn.softmax(jnp.log(START) - total * cost)
    np.testing.assert_allclose(state.x, wanted, atol=1e-12)
    assert state.evaluations == 5


def test_transport_with_an_entropy_on_the_polytope():
    rng = np.random.default_rng(0)
    cost = jnp.asarray(rng.uniform(size=(3, 4)))
    rows, columns = jnp.full(3, 1 / 3), jnp.full(4, 1 / 4)
    problem = SetConstrained(
        lambda P, cost: (
            jnp.sum(P * cost) + 0.2 * jnp.sum(jax.scipy.special.xlogy(P, P))
        ),
        lambda V, cost: project_transport(V, rows, columns),
        cost,
    )
    solver = MirrorDescent(
        2.0, projection=lambda y, cost: project_kl_transport(y, rows, columns)
    )
    end = solve(problem, solver, rows[:, None] * columns[None, :], tol=1e-9)
    exact = project_kl_transport(-cost / 0.2, rows, columns)
    assert end.converged
    np.testing.assert_allclose(end.x, exact, atol=1e-8)


def test_another_mirror_map_is_another_geometry():
    # The identity's divergence is Euclidean: projected gradient.
    problem = SetConstrained(
        lambda x: jnp.sum((x - jnp.array([1.0, -1.0])) ** 2) / 2, project_nonnegative
    )
    start = jnp.ones(2)
    mirror = MirrorDescent(0.5, lambda x: x, project_nonnegative)
    plain = ProximalGradient(0.5, accelerate=False)
    ends = [solve(problem, solver, start, tol=1e-9) for solver in (mirror, plain)]
    assert ends[0].steps == ends[1].steps
    np.testing.assert_array_equal(ends[0].x, ends[1].x)


def test_rows_are_simplices_and_zeros_stay():
    targets = jnp.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    problem = SetConstrained(
        lambda P: distance(P, targets), lambda V: jax.vmap(project_simplex)(V)
    )
    end = solve(problem, MirrorDescent(1.0), jnp.full((2, 3), 1 / 3), tol=1e-8)
    np.testing.assert_allclose(end.x, targets, atol=1e-7)
    stuck = solve(problem, MirrorDescent(1.0), jnp.eye(2, 3), tol=1e-8, max_steps=200)
    assert not stuck.converged


def test_bad_settings_and_problems_are_refused():
    with pytest.raises(ValueError, match="MirrorDescent: `stepsize` must be positive"):
        MirrorDescent(-1.0)
    with pytest.raises(ValueError, match="`iterations` must be a positive integer"):
        MirrorDescent(1.0, iterations=0)
    with pytest.raises(TypeError, match="`mirror_map` must be callable"):
        MirrorDescent(1.0, 2.0)
    with pytest.raises(TypeError, match="the problem must be a SetConstrained"):
        solve(Root(lambda x: x), MirrorDescent(1.0), START)
