"""Spectra by class: against dense Hessians, and what counts as proved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from varan.sharpness import (
    ClasswiseSpectrum,
    Eigenpairs,
    batches_by_class,
    classwise_spectrum,
)

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(KEY, (14, 3)))
Y = np.array([0] * 8 + [1] * 4 + [2] * 2)


def losses(params, x, y):
    logits = jnp.tanh(x @ params["in"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def loss(params, batch):
    x, y, weights = batch
    return jnp.sum(weights * losses(params, x, y))


@pytest.fixture(scope="module")
def measured():
    keys = jax.random.split(KEY, 2)
    params = {
        "in": 2 * jax.random.normal(keys[0], (3, 4)),
        "out": 2 * jax.random.normal(keys[1], (4, 3)),
    }
    batches = batches_by_class(X, Y, 3)
    found = classwise_spectrum(loss, params, batches, 2, tol=1e-9, key=KEY)
    return params, batches, found


def test_filling_up_changes_no_class_s_loss(measured):
    params, (x, y, weights), _ = measured
    assert x.shape == (3, 8, 3)
    np.testing.assert_array_equal(np.sum(weights > 0, 1), [8, 4, 2])
    for c in range(3):
        own = c == Y
        mean = jnp.mean(losses(params, X[own], Y[own]))
        here = loss(params, (x[c], y[c], weights[c]))
        np.testing.assert_allclose(here, mean, rtol=1e-12)
    few = batches_by_class(X, Y, 3, most=3)[2]
    np.testing.assert_array_equal(np.sum(few > 0, 1), [3, 3, 2])


def test_ends_are_those_of_the_dense_hessians(measured):
    params, batches, found = measured
    flat, unravel = ravel_pytree(params)
    dense = jax.jit(jax.vmap(jax.hessian(lambda v, b: loss(unravel(v), b)), (None, 0)))
    exact = np.linalg.eigvalsh(dense(flat, batches))
    np.testing.assert_allclose(found.largest.values, exact[:, :-3:-1], atol=1e-7)
    np.testing.assert_allclose(found.smallest.values, exact[:, :2], atol=1e-7)
    ratio = np.maximum(-exact[:, 0], 0) / exact[:, -1]
    np.testing.assert_allclose(found.negativity, ratio, rtol=1e-6)
    np.testing.assert_array_equal(found.has_negative_curvature, exact[:, 0] < 0)
    assert found.certificate.proof and found.certificate.value < 1e-6


def test_nothing_is_proved_where_the_residual_is_larger():
    vectors, count = jnp.ones((3, 1, 2)), jnp.zeros(3, jnp.int32)
    high = Eigenpairs(jnp.full((3, 1), 4.0), vectors, jnp.zeros((3, 1)), count)
    values = jnp.array([-0.1, -0.1, 0.1])[:, None]
    residuals = jnp.array([0.2, 0.05, 0.05])[:, None]
    found = ClasswiseSpectrum(high, Eigenpairs(values, vectors, residuals, count))
    np.testing.assert_array_equal(found.has_negative_curvature, [False, True, False])
    np.testing.assert_allclose(found.negativity, [0.025, 0.025, 0.0])
    assert found.certificate.value == 0.2


def test_a_class_without_positive_curvature_has_infinite_negativity():
    form = lambda w, a: jnp.sum(a * w**2) / 2  # noqa: E731
    curvatures = jnp.array([[-1.0, -2.0], [1.0, -2.0], [0.0, 0.0]])
    found = classwise_spectrum(form, jnp.ones(2), curvatures, key=KEY)
    np.testing.assert_allclose(found.negativity, [np.inf, 2, 0])
    assert "up to rounding" in found.certificate.statement
    with pytest.raises(ValueError, match=r"classwise_spectrum \(class 1\): `loss_fn`"):
        classwise_spectrum(form, jnp.ones(2), curvatures.at[1, 0].set(jnp.nan), key=KEY)
    with pytest.raises(ValueError, match="there is one at least"):
        classwise_spectrum(form, jnp.ones(2), curvatures[:0], key=KEY)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="none of class 3"):
        batches_by_class(X, Y, 4)
    with pytest.raises(ValueError, match=r"must lie in 0 .. 1 \(got 2 among them"):
        batches_by_class(X, Y, 2)
    with pytest.raises(ValueError, match="must have one length"):
        batches_by_class(X[:3], Y, 3)
    with pytest.raises(ValueError, match="one leading axis of classes"):
        classwise_spectrum(loss, jnp.ones(2), (jnp.ones(2), jnp.ones(3)), key=KEY)
