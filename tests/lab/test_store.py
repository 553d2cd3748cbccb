"""The store keeps what it is given, and refuses files it cannot trust."""

import math
import sqlite3
from dataclasses import replace
from multiprocessing import get_context

import pytest

from varan.lab import provenance, store
from varan.lab.store import Record, Store, StoreError


def record(seed=0, **fields):
    return Record(
        row="toy",
        scale="laptop",
        seed=seed,
        outcome="measured",
        settings={"n": 3},
        environment={"python": "3"},
        numbers={"gain": 2.0, "worse": math.inf},
        curves=[{"x": [1.0], "y": ["inf"]}],
        notes=["a note"],
        wall_s=0.5,
        **fields,
    )


def test_a_record_comes_back(tmp_path):
    with Store(tmp_path / "new" / "folder") as opened:
        opened.add(record())
    with Store(tmp_path / "new" / "folder") as opened:
        assert opened.records("toy", "laptop") == [record(taken=_taken(opened))]
        assert opened.records("toy", "smoke") == []


def _taken(opened):
    return opened.records("toy", "laptop")[0].taken


def test_nothing_is_overwritten(tmp_path):
    with Store(tmp_path) as opened:
        opened.add(record(message="old"))
        opened.add(record(message="new"))
        assert [r.message for r in opened.records("toy", "laptop")] == ["old", "new"]


def test_only_what_the_present_code_would_repeat_is_current(toys, tmp_path):
    row = toys(id="toy", seeds=2)
    settings = dict(row.scales["laptop"].settings)
    sources = ["core/_status.py"]
    hashes = {file: provenance.hash_source(file) for file in sources}

    def mark(**changes):
        parts = {"precision": row.precision, "settings": settings, "hashes": hashes}
        return provenance.fingerprint("toy", "laptop", **{**parts, **changes})

    with Store(tmp_path) as opened:
        opened.add(record(0, fingerprint=mark(), sources=sources))
        assert list(opened.current(row, "laptop")) == [0]
        assert not opened.current(replace(row, precision="float64"), "laptop")
        assert not opened.current(toys(id="toy", settings={"n": 4}), "laptop")
        # A failure, an edited file and an unknown origin never count.
        opened.add(replace(record(1, fingerprint=mark()), outcome="failed"))
        stale = mark(hashes={"core/_status.py": "of another day"})
        opened.add(record(2, fingerprint=stale, sources=sources))
        opened.add(record(3))
        assert list(opened.current(row, "laptop")) == [0]
        # More seeds do not make what is measured stale.
        assert list(opened.current(toys(id="toy", seeds=9), "laptop")) == [0]


def _append(folder, seeds):
    with Store(folder) as opened:
        for seed in seeds:
            opened.add(record(seed))


def test_two_processes_write_at_once(tmp_path):
    context = get_context("spawn")
    halves = [range(0, 20), range(20, 40)]
    writers = [context.Process(target=_append, args=(tmp_path, h)) for h in halves]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    with Store(tmp_path) as opened:
        seeds = sorted(r.seed for r in opened.records("toy", "laptop"))
    assert seeds == list(range(40))


def test_a_newer_store_is_refused(tmp_path):
    with Store(tmp_path):
        pass
    with sqlite3.connect(tmp_path / store.FILE) as connection:
        connection.execute("UPDATE varan_store SET schema = 99")
    connection.close()
    with pytest.raises(StoreError, match=r"newer varan \(schema 99.*Update varan"):
        Store(tmp_path)


def test_a_corrupt_store_is_refused(tmp_path):
    (tmp_path / store.FILE).write_bytes(b"this is no database, " * 100)
    with pytest.raises(StoreError, match=r"cannot be opened \(file is not a database"):
        Store(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot be made .*--out"):
        Store(tmp_path / "file" / "results")


def test_a_store_that_cannot_be_written(tmp_path):
    with Store(tmp_path) as opened:
        # The quota of a full disk: the file may not grow.
        with opened._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match=r"cannot be written \(.*full"):
            opened.add(replace(record(), detail="x" * 100_000))
        assert opened.records("toy", "laptop") == []
