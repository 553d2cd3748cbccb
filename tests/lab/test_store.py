"""The store keeps what it is given, in SQLite as in PostgreSQL."""

import math
import re
from dataclasses import replace
from multiprocessing import get_context

import pytest

from varan.lab import provenance
from varan.lab.store import RaceRecord, Record, Store, new_run_id


@pytest.fixture(params=["sqlite", "postgres"])
def location(request, tmp_path):
    """Where a new store goes: a folder, then a database of a real server."""
    if request.param == "sqlite":
        return tmp_path / "new" / "folder"
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def opened(location):
    with Store(location) as store:
        yield store


def record(seed=0, row="toy", scale="laptop", **fields):
    fields = {
        "outcome": "measured",
        "numbers": {"gain": 2.0, "worse": math.inf},
    } | fields
    return Record(
        row=row,
        scale=scale,
        seed=seed,
        settings={"n": 3},
        environment={"python": "3", "commit": "abc"},
        curves=[{"x": [1.0], "y": ["inf"]}],
        notes=["a note"],
        wall_s=0.5,
        compile_s=0.1,
        **fields,
    )


def test_a_record_comes_back(location):
    kept = record(run=new_run_id())
    with Store(location) as opened:
        opened.add(kept)
    with Store(location) as opened:
        assert opened.records("toy", "laptop") == [kept]
        assert opened.records("toy", "smoke") == []


def test_what_no_database_takes_as_text_is_replaced(opened):
    opened.add(record(outcome="failed", detail="a\0b \ud800", message="Grüße, 猫"))
    (kept,) = opened.records()
    assert (kept.detail, kept.message) == ("a\N{REPLACEMENT CHARACTER}b ?", "Grüße, 猫")


def test_nothing_is_overwritten(opened):
    opened.add(record(message="old"))
    opened.add(record(message="new"))
    assert [r.message for r in opened.records("toy", "laptop")] == ["old", "new"]


def test_records_are_chosen(opened):
    for run, row, outcome in [
        ("a", "one", "measured"),
        ("a", "two", "failed"),
        ("b", "one", "measured"),
    ]:
        opened.add(record(row=row, run=run, outcome=outcome))
    assert [r.row for r in opened.records()] == ["one", "two", "one"]
    assert [r.run for r in opened.records("one")] == ["a", "b"]
    assert [r.row for r in opened.records(run="a")] == ["one", "two"]
    assert [r.row for r in opened.records(outcome="failed")] == ["two"]
    assert opened.records("two", run="b") == []


def test_only_what_the_present_code_would_repeat_is_current(toys, opened):
    row = toys(id="toy", seeds=2)
    settings = dict(row.scales["laptop"].settings)
    sources = ["core/_status.py"]
    hashes = {file: provenance.hash_source(file) for file in sources}

    def mark(**changes):
        parts = {"precision": row.precision, "settings": settings, "hashes": hashes}
        return provenance.fingerprint("toy", "laptop", **{**parts, **changes})

    opened.add(record(0, fingerprint=mark(), sources=sources))
    assert list(opened.current(row, "laptop")) == [0]
    assert not opened.current(replace(row, precision="float64"), "laptop")
    assert not opened.current(toys(id="toy", settings={"n": 4}), "laptop")
    # A failure, an edited file and an unknown origin never count.
    opened.add(record(1, fingerprint=mark(), outcome="failed"))
    stale = mark(hashes={"core/_status.py": "of another day"})
    opened.add(record(2, fingerprint=stale, sources=sources))
    opened.add(record(3))
    assert list(opened.current(row, "laptop")) == [0]
    # More seeds do not make what is measured stale; the newest measurement counts.
    opened.add(record(0, fingerprint=mark(), sources=sources, message="again"))
    (known,) = opened.current(toys(id="toy", seeds=9), "laptop").values()
    assert known.message == "again"
    assert known.is_current(row, "laptop")


def test_many_records_hash_each_source_once(toys, opened, monkeypatch):
    sources = ["core/_status.py", "core/_checks.py"]
    for seed in range(5):
        opened.add(record(seed, sources=sources))
    hashed = []
    monkeypatch.setattr(provenance, "hash_source", lambda file: hashed.append(file))
    opened.current(toys(id="toy"), "laptop")
    assert hashed == sources


def test_the_newest_measurements_belong_together(opened):
    for seed, mark, message in [
        (0, "old", "a"),
        (1, "old", "b"),
        (2, "old", "c"),
        (0, "new", "d"),
        (1, "new", "e"),
        (0, "new", "f"),
    ]:
        opened.add(record(seed, fingerprint=mark, message=message))
    # A failure changes nothing of what was measured.
    opened.add(record(2, fingerprint="newer", outcome="failed"))
    opened.add(record(0, scale="smoke", message="small"))
    newest = opened.newest("toy", "laptop")
    assert {seed: r.message for seed, r in newest.items()} == {0: "f", 1: "e"}
    # Without a fingerprint they still belong together.
    opened.add(record(1, scale="smoke", message="of unknown code"))
    everything = opened.newest_all()
    assert everything["toy", "laptop"] == newest
    small = {seed: r.message for seed, r in everything["toy", "smoke"].items()}
    assert small == {0: "small", 1: "of unknown code"}
    assert opened.newest("nonesuch", "laptop") == {}


def test_a_failure_counts_until_something_newer_makes_it_good(opened):
    def failing():
        return {key: set(found) for key, found in opened.failing().items()}

    opened.add(record(0, row="dead", outcome="failed"))
    opened.add(record(0, run="a"))
    opened.add(record(1, run="a", outcome="failed"))
    opened.add(record(2, run="a"))
    # Of one run, whatever the order; of a row without any measurement; after it.
    assert failing() == {("dead", "laptop"): {0}, ("toy", "laptop"): {1}}
    opened.add(record(2, run="b", outcome="failed"))
    assert failing()["toy", "laptop"] == {1, 2}
    # Measured by another run: what went before it has no say any more.
    opened.add(record(2, run="c"))
    assert failing() == {("dead", "laptop"): {0}}
    opened.add(record(0, row="dead"))
    assert failing() == {}


def test_a_run_has_what_it_measured_and_what_it_took_from_the_store(opened):
    def add(seed, run, mark, **fields):
        opened.add(record(seed, run=run, fingerprint=mark, **fields))

    add(0, "a", "old")
    add(1, "a", "old")
    add(0, "b", "new")
    add(0, "b", "new", row="whole")
    # It is resumed, with a seed that fails and one of another row.
    add(1, "c", "new")
    add(2, "c", None, outcome="failed")
    add(0, "c", "new", row="another", scale="smoke")
    add(3, "d", "new")
    found = opened.of_run("c")
    assert set(found) == {("toy", "laptop"), ("another", "smoke")}
    runs = {seed: r.run for seed, r in found["toy", "laptop"].items()}
    assert runs == {0: "b", 1: "c", 2: "c"}
    assert found["toy", "laptop"][2].outcome == "failed"
    assert set(opened.of_run("a")["toy", "laptop"]) == {0, 1}
    assert opened.of_run("nonesuch") == {}


def test_runs_are_summed_up(opened):
    assert opened.runs() == []
    opened.add(record(taken="2026-01-01T00:00:00+00:00"))
    opened.add(record(0, run="b", taken="2026-01-02T00:00:00+00:00"))
    opened.add(record(1, run="b", taken="2026-01-03T00:00:00+00:00"))
    opened.add(record(0, run="b", row="two", scale="smoke", outcome="failed"))
    opened.add(record(0, run="a"))
    before, first, second = opened.runs()
    assert (before.run, before.measured) == (None, 1)
    assert (first.run, first.rows, first.measured, first.failed) == ("b", 2, 2, 1)
    assert first.began == "2026-01-02T00:00:00+00:00" < first.ended
    assert (first.scales, first.wall_s) == (("laptop", "smoke"), 1.5)
    assert (second.run, second.commit) == ("a", "abc")


def test_run_ids_tell_runs_apart_and_say_when():
    ids = {new_run_id() for _ in range(100)}
    assert len(ids) > 95
    assert all(re.fullmatch(r"\d{8}-\d{6}-[a-z]{5}", each) for each in ids)


def race(row="toy", heat="small", **fields):
    times = {"wall_s": [0.1, 0.2], "cpu_s": [0.1, 0.2], "compile_s": 1.0}
    return RaceRecord(
        row=row,
        heat=heat,
        reference="ours",
        contestants={"ours": {**times, "package": None, "version": None, "error": 0.0}},
        environment={"python": "3"},
        settings={"rounds": 2},
        skipped={"peer": "not installed"},
        **fields,
    )


def test_the_newest_race_of_each_heat_comes_back(opened):
    assert opened.races() == []
    opened.add_race(race(remarks=["old"]))
    opened.add_race(race("another"))
    opened.add_race(race(heat="large"))
    newest = race(remarks=["new"])
    opened.add_race(newest)
    found = [(r.row, r.heat) for r in opened.races()]
    assert found == [("another", "small"), ("toy", "large"), ("toy", "small")]
    assert opened.races("toy")[1] == newest
    assert opened.races("nonesuch") == []


def _append(location, seeds):
    with Store(location) as opened:
        for seed in seeds:
            opened.add(record(seed, detail="x" * 10_000))


def test_several_processes_write_at_once(location):
    # All of them find no store and make it: one does, the others wait.
    context = get_context("spawn")
    shares = [range(20 * n, 20 * n + 20) for n in range(3)]
    writers = [context.Process(target=_append, args=(location, s)) for s in shares]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    with Store(location) as opened:
        seeds = sorted(r.seed for r in opened.records("toy", "laptop"))
    assert seeds == list(range(60))
