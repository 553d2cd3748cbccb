"""Stored rows: chosen, judged by the present checks, marked when they are stale."""

import json
import math

import pytest

from varan.lab.catalogue import Catalogue, Check
from varan.lab.store import Record, Store
from varan.lab.stored import stored_rows


@pytest.fixture
def opened(tmp_path):
    with Store(tmp_path) as store:
        yield store


@pytest.fixture
def add(opened):
    """Adds a record of a row, as the present code measures it."""

    def add(row, seed=0, gain=2.0, *, scale="laptop", fingerprint=None, **fields):
        known = {
            "outcome": "measured",
            "numbers": {"gain": gain},
            "fingerprint": fingerprint or present(row, scale),
        }
        record = Record(
            row=row.id,
            scale=scale,
            seed=seed,
            settings={},
            environment={"commit": "abc", "versions": {"jax": "1"}},
            **known | fields,
        )
        opened.add(record)

    return add


def present(row, scale):
    from varan.lab import provenance

    settings = row.scales[scale].settings
    return provenance.fingerprint(row.id, scale, row.precision, settings, {})


def test_rows_come_in_the_order_of_the_catalogue(toys, opened, add):
    first, second = toys(id="b", seeds=2), toys(id="a", number=2, seeds=2)
    for row, scale in ((second, "laptop"), (first, "smoke"), (first, "laptop")):
        for seed in range(2):
            add(row, seed, scale=scale)
    found = stored_rows(Catalogue((first, second)), opened)
    keys = [(entry.id, entry.scale) for entry in found]
    assert keys == [("b", "smoke"), ("b", "laptop"), ("a", "laptop")]
    assert {entry.outcome for entry in found} == {"held"}
    assert not any(entry.stale for entry in found)


def test_what_was_measured_with_other_code_is_stale(toys, opened, add):
    row = toys(seeds=1)
    add(row, fingerprint="of another day")
    (entry,) = stored_rows(Catalogue((row,)), opened)
    assert entry.stale and entry.outcome == "held"
    assert "Measured with other code or settings than the present." in entry.remarks


def test_there_is_no_verdict_on_what_cannot_be_judged(toys, opened, add):
    gone, grown = toys(id="gone"), toys(id="grown")
    add(gone)
    add(grown)
    checks = (*grown.checks, Check("new", "other", ">=", 1.0, "mean", "theory"))
    found = stored_rows(Catalogue((toys(id="grown", checks=checks),)), opened)
    assert [(entry.id, entry.outcome) for entry in found] == [
        ("grown", "no verdict"),
        ("gone", "no verdict"),
    ]
    assert "did not measure 'other', which the check 'new' needs" in found[0].reason
    assert found[1].reason == "The catalogue has no such built row."


def test_a_failure_is_told_with_what_it_said(toys, opened, add):
    row = toys(seeds=3)
    add(row, 0)
    add(row, 2, outcome="failed", message="it broke.", numbers={})
    (entry,) = stored_rows(Catalogue((row,)), opened)
    assert entry.outcome == "failed"
    assert entry.reason == "1 of 2 seeds failed; seed 2: it broke."


def test_a_run_is_shown_as_it_was(toys, opened, add):
    row = toys(seeds=1)
    add(row, gain=1.0, run="first")
    add(row, gain=2.0, run="second")
    outcomes = {
        run: [entry.outcome for entry in stored_rows(Catalogue((row,)), opened, run)]
        for run in ("first", "second", None)
    }
    assert outcomes == {"first": ["not held"], "second": ["held"], None: ["held"]}


def test_as_plain_data_it_is_json(toys, opened, add):
    row = toys(seeds=1)
    add(row, gain=math.inf, wall_s=1.0, run="first")
    (entry,) = stored_rows(Catalogue((row,)), opened)
    plain = json.loads(json.dumps(entry.to_dict(), allow_nan=False))
    measured = plain["measurements"]["0"]
    assert (measured["numbers"], measured["run"]) == ({"gain": "inf"}, "first")
    assert (measured["commit"], measured["jax"], measured["wall_s"]) == ("abc", "1", 1)
    assert plain["checks"][0]["outcome"] == plain["outcome"] == "held"
