"""SAMformer: what it is invariant to, what it contains, its attention, its errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.nets import RevIN, SAMformer, attention_entropy

KEY = jax.random.key(0)
D, L, H = 4, 10, 3


@pytest.fixture(scope="module")
def model():
    made = SAMformer(D, L, H, 5, key=KEY)
    # Other than at the start, where the affine part of RevIN does nothing.
    return eqx.tree_at(
        lambda m: (m.revin.scale, m.revin.shift),
        made,
        (jnp.array([2.0, 0.5, -1.0, 1.0]), jnp.array([0.1, -0.2, 0.0, 3.0])),
    )


@pytest.fixture(scope="module")
def forecast():
    return eqx.filter_jit(lambda model, x: model(x))


X = jax.random.normal(jax.random.key(1), (D, L))


def test_channels_have_no_order(forecast):
    """A permutation of the channels permutes the forecast: no position code."""
    plain, order = SAMformer(D, L, H, 5, key=KEY), jnp.array([2, 0, 3, 1])
    moved = forecast(plain, X[order])
    np.testing.assert_allclose(moved, forecast(plain, X)[order], atol=1e-12)


def test_level_and_scale_pass_through(model, forecast):
    level = jnp.array([5.0, -3.0, 0.0, 100.0])[:, None]
    here = forecast(model, X)
    np.testing.assert_allclose(forecast(model, X + level), here + level, atol=1e-9)
    # Up to the constant that is added to the variance.
    np.testing.assert_allclose(forecast(model, 7 * X), 7 * here, rtol=1e-3)


def test_normalisation_is_undone_and_constants_survive():
    norm = eqx.tree_at(lambda n: n.scale, RevIN(2), jnp.array([3.0, 0.5]))
    x = jnp.stack([jnp.linspace(0.0, 9.0, L), jnp.full(L, 4.0)])
    z, taken = norm.normalise(x)
    np.testing.assert_allclose(z[0] / 3, (x[0] - 4.5) / np.std(x[0]), rtol=1e-5)
    np.testing.assert_array_equal(z[1], 0.0)
    # The inverse divides by scale + eps^2.
    np.testing.assert_allclose(norm.restore(z, taken), x, atol=1e-8)
    grads = eqx.filter_grad(lambda n: jnp.sum(n.restore(*n.normalise(x))))(norm)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_it_is_the_formula(forecast):
    made = SAMformer(D, L, H, 5, revin=False, key=KEY)
    x, Q, K, V, O, W = map(
        np.asarray, (X, made.query, made.key, made.value, made.out, made.head)
    )
    scores = np.exp(x @ Q @ (x @ K).T / np.sqrt(5))
    A = scores / scores.sum(1, keepdims=True)
    np.testing.assert_allclose(made.attention(X), A, atol=1e-12)
    expected = (x + A @ x @ V @ O) @ W
    np.testing.assert_allclose(forecast(made, X), expected, atol=1e-12)


def test_without_values_it_is_linear(forecast):
    """So it can express every linear forecaster, the least-squares one too."""
    made = SAMformer(D, L, H, 5, revin=False, key=KEY)
    made = eqx.tree_at(lambda m: m.value, made, jnp.zeros_like(made.value))
    np.testing.assert_allclose(forecast(made, X), X @ made.head, atol=1e-14)


def test_attention_is_stochastic_and_its_entropy_between_the_ends(model):
    A = model.attention(X)
    np.testing.assert_allclose(jnp.sum(A, 1), 1, atol=1e-12)
    entropy = attention_entropy(A)
    assert entropy.shape == (D,) and np.all((entropy > 0) & (entropy < np.log(D)))
    np.testing.assert_allclose(attention_entropy(jnp.eye(D)), 0)
    even = jnp.full((2, D, D), 1 / D)
    np.testing.assert_allclose(attention_entropy(even), np.log(D))


def test_dtype_follows(float32):
    made = SAMformer(D, L, H, key=KEY)
    assert made(jnp.ones((D, L))).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: SAMformer(0, L, H, key=KEY), "`channels` must be at least 1"),
        (lambda m: SAMformer(D, L, H, 0, key=KEY), "`d_model` must be at least 1"),
        (lambda m: RevIN(2, eps=0.0), "`eps` must be positive"),
        (lambda m: m(X[:, :-1]), r"must have shape \(channels, 10\)"),
        (lambda m: m(X[:-1]), "must have 4 channels"),
    ],
)
def test_bad_input_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
