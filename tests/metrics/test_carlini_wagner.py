"""Carlini and Wagner's attack: exact distances of linear classifiers, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.metrics import carlini_wagner

WEIGHT = jax.random.normal(jax.random.key(0), (5, 3))
X = jax.random.uniform(jax.random.key(1), (12, 5), minval=0.3, maxval=0.7)
STEPS, SEARCHES = 200, 9


def linear(x):
    return (x - 0.5) @ WEIGHT


LABELS = jnp.argmax(linear(X), 1)


def exact_distances(x, labels):
    """The lead over the length of the weights' difference, the nearest class."""
    logits = linear(x)
    rows = jnp.arange(len(x))
    leads = logits[rows, labels][:, None] - logits
    norms = jnp.linalg.norm(WEIGHT.T[labels][:, None] - WEIGHT.T[None], axis=-1)
    own = jax.nn.one_hot(labels, 3, dtype=bool)
    return jnp.min(jnp.where(own, jnp.inf, leads / jnp.where(own, 1, norms)), 1)


@pytest.fixture(scope="module")
def found():
    return carlini_wagner(
        linear, X, LABELS, stepsize=0.005, steps=STEPS, searches=SEARCHES
    )


def test_distances_of_a_linear_classifier(found):
    """Never below the smallest one, and above it by the last steps' length at most."""
    exact = exact_distances(X, LABELS)
    assert np.all(exact < 0.3)  # not reached through a bound
    assert np.all(found.distance >= exact * (1 - 1e-12))
    # Adam moves an entry by about `stepsize / 2`, half the width of the bounds; where
    # two classes are about as near, the descent may settle at the farther one.
    close = found.distance <= exact + 0.005 / 2 * 5**0.5
    assert np.mean(close) >= 0.9 and np.median(found.distance / exact) < 1.005


def test_what_is_found_is_misclassified_at_its_distance(found):
    assert np.all(jnp.argmax(linear(found.x), 1) != LABELS)
    np.testing.assert_allclose(
        jnp.linalg.norm(found.x - X, axis=1), found.distance, rtol=1e-12
    )


def test_misclassified_nothing_found_and_not_a_number():
    """Distance 0 at once; infinite where there is no other class; NaN stays NaN."""
    x = jnp.array([[0.4], [0.6]])

    def attack(logits_fn, labels):
        return carlini_wagner(logits_fn, x, labels, steps=20, searches=3)

    wrong = attack(lambda x: jnp.concatenate([x, 0 * x + 2], 1), jnp.array([0, 1]))
    np.testing.assert_array_equal(wrong.distance, [0, np.inf])
    np.testing.assert_array_equal(wrong.x, x)
    unknown = attack(
        lambda x: jnp.concatenate([x, jnp.sqrt(x - 0.5)], 1), jnp.array([0, 1])
    )
    assert np.isnan(unknown.distance[0])


def test_bounds_are_kept_and_samples_do_not_meet(found):
    tight = carlini_wagner(linear, X, LABELS, bounds=(0.25, 0.75), steps=STEPS)
    assert np.all((tight.x >= 0.25) & (tight.x <= 0.75))
    some = carlini_wagner(
        linear, X[:4], LABELS[:4], stepsize=0.005, steps=STEPS, searches=SEARCHES
    )
    np.testing.assert_allclose(some.distance, found.distance[:4], rtol=1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": X + 1.0}, "`x` must lie in `bounds`"),
        ({"x": X[:0]}, "`x` must not be empty"),
        ({"x": X.at[0, 0].set(jnp.nan)}, "`x` must be finite"),
        ({"labels": LABELS[:3]}, "`labels` must have shape"),
        ({"steps": 0}, "must be at least 1"),
        ({"stepsize": 0.0}, "`stepsize` must be positive"),
        ({"bounds": (1.0, 0.0)}, "`bounds` must be"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        carlini_wagner(**{"logits_fn": linear, "x": X, "labels": LABELS, **change})
