"""Stores of older versions are brought up to date, those of newer ones refused."""

import sqlite3
from contextlib import closing
from multiprocessing import get_context

import pytest
import sqlalchemy as sa

from varan.lab import _migrations, _schema
from varan.lab.store import FILE, SCHEMA, Record, Store, StoreError

# What the first version of the store made, and one measurement and failure in it.
SCHEMA_1 = """
CREATE TABLE varan_store (schema INTEGER);
INSERT INTO varan_store VALUES (1);
CREATE TABLE measurement (
    id INTEGER NOT NULL, "row" VARCHAR NOT NULL, scale VARCHAR NOT NULL,
    seed INTEGER NOT NULL, outcome VARCHAR NOT NULL, taken VARCHAR NOT NULL,
    fingerprint VARCHAR, wall_s FLOAT, cpu_s FLOAT, peak_memory_mib FLOAT,
    message TEXT, detail TEXT, settings TEXT NOT NULL, numbers TEXT NOT NULL,
    curves TEXT NOT NULL, notes TEXT NOT NULL, sources TEXT NOT NULL,
    environment TEXT NOT NULL, PRIMARY KEY (id)
);
CREATE INDEX measurement_of ON measurement ("row", scale, seed);
INSERT INTO measurement VALUES (
    1, 'toy', 'laptop', 0, 'measured', '2026-01-01T00:00:00+00:00', 'mark', 0.5, 0.4,
    100.0, NULL, NULL, '{"n": 3}', '{"gain": 2.0, "worse": Infinity}',
    '[{"x": [1.0], "y": ["inf"]}]', '["a note"]', '["core/_status.py"]',
    '{"python": "3"}'
);
INSERT INTO measurement VALUES (
    2, 'toy', 'laptop', 1, 'failed', '2026-01-01T00:00:01+00:00', NULL, NULL, NULL,
    NULL, 'it broke', 'at line 1', '{"n": 3}', '{}', '[]', '[]', '[]', '{}'
);
"""


@pytest.fixture
def old(tmp_path):
    """The folder of a store of the first schema."""
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.executescript(SCHEMA_1)
    return tmp_path


def test_an_old_store_is_brought_up_to_date(old):
    new = Record("toy", "laptop", 1, "measured", {}, {}, compile_s=0.1, run="r")
    with Store(old) as opened:
        first, second = opened.records()
        opened.add(new)
    assert first.numbers == {"gain": 2.0, "worse": float("inf")}
    assert (first.settings, first.wall_s) == ({"n": 3}, 0.5)
    assert first.curves == [{"x": [1.0], "y": ["inf"]}]
    assert (first.fingerprint, first.notes) == ("mark", ["a note"])
    assert (first.run, first.compile_s) == (None, None)
    assert (second.outcome, second.message) == ("failed", "it broke")
    with Store(old) as opened:
        assert opened.records() == [first, second, new]
        assert opened.races() == []


def test_a_step_that_fails_leaves_the_store_as_it_was(old, monkeypatch):
    first, second = _migrations._STEPS

    def breaks(connection):
        second(connection)
        connection.exec_driver_sql("ALTER TABLE nonesuch ADD COLUMN x")

    with monkeypatch.context() as patch:
        patch.setattr(_migrations, "_STEPS", (first, breaks))
        with pytest.raises(StoreError, match=r"cannot be opened .*nonesuch"):
            Store(old)
    with closing(sqlite3.connect(old / FILE)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
        assert ("race",) not in tables
        assert connection.execute("SELECT schema FROM varan_store").fetchall() == [(1,)]
    _open(old)


def _open(folder):
    with Store(folder) as opened:
        assert len(opened.records()) == 2


def test_two_processes_bring_it_up_to_date_at_once(old):
    context = get_context("spawn")
    openers = [context.Process(target=_open, args=(old,)) for _ in range(3)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    assert [opener.exitcode for opener in openers] == [0, 0, 0]


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_a_newer_store_is_refused(dialect, request, tmp_path):
    location = tmp_path
    if dialect == "postgres":
        location = request.getfixturevalue("postgres").new_database()
    with Store(location) as opened, opened._engine.begin() as connection:
        connection.execute(sa.update(_schema.ABOUT).values(schema=99))
    with pytest.raises(StoreError, match=r"newer varan \(schema 99.*Update varan"):
        Store(location)


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_queries_see_the_tables_as_they_are(dialect, request, tmp_path):
    location = tmp_path
    if dialect == "postgres":
        location = request.getfixturevalue("postgres").new_database()
    with Store(location) as opened:
        made = sa.inspect(opened._engine)
        assert SCHEMA == 2
        for table in (_schema.ABOUT, _schema.MEASUREMENTS, _schema.RACES):
            columns = {column["name"] for column in made.get_columns(table.name)}
            assert columns == set(table.c.keys())
