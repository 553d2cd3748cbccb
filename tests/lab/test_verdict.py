"""Verdicts on measurements whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.lab.catalogue import Check
from varan.lab.verdict import bootstrap_interval, judge, judge_check

finite = st.floats(-1e6, 1e6)
samples = st.lists(finite, min_size=1, max_size=12)
relations = st.sampled_from([">=", "<="])
statistics = st.sampled_from(["mean", "median", "worst"])
quick = settings(max_examples=25, deadline=None, derandomize=True)


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
    assert min(values) <= low <= high <= max(values)
    right = low >= threshold if relation == ">=" else high <= threshold
    wrong = high < threshold if relation == ">=" else low > threshold
    if right:
        assert verdict.outcome == "held"
    elif wrong or statistic == "worst":
        assert verdict.outcome == "not held"
    else:
        assert verdict.outcome == "inconclusive"


@quick
@given(samples, finite, statistics)
def test_reflection_swaps_the_relations(values, threshold, statistic):
    mirrored = [-value for value in values]
    # Percentiles of mirrored resamples mirror exactly only up to the draw's symmetry;
    # measurements clearly off the threshold must agree.
    spread = max(values) - min(values)
    if min(abs(value - threshold) for value in values) > spread:
        assert outcome(
            values, relation=">=", threshold=threshold, statistic=statistic
        ) == outcome(mirrored, relation="<=", threshold=-threshold, statistic=statistic)


@quick
@given(samples, st.floats(-100, 100), st.sampled_from(["mean", "median"]))
def test_intervals_move_with_the_measurements(values, shift, statistic):
    low, high = bootstrap_interval(values, statistic)
    moved = bootstrap_interval([value + shift for value in values], statistic)
    # Rounding of sums of numbers up to 1e6.
    np.testing.assert_allclose(moved, (low + shift, high + shift), atol=1e-8)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_known_truth_is_rarely_called_wrongly(statistic):
    # True mean and median 1. A claim that holds by half a standard deviation with 10
    # seeds is practically never called "not held", and the other way round.
    rng = np.random.default_rng(0)
    for _ in range(100):
        values = rng.normal(1.0, 1.0, size=10)
        assert outcome(values, threshold=-0.3, statistic=statistic) != "not held"
        assert outcome(values, threshold=2.3, statistic=statistic) != "held"


def test_intervals_cover_the_truth():
    # A percentile bootstrap of 20 normal measurements covers the mean in about 92 of
    # 100 cases; 200 cases have a standard error of 2 in 100.
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(size=20), "mean")
        covered += low <= 0.0 <= high
    assert 0.86 <= covered / 200 <= 0.98


def test_decided_and_undecided():
    assert outcome([2.0, 2.1, 2.2]) == "held"
    assert outcome([0.1, 0.2, 0.3]) == "not held"
    assert outcome([0.5, 1.5, 0.6, 1.4]) == "inconclusive"
    assert outcome([1.1, 1.2], relation="in", threshold=(1.0, 2.0)) == "held"
    assert outcome([2.1, 2.2], relation="in", threshold=(1.0, 2.0)) == "not held"
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
    assert outcome([math.inf, 50.0, math.inf], statistic="median") == "held"
    assert outcome([math.inf, 0.5, 0.6], statistic="mean") == "inconclusive"
    assert bootstrap_interval([-math.inf, math.inf], "mean") == (-math.inf, math.inf)


def test_the_same_measurements_give_the_same_interval():
    values = [1.0, 2.5, 0.3, 4.0]
    assert bootstrap_interval(values, "mean") == bootstrap_interval(values, "mean")


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
