"""Means over runs of equal entries: what isotonic and fused answers are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def runs(x):
    """The number of the run of equal neighbours that each entry belongs to."""
    changes = jnp.concatenate([jnp.zeros(1, bool), x[1:] != x[:-1]])
    return jnp.cumsum(changes, dtype=jnp.int32)


def run_sums(values, numbers):
    """For each entry the sum of `values` over its run."""
    sums = jax.ops.segment_sum(
        values, numbers, num_segments=values.shape[0], indices_are_sorted=True
    )
    return sums[numbers]
