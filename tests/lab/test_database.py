"""Stores that cannot be opened, read or written: one sentence, and nothing lost."""

from dataclasses import replace

import pytest

from varan.lab.store import FILE, Record, Store, StoreError


def record(seed=0):
    return Record("toy", "laptop", seed, "measured", {"n": 3}, {"python": "3"})


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / FILE).write_bytes(b"this is no database, " * 100)
    with pytest.raises(StoreError, match=r"cannot be opened \(file is not a database"):
        Store(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot be made .*--out"):
        Store(tmp_path / "file" / "results")


def test_a_full_disk(tmp_path):
    with Store(tmp_path) as opened:
        opened.add(record(0))
        # The quota of a full disk: the file may not grow.
        with opened._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match=r"cannot be written \(.*full"):
            opened.add(replace(record(1), detail="x" * 100_000))
    with Store(tmp_path) as opened:
        assert [r.seed for r in opened.records()] == [0]
