"""The loss on a plane: the middle, the filters' lengths, what stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.sharpness import loss_surface

KEY = jax.random.key(0)


def loss(w, x):
    return jnp.mean((jnp.tanh(x @ w["in"].T) @ w["out"] + w["shift"]) ** 2)


def test_the_plane_is_the_loss_along_filters_of_their_own_length():
    keys = jax.random.split(KEY, 3)
    w = {
        "in": jax.random.normal(keys[0], (4, 3)) * jnp.arange(4.0)[:, None],
        "out": jax.random.normal(keys[1], (4, 1)),
        "shift": jnp.ones(()),
    }
    x = jax.random.normal(keys[2], (8, 3))
    mask = {"in": True, "out": False, "shift": True}
    plane = loss_surface(loss, w, x, radius=0.5, points=3, mask=mask, key=KEY)
    np.testing.assert_allclose(plane.a, [-0.5, 0, 0.5])
    np.testing.assert_allclose(plane.loss[1, 1], loss(w, x))
    first, second = plane.directions
    there = jax.tree.map(lambda v, a, b: v - 0.5 * a + 0.5 * b, w, first, second)
    np.testing.assert_allclose(plane.loss[0, 2], loss(there, x))
    for direction in plane.directions:
        lengths = [jnp.linalg.norm(v["in"], axis=1) for v in (direction, w)]
        np.testing.assert_allclose(*lengths)
        assert direction["shift"] == 0 and not jnp.any(direction["out"])
    assert not jnp.allclose(first["in"], second["in"])


def test_the_units_of_a_kernel_lie_along_its_last_axis():
    # Flax: (in, out) and (height, width, in, out).
    w = {
        "dense": {"kernel": jax.random.normal(KEY, (3, 4)) * jnp.arange(4.0)[None, :]},
        "conv": {"kernel": jax.random.normal(KEY, (2, 2, 3, 5))},
    }
    square = lambda w, b: sum(jnp.sum(v**2) for v in jax.tree.leaves(w))  # noqa: E731
    for direction in loss_surface(square, w, None, points=2, key=KEY).directions:
        for name, axes in (("dense", 0), ("conv", (0, 1, 2))):
            lengths = [
                jnp.sqrt(jnp.sum(tree[name]["kernel"] ** 2, axes))
                for tree in (direction, w)
            ]
            np.testing.assert_allclose(*lengths)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`radius` must be positive"):
        loss_surface(loss, jnp.eye(2), None, radius=0.0, key=KEY)
    with pytest.raises(ValueError, match="`points` must be at least 2"):
        loss_surface(loss, jnp.eye(2), None, points=1, key=KEY)
    with pytest.raises(TypeError, match="`points` must be an integer"):
        loss_surface(loss, jnp.eye(2), None, points=2.5, key=KEY)
