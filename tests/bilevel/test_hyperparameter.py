"""Hyperparameters that are tuned: ranges, first values, errors."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from varan.bilevel import Hyperparameter


@pytest.mark.parametrize(
    ("low", "high"),
    [(-math.inf, math.inf), (0.5, math.inf), (-math.inf, 3.0), (0.5, 3.0)],
)
def test_ranges_hold_and_the_start_comes_back(low, high):
    spec = Hyperparameter(0.7, low=low, high=high)
    np.testing.assert_allclose(spec.value(jnp.array(spec.unconstrained())), 0.7)
    values = spec.value(jnp.array([-30.0, 0.0, 30.0]))
    assert bool(jnp.all((values >= low) & (values <= high)))
    small = Hyperparameter(1e-9, low=0.0)
    np.testing.assert_allclose(small.value(jnp.array(small.unconstrained())), 1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 1.0}, "`start` must lie inside"),
        ({"scale": 0.0}, "`scale` must be positive"),
    ],
)
def test_bad_input_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Hyperparameter(1.0, **settings)
