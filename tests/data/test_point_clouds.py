"""The samplers draw from what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.data import (
    checkerboard,
    gaussian_mixture,
    sphere_points,
    swiss_roll,
    two_moons,
)

KEY = jax.random.key(0)


def test_without_noise_the_shapes_are_curves():
    roll = swiss_roll(KEY, 200, noise=0.0)
    radius = jnp.linalg.norm(roll, axis=1)
    angle = radius / 0.15
    curve = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    np.testing.assert_allclose(roll, curve, atol=1e-12)
    assert float(radius.min()) >= 0.15 * 1.5 * np.pi
    moons = two_moons(KEY, 200, noise=0.0)
    centre = jnp.asarray([0.5, 0.25])
    near = [jnp.linalg.norm(moons + s * centre[None], axis=1) for s in (1.0, -1.0)]
    assert np.all(np.isclose(near[0], 1) | np.isclose(near[1], 1))
    assert abs(float(moons.mean())) < 0.2


def test_checkerboard_fills_every_dark_square_and_no_other():
    cloud = np.asarray(checkerboard(KEY, 800))
    square = np.floor((cloud + 1) * 2).astype(int)
    assert np.all(square.sum(1) % 2 == 0)
    assert len({tuple(s) for s in square}) == 8


def test_mixture_has_its_weights_and_deviations():
    means = jnp.asarray([[-20.0], [20.0]])
    cloud = gaussian_mixture(
        KEY,
        4000,
        means,
        deviation=jnp.asarray([1.0, 3.0]),
        weights=jnp.asarray([0.25, 0.75]),
    )
    right = cloud > 0
    # Four standard deviations of the share: a false alarm in 16 000.
    assert abs(float(right.mean()) - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 4000)
    assert abs(float(cloud[right].std()) - 3) < 0.2


def test_sphere_points_have_length_one_and_gather_about_a_centre():
    uniform = sphere_points(KEY, 2000, 4)
    np.testing.assert_allclose(jnp.linalg.norm(uniform, axis=1), 1, rtol=1e-12)
    assert float(jnp.linalg.norm(uniform.mean(0))) < 4 / np.sqrt(2000)
    north = jnp.asarray([0.0, 0.0, 1.0])
    near = sphere_points(KEY, 200, centre=north, spread=0.1)
    assert float((near @ north).min()) > 0.8


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="swiss_roll: `points` must be at least 1"):
        swiss_roll(KEY, 0)
    with pytest.raises(ValueError, match="`noise` not negative"):
        two_moons(KEY, 3, noise=-1.0)
    with pytest.raises(ValueError, match="`squares` must be even"):
        checkerboard(KEY, 3, squares=3)
    with pytest.raises(ValueError, match="`means` must have shape"):
        gaussian_mixture(KEY, 3, jnp.zeros(2))
    with pytest.raises(ValueError, match="`dimension` must be at least 2"):
        sphere_points(KEY, 3, 1)
