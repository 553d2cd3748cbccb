"""Races: order, pairing, ratios, refusal."""

import json
import time

import jax.numpy as jnp
import pytest

from varan.lab.race import CompileTime, compile_time, race, ratio_interval


def test_ratios_are_against_the_reference():
    result = race(
        {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.005)},
        repeats=5,
        reference="slow",
    )
    ratio, low, high = result.ratio("fast")
    assert low <= ratio <= high
    # Sleeping is never shorter than asked, and here rarely twice as long.
    assert 1.5 < ratio < 6.0
    assert result.ratio("slow") == (1.0, 1.0, 1.0)
    assert result.table().splitlines()[1].startswith("fast")
    written = json.loads(json.dumps(result.to_dict()))
    assert written["reference"] == "slow"
    assert len(written["contestants"]["fast"]["wall_s"]) == 5


def test_rounds_are_interleaved_and_shuffled():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}
    result = race(contestants, repeats=20, warmup=2)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 22
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 2
    assert result.reference == "a"
    first = list(calls)
    calls.clear()
    race(contestants, repeats=20, warmup=2)
    assert calls == first


def test_answers_are_kept_for_comparison():
    result = race({"a": lambda: jnp.ones(3) * 2.0, "b": lambda: 7}, repeats=1)
    assert result.answers["b"] == 7
    assert result.answers["a"].tolist() == [2.0, 2.0, 2.0]


def test_every_timed_call_is_reported():
    told = []
    race({"a": int, "b": str}, repeats=2, report=lambda *call: told.append(call))
    assert [turn for turn, *_ in told] == [0, 0, 1, 1]
    assert {name for _, name, *_ in told} == {"a", "b"}
    assert all(wall >= 0 and cpu >= 0 for *_, wall, cpu in told)


def test_a_ratio_and_its_inverse_have_inverse_intervals():
    ratios = [0.5, 4.0, 1.0]
    ratio, low, high = ratio_interval(ratios)
    assert ratio == 1.0 and 0.0 < low < 0.5 and high > 4.0
    inverse = ratio_interval([1 / ratio for ratio in ratios])
    assert inverse == pytest.approx((1 / ratio, 1 / high, 1 / low))


def test_bad_races_are_refused():
    with pytest.raises(ValueError, match="`contestants` must not be empty"):
        race({})
    with pytest.raises(ValueError, match=r"`reference` must be one of 'a' \(got 'b'\)"):
        race({"a": int}, reference="b")
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        race({"a": int}, repeats=0)


def test_compile_time_has_three_parts():
    spent = compile_time(lambda x: jnp.sin(x) @ x, jnp.ones(3))
    assert spent.total == spent.trace + spent.lower + spent.compile
    assert spent.compile > 0.0
    assert CompileTime(1.0, 2.0, 3.0).total == 6.0
