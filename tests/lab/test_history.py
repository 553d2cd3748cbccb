"""What changed between two runs: verdicts, numbers apart, numbers that must not."""

import json

import pytest

from varan.lab.catalogue import Catalogue
from varan.lab.history import HistoryError, compare, find_run, pair
from varan.lab.store import Record, Store

HERE = {"python": "3", "versions": {"jax": "1", "varan": "0"}, "commit": "abc"}


@pytest.fixture
def opened(tmp_path):
    with Store(tmp_path) as store:
        yield store


@pytest.fixture
def measure(opened):
    """Stores one run of a row: its gains, one a seed."""

    def measure(row, run, gains, *, mark="same", environment=HERE, **numbers):
        for seed, gain in enumerate(gains):
            failed = {"outcome": "failed", "message": "it broke."}
            good = {"outcome": "measured", "numbers": {"gain": gain, **numbers}}
            record = Record(
                row=row.id,
                scale="laptop",
                seed=seed,
                settings={},
                environment=environment,
                fingerprint=mark,
                run=run,
                **(failed if gain is None else good),
            )
            opened.add(record)

    return measure


def compared(opened, *rows, references=()):
    before, after = pair(opened.runs(), references)
    found = compare(Catalogue(rows), opened, before, after)
    json.dumps(found.to_dict(), allow_nan=False)
    return found


def test_a_change_of_verdict_and_of_numbers(toys, opened, measure):
    row = toys(seeds=3)
    measure(row, "first", [2.0, 2.1, 2.2], mark="old")
    measure(row, "second", [1.0, 1.1, 1.2], mark="new")
    (change,) = compared(opened, row).rows
    assert change.outcome_changed and change.apart and change.code_changed
    (check,) = change.checks
    assert (check.before.value, check.after.value) == (2.1, 1.1)
    assert (check.before.outcome, check.after.outcome) == ("held", "not held")
    # Other code may give other numbers.
    assert change.moved and not change.differences


def test_numbers_within_their_intervals_moved_but_are_not_apart(toys, opened, measure):
    row = toys(seeds=3)
    measure(row, "first", [2.0, 2.1, 2.2], mark="old")
    measure(row, "second", [2.05, 2.15, 2.25], mark="new")
    (change,) = compared(opened, row).rows
    assert change.moved and not change.apart and not change.outcome_changed


def test_the_same_code_and_seed_must_give_the_same_numbers(toys, opened, measure):
    row = toys(seeds=2)
    measure(row, "first", [2.0, 2.1], other=1.0)
    measure(row, "second", [2.0, 2.1 + 1e-15], other=1.0)
    (change,) = compared(opened, row).rows
    (difference,) = change.differences
    assert (difference.seed, difference.quantity) == (1, "gain")
    assert change.irreproducible and not difference.elsewhere
    # Other versions may explain it, another commit does not: the code is the same.
    elsewhere = HERE | {"versions": {"jax": "2"}}
    measure(row, "third", [2.0, 2.2], other=1.0, environment=elsewhere)
    (change,) = compared(opened, row).rows
    assert change.differences[0].elsewhere and not change.irreproducible
    committed = HERE | {"commit": "def", "versions": {"jax": "1", "varan": "1"}}
    measure(row, "fourth", [2.0, 2.3], other=1.0, environment=committed)
    (change,) = compared(opened, row, references=["first", "fourth"]).rows
    assert change.irreproducible


def test_a_row_that_measures_time_is_never_irreproducible(toys, opened, measure):
    row = toys(seeds=1, exclusive=True)
    measure(row, "first", [2.0])
    measure(row, "second", [2.1])
    (change,) = compared(opened, row).rows
    assert change.moved and not change.differences


def test_what_only_one_run_measured_and_what_failed(toys, opened, measure):
    both, early, late = (toys(id=name, seeds=2) for name in ("both", "early", "late"))
    measure(both, "first", [2.0, 2.0])
    measure(early, "first", [2.0, 2.0])
    measure(both, "second", [2.0, None])
    measure(late, "second", [2.0, 2.0])
    found = compared(opened, both, early, late)
    assert found.only_before == (("early", "laptop"),)
    assert found.only_after == (("late", "laptop"),)
    (change,) = found.rows
    assert (change.before.outcome, change.after.outcome) == ("held", "failed")
    assert change.checks == ()
    alone = found.only(lambda id, scale: id == "late")
    assert (alone.rows, alone.only_before) == ((), ())
    assert alone.only_after == (("late", "laptop"),)


def test_versions_machine_and_commit_that_differ_are_named(toys, opened, measure):
    row = toys(seeds=1)
    other = {"python": "3", "versions": {"jax": "2"}, "machine": {"cores": 4}}
    measure(row, "first", [2.0])
    measure(row, "second", [2.0], environment=other)
    assert compared(opened, row).environment == (
        ("commit", "abc", None),
        ("jax", "1", "2"),
        ("varan", "0", None),
        ("cores", None, 4),
    )


def test_runs_are_found_by_a_part_of_their_id(toys, opened, measure):
    row = toys(seeds=1)
    for run in ("2026-aa", "2026-aab", "2027-cc"):
        measure(row, run, [2.0])
    runs = opened.runs()
    assert find_run(runs, "cc").run == "2027-cc"
    assert find_run(runs, "2026-aa").run == "2026-aa"
    with pytest.raises(HistoryError, match="2 runs have '2026' in their id"):
        find_run(runs, "2026")
    with pytest.raises(HistoryError, match="There is no run 'dd'"):
        find_run(runs, "dd")


def test_a_run_is_compared_with_the_newest_that_shares_something(toys, opened, measure):
    one, two = toys(id="one", seeds=1), toys(id="two", seeds=1)
    with pytest.raises(HistoryError, match="There is no run yet"):
        pair(opened.runs(), [])
    for run, row in (("a", one), ("b", one), ("c", two), ("d", one)):
        measure(row, run, [2.0])
    runs = opened.runs()

    def chosen(*references):
        return [run.run for run in pair(runs, references)]

    assert chosen() == ["b", "d"]
    assert chosen("b") == ["a", "b"]
    # The earlier one comes first, however they are named.
    assert chosen("d", "c") == ["c", "d"]
    with pytest.raises(HistoryError, match="No earlier run measured anything that c"):
        chosen("c")
    with pytest.raises(HistoryError, match="one and the same run"):
        chosen("c", "c")
