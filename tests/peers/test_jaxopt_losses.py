"""jaxopt's losses against what replaces them: here, in optax or in JAX itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.fenchel_young import Tsallis, fenchel_young_loss, sparsemax

jaxopt = pytest.importorskip("jaxopt")
from jaxopt import loss as theirs
from jaxopt.projection import projection_simplex

SCORES = jnp.array(1.5 * np.random.default_rng(0).standard_normal((30, 5)))
SINGLE = jnp.linspace(-3.1, 3.3, 25)
optax_losses = optax.losses


def one_hot(label):
    return jax.nn.one_hot(label, 5, dtype=SCORES.dtype)


BINARY = {
    "logistic": (
        lambda label, s: optax_losses.sigmoid_binary_cross_entropy(s, label),
        theirs.binary_logistic_loss,
    ),
    "sparsemax": (
        lambda label, s: optax_losses.sparsemax_loss(s, label),
        theirs.binary_sparsemax_loss,
    ),
    "hinge": (
        lambda label, s: optax_losses.hinge_loss(s, 2.0 * label - 1.0),
        theirs.binary_hinge_loss,
    ),
    "perceptron": (
        lambda label, s: optax_losses.perceptron_loss(s, 2.0 * label - 1.0),
        theirs.binary_perceptron_loss,
    ),
}
MULTICLASS = {
    "logistic": (
        lambda label, s: optax_losses.softmax_cross_entropy_with_integer_labels(
            s, label
        ),
        theirs.multiclass_logistic_loss,
    ),
    "logistic, Tsallis": (
        lambda label, s: Tsallis(1.0).loss(s, one_hot(label)),
        theirs.multiclass_logistic_loss,
    ),
    "sparsemax, Tsallis": (
        lambda label, s: Tsallis(2.0).loss(s, one_hot(label)),
        theirs.multiclass_sparsemax_loss,
    ),
    "hinge": (
        lambda label, s: optax_losses.multiclass_hinge_loss(s, label),
        theirs.multiclass_hinge_loss,
    ),
    "perceptron": (
        lambda label, s: optax_losses.multiclass_perceptron_loss(s, label),
        theirs.multiclass_perceptron_loss,
    ),
}


def assert_same(pair, label, scores, hessian=False):
    """Values and gradients (and Hessians) of a batch of scores, one label."""
    derivatives = [lambda f: f, lambda f: jax.grad(f, 1)]
    if hessian:
        derivatives.append(lambda f: jax.hessian(f, 1))

    @jax.jit
    def outcomes(label):
        return [
            [jax.vmap(d(f), (None, 0))(label, scores) for d in derivatives]
            for f in pair
        ]

    for mine, its in zip(*outcomes(label), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-12)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("label", [0, 1])
def test_binary_losses(name, label):
    ours, peer = BINARY[name]
    assert_same((ours, peer), jnp.array(label), SINGLE)


@pytest.mark.parametrize("name", MULTICLASS)
def test_multiclass_losses(name):
    # The Hessian where the loss has one.
    assert_same(MULTICLASS[name], jnp.array(2), SCORES, hessian="Tsallis" in name)


def test_huber():
    for delta in (0.5, 1.0):
        pair = [
            lambda t, p, d=delta: optax_losses.huber_loss(p, t, delta=d),
            lambda t, p, d=delta: theirs.huber_loss(t, p, d),
        ]
        assert_same(pair, jnp.array(0.3), SINGLE)


def test_sparse_plus_and_sigmoid():
    np.testing.assert_allclose(jax.nn.sparse_plus(SINGLE), theirs.sparse_plus(SINGLE))
    np.testing.assert_allclose(
        jax.nn.sparse_sigmoid(SINGLE), theirs.sparse_sigmoid(SINGLE)
    )


def test_fenchel_young_of_a_maximum():
    target = one_hot(1)
    ours = fenchel_young_loss(jax.nn.logsumexp)
    peer = theirs.make_fenchel_young_loss(jax.nn.logsumexp)
    pair = (lambda t, s: ours(s, t), peer)
    assert_same(pair, target, SCORES, hessian=True)


def test_sparsemax_is_the_projection_with_its_jacobian():
    @jax.jit
    def both(scores):
        return [
            (jax.vmap(f)(scores), jax.vmap(jax.jacrev(f))(scores))
            for f in (sparsemax, projection_simplex)
        ]

    for mine, its in zip(*both(SCORES), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-13)


def test_every_public_loss_is_compared_here():
    compared = {
        "huber_loss",
        "make_fenchel_young_loss",
        "sparse_plus",
        "sparse_sigmoid",
        *(f"binary_{name}_loss" for name in BINARY),
        *(f"multiclass_{name.split(',')[0]}_loss" for name in MULTICLASS),
    }
    public = {name for name in vars(theirs) if not name.startswith("_")}
    assert public == compared
