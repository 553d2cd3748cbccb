"""Attacks: closed form on linear classifiers, the ball, transfer and its counting."""

from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.metrics import bim, fgsm, pgd, transfer_matrix

KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (40, 5))


class Linear(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return x @ self.weight


def linear(key, classes=3):
    return Linear(jax.random.normal(key, (5, classes)))


ONE, OTHER = linear(KEYS[1]), linear(KEYS[2])
TWO = Linear(ONE.weight[:, :2])
Y = jnp.argmax(ONE(X), 1)
Y2 = jnp.argmax(TWO(X), 1)


def test_closed_form_of_two_linear_classes():
    """Each entry goes to the ball's end against the difference of the weights."""
    gap = np.asarray(TWO.weight[:, 1] - TWO.weight[:, 0])
    toward = np.where(np.asarray(Y2)[:, None] == 0, gap, -gap)
    found = bim(TWO, X, Y2, 0.3, steps=12)
    np.testing.assert_allclose(found, X + 0.3 * np.sign(toward), atol=1e-12)


def test_more_steps_never_lower_the_loss_of_a_linear_classifier():
    def margin(x):
        logits = TWO(x)
        return jnp.take_along_axis(logits, Y2[:, None], 1)[:, 0] * 2 - logits.sum(1)

    margins = [margin(bim(TWO, X, Y2, 0.3, steps=n)) for n in (1, 3, 9, 20)]
    for fewer, more in pairwise(margins):
        assert np.all(more <= fewer + 1e-12)


def test_it_stays_in_the_ball_and_in_the_bounds():
    eps = jnp.array([0.5, 0.0, 0.1, 0.2, 0.3])
    found = bim(ONE, X, Y, eps, steps=30, bounds=(-1.5, 1.5))
    assert np.all(found <= 1.5) and np.all(found >= -1.5)
    inside = np.abs(X) <= 1.5
    assert np.all(np.where(inside, np.abs(found - X) - eps[None], 0) <= 1e-12)
    np.testing.assert_array_equal(bim(ONE, X, Y, 0.0), X)


def test_transfer_counts_what_the_target_got_right():
    found = transfer_matrix([ONE, OTHER], [ONE, OTHER], X, Y, 0.4, steps=20)
    np.testing.assert_array_equal(found.counts[0], 40)
    for i, surrogate in enumerate((ONE, OTHER)):
        there = bim(surrogate, X, Y, 0.4, steps=20)
        for j, target in enumerate((ONE, OTHER)):
            before = np.argmax(target(X), 1) == np.asarray(Y)
            after = np.argmax(target(there), 1) == np.asarray(Y)
            expected = np.sum(before & ~after) / np.sum(before)
            np.testing.assert_allclose(found.rates[i, j], expected)
    assert np.all((found.low < found.rates) & (found.rates < found.high))
    swapped = transfer_matrix([ONE, OTHER], [OTHER, ONE], X, Y, 0.4, steps=20)
    np.testing.assert_array_equal(swapped.rates, found.rates[:, ::-1])


def test_without_a_radius_nobody_is_fooled():
    found = transfer_matrix([ONE], [ONE, OTHER], X, Y, 0.0, steps=2)
    np.testing.assert_array_equal(found.rates, 0)
    # Wilson's interval of 0 in n: up to z^2 / (n + z^2).
    n = np.asarray(found.counts)
    np.testing.assert_allclose(found.low[0], 0, atol=1e-12)
    np.testing.assert_allclose(found.high[0], 3.8415 / (n + 3.8415), rtol=1e-4)


def test_nan_stays_visible():
    broken = Linear(OTHER.weight * jnp.nan)
    found = transfer_matrix([broken, ONE], [ONE, broken], X, Y, 0.3, steps=2)
    np.testing.assert_array_equal(np.isnan(found.rates), [[True, True], [False, True]])
    np.testing.assert_array_equal(found.counts, [40, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bim(ONE, X, Y, -0.1), "`eps` must not be negative"),
        (lambda: bim(ONE, X, Y, 0.1, stepsize=0.0), "`stepsize` must be positive"),
        (lambda: bim(ONE, X, Y, 0.1, steps=0), "`steps` must be at least 1"),
        (lambda: bim(ONE, X, Y, 0.1, bounds=(1, 0)), r"`bounds` must be \(least"),
        (lambda: bim(ONE, X[:0], Y[:0], 0.1), "`x` must not be empty"),
        (lambda: bim(ONE, X * jnp.inf, Y, 0.1), "`x` must be finite"),
        (lambda: transfer_matrix([], [ONE], X, Y, 0.1), "must not be empty"),
        (lambda: transfer_matrix([ONE], [TWO], X, Y, 0.1), r"got \[2, 3\] of them"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_step_of_fgsm_is_bims_with_the_whole_radius():
    found = fgsm(ONE, X, Y, 0.3, bounds=(-1.0, 1.0))
    wanted = bim(ONE, X, Y, 0.3, steps=1, stepsize=0.3, bounds=(-1.0, 1.0))
    np.testing.assert_array_equal(found, wanted)


def test_l2_ascent_reaches_the_closed_form_of_two_linear_classes():
    gap = np.asarray(TWO.weight[:, 1] - TWO.weight[:, 0])
    toward = np.where(np.asarray(Y2)[:, None] == 0, gap, -gap)
    found = pgd(TWO, X, Y2, 0.3, norm="l2", steps=12)
    np.testing.assert_allclose(
        found, X + 0.3 * toward / np.linalg.norm(gap), atol=1e-12
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_stay_in_the_ball(norm):
    x = jnp.clip(X, -1, 1)
    found = pgd(ONE, x, Y, 0.3, norm=norm, steps=3, bounds=(-1, 1), key=KEYS[3])
    order = np.inf if norm == "linf" else 2
    assert np.all(np.linalg.norm(found - x, order, axis=1) <= 0.3 + 1e-12)
    assert np.all(np.abs(found) <= 1)
    fixed = pgd(ONE, X, Y, 0.0, norm=norm, steps=3, key=KEYS[3])
    np.testing.assert_allclose(fixed, X, atol=1e-12)


def test_a_flat_loss_moves_nothing_in_l2():
    found = pgd(Linear(jnp.zeros((5, 3))), X, Y, 0.3, norm="l2", steps=3)
    np.testing.assert_array_equal(found, X)


def test_pgd_knows_two_norms():
    with pytest.raises(ValueError, match="pgd: `norm` must be one of 'linf', 'l2'"):
        pgd(ONE, X, Y, 0.3, norm="l1")
