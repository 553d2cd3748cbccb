"""Stores that cannot be opened, read or written: one sentence, and nothing lost."""

import os
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
import sqlalchemy as sa

from varan.lab.runner import run
from varan.lab.store import FILE, Record, Store, StoreError


def record(seed=0):
    return Record("toy", "laptop", seed, "measured", {"n": 3}, {"python": "3"})


@pytest.fixture
def filled(tmp_path):
    """The folder of a store with one record."""
    with Store(tmp_path) as opened:
        opened.add(record())
    return tmp_path


def seeds_in(location, **options):
    with Store(location, **options) as opened:
        return [kept.seed for kept in opened.records()]


def test_a_store_is_named_by_its_folder_or_file(filled):
    assert seeds_in(filled) == seeds_in(str(filled)) == seeds_in(filled / FILE) == [0]
    with Store(filled) as opened:
        assert opened.location == str(opened.path) == str(filled / FILE)


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / FILE).write_bytes(b"this is no database, " * 100)
    with pytest.raises(StoreError, match=r"cannot be opened \(file is not a database"):
        Store(tmp_path)


def test_a_file_that_was_cut_off(filled):
    with Store(filled) as opened:
        for seed in range(1, 50):
            opened.add(replace(record(seed), detail="x" * 2000))
    content = (filled / FILE).read_bytes()
    (filled / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match=r"(opened|read) \(.*malformed"):
        seeds_in(filled)


def test_a_record_that_is_damaged(filled):
    with closing(sqlite3.connect(filled / FILE)) as connection, connection:
        connection.execute("UPDATE measurement SET numbers = '{'")
    with pytest.raises(StoreError, match=r"cannot be read \(a damaged record"):
        seeds_in(filled)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot be made .*--out"):
        Store(tmp_path / "file" / "results")


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(StoreError, match=r"There is no store at .*`varan run` makes"):
        Store(tmp_path / "typo", existing=True)
    # Some other program's file, or one that was cut to nothing.
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(StoreError, match="There is no store at"):
        Store(tmp_path, existing=True)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("log", [False, True])
def test_a_folder_that_may_only_be_read(filled, monkeypatch, log):
    """Results can be looked at; what would measure is refused before it begins."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    if log:
        # What a killed run leaves: its last record stands only in the log.
        running = Store(filled)
        running.add(record(1))
    with Store(filled, existing=True) as opened:
        assert [kept.seed for kept in opened.records()] == ([0, 1] if log else [0])
        with pytest.raises(StoreError, match=r"cannot be written \(.*readonly"):
            opened.add(record(2))
    if log:
        running.__exit__()
    assert sorted(file.name for file in filled.iterdir()) == [FILE]


def test_a_file_that_cannot_be_written_is_refused_before_a_run(filled, monkeypatch):
    real = sqlite3.connect

    def read_only(path, **options):
        return real(f"file:{path}?mode=ro", uri=True, **options)

    monkeypatch.setattr(sqlite3.dbapi2, "connect", read_only)
    with pytest.raises(StoreError, match=r"cannot be opened \(.*readonly"):
        Store(filled)


def test_a_full_disk(filled):
    with Store(filled) as opened:
        # The quota of a full disk: the file may not grow.
        with opened._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match=r"cannot be written \(.*full"):
            opened.add(replace(record(1), detail="x" * 100_000))
        assert len(opened.records()) == 1
    assert seeds_in(filled) == [0]


def test_a_run_on_a_full_disk_ends_in_order_and_goes_on_later(toys, tmp_path):
    row = toys(seeds=3)
    with Store(tmp_path) as opened:
        grown = []

        @sa.event.listens_for(opened._engine, "commit")
        def fill(connection):
            grown.append(connection)
            # After the first measurement not a page is free.
            connection.exec_driver_sql("PRAGMA max_page_count = 1")

        with pytest.raises(StoreError, match=r"cannot be written \(.*full"):
            run([row], "laptop", opened, jobs=1)
        assert grown
        kept = seeds_in(tmp_path)
        assert 1 <= len(kept) < 3
    # Space is made: the same call goes on from there.
    with Store(tmp_path) as opened:
        (again,) = run([row], "laptop", opened, jobs=1)
        assert (again.reused, set(again.measured)) == (len(kept), {0, 1, 2})
