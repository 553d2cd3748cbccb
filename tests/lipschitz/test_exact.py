"""Exact Lipschitz constants do not depend on units, and say what they left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from varan.lipschitz import Box, exact_bounds, exact_lipschitz

relu = jax.nn.relu


def box(lower, upper, dtype=None):
    return Box(jnp.array(lower, dtype), jnp.array(upper, dtype))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


UNIT = box([-1.0, -1.0, -1.0], [1.0, 1.0, 1.0])


def hidden(x):
    """Every hyperplane passes through the centre of the box: cells touch there."""
    return relu(normal(1, 4, 5) @ relu(normal(0, 5, 3) @ x))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elongated_boxes(dtype):
    found = exact_lipschitz(
        lambda x: relu(x[:1]) + relu(x[1:] - 0.5) * 3,
        box([0.0, 0.0], [1e10, 1.0], dtype),
    )
    assert (found.value, found.cells, found.complete) == (4.0, 2, True)
    found = exact_lipschitz(
        lambda x: 5 * relu(x[1:] * 1e6 - 0.5), box([0.0, 0.0], [1e6, 1e-6], dtype)
    )
    np.testing.assert_allclose(found.value, 5e6, rtol=1e-6)
    assert found.cells == 2 and found.complete


def test_units_of_inputs_and_neurons_change_nothing():
    units = 2.0 ** jnp.array([30.0, 0.0, -25.0])
    scaled = Box(UNIT.lower * units, UNIT.upper * units)
    one = exact_lipschitz(hidden, UNIT)
    other = exact_lipschitz(lambda x: hidden(x / units), scaled)
    assert one.complete and other.complete and one.cells == other.cells
    points = jax.random.uniform(jax.random.key(2), (5000, 3), minval=-1.0)
    slopes = jnp.abs(jax.jit(jax.vmap(jax.jacobian(hidden)))(points))
    for found, unit in ((one, jnp.ones(3)), (other, units)):
        norms = jnp.sum(slopes / unit[None, None], 2)
        np.testing.assert_allclose(found.per_row, jnp.max(norms, 0), rtol=1e-12)

    def layers(x):
        first = relu(2.0**40 * (normal(0, 5, 3) @ x))
        return relu(normal(1, 4, 5) @ (first * 2.0**-40))

    again = exact_lipschitz(layers, UNIT)
    assert again.cells == one.cells
    np.testing.assert_allclose(again.per_row, one.per_row, rtol=1e-12)


@pytest.mark.parametrize("shift", [1e-10, 1e-11])
def test_a_cell_left_out_for_its_size_is_told(shift):
    found = exact_lipschitz(lambda x: 2 * relu(shift - x), box([0.0], [1.0]))
    assert found.value == 0 and not found.complete


def test_touching_hyperplanes_leave_the_search_complete():
    found = exact_lipschitz(lambda x: jnp.abs(x) + relu(x) + relu(2 * x), UNIT)
    assert (found.value, found.cells, found.complete) == (4.0, 8, True)


def test_sides_without_width():
    flat = box([1.0, -1.0], [1.0, 1.0])
    found = exact_lipschitz(lambda x: relu(x[:1] + x[1:]) - relu(-x[1:]), flat)
    assert (found.value, found.cells, found.complete) == (3.0, 2, True)


def test_a_program_that_fails_leaves_the_search_incomplete(monkeypatch):
    failed = scipy.optimize.OptimizeResult(x=None, status=4)
    monkeypatch.setattr(scipy.optimize, "linprog", lambda *_, **__: failed)
    found = exact_lipschitz(relu, UNIT)
    assert (found.value, found.cells, found.complete) == (0.0, 0, False)


@pytest.mark.parametrize("exact", [exact_lipschitz, exact_bounds])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_weights_that_are_not_finite_are_refused(exact, bad):
    weight = jnp.array([[1.0, bad, 2.0]])
    with pytest.raises(ValueError, match=r"over the box \(got 1 NaN"):
        exact(lambda x: relu(weight @ x), UNIT)
    with pytest.raises(ValueError, match="coefficients of `model` must be finite"):
        exact(lambda x: relu(x) + bad, UNIT)
