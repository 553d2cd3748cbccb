"""Universal perturbations: the step by hand, invariants, fooling counted, edges."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import softmax
from scipy.stats import beta

from varan.lipschitz import (
    aggregate_gradients,
    fooling_rate,
    ibp_margins,
    universal_perturbation,
)

KEY = jax.random.key(0)
X = jax.random.uniform(jax.random.key(1), (24, 6))
WEIGHT = jax.random.normal(jax.random.key(2), (6, 3))
EPS = 0.2


class Linear(eqx.Module):
    weight: jax.Array

    def __call__(self, x):
        return (x - 0.5) @ self.weight


NET = Linear(3 * WEIGHT)


def craft(net=NET, x=X, **kwargs):
    arguments = {
        "epsilon": EPS,
        "key": KEY,
        "epochs": 3,
        "batch_size": 8,
        "minibatch_size": 2,
        "passes": 2,
        **kwargs,
    }
    return universal_perturbation(net, x, **arguments)


def slope(delta):
    """Gradient of the mean cross-entropy against the clean predictions, in NumPy."""
    x, weight = np.asarray(X), 3 * np.asarray(WEIGHT)
    moved = x + delta
    inside = (moved > 0) & (moved < 1)
    targets = np.argmax((x - 0.5) @ weight, 1)
    off = softmax((np.clip(moved, 0, 1) - 0.5) @ weight, 1) - np.eye(3)[targets]
    return np.mean(inside * (off @ weight.T), 0)


class TestMethod:
    def test_a_step_by_hand(self):
        """One epoch of one batch, the search through the whole batch three times."""
        ahead, total = np.zeros(6), np.zeros(6)
        for _ in range(3):
            total += slope(ahead)
            ahead = np.clip(ahead + 0.07 * np.sign(slope(ahead)), -EPS, EPS)
        found = craft(
            epochs=1, batch_size=24, minibatch_size=24, passes=3, stepsize=0.07
        )
        np.testing.assert_allclose(found.delta, 0.07 * np.sign(total), rtol=1e-12)
        # What the search reached is farther than one step, and was dropped.
        assert np.max(np.abs(ahead)) > 0.1 > np.max(np.abs(found.delta))
        assert found.gradients == 3 * 24

    def test_search_of_one_whole_batch_is_spgd(self):
        aggregated = craft(minibatch_size=8, passes=1)
        plain = craft(method="spgd")
        np.testing.assert_array_equal(aggregated.delta, plain.delta)
        np.testing.assert_allclose(aggregated.losses, plain.losses, rtol=1e-12)
        assert aggregated.gradients == plain.gradients == 3 * 24

    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"method": "spgd"},
            {"momentum": 0.9},
            {"loss": "logit"},
            {"start": jnp.full(6, 7.0)},
            {"stepsize": 5.0},
        ],
    )
    def test_never_larger_than_epsilon_and_it_raises_the_loss(self, change):
        found = craft(**change)
        assert np.all(np.abs(found.delta) <= EPS)
        none = craft(**{**change, "stepsize": 1e-12, "start": None})
        assert found.losses[-1] > none.losses[0]
        assert found.certificate.value > 0

    def test_cap(self):
        """Infinite it is plain cross-entropy; below every loss nothing counts."""
        plain = craft(cap=np.inf)
        np.testing.assert_array_equal(plain.delta, craft(cap=1e9).delta)
        np.testing.assert_array_equal(craft(cap=1e-9).delta, np.zeros(6))

    def test_against_one_class_of_a_linear_classifier(self):
        """Samples of one class of two: the corner that the weights point to."""
        gap = WEIGHT[:, 0] - WEIGHT[:, 1]
        net = Linear(jnp.stack([WEIGHT[:, 0], WEIGHT[:, 1], WEIGHT[:, 1]], 1))
        some = 0.5 + 0.4 * jnp.sign(gap)[None] + 0.1 * X
        found = craft(net, some, stepsize=EPS / 4, bounds=(-9.0, 9.0))
        np.testing.assert_allclose(found.delta, -EPS * jnp.sign(gap), rtol=1e-12)

    def test_constant_classifier(self):
        found = craft(Linear(0 * WEIGHT))
        np.testing.assert_array_equal(found.delta, np.zeros(6))
        assert found.certificate.value == 0 == found.certificate.details["low"]

    def test_key_decides(self):
        np.testing.assert_array_equal(craft().delta, craft().delta)
        others = [craft(key=jax.random.key(k)).losses for k in (1, 2)]
        assert np.any(others[0] != others[1])

    def test_single_precision_and_images(self):
        def net(x):
            return jnp.sum(x, (1, 2))[:, None] * jnp.array([[1.0, -1.0]], x.dtype)

        images = X.astype(jnp.float32).reshape(24, 2, 3) - 0.5
        found = craft(net, images, bounds=(-1.0, 1.0))
        assert found.delta.shape == (2, 3) and found.delta.dtype == jnp.float32


class TestFoolingRate:
    DELTA = EPS * jnp.sign(WEIGHT[:, 0])

    def test_counts_changed_predictions(self):
        x = np.asarray(X)
        there = np.clip(x + np.asarray(self.DELTA), 0, 1)
        changed = np.argmax(NET(x), 1) != np.argmax(NET(there), 1)
        found = fooling_rate(NET, X, self.DELTA, confidence=0.9)
        hits, n = changed.sum(), len(x)
        assert 0 < hits < n
        np.testing.assert_allclose(found.value, hits / n, rtol=1e-12)
        np.testing.assert_allclose(
            [found.details["low"], found.details["high"]],
            [beta.ppf(0.05, hits, n - hits + 1), beta.isf(0.05, hits + 1, n - hits)],
            rtol=1e-9,
        )

    def test_between_nothing_and_what_is_not_proved_safe(self):
        """Samples whose prediction is certified in the ball are never fooled."""
        clean = jnp.argmax(NET(X), 1)

        @jax.jit
        def safe(epsilon):
            leads = ibp_margins(NET, X, clean, epsilon)
            return jnp.mean((jnp.sum(leads > 0, 1) == 2).astype(X.dtype))

        epsilons = (0.02, 0.05, 0.1, 0.2)
        shares = [safe(epsilon) for epsilon in epsilons]
        assert any(0 < share < 1 for share in shares)
        for epsilon, share in zip(epsilons, shares, strict=True):
            found = craft(epsilon=epsilon)
            assert found.certificate.value <= 1 - share + 1e-12

    def test_wrong_clean_predictions_are_no_errors(self):
        assert fooling_rate(NET, X, jnp.zeros(6)).value == 0


class TestAggregateGradients:
    def test_mean_along_the_search(self):
        """Of a quadratic of two leaves, with a bound on where the search may go."""
        ahead = aggregate_gradients(
            optax.sgd(0.25), 3, project=lambda p: jax.tree.map(jnp.abs, p)
        )
        params = {"a": jnp.array(2.0), "b": jnp.array([-1.0])}
        shifts = jnp.arange(3.0)

        def grad_fn(params, j):
            return jax.tree.map(lambda leaf: 2 * leaf - shifts[j], params)

        expected = {}
        for name, value in (("a", 2.0), ("b", -1.0)):
            slopes = []
            for shift in range(3):
                slopes.append(2 * value - shift)
                value = abs(value - 0.25 * slopes[-1])
            expected[name] = np.mean(slopes)
        found, state = ahead.update(None, ahead.init(params), params, grad_fn=grad_fn)
        for name, value in expected.items():
            np.testing.assert_allclose(np.squeeze(found[name]), value, rtol=1e-12)
        assert state == optax.EmptyState()

    def test_edges(self):
        with pytest.raises(ValueError, match="`steps` must be at least 1"):
            aggregate_gradients(optax.sgd(0.1), 0)
        ahead = aggregate_gradients(optax.sgd(0.1), 1)
        for missing in ({"params": X}, {"grad_fn": lambda p, j: p}):
            with pytest.raises(ValueError, match="needs `params` and `grad_fn"):
                ahead.update(X, optax.EmptyState(), **missing)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"minibatch_size": 9}, "`minibatch_size` must not exceed `batch_size`"),
        ({"batch_size": 25}, "nor that the number of samples"),
        ({"x": X + 1}, "`x` must lie in `bounds`"),
        ({"x": X[:0]}, "`x` must not be empty"),
        ({"x": X.at[0, 0].set(jnp.nan)}, "`x` must be finite"),
        ({"epsilon": 0.0}, "`epsilon` must be positive"),
        ({"stepsize": -0.1}, "`stepsize` must be positive"),
        ({"cap": 0.0}, "`cap` must be positive"),
        ({"momentum": 1.0}, "`momentum` below 1"),
        ({"passes": 0}, "must be at least 1"),
        ({"method": "uap"}, "`method` must be one of"),
        ({"loss": "margin"}, "`loss` must be one of"),
        ({"start": jnp.zeros(5)}, "`start` must have shape"),
        ({"net": Linear(WEIGHT / 0), "method": "spgd"}, "logits must be finite"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        craft(**change)


def test_bad_delta():
    with pytest.raises(ValueError, match="`delta` must have shape"):
        fooling_rate(NET, X, jnp.zeros(5))
