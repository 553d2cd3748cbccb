"""Boxes: what they contain and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz import Box


def test_ball_is_cut_to_the_range_of_the_data():
    box = Box.linf(jnp.array([0.1, 0.9]), 0.2, clip=(0.0, 1.0))
    assert jnp.allclose(box.lower, jnp.array([0.0, 0.7]))
    assert jnp.allclose(box.upper, jnp.array([0.3, 1.0]))


def test_integers_become_floating():
    assert jnp.issubdtype(Box.linf(jnp.array([1, 2]), 1).lower.dtype, jnp.floating)


@pytest.mark.parametrize(
    ("lower", "upper", "words"),
    [
        ([0.0, 2.0], [1.0, 1.0], "must not exceed"),
        ([0.0, jnp.nan], [1.0, 1.0], "must not be NaN"),
        ([0.0], [1.0, 1.0], "one shape"),
    ],
)
def test_bad_sides_are_refused(lower, upper, words):
    with pytest.raises(ValueError, match=words):
        Box(jnp.array(lower), jnp.array(upper))


def test_negative_radius_is_refused():
    with pytest.raises(ValueError, match="at least 0"):
        Box.linf(jnp.zeros(2), -0.1)


def test_sides_are_rounded_outward():
    given = np.array([0.1]), np.array([0.1 + 1e-12])
    box = Box(jnp.asarray(given[0], jnp.float32), given[1])
    assert box.upper.dtype == jnp.float32 and float(box.upper[0]) >= given[1][0]
    ball = Box.linf(jnp.ones(1, jnp.float32), 1e-9)
    assert float(ball.lower[0]) < 1 - 1e-9 and float(ball.upper[0]) > 1 + 1e-9
    exact = Box.linf(jnp.array([1.0, -2.0]), 0.5)
    assert exact.lower.tolist() == [0.5, -2.5] and exact.upper.tolist() == [1.5, -1.5]
    assert jnp.isinf(Box(jnp.zeros(1, jnp.float16), np.array([1e6])).upper[0])


@pytest.mark.parametrize("clip", [(0.0, 1.0), (2.0, 1.0), (jnp.nan, 1.0)])
def test_centres_outside_of_the_range_are_refused(clip):
    with pytest.raises(ValueError, match="clip"):
        Box.linf(jnp.array([0.5, 1.2]), 1.0, clip=clip)
    traced = jax.jit(lambda x: Box.linf(x, 1.0, clip=(0.0, 1.0)))
    assert not bool(traced(jnp.array([0.5, 1.2])).valid)


def test_complex_sides_are_refused():
    with pytest.raises(TypeError, match="real"):
        Box(jnp.array([1j]), jnp.array([1.0]))


def test_boxes_map_over_lanes():
    boxes = jax.vmap(lambda x: Box.linf(x, 0.5))(jnp.zeros((3, 2)))
    assert boxes.lower.shape == (3, 2)
