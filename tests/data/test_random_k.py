"""Random-k data: leaders decide the labels."""

import jax
import jax.numpy as jnp
import pytest

from varan.data import random_k

KEY = jax.random.key(0)


def test_points_lie_in_the_cube_and_keys_decide():
    x, y = random_k(KEY, points=200, dimension=3, classes=4)
    assert x.shape == (200, 3) and y.shape == (200,)
    assert bool(jnp.all((x >= 0) & (x <= 1))) and set(y.tolist()) <= set(range(4))
    again, _ = random_k(KEY, points=200, dimension=3, classes=4)
    other, _ = random_k(jax.random.key(1), points=200, dimension=3, classes=4)
    assert bool(jnp.all(x == again)) and not bool(jnp.all(x == other))


def test_one_leader_gives_one_label():
    _, y = random_k(KEY, points=200, dimension=3, classes=4, leaders=1)
    assert len(set(y.tolist())) == 1


@pytest.mark.parametrize("name", ["points", "dimension", "classes", "leaders"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
        random_k(KEY, **{name: 0})
