"""Verdicts on measurements whose truth is known."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from varan.lab.catalogue import Check
from varan.lab.verdict import confidence_interval, judge, judge_check

# Numbers apart by more than rounding.
finite = st.integers(-(10**9), 10**9).map(lambda k: k / 1000)
samples = st.lists(finite, min_size=1, max_size=12)
infinite = st.sampled_from([-math.inf, math.inf])
extended = st.lists(finite | infinite, min_size=1, max_size=12)
relations = st.sampled_from([">=", "<="])
statistics = st.sampled_from(["mean", "median", "worst"])
interval_statistics = st.sampled_from(["mean", "median"])
quick = settings(max_examples=25, deadline=None, derandomize=True)


SAMPLES = 2000


def drawn(law, *parameters):
    def draw(size):
        rng = np.random.default_rng(size + 1)
        return getattr(rng, law)(*parameters, size=(SAMPLES, size))

    return draw


# A law's name in the table of rates; its draws; its mean and median.
LAWS = {
    "normal": (drawn("normal"), {"mean": 0.0, "median": 0.0}),
    "Student 3": (drawn("standard_t", 3), {"mean": 0.0, "median": 0.0}),
    "lognormal": (drawn("lognormal"), {"mean": math.exp(0.5), "median": 1.0}),
}


def intervals(samples, statistic):
    return np.array([confidence_interval(values, statistic) for values in samples])


def documented_rates(statistic, law, size):
    """A pair of the table in the docstring of `confidence_interval`."""
    table = confidence_interval.__doc__ or ""
    (line,) = re.findall(rf"^ *{statistic}, {law}  +(.+)$", table, re.MULTILINE)
    cells = re.split(" {2,}", line)
    return [float(rate) for rate in cells[[3, 5, 10, 20].index(size)].split(",")]


def check(relation=">=", threshold=1.0, statistic="median", **fields):
    return Check("c", "q", relation, threshold, statistic, "theory", **fields)


def outcome(values, **fields):
    made = check(**fields)
    return judge_check(made, values, made.threshold).outcome


@quick
@given(samples, relations, finite, statistics)
def test_a_verdict_is_about_the_interval(values, relation, threshold, statistic):
    made = check(relation, threshold, statistic)
    verdict = judge_check(made, values, threshold)
    low, high = verdict.interval or (verdict.value, verdict.value)
    assert low <= verdict.value <= high
    right = low >= threshold if relation == ">=" else high <= threshold
    wrong = high < threshold if relation == ">=" else low > threshold
    assert not (right and wrong)
    if right:
        assert verdict.outcome == "held"
    elif wrong or statistic == "worst":
        assert verdict.outcome == "not held"
    else:
        assert verdict.outcome == "inconclusive"


@quick
@given(extended, relations, finite, st.floats(0, 1e6), statistics)
def test_an_easier_threshold_is_never_harder(
    values, relation, threshold, slack, statistic
):
    easier = threshold - slack if relation == ">=" else threshold + slack
    kinds = {"relation": relation, "statistic": statistic}
    order = ["not held", "inconclusive", "held"]
    strict = order.index(outcome(values, threshold=threshold, **kinds))
    assert strict <= order.index(outcome(values, threshold=easier, **kinds))


@quick
@given(samples, st.floats(-100, 100), st.floats(-100, 100), interval_statistics)
def test_intervals_follow_affine_maps(values, scale, shift, statistic):
    ends = confidence_interval(values, statistic)
    moved = confidence_interval([scale * value + shift for value in values], statistic)
    wanted = sorted(scale * end + shift for end in ends)
    # Rounding of sums of numbers up to 1e6, stretched 9 times for two measurements.
    np.testing.assert_allclose(moved, wanted, rtol=1e-9, atol=1e-4)


@quick
@given(extended, st.randoms(use_true_random=False), interval_statistics)
def test_the_order_of_the_seeds_means_nothing(values, random, statistic):
    shuffled = random.sample(values, len(values))
    assert confidence_interval(shuffled, statistic) == confidence_interval(
        values, statistic
    )


@quick
@given(extended, interval_statistics)
def test_infinities_give_ends_and_no_nan(values, statistic):
    low, high = confidence_interval(values, statistic)
    assert low <= high
    if statistic == "mean" and len(set(values)) > 1:
        assert math.isinf(low) == math.isinf(high) == any(map(math.isinf, values))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("statistic", ["mean", "median"])
@pytest.mark.parametrize("size", [3, 5, 10, 20])
def test_a_false_claim_is_rarely_held(statistic, law, size):
    draw, truth = LAWS[law]
    ends = intervals(draw(size), statistic)
    # A claim exactly at its threshold: "held" by the end on the wrong side.
    rates = (
        np.mean(ends[:, 0] > truth[statistic]),
        np.mean(ends[:, 1] < truth[statistic]),
    )
    wanted = np.asarray(documented_rates(statistic, law, size)) / 100
    # Four standard errors, and the table's rounding.
    spread = 4 * np.sqrt(wanted * (1 - wanted) / SAMPLES) + 1e-3
    assert np.all(np.abs(rates - wanted) <= spread)
    if statistic == "median" and size >= 5:
        # Whatever the law: at most `rank` of the values on one side of the median.
        rank = {5: 0, 10: 1, 20: 5}[size]
        exact = binom.cdf(rank, size, 0.5)
        assert exact <= (0.032 if size == 5 else 0.025)
        assert np.all(np.abs(rates - exact) <= 4 * np.sqrt(exact / SAMPLES))
    elif law != "lognormal":
        assert max(rates) <= 0.05


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_power_grows_with_the_seeds_and_with_the_distance(statistic):
    draw, _ = LAWS["normal"]
    power = {
        size: [np.mean(ends > -margin) for margin in (-0.5, 0.0, 0.5, 1.0, 2.0)]
        for size in (3, 5, 10, 20)
        for ends in [intervals(draw(size), statistic)[:, 0]]
    }
    for rates in power.values():
        assert sorted(rates) == rates
        # Half a standard deviation on the wrong side.
        assert rates[0] <= 0.015
    for place in (3, 4):
        rates = [power[size][place] for size in (3, 5, 10, 20)]
        assert sorted(rates) == rates
    assert power[5][4] > 0.75 and power[20][3] > 0.85


def test_decided_and_undecided():
    assert outcome([2.0, 2.1, 2.2]) == "held"
    assert outcome([0.1, 0.2, 0.3]) == "not held"
    assert outcome([0.5, 1.5, 0.6, 1.4]) == "inconclusive"
    assert outcome([1.4, 1.41], relation="in", threshold=(1.0, 2.0)) == "held"
    assert outcome([2.4, 2.41], relation="in", threshold=(1.0, 2.0)) == "not held"
    assert outcome([1.9, 2.2], relation="in", threshold=(1.0, 2.0)) == "inconclusive"


def test_the_boundary_satisfies():
    assert outcome([1.0, 1.0]) == "held"
    assert outcome([1.0], relation="<=") == "held"


def test_worst_means_every_seed():
    verdict = judge_check(check(statistic="worst"), [3.0, 2.0, 0.5], 1.0)
    assert (verdict.value, verdict.interval) == (0.5, (0.5, 3.0))
    assert verdict.outcome == "not held"
    verdict = judge_check(check("<=", 4.0, "worst"), [3.0, 2.0, 0.5], 4.0)
    assert (verdict.value, verdict.outcome) == (3.0, "held")
    inside = check("in", (0.0, 1.0), "worst")
    assert judge_check(inside, [0.5, 1.2, -0.1], (0.0, 1.0)).value == 1.2


def test_a_diverged_baseline_is_infinitely_worse():
    diverged = [math.inf, 50.0, math.inf, 60.0, 70.0]
    assert outcome(diverged, statistic="median") == "held"
    assert outcome(diverged[:3], statistic="median") == "inconclusive"
    assert outcome([math.inf] * 3, statistic="mean") == "held"
    assert outcome([math.inf, 0.5, 0.6], statistic="mean") == "inconclusive"
    assert confidence_interval([1.0, 2.0, math.inf], "median")[1] == math.inf
    assert confidence_interval([-math.inf, math.inf], "mean") == (-math.inf, math.inf)


def test_the_same_measurements_give_the_same_interval():
    values = [1.0, 2.5, 0.3, 4.0]
    assert confidence_interval(values, "mean") == confidence_interval(values, "mean")


def test_a_row_holds_when_all_checks_do(toys):
    checks = (check(), Check("d", "r", "<=", 0.0, "mean", "theory", smoke=False))
    row = toys(checks=checks)

    def judged(q, r):
        return judge(row, "laptop", {s: {"q": q, "r": r + 0.1 * s} for s in range(3)})

    assert judged(2.0, -1.0).outcome == "held"
    assert judged(2.0, 1.0).outcome == "not held"
    assert judged(2.0, -0.1).outcome == "inconclusive"
    assert judged(0.0, -0.1).outcome == "not held"
    assert judged(2.0, -1.0).remarks == ()


def test_few_seeds_are_said(toys):
    verdict = judge(toys(checks=[check()]), "laptop", {0: {"q": 2.0}})
    assert verdict.checks[0].interval is None
    assert verdict.remarks == (
        "Measured with 1 of the 3 declared seeds.",
        "One seed: there is no interval over seeds.",
    )


def test_smoke_decides_only_what_it_may(toys):
    checks = (
        check(smoke_threshold=5.0),
        Check("d", "r", "<=", 0.0, "mean", "theory", smoke=False),
    )
    verdict = judge(toys(checks=checks), "smoke", {0: {"q": 2.0}})
    assert [entry.check.name for entry in verdict.checks] == ["c"]
    assert verdict.outcome == "not held"
    assert "1 check is not decided at smoke scale." in verdict.remarks
    verdict = judge(toys(checks=checks[1:]), "smoke", {0: {"q": 2.0}})
    assert verdict.outcome is None


def test_what_was_not_measured_is_an_error(toys):
    row = toys(checks=[check()])
    with pytest.raises(ValueError, match="no seed was measured"):
        judge(row, "laptop", {})
    with pytest.raises(ValueError, match=r"seed 1: the experiment did not measure 'q'"):
        judge(row, "laptop", {0: {"q": 1.0}, 1: {"p": 1.0}})
    with pytest.raises(ValueError, match=r"'q' is not a number \(NaN\)"):
        judge(row, "laptop", {0: {"q": math.nan}})
