"""GREAT score: what it is, what it is not, its interval, temperature and radii."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import spearmanr

from varan.lipschitz import (
    calibrate_temperature,
    great_score,
    great_score_samples,
)

KEY = jax.random.key(0)
MOST = np.sqrt(np.pi / 2)
N, CLASSES = 40, 4
WEIGHT = jax.random.normal(jax.random.key(1), (6, CLASSES))


def sampler(key, n):
    """Unit normals with random classes: about a fourth of them as a linear map says."""
    for_x, for_y = jax.random.split(key)
    return jax.random.normal(for_x, (n, 6)), jax.random.randint(for_y, (n,), 0, CLASSES)


def linear(x):
    return 3 * x @ WEIGHT


X, Y = sampler(KEY, N)


def score(predict=linear, **kwargs):
    arguments = {"key": KEY, "samples": N, "temperature": 2.0, **kwargs}
    return great_score(predict, sampler, **arguments)


class TestScore:
    def test_formula_of_every_squash(self):
        logits = np.asarray(linear(X))
        squashed = {
            "softmax": softmax(logits / 2.0, 1),
            "sigmoid": expit(logits / 2.0),
            "softmax_of_sigmoid": softmax(expit(logits) / 2.0, 1),
            "sigmoid_of_softmax": expit(softmax(logits, 1) / 2.0),
        }
        for squash, values in squashed.items():
            mine = values[np.arange(N), Y]
            values[np.arange(N), Y] = -np.inf
            expected = MOST * np.maximum(mine - values.max(1), 0)
            found = score(squash=squash)
            np.testing.assert_allclose(found.per_sample, expected, rtol=1e-12)
            np.testing.assert_allclose(found.mean, expected.mean(), rtol=1e-12)

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.floats(1e-300, 1e300), st.floats(-50, 50))
    def test_between_zero_and_the_most_and_free_of_shifts(self, temperature, shift):
        found = score(temperature=temperature)
        assert np.all((found.per_sample >= 0) & (found.per_sample <= MOST))
        moved = score(lambda x: linear(x) + shift, temperature=max(temperature, 0.1))
        still = score(temperature=max(temperature, 0.1))
        np.testing.assert_allclose(moved.per_sample, still.per_sample, atol=1e-11)

    def test_a_cold_softmax_counts_what_is_right(self):
        right = jnp.mean(jnp.argmax(linear(X), 1) == Y)
        assert 0 < right < 1
        np.testing.assert_allclose(score(temperature=1e-9).mean, MOST * float(right))

    def test_a_black_box_of_numpy_with_its_own_probabilities(self):
        found = score(lambda x: softmax(np.asarray(linear(x)) / 2, 1), squash=None)
        np.testing.assert_allclose(found.mean, score().mean, rtol=1e-12)

    def test_single_precision_stays(self):
        def single(key, n):
            x, y = sampler(key, n)
            return x.astype(jnp.float32), y

        found = great_score(
            lambda x: x @ WEIGHT.astype(jnp.float32), single, key=KEY, samples=N
        )
        assert found.mean.dtype == found.interval.low.dtype == jnp.float32


class TestHonesty:
    def test_counterexample_is_warned_of(self):
        """Hard outputs: the highest score, 0.008 away from the boundary on average."""

        def near(key, n):
            x = 0.01 * jax.random.normal(key, (n, 1))
            return x, (x[:, 0] > 0).astype(jnp.int32)

        def hard(x):
            return jnp.concatenate([x <= 0, x > 0], 1).astype(x.dtype)

        with pytest.warns(UserWarning, match="no lower bound of the smallest"):
            found = great_score(hard, near, key=KEY, squash=None)
        np.testing.assert_allclose(found.mean, MOST)
        truth = np.mean(np.abs(near(KEY, 500)[0]))
        assert truth < 0.009 and truth <= found.reach <= 3 * truth
        assert found.kind == "estimate" and not found.certificate.proof
        assert "(estimate)" in str(found) and "no lower bound" in str(found)

    def test_certified_radius_of_a_linear_classifier(self):
        """The constants of all differences give the exact distance, one gives less."""
        rows = 3 * WEIGHT.T
        differences = rows[:, None] - rows[None]
        constants = jnp.linalg.norm(differences, axis=-1)
        logits = linear(X)
        leads = logits[jnp.arange(N), Y][:, None] - logits
        own = jax.nn.one_hot(Y, CLASSES, dtype=bool)
        ratios = jnp.where(own, jnp.inf, leads / jnp.where(own, 1, constants[Y]))
        exact = jnp.maximum(jnp.min(ratios, 1), 0)
        tight = score(lipschitz=constants)
        loose = score(lipschitz=float(jnp.linalg.norm(rows, 2)))
        np.testing.assert_allclose(tight.radii, exact, rtol=1e-13)
        assert np.all(tight.radii <= exact) and np.all(loose.radii <= exact)
        assert np.all((loose.radii > 0) == (exact > 0))
        assert loose.certified.proof and loose.certified.value <= loose.radii.mean()
        assert "(proof)" in str(loose)

    def test_reach_is_above_the_mean_distance(self):
        """Of a linear classifier, where the smallest perturbations are known."""
        rows = 3 * WEIGHT.T
        constants = jnp.linalg.norm(rows[:, None] - rows[None], axis=-1)
        assert score(lipschitz=constants).radii.mean() <= score().reach

    def test_interval_and_how_many_samples_it_takes(self):
        half = np.sqrt(np.pi / 4 * np.log(2 / 0.1) / N)
        found = score(delta=0.1, temperature=9.0)
        np.testing.assert_allclose(found.interval.high - found.mean, half, rtol=1e-12)
        assert found.interval.low == max(found.mean - half, 0)
        assert great_score_samples(half * (1 + 1e-9), 0.1) == N
        assert great_score_samples(half * (1 - 1e-9), 0.1) == N + 1
        assert great_score_samples(half, 0.1, bound="paper") > 100 * N

    def test_interval_covers(self):
        """Hoeffding's covers far more often than asked: 20 of 20 at delta = 0.2."""
        x, y = sampler(jax.random.key(5), 20_000)
        values = softmax(np.asarray(linear(x)) / 2, 1)
        mine = values[np.arange(20_000), y]
        values[np.arange(20_000), y] = 0
        truth = MOST * np.maximum(mine - values.max(1), 0).mean()
        for key in jax.random.split(jax.random.key(3), 20):
            low, high = score(key=key, delta=0.2).interval
            assert low <= truth <= high


class TestCalibration:
    LOGITS = 4 * jax.random.normal(jax.random.key(4), (5, 30, 3))
    LABELS = jnp.argmax(LOGITS[0], 1)
    GRID = jnp.linspace(0.05, 2, 60)

    def brute(self, temperature, squash=softmax):
        values = squash(np.asarray(self.LOGITS) / temperature, -1)
        rows = np.arange(30)
        mine = values[:, rows, self.LABELS].copy()
        values[:, rows, self.LABELS] = -np.inf
        return MOST * np.maximum(mine - values.max(-1), 0).mean(1)

    def test_least_of_the_best_that_are_allowed(self):
        scores = np.array([self.brute(float(t)) for t in self.GRID])
        distances = np.array([1.1, 0.45, 0.4, 0.36, 0.5])
        allowed = (scores <= distances).all(1)
        assert 0 < allowed.sum() < len(allowed)
        ranks = np.array([spearmanr(s, distances).statistic for s in scores])
        best = np.flatnonzero(allowed & (ranks >= ranks[allowed].max() - 1e-12))[0]
        found = calibrate_temperature(
            self.LOGITS,
            self.LABELS,
            jnp.asarray(distances),
            squash="softmax",
            temperatures=self.GRID,
        )
        np.testing.assert_allclose(found.temperature, self.GRID[best])
        np.testing.assert_allclose(found.correlation, ranks[best], atol=1e-12)
        np.testing.assert_allclose(found.scores, scores[best], rtol=1e-12)
        assert found.feasible

    def test_none_allowed_is_not_a_number(self):
        found = calibrate_temperature(
            self.LOGITS,
            self.LABELS,
            jnp.full(5, 1e-9),
            squash="softmax",
            temperatures=self.GRID,
        )
        assert not found.feasible and np.isnan(found.temperature)
        with pytest.raises(ValueError, match="`temperature` must be positive"):
            score(temperature=found.temperature)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"squash": None}, "outputs must lie in"),
        ({"predict": lambda x: x[:, :1]}, "at least two classes"),
        ({"predict": lambda x: x[:, :2]}, "labels must lie in 0 .. 1"),
        ({"predict": lambda x: linear(x) / 0}, "`outputs` must be finite"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"samples": 0}, "`samples` must be at least 1"),
        ({"delta": 1.0}, "`delta` must lie between"),
        ({"squash": "tanh"}, "`squash` must be one of"),
        ({"lipschitz": 0.0}, "`lipschitz` must be positive"),
        ({"lipschitz": jnp.ones((2, 2))}, "`lipschitz` must have shape"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        score(**change)


def test_labels_that_are_no_classes():
    with pytest.raises(TypeError, match="labels must be integers"):
        great_score(linear, lambda *_: (X, X[:, 0]), key=KEY, samples=N)


def test_bad_calibration():
    logits, labels = jnp.ones((2, 3, 2)), jnp.zeros(3, int)
    with pytest.raises(ValueError, match="at least two classifiers"):
        calibrate_temperature(logits[:1], labels, jnp.ones(1))
    with pytest.raises(ValueError, match="`temperatures` must be positive"):
        calibrate_temperature(
            logits, labels, jnp.ones(2), temperatures=jnp.array([0.0, 1.0])
        )
    with pytest.raises(ValueError, match="`distances` must have shape"):
        calibrate_temperature(logits, labels, jnp.ones(3))
