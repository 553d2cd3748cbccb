"""Nonlinear conjugate gradients: the linear method on quadratics, and the contract."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Smooth, solve
from varan.secondorder import nonlinear_cg, scale_by_nonlinear_cg
from varan.secondorder._nonlinear_cg import Formula
from varan.testing import Case, contract

FORMULAE = get_args(Formula)


def bowl(x, c):
    return jnp.sum(jnp.cosh(x - c)) + jnp.sum(x) ** 2


BOWLS = [Smooth(bowl, jnp.asarray(c)) for c in ([1.0, -1.0], [0.5, 2.0])]
CASES = [
    Case(
        lambda: nonlinear_cg(),
        BOWLS,
        jnp.zeros(2),
        kind="optimiser",
        max_steps=5,
        xfail={"accumulates": "optax.MultiSteps passes no extra arguments on"},
        name="optimiser",
    ),
    Case(lambda: nonlinear_cg(), BOWLS, jnp.zeros(2), name="solver"),
]
test_contract = contract(CASES)


@pytest.mark.parametrize("formula", FORMULAE)
def test_directions_are_those_of_the_linear_method(formula):
    # On a quadratic with exact searches all formulae agree with conjugate gradients.
    rng = np.random.default_rng(0)
    half = rng.standard_normal((6, 6))
    A, b = half @ half.T + np.eye(6), rng.standard_normal(6)
    method = scale_by_nonlinear_cg(formula)
    x = np.zeros(6)
    state, directions = method.init(jnp.asarray(x)), []
    for _ in range(6):
        gradient = A @ x - b
        direction, state = method.update(jnp.asarray(gradient), state)
        d = np.asarray(direction)
        x = x - (gradient @ d) / (d @ A @ d) * d
        directions.append(d / np.linalg.norm(d))
    np.testing.assert_allclose(A @ x, b, atol=1e-9)
    D = np.stack(directions)
    products = D @ A @ D.T
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-8)


@pytest.mark.parametrize("formula", FORMULAE)
def test_a_curved_valley_is_followed(formula):
    def valley(x):
        return jnp.sum(10 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    end = solve(Smooth(valley), nonlinear_cg(formula), jnp.full(5, -0.5), tol=1e-9)
    assert end.converged
    np.testing.assert_allclose(end.x, 1.0, atol=1e-7)


@pytest.mark.parametrize("formula", FORMULAE)
def test_every_direction_descends(formula):
    method = scale_by_nonlinear_cg(formula)
    gradients = jnp.asarray(np.random.default_rng(1).standard_normal((40, 4)))

    def step(state, gradient):
        direction, state = method.update(gradient, state)
        return state, direction @ gradient

    slopes = jax.lax.scan(step, method.init(gradients[0]), gradients)[1]
    assert jnp.all(slopes < 0)


def test_an_unknown_formula_is_refused():
    with pytest.raises(ValueError, match="`formula` must be one of 'hager-zhang'"):
        nonlinear_cg("newton")
