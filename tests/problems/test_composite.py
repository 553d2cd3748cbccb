"""Composite and set-constrained problems: conditions, derivatives, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.operators import project_box, prox_l1
from varan.problems import Composite, SetConstrained

X = jnp.array([1.5, -0.2, -3.0])


def shrunk(stepsize=1.0):
    return Composite(
        lambda x, c, lam: jnp.sum((x - c) ** 2) / 2,
        lambda v, t, c, lam: prox_l1(v, lam, t),
        X,
        0.5,
        nonsmooth=lambda x, c, lam: lam * jnp.sum(jnp.abs(x)),
        stepsize=stepsize,
    )


@pytest.mark.parametrize("stepsize", [0.1, 1.0, 7.0])
def test_the_condition_vanishes_exactly_at_the_solution(stepsize):
    problem = shrunk(stepsize)
    answer = prox_l1(X, 0.5)
    np.testing.assert_allclose(problem.condition(answer), 0, atol=1e-14)
    assert problem.residual(problem.condition(answer + 0.1)) > 0.01


def test_the_condition_is_the_gradient_where_there_is_nothing_else():
    problem = SetConstrained(lambda x: jnp.sum(jnp.sin(x)), lambda v: v, stepsize=0.3)
    np.testing.assert_allclose(problem.condition(X), jnp.cos(X), atol=1e-14)


def test_the_parts_add_up():
    problem = shrunk()
    point = jnp.array([1.0, 2.0, -1.0])
    assert problem.smooth(point) == jnp.sum((point - X) ** 2) / 2
    assert problem.penalty(point) == 2.0
    assert SetConstrained(jnp.sum, lambda v: v).value(point) == 2.0


def test_a_penalty_without_value_says_what_to_pass():
    problem = Composite(jnp.sum, lambda v, t: v)
    with pytest.raises(TypeError, match="Pass it as `nonsmooth`"):
        problem.penalty(X)


def test_no_feasible_direction_descends_where_the_condition_is_zero():
    problem = SetConstrained(
        lambda x, c: jnp.sum((x - c) ** 2), lambda v, c: project_box(v, -1.0, 1.0), X
    )
    answer = project_box(X, -1.0, 1.0)
    np.testing.assert_allclose(problem.condition(answer), 0, atol=1e-14)
    slope = jax.grad(problem.value)(answer)
    for point in np.random.default_rng(0).uniform(-1, 1, (50, 3)):
        assert slope @ (point - answer) >= -1e-12


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="Composite: `prox` must be callable"):
        Composite(jnp.sum, None)
    with pytest.raises(TypeError, match="SetConstrained: `projection` must be call"):
        SetConstrained(jnp.sum, 3)
    for problem in (Composite, SetConstrained):
        with pytest.raises(ValueError, match="`stepsize` must be positive"):
            problem(jnp.sum, lambda v, t: v, stepsize=0.0)
