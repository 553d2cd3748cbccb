"""Randomised smoothing: closed forms, coverage, order of the radii, honest typing."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf
from scipy.stats import norm

from varan.fenchel_young import sparsemax
from varan.lipschitz import (
    SimplexMap,
    SmoothedSamples,
    certify_samples,
    choose_map,
    lvm_maps,
    smooth_certify,
    smooth_samples,
    smoothed_lipschitz,
)

SIGMA, KEY = 0.5, jax.random.key(0)
MAPS = (
    SimplexMap("sparsemax", 1.0),
    SimplexMap("softmax", 3.0),
    SimplexMap("hard"),
    SimplexMap("softmax", 1e7),
    SimplexMap("sparsemax", 1e7),
)


class Linear(eqx.Module):
    """Two logits, whose boundary is at x_0 = 0; the distance to it is |x_0|."""

    scale: jax.Array

    def __call__(self, x):
        return self.scale * jnp.stack([x[0], -x[0]])


linear = Linear(jnp.array(1.0))


def samples_of(x, n, maps=MAPS, key=KEY, sigma=SIGMA):
    return smooth_samples(linear, x, sigma=sigma, n=n, maps=maps, key=key)


@pytest.fixture(scope="module")
def many():
    return samples_of(jnp.array([[0.0, 1.0], [0.4, 0.0], [-1.0, 3.0]]), 20_000)


def expected_score(one, at):
    """The mean score of class 0, by a fine sum over the noise."""
    noise = np.linspace(-8, 8, 100_001)
    first = at + SIGMA * noise
    if one.name == "softmax":
        score = 0.5 + 0.5 * np.tanh(one.temperature * first)
    elif one.name == "sparsemax":
        score = np.clip(one.temperature * first + 0.5, 0, 1)
    else:
        score = first > 0
    return np.trapezoid(score * norm.pdf(noise), noise)


class TestSamples:
    def test_means_and_variances_of_known_functions(self, many):
        for place, one in enumerate(MAPS):
            for point, at in enumerate((0.0, 0.4, -1.0)):
                mean = many.mean[point, place, 0]
                # Five standard errors, and the grid's error at a jump.
                error = 5 * math.sqrt(many.variance[point, place, 0] / many.n) + 1e-4
                assert abs(mean - expected_score(one, at)) < error

    def test_scores_sum_to_one(self, many):
        np.testing.assert_allclose(np.sum(many.mean, 2), 1, rtol=1e-12)

    def test_large_temperature_is_the_arg_max(self, many):
        """But for logits closer than 1e-7, which no sample has."""
        hard, *others = (many.mean[:, k] for k in (2, 3, 4))
        for other in others:
            np.testing.assert_allclose(other, hard, atol=1e-5)
        counts = hard * many.n
        np.testing.assert_allclose(counts, np.rint(counts), atol=1e-8)

    def test_pooled_moments_are_those_of_all_samples(self):
        """Across blocks and a block that is not full, where block variances differ."""
        x, n = jnp.array([[0.3, 0.0]]), 300
        found = samples_of(x, n)
        blocks = [jax.random.fold_in(jax.random.fold_in(KEY, 0), i) for i in (0, 1)]
        noise = jnp.concatenate([jax.random.normal(k, (256, 2)) for k in blocks])[:n]
        logits = jax.vmap(linear)(x + SIGMA * noise)
        scores = jax.vmap(sparsemax)(logits)
        np.testing.assert_allclose(found.mean[0, 0], jnp.mean(scores, 0), rtol=1e-12)
        variance = jnp.var(scores, 0, ddof=1)
        np.testing.assert_allclose(found.variance[0, 0], variance, rtol=1e-12)

    def test_scaling_of_inputs_and_noise(self):
        """f(x / 2) at twice the noise is f at the noise, and radii double."""
        x, half = jnp.array([[0.4, 0.0]]), Linear(jnp.array(0.5))
        settings = {"n": 500, "maps": MAPS, "key": KEY}
        one = smooth_samples(linear, x, sigma=SIGMA, **settings)
        two = smooth_samples(half, 2 * x, sigma=2 * SIGMA, **settings)
        np.testing.assert_allclose(one.mean, two.mean, rtol=1e-12)
        small, large = (certify_samples(s, s, alpha=0.1) for s in (one, two))
        np.testing.assert_allclose(2 * small.radii, large.radii, rtol=1e-12)

    def test_nan_counts_for_no_class(self):
        def net(x):
            return jnp.where(x[0] > 0, jnp.log(-x[0]), linear(x))

        found = smooth_samples(
            net, jnp.array([[-0.5]]), sigma=SIGMA, n=500, maps=MAPS[1:3], key=KEY
        )
        total = np.sum(found.mean, 2)
        assert np.all((total < 0.95) & (total > 0.7))
        assert np.ptp(total) < 1e-12


class TestTheorem:
    def test_ramp_attains_it(self):
        """The steepest point of a smoothed ramp, by differences of its integral."""
        for slope in (0.3, 1.0, 4.0):
            noise = np.linspace(-9, 9, 200_001)

            def smoothed(x, slope=slope, noise=noise):
                ramp = np.clip(slope * (x + SIGMA * noise), -0.5, 0.5)
                return np.trapezoid(ramp * norm.pdf(noise), noise)

            steepest = (smoothed(1e-4) - smoothed(-1e-4)) / 2e-4
            bound = float(smoothed_lipschitz(slope, SIGMA))
            assert steepest <= bound * (1 + 1e-5)  # of the sums
            np.testing.assert_allclose(steepest, bound, rtol=1e-5)

    def test_limits(self):
        limit = 1 / (SIGMA * math.sqrt(2 * math.pi))
        constants = jnp.array([0.0, 1e-6, 1e9, jnp.inf])
        found = smoothed_lipschitz(constants, SIGMA)
        np.testing.assert_allclose(found, [0, 1e-6, limit, limit], rtol=1e-6)
        vector = smoothed_lipschitz(jnp.inf, SIGMA, width=math.sqrt(2))
        np.testing.assert_allclose(vector, 1 / (SIGMA * math.sqrt(math.pi)))
        with_base = smoothed_lipschitz(2.0, SIGMA, width=math.sqrt(2))
        np.testing.assert_allclose(with_base, 2 * erf(1 / (2 * 2 * SIGMA)))

    def test_derivative(self):
        slope = jax.grad(smoothed_lipschitz)(1.5, SIGMA)
        ahead, behind = (smoothed_lipschitz(1.5 + e, SIGMA) for e in (1e-5, -1e-5))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)

    def test_maps_are_as_steep_as_they_say(self):
        """Jacobians of softmax and sparsemax at random logits."""
        logits = np.random.default_rng(0).normal(size=(500, 4))
        weights = np.exp(3 * logits)
        soft = weights / np.sum(weights, 1, keepdims=True)
        share = np.eye(4) * soft[:, None] - soft[:, None] * soft[..., None]
        # Sparsemax subtracts the mean of the support, the same for all entries of it.
        support = 1.0 * (np.asarray(jax.vmap(sparsemax)(jnp.asarray(3 * logits))) > 0)
        outer = support[:, None] * support[..., None]
        centred = (
            np.eye(4) * support[:, None]
            - outer / np.sum(support, 1, keepdims=True)[..., None]
        )
        for jacobians, name in ((3 * share, "softmax"), (3 * centred, "sparsemax")):
            steepest = np.max(np.linalg.norm(jacobians, 2, (1, 2)))
            bound = SimplexMap(name, 3.0).lipschitz(1.0)
            assert 0.8 * bound < steepest <= bound * (1 + 1e-12)


class TestCertificate:
    def test_radius_stays_below_the_truth_and_gets_there(self, many):
        """The arg max of a linear classifier: the bound is tight as n grows."""
        found = certify_samples(many.only(2), many.only(2), two_sided=False)
        assert found.labels[1:].tolist() == [0, 1]
        assert np.all(found.radii[1:] < [0.4, 1.0])
        np.testing.assert_allclose(found.radii[1:], [0.4, 1.0], rtol=0.08)
        # On the boundary no class leads: it abstains.
        assert found.radii[0] == 0 and found.labels[0] == -1

    @pytest.mark.parametrize("rule", ["holdout", "per_input_bonferroni", "repo"])
    def test_every_rule_stays_below_the_truth(self, many, rule):
        few = samples_of(
            jnp.array([[0.0, 1.0], [0.4, 0.0], [-1.0, 3.0]]),
            2000,
            key=jax.random.key(1),
        )
        found = certify_samples(many, few, rule=rule)
        assert np.all(found.radii <= [1e-9, 0.4, 1.0])
        assert found.radii[2] > 0.8
        assert found.kind == ("estimate" if rule == "repo" else "proof")
        assert ("with probability 0.999" in str(found)) == (rule != "repo")

    def test_rules_are_ordered(self, many):
        radii = {
            rule: certify_samples(many, many, rule=rule).radii
            for rule in ("holdout", "per_input_bonferroni", "repo")
        }
        assert np.all(radii["repo"] >= radii["holdout"])
        assert np.all(radii["repo"] >= radii["per_input_bonferroni"])
        # What the holdout chose on these very samples is their best.
        np.testing.assert_allclose(radii["repo"], radii["holdout"])

    def test_bernstein_and_clopper_pearson_by_hand(self, many):
        for place, rows in ((1, 1), (2, 2)):
            found = certify_samples(many.only(place), many.only(place), alpha=0.02)
            mean, label = many.mean[rows, place], found.labels[rows]
            if place == 1:
                log, n = math.log(2 * 2 / 0.02), many.n
                half = math.sqrt(2 * many.variance[rows, place, label] * log / n)
                low = mean[label] - half - 7 * log / (3 * (n - 1))
            else:
                hits = round(mean[label] * many.n)
                # P(at least so many hits) is the level at the bound.
                low = found.lower[rows]
                from scipy.stats import binom

                level = binom.sf(hits - 1, many.n, low)
                np.testing.assert_allclose(level, 0.01, rtol=1e-6)
            np.testing.assert_allclose(found.lower[rows], low, rtol=1e-9)

    def test_radius_2_without_a_constant_never_wins(self, many):
        found = certify_samples(many, many)
        assert np.all(found.radii_2 <= found.radii_1 * (1 + 1e-12))
        np.testing.assert_allclose(
            found.radii_2[1],
            (found.lower[1] - found.upper[1]) * SIGMA * math.sqrt(math.pi / 2),
        )

    def test_radius_2_with_a_small_constant_wins_and_is_sound(self):
        """Logits of constant 0.2 sqrt(2): scores hardly move, the distance is 0.4."""
        net, x = Linear(jnp.array(0.2)), jnp.array([[0.4, 0.0]])
        seen = smooth_samples(net, x, sigma=SIGMA, n=20_000, maps=MAPS, key=KEY).only(0)
        plain, based = (
            certify_samples(seen, seen, lipschitz=c) for c in (None, 0.2 * math.sqrt(2))
        )
        assert based.radii_1[0] == plain.radii[0] < based.radii_2[0] < 0.4
        np.testing.assert_allclose(based.radii[0], 0.4, rtol=0.1)

    @given(
        mean=st.floats(0, 1),
        hits=st.integers(0, 1000),
        alpha=st.floats(1e-9, 0.99),
        two_sided=st.booleans(),
    )
    @settings(max_examples=15, deadline=None, derandomize=True)
    def test_always_finite(self, mean, hits, alpha, two_sided):
        """Bounds at the ends of the range would give an infinite quantile."""
        maps = (SimplexMap("softmax"), SimplexMap("hard"))
        scores = np.array([[[mean, 1 - mean], [hits / 1000, 1 - hits / 1000]]])
        made = SmoothedSamples(scores, 0 * scores, 1000, SIGMA, 1e-12, maps)
        found = certify_samples(made, made, alpha=alpha, two_sided=two_sided)
        assert np.isfinite(found.radii[0]) and found.radii[0] >= 0
        assert (found.labels[0] == -1) == (found.radii[0] == 0)

    def test_ties_and_nan_abstain(self):
        scores = np.array([[[0.5, 0.5]], [[np.nan, np.nan]]])
        made = SmoothedSamples(scores, 0 * scores, 1000, SIGMA, 1e-12, MAPS[:1])
        found = certify_samples(made, made, alpha=0.1)
        assert found.labels.tolist() == [-1, -1] and found.radii.tolist() == [0, 0]

    def test_coverage_of_the_one_sided_rule(self):
        """200 repeats at level 0.2: more than 0.29 wrong has probability 0.001."""
        x = jnp.tile(jnp.array([[0.25, 0.0]]), (200, 1))
        one, two = jax.random.split(jax.random.key(7))
        hard = (SimplexMap("hard"),)
        found = certify_samples(
            samples_of(x, 250, hard, one),
            samples_of(x, 30, hard, two),
            alpha=0.2,
            two_sided=False,
        )
        wrong = np.mean((found.radii > 0.25) | (found.labels == 1))
        assert 0.05 < wrong < 0.29


class TestSmoothCertify:
    def test_global_uses_one_map_chosen_elsewhere(self):
        x = jnp.array([[0.4, 0.0], [-1.0, 3.0]])
        settings = {"sigma": SIGMA, "n": 2000, "maps": MAPS, "key": KEY}
        found = smooth_certify(linear, x, validation=0.9 * x, **settings)
        assert len(found.maps) == 1 and found.kind == "proof"
        third = jax.random.split(KEY, 3)[2]
        index = choose_map(samples_of(0.9 * x, 200, key=third), 2000)
        assert found.maps[0] == MAPS[index]
        assert found.labels.tolist() == [0, 1] and np.all(found.radii < [0.4, 1.0])
        repo = smooth_certify(linear, x, select="repo", **settings)
        assert repo.kind == "estimate" and len(repo.maps) == len(MAPS)

    def test_dtype_of_the_noise_follows_the_input(self):
        small, large = (
            samples_of(jnp.array([[0.4, 0.0]], dtype), 500, MAPS[2:3])
            for dtype in (jnp.float32, jnp.float64)
        )
        assert small.mean.dtype == np.float64
        assert small.rounding > 1e-5 > large.rounding

    def test_family(self):
        maps = lvm_maps()
        assert len(set(maps)) == len(maps) == 205
        assert maps[0].name == "hard" and maps[-1] == SimplexMap("sparsemax", 1e7)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"n": 1}, ValueError, "`n` must be at least 2"),
        ({"n_select": 1}, ValueError, "`n` must be at least 2"),
        ({"sigma": 0.0}, ValueError, "`sigma` must be positive"),
        ({"alpha": 1.0}, ValueError, "`alpha` must lie between 0 and 1"),
        ({"alpha": math.nan}, ValueError, "`alpha` must lie between 0 and 1"),
        ({"x": jnp.full((1, 2), jnp.nan)}, ValueError, "`x` must be finite"),
        ({"x": jnp.zeros((0, 2))}, ValueError, "`x` must not be empty"),
        ({"maps": "lvm"}, ValueError, "chooses among 205 maps on `validation`"),
        ({"maps": "soft"}, ValueError, "`maps` must be one of"),
        ({"maps": []}, ValueError, "`maps` must not be empty"),
        ({"maps": ["softmax"]}, TypeError, "must hold `SimplexMap`s"),
        ({"maps": [SimplexMap("softmax", -1.0)]}, ValueError, "must be positive"),
        ({"select": "best"}, ValueError, "`select` must be one of"),
        ({"lipschitz": -1.0}, ValueError, "`lipschitz` must not be negative"),
        (
            {"predict": lambda x: jax.nn.softmax(x)},
            ValueError,
            "must return logits .got probabilities.",
        ),
        ({"predict": lambda x: x[:1]}, ValueError, "at least two logits"),
    ],
)
def test_bad_input(arguments, error, message):
    given = {"predict": linear, "x": jnp.ones((1, 2)), "sigma": SIGMA, "n": 100}
    with pytest.raises(error, match=message):
        smooth_certify(**{**given, "maps": "hard", "key": KEY, **arguments})


def test_bad_samples():
    one, two = (samples_of(jnp.ones((k, 2)), 100, MAPS[2:3]) for k in (1, 2))
    with pytest.raises(ValueError, match="of the inputs and maps of `samples`"):
        certify_samples(one, two)
    with pytest.raises(ValueError, match="`rule` must be one of"):
        certify_samples(one, one, rule="global")
    with pytest.raises(ValueError, match="`n` must be at least 2"):
        choose_map(one, 1)
    with pytest.raises(ValueError, match="`temperatures` must be at least 1"):
        lvm_maps(0)
    with pytest.raises(ValueError, match="`lipschitz` must not be negative"):
        smoothed_lipschitz(-1.0, 1.0)
    with pytest.raises(TypeError, match="must be a known array"):
        jax.jit(lambda x: samples_of(x, 10).mean)(jnp.ones((1, 2)))
