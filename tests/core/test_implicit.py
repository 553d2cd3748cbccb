"""The implicit function theorem as a modular tool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.core import implicit_root, root_jvp, root_vjp
from varan.testing import assert_close


def cubic_root(c):
    """The root of x**3 + x = c, found without any derivative."""
    frozen = jax.lax.stop_gradient(c)
    x = jnp.zeros_like(frozen)
    for _ in range(60):
        x = x - (x**3 + x - frozen) / (3 * x**2 + 1)
    return implicit_root(lambda x: x**3 + x - c, x)


def test_every_transformation_and_order():
    @jax.jit
    def orders(c):
        first = jax.grad(cubic_root)
        forward = jax.jvp(cubic_root, (c,), (jnp.ones(()),))[1]
        return cubic_root(c), first(c), forward, jax.grad(first)(c)

    # x = 1 solves c = 2: x' = 1 / (3x^2 + 1), x'' = -6x x'^3.
    assert_close(orders(jnp.asarray(2.0)), (1.0, 0.25, 0.25, -6 / 64), 1e-10)
    lanes = jax.vmap(jax.grad(cubic_root))(jnp.asarray([2.0, 10.0]))
    assert_close(lanes, (0.25, 1 / 13), 1e-10)


def test_the_value_is_returned_unchanged_even_if_it_is_no_root():
    x = jnp.asarray([1.0, 2.0])
    assert np.array_equal(implicit_root(lambda x: x - 7.0, x), x)


def test_the_derivative_of_x_itself_is_dropped():
    def answer(c):
        return implicit_root(lambda x: x - 3.0 * c, 100.0 * c)

    assert_close(jax.grad(answer)(jnp.ones(())), 3.0, 1e-12)


def test_unreliable_answers_have_nan_derivatives_lane_by_lane():
    def answer(c, reliable):
        x = jax.lax.stop_gradient(c)
        return implicit_root(lambda x: x - c, x, reliable=reliable)

    lanes = jax.vmap(jax.grad(answer))(jnp.ones(2), jnp.asarray([True, False]))
    assert lanes[0] == 1.0 and np.isnan(lanes[1])


def test_pytrees_and_entries_free_of_the_parameters():
    """Every KKT system has such an entry: a constraint that the data do not move."""

    def condition(x, c):
        return {"free": x["free"] - 1.0, "moved": x["moved"] - c}

    x = {"free": jnp.ones(()), "moved": jnp.full(2, 3.0)}
    params, tangents = (jnp.full(2, 3.0),), (jnp.asarray([1.0, 2.0]),)
    tangent = root_jvp(condition, x, params, tangents)
    assert_close(tangent, {"free": 0.0, "moved": [1.0, 2.0]}, 1e-12)
    (pulled,) = root_vjp(condition, x, params, x)
    assert_close(pulled, x["moved"], 1e-12)


def test_pytrees_with_an_absent_part():
    x = (jnp.array(2.0), None)
    tangent = root_jvp(lambda x, c: (x[0] - c, None), x, (2.0,), (1.0,))
    assert tangent[0] == 1.0 and tangent[1] is None


def test_forward_and_reverse_directions_match():
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(np.eye(3) + 0.2 * rng.standard_normal((3, 3)))
    b, direction, weight = (jnp.asarray(rng.standard_normal(3)) for _ in range(3))
    x = jnp.linalg.solve(matrix, b)

    def condition(x, b):
        return matrix @ x - b

    tangent = root_jvp(condition, x, (b,), (direction,))
    (pulled,) = root_vjp(condition, x, (b,), weight)
    assert_close(tangent, np.linalg.solve(matrix, direction), 1e-10)
    assert_close(jnp.vdot(tangent, weight), jnp.vdot(pulled, direction), 1e-12)


def test_nothing_is_computed_unless_a_derivative_is_taken():
    text = str(jax.make_jaxpr(lambda c: cubic_root(c))(jnp.ones(())))
    assert "linear_solve" not in text


@pytest.mark.parametrize("size", [3, 600])
def test_integers_in_the_closure_do_no_harm(size):
    index = jnp.arange(size)[::-1]

    def answer(c):
        x = jax.lax.stop_gradient(c)[index]
        return implicit_root(lambda x: 2.0 * x - 2.0 * c[index], x)

    slopes = jax.grad(lambda c: answer(c)[0])(jnp.ones(size))
    assert_close(slopes, np.eye(size)[-1], 1e-8)
