"""The short form: derivatives in every array, batches, choice of the solver."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from varan import Status
from varan.constrained import quadratic_program
from varan.testing import assert_close, difference

RNG = np.random.default_rng(4)
HALF, INSIDE = RNG.standard_normal((4, 4)), RNG.standard_normal(4)
A, G = RNG.standard_normal((1, 4)), RNG.standard_normal((3, 4))
DATA = {
    name: jnp.asarray(value)
    for name, value in dict(
        Q=HALF @ HALF.T,
        c=2 * RNG.standard_normal(4),
        A=A,
        b=A @ INSIDE,
        G=G,
        h=G @ INSIDE + 0.1,
        lower=INSIDE - 0.3,
        upper=INSIDE + 0.3,
    ).items()
}


@jax.jit
def answer(data):
    return quadratic_program(**data, tol=1e-11).x.x


@jax.jit
def forward(data, direction):
    return jax.jvp(answer, (data,), (direction,))[1]


@jax.jit
def reverse(data, weight):
    return jax.vjp(answer, data)[1](weight)[0]


@pytest.mark.parametrize("name", DATA)
def test_derivatives_in_every_array(name):
    direction = jax.tree.map(jnp.zeros_like, DATA)
    rng = np.random.default_rng(1)
    direction[name] = jnp.asarray(rng.standard_normal(DATA[name].shape))
    tangent = forward(DATA, direction)
    assert_close(tangent, difference(answer, DATA, direction, 1e-4), 1e-7)
    weight = jnp.asarray(rng.standard_normal(tangent.shape))
    pulled = reverse(DATA, weight)
    assert_close(jnp.vdot(pulled[name], direction[name]), tangent @ weight, 1e-9)


def test_batches_equal_loops():
    lanes = DATA["c"][None, :] + jnp.asarray(RNG.standard_normal((5, 4)))
    batch = jax.vmap(lambda c: answer({**DATA, "c": c}))(lanes)
    for c, x in zip(lanes, batch, strict=True):
        np.testing.assert_allclose(x, answer({**DATA, "c": c}), atol=1e-8)


def test_a_failing_lane_spoils_no_other():
    lanes = jnp.stack([DATA["b"], DATA["b"] + 100.0])

    def solution(b):
        return quadratic_program(**{**DATA, "b": b}, max_steps=200)

    both = jax.vmap(solution)(lanes)
    assert both.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE]
    gradient = jax.grad(
        lambda b: jax.vmap(lambda b: solution(b).x.x.sum())(b)[0].sum()
    )(lanes)
    assert bool(jnp.all(jnp.isfinite(gradient[0])))
    np.testing.assert_allclose(gradient[1], 0.0)


def test_operators_are_solved_without_matrices():
    data = {**DATA, "Q": lx.MatrixLinearOperator(DATA["Q"])}
    x = quadratic_program(**data, tol=1e-6).x.x
    np.testing.assert_allclose(x, answer(DATA), atol=1e-5)


def test_starts_from_an_earlier_answer():
    first = quadratic_program(**DATA)
    again = quadratic_program(**DATA, start=first.x)
    assert int(again.steps) == 0 and bool(again.converged)


def test_derivatives_can_be_forbidden():
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(
            lambda c: quadratic_program(DATA["Q"], c, differentiate="none").x.x.sum()
        )(DATA["c"])
