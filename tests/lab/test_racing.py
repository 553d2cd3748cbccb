"""Races of toys in a real worker: the absent, raising, wrong, slow and dying."""

from pathlib import Path

import pytest

from varan.lab.racing import NoSuchHeat, RaceError, run, settings_of
from varan.lab.standings import standings
from varan.lab.store import Store


def raced(row, **options):
    kept, told = [], []
    settings = settings_of(row, repeats=options.pop("repeats", None))
    run(row, settings, kept.append, report=told.append, **options)
    return kept, told


@pytest.fixture(scope="module")
def good(make_toy):
    """One race of all kinds of contestants; its record and the worker's messages."""
    race = {"toy": "good", "repeats": 6, "limit_s": 0.15, "quick": {"repeats": 2}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "toys"))
        (record,), told = raced(make_toy(race=race))
    return record, told


def test_all_run_in_turns(good):
    record, told = good
    timed = [(m["turn"], m["name"]) for m in told if m["event"] == "time"]
    lasting = {"ours", "slow", "wrong", "nan"}
    rounds = [[name for at, name in timed if at == turn] for turn in range(6)]
    assert all(set(names) - {"raises later"} == lasting for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    for name in lasting:
        assert len(record.contestants[name]["wall_s"]) == 6
        assert len(record.contestants[name]["cpu_s"]) == 6
    assert record.reference == "ours" and record.heat == "good, n = 1"
    assert record.settings == {
        "toy": "good",
        "repeats": 6,
        "limit_s": 0.15,
        "measure": "distance",
        "tolerance": 1e-6,
    }
    assert record.environment["threads"] == "1"
    assert record.remarks[0] == "a toy"


def test_compiling_is_apart(good):
    # The first call of this toy takes 50 ms longer than the later ones.
    record, _ = good
    assert 0.04 < record.contestants["slow"]["compile_s"] < 0.2
    assert max(record.contestants["slow"]["wall_s"]) < 0.05


def test_the_absent_and_the_broken_are_skipped_by_name(good):
    record, _ = good
    assert record.skipped["absent"] == (
        "toy-peer is not installed: pip install 'varan[peers]'"
    )
    assert (
        "does not import (it needs another numpy): mend it"
        in (record.skipped["broken"])
    )
    assert not {"absent", "broken"} & set(record.contestants)


def test_who_raises_is_shown_with_what_it_said(good):
    record, _ = good
    for name in ("raises", "raises later"):
        entry = record.contestants[name]
        assert entry["failed"] == "RuntimeError: it broke"
        assert (entry["wall_s"], entry["package"]) == ([], "numpy")
        assert f"{name} failed: RuntimeError: it broke" in record.remarks


def test_wrong_answers_are_flagged_and_do_not_win(good):
    record, _ = good
    assert record.contestants["wrong"]["error"] == 0.5
    met = {name: entry["met"] for name, entry in record.contestants.items()}
    assert (met["ours"], met["slow"], met["wrong"], met["nan"]) == (
        True,
        True,
        False,
        False,
    )
    assert "Missed the distance of 1e-06: wrong 5.0e-01, nan nan." in record.remarks
    order = [entry.name for entry in standings(record)]
    assert order.index("ours") == 0 and order.index("slow") < order.index("wrong")
    assert set(order[-2:]) == {"raises", "raises later"}


def test_the_slow_are_timed_once(good):
    record, _ = good
    assert len(record.contestants["slowest"]["wall_s"]) == 1
    assert "slowest was timed once: a call takes more than 0.15 s." in record.remarks
    (slowest,) = (e for e in standings(record) if e.name == "slowest")
    assert slowest.ratio > 10 and slowest.interval is None


def test_versions_of_the_peers(good):
    import numpy

    record, _ = good
    assert record.contestants["slow"]["version"] == numpy.__version__
    assert record.contestants["ours"]["package"] is None


def test_a_race_is_stored_and_read_back(good, tmp_path):
    record, _ = good
    with Store(tmp_path) as store:
        store.add_race(record)
        (read,) = store.races("toy-good")
    # An error may be NaN, which equals nothing.
    assert read.contestants.pop("nan") and read.remarks == record.remarks
    kept = {name: e for name, e in record.contestants.items() if name != "nan"}
    assert read.contestants == kept
    assert read.skipped == record.skipped


def test_a_dying_worker_leaves_the_rounds_it_has(toys):
    row = toys(race={"toy": "killed", "repeats": 5})
    kept = []
    with pytest.raises(RaceError, match=r"ended by SIGKILL"):
        run(row, settings_of(row), kept.append)
    (record,) = kept
    assert len(record.contestants["killed"]["wall_s"]) == 2
    assert "after 2 of 5 rounds." in record.remarks[-1]


def test_settings_are_declared_and_quick_ones_go_over_them(toys):
    race = {"repeats": 7, "sizes": [5], "quick": {"sizes": [1]}}
    row = toys(race=race)
    assert settings_of(row) == {"repeats": 7, "limit_s": 10.0, "sizes": [5]}
    quick = settings_of(row, quick=True)
    assert (quick["sizes"], quick["repeats"], quick["quick"]) == ([1], 7, True)
    assert settings_of(row, repeats=2)["repeats"] == 2
    with pytest.raises(RaceError, match="has no race"):
        settings_of(toys())


def test_heats_are_chosen_by_name(toys):
    row = toys(race={"toy": "no ours", "sizes": [1, 2], "repeats": 1})
    kept, _ = raced(row, heat="n = 2", one_thread=False)
    assert [record.heat for record in kept] == ["no ours, n = 2"]
    assert kept[0].environment["threads"] == "default"
    assert kept[0].contestants["ours"]["failed"] and len(standings(kept[0])) == 2
    with pytest.raises(NoSuchHeat, match=r"'n = 3' in its name \(no ours, n = 1; "):
        raced(row, heat="n = 3")


def test_a_race_that_cannot_be_loaded(toys, monkeypatch):
    with pytest.raises(RaceError, match="The race of toy-good: KeyError: 'size'"):
        raced(toys(race={"toy": "unreadable"}))
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(RaceError, match="No module named 'toy_experiments_race'"):
        raced(toys(race={"toy": "good"}))
