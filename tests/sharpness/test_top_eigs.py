"""Eigenvalues along training: right, at the right steps, and kept when a run dies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan import Status
from varan.sharpness import sam, track_top_eigs
from varan.train import gradient_update

START = jnp.array([1.0, -0.5, 0.3])


def loss(x, batch):
    return jnp.sum(batch * x**4) + jnp.sum(x**2) / 2


BATCH = jnp.array([0.5, 1.0, 2.0])


@jax.jit
def track(stepsize, rho, start=START):
    method = sam(optax.sgd(stepsize, momentum=0.5), rho)
    return track_top_eigs(
        loss, start, BATCH, method, steps=9, every=3, k=2, key=jax.random.key(0)
    )


@pytest.fixture(scope="module")
def tracked():
    return track(0.02, 0.1)


def test_looks_at_the_path_of_the_optimiser(tracked):
    method = sam(optax.sgd(0.02, momentum=0.5), 0.1)
    here = lambda x: loss(x, BATCH)  # noqa: E731
    one = jax.jit(lambda x, state: gradient_update(here, x, state, method)[:2])
    look = jax.jit(lambda x: (here(x), jax.grad(here)(x)))
    x, state, expected = START, method.init(START), []
    for number in range(10):
        if number % 3 == 0:
            value, gradient = look(x)
            # The Hessian is diagonal.
            top = np.sort(1 + 12 * np.asarray(BATCH * x**2))[:0:-1]
            expected.append([*top, value, np.linalg.norm(gradient)])
        if number < 9:
            x, state = one(x, state)
    assert tracked.steps.tolist() == [0, 3, 6, 9]
    np.testing.assert_allclose(tracked.params, x, rtol=1e-12)
    found = np.column_stack([tracked.values, tracked.losses, tracked.grad_norms])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert int(tracked.status) == Status.CONVERGED


def test_residuals_bound_the_error(tracked):
    assert np.all(np.asarray(tracked.residuals) <= 1e-3 * np.asarray(tracked.values))


def test_a_diverging_run_stops_and_keeps_its_curve():
    lost = track(5.0, 0.1)
    assert int(lost.status) == Status.DIVERGED
    assert np.isfinite(lost.losses[0]) and not np.isfinite(lost.losses[-1])
    np.testing.assert_allclose(lost.values[0], track(0.02, 0.1).values[0], rtol=1e-9)


def test_steps_are_checked():
    for steps, every in ((10, 3), (0, 1), (3, 0)):
        with pytest.raises(ValueError, match="positive multiple of `every`"):
            track_top_eigs(
                loss,
                START,
                BATCH,
                optax.sgd(0.1),
                steps=steps,
                every=every,
                key=jax.random.key(0),
            )
