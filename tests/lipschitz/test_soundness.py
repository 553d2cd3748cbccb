"""A sample of the benchmark of soundness: no certified number on the wrong side."""

import jax.numpy as jnp
import pytest

from varan.claims.lipschitz import _soundness as soundness


@pytest.mark.parametrize("weights", ["integers", "cancelling"])
def test_no_certified_number_is_on_the_wrong_side(weights):
    """In single precision, where kinks are hit exactly or rounding is largest."""
    family = dict(shape="plain", activation="relu", weights=weights, dtype="float32")
    count = soundness.sampled(1000, 60, **family)
    assert count.comparisons > 60 * 1000
    assert count.violations == 0, count


@pytest.mark.parametrize("weights", ["normal", "integers"])
def test_nor_is_one_against_exact_values(weights):
    count = soundness.enumerated(1000, 4, weights=weights)
    assert count.comparisons >= 4 * 20
    assert count.violations == 0, count


def test_a_wrong_bound_would_be_counted():
    """The comparison itself: a box that is a hair too small is seen."""
    values = jnp.asarray([[0.0], [1.0]])
    made, wrong, worst = soundness._outside(
        values, jnp.zeros(1), jnp.asarray([1 - 1e-12])
    )
    assert (int(made), int(wrong)) == (2, 1) and float(worst) > 0
    nothing = soundness._outside(values, jnp.zeros(1), jnp.ones(1))
    assert int(nothing[1]) == 0
