"""The optax transformation against the learner that it unrolls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.games import EuclideanBall, OptimisticOMD, scale_by_optimistic_adaptive


def test_it_plays_what_the_learner_plays_while_the_set_does_not_bind():
    target = {"a": jnp.array([0.3]), "b": jnp.array([[-0.2, 0.1]])}
    start = jax.tree.map(jnp.zeros_like, target)
    learner = OptimisticOMD(EuclideanBall(1.0), gradient_bound=1.0, smoothness=0.5)
    optimiser = optax.chain(
        scale_by_optimistic_adaptive(2.0, 1.0, 0.5), optax.scale(-1.0)
    )

    @jax.jit
    def step(carry, scale):
        x, memory, state = carry
        gradient = jax.tree.map(lambda v, c: scale * (v - c), x, target)
        updates, memory = optimiser.update(gradient, memory)
        return (
            optax.apply_updates(x, updates),
            memory,
            learner.update(state, gradient),
        )

    carry = (start, optimiser.init(start), learner.init(start))
    for scale in jnp.linspace(0.2, 1.0, 15):
        carry = step(carry, scale)
        for ours, theirs in zip(
            jax.tree.leaves(carry[0]), jax.tree.leaves(carry[2].x), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-13)


def test_bad_settings():
    with pytest.raises(ValueError, match="`diameter` must be positive"):
        scale_by_optimistic_adaptive(0.0, 1.0)
    with pytest.raises(ValueError, match="`smoothness` must not be negative"):
        scale_by_optimistic_adaptive(1.0, 1.0, -1.0)
