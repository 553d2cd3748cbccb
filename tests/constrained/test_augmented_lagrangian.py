"""The augmented Lagrangian on Hock and Schittkowski's problems, and the contract.

Numbers and solutions: Hock, Schittkowski, 1981, "Test examples for nonlinear
programming codes".
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from varan import NewtonCG, Smooth, Status, solve
from varan.constrained import AugmentedLagrangian
from varan.problems import Constrained
from varan.testing import Case, contract


def hs43(x):
    squares = jnp.array([[1.0, 1, 1, 1], [1, 2, 1, 2], [2, 1, 1, 0]])
    slopes = jnp.array([[1.0, -1, 1, -1], [-1, 0, 0, -1], [2, -1, 0, -1]])
    return squares @ x**2 + slopes @ x - jnp.array([8.0, 10, 5])


# Objective, equality, inequality, start, least value.
PROBLEMS = {
    6: (
        lambda x: (1 - x[0]) ** 2,
        lambda x: 10 * (x[1] - x[0] ** 2),
        None,
        [-1.2, 1.0],
        0.0,
    ),
    7: (
        lambda x: jnp.log1p(x[0] ** 2) - x[1],
        lambda x: (1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4,
        None,
        [2.0, 2.0],
        -np.sqrt(3),
    ),
    10: (
        lambda x: x[0] - x[1],
        None,
        lambda x: 3 * x[0] ** 2 - 2 * x[0] * x[1] + x[1] ** 2 - 1,
        [-10.0, 10.0],
        -1.0,
    ),
    14: (
        lambda x: (x[0] - 2) ** 2 + (x[1] - 1) ** 2,
        lambda x: x[0] - 2 * x[1] + 1,
        lambda x: x[0] ** 2 / 4 + x[1] ** 2 - 1,
        [2.0, 2.0],
        9 - 23 * np.sqrt(7) / 8,
    ),
    39: (
        lambda x: -x[0],
        lambda x: jnp.stack(
            [x[1] - x[0] ** 3 - x[2] ** 2, x[0] ** 2 - x[1] - x[3] ** 2]
        ),
        None,
        [2.0, 2.0, 2.0, 2.0],
        -1.0,
    ),
    43: (
        lambda x: jnp.array([1.0, 1, 2, 1]) @ x**2 + jnp.array([-5.0, -5, -21, 7]) @ x,
        None,
        hs43,
        [0.0, 0.0, 0.0, 0.0],
        -44.0,
    ),
    71: (
        lambda x: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
        lambda x: x @ x - 40,
        lambda x: jnp.concatenate([(25 - jnp.prod(x))[None], 1 - x, x - 5]),
        [1.0, 5.0, 5.0, 1.0],
        17.0140173,
    ),
}


@pytest.mark.parametrize("number", PROBLEMS)
def test_the_known_minimum_is_found(number):
    f, h, g, start, least = PROBLEMS[number]
    problem = Constrained(f, equality=h, inequality=g)
    x = jnp.asarray(start)
    end = solve(problem, AugmentedLagrangian(), problem.start(x), max_steps=60)
    assert end.converged and end.certificate.met
    np.testing.assert_allclose(f(end.x.x), least, atol=1e-6)
    rows = []
    if h is not None:
        rows.append(("eq", lambda v: jnp.atleast_1d(h(v))))
    if g is not None:
        rows.append(("ineq", lambda v: -jnp.atleast_1d(g(v))))
    peer = scipy.optimize.minimize(
        jax.jit(f),
        start,
        jac=jax.jit(jax.grad(f)),
        method="SLSQP",
        constraints=[
            {"type": kind, "fun": jax.jit(c), "jac": jax.jit(jax.jacobian(c))}
            for kind, c in rows
        ],
        options={"ftol": 1e-12},
    )
    if peer.success and abs(peer.fun - least) < 1e-4:  # it too finds local minima
        np.testing.assert_allclose(end.x.x, peer.x, atol=1e-4)


def loss(x, c):
    return jnp.sum(jnp.cosh(x - c))


def arc(x, c):
    return (x @ x - 1.0)[None]


def half(x, c):
    return x[:1] - 0.25


def pair(c):
    return Constrained(loss, jnp.asarray(c), equality=arc, inequality=half)


FIRST = pair([1.0, 1.5])
CASES = [
    Case(
        lambda: AugmentedLagrangian(),
        (FIRST, pair([0.2, 2.0])),
        FIRST.start(jnp.array([0.3, 0.8])),
        tol=1e-9,
        max_steps=60,
        xfail={"pytrees": "a problem in another dress shows no constraints; see below"},
        name="arc",
    )
]
test_contract = contract(CASES)


@pytest.mark.parametrize(
    "inner", [NewtonCG(), optax.lbfgs()], ids=["newton-cg", "lbfgs"]
)
def test_inner_solvers_find_one_answer(inner):
    start = FIRST.start(jnp.array([0.3, 0.8]))
    with jax.numpy_dtype_promotion("standard"):
        end = solve(FIRST, AugmentedLagrangian(inner), start, tol=1e-7)
    best = solve(FIRST, AugmentedLagrangian(), start, tol=1e-10)
    assert end.converged
    np.testing.assert_allclose(end.x.x, best.x.x, atol=1e-6)


def test_pytrees_of_unknowns_and_constraints():
    problem = Constrained(
        lambda x: jnp.sum(x["a"] ** 2) + jnp.sum(x["b"] ** 2),
        equality=lambda x: {"sum": jnp.sum(x["a"]) + x["b"] - 3.0},
        inequality=lambda x: [x["b"] - 0.5, -x["a"]],
    )
    start = problem.start({"a": jnp.zeros(2), "b": jnp.zeros(())})
    end = solve(problem, AugmentedLagrangian(), start)
    assert end.converged
    np.testing.assert_allclose(end.x.x["a"], 1.25, atol=1e-6)
    np.testing.assert_allclose(end.x.x["b"], 0.5, atol=1e-6)


def test_contradicting_constraints_stall_and_claim_no_proof():
    problem = Constrained(
        lambda x: x @ x, inequality=lambda x: jnp.stack([x[0] + 1, 1 - x[0]])
    )
    end = solve(problem, AugmentedLagrangian(), problem.start(jnp.ones(2)))
    assert end.status == Status.STALLED
    assert end.certificate.details["infeasibility"] > 0.9


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`inner_steps` must be a positive integer"):
        AugmentedLagrangian(inner_steps=0)
    with pytest.raises(ValueError, match="`penalty` must be positive"):
        AugmentedLagrangian(penalty=-1.0)
    with pytest.raises(TypeError, match="the problem must be a Constrained"):
        solve(Smooth(jnp.sum), AugmentedLagrangian(), jnp.ones(2))
