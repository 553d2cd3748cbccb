"""Stores of older versions are brought up to date, those of newer ones refused."""

import os
import sqlite3
from contextlib import closing
from multiprocessing import get_context

import pytest
import sqlalchemy as sa

from varan.lab import _migrations, _schema
from varan.lab.store import FILE, SCHEMA, Record, Store, StoreError

# What the first version of the store made.
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
"""
_COLUMNS = """INSERT INTO measurement (
    "row", scale, seed, outcome, taken, fingerprint, wall_s, cpu_s, peak_memory_mib,
    message, detail, settings, numbers, curves, notes, sources, environment
) VALUES """
# A measurement and a failure in it.
ROWS = (
    _COLUMNS
    + """(
    'toy', 'laptop', 0, 'measured', '2026-01-01T00:00:00+00:00', 'mark', 0.5, 0.4,
    100.0, NULL, NULL, '{"n": 3}', '{"gain": 2.0, "worse": Infinity}',
    '[{"x": [1.0], "y": ["inf"]}]', '["a note"]', '["core/_status.py"]',
    '{"python": "3"}'
)""",
    _COLUMNS
    + """(
    'toy', 'laptop', 1, 'failed', '2026-01-01T00:00:01+00:00', NULL, NULL, NULL,
    NULL, 'it broke', 'at line 1', '{"n": 3}', '{}', '[]', '[]', '[]', '{}'
)""",
)


@pytest.fixture(params=["sqlite", "postgres"])
def location(request, tmp_path):
    """Where a new store goes."""
    if request.param == "sqlite":
        return tmp_path
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def old_file(tmp_path):
    """The folder of a store of the first schema, as it was made then."""
    with closing(sqlite3.connect(tmp_path / FILE)) as connection, connection:
        connection.executescript(SCHEMA_1)
        for row in ROWS:
            connection.execute(row)
    return tmp_path


@pytest.fixture
def old(location, request):
    """A store of the first schema; on a server by the first step, as none was then."""
    if not isinstance(location, str):
        return request.getfixturevalue("old_file")
    engine = sa.create_engine(location.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        _migrations._STEPS[0](connection)
        connection.execute(sa.insert(_schema.ABOUT).values(schema=1))
        for row in ROWS:
            connection.exec_driver_sql(row)
    engine.dispose()
    return location


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
        connection.exec_driver_sql("ALTER TABLE nonesuch ADD COLUMN x INTEGER")

    with monkeypatch.context() as patch:
        patch.setattr(_migrations, "_STEPS", (first, breaks))
        with pytest.raises(StoreError, match=r"cannot be opened .*nonesuch"):
            Store(old)
    # Half a step would make it fail again: the table of the races would be there.
    _open(old)


def test_an_old_store_that_may_only_be_read_is_left_alone(old_file, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StoreError, match=r"cannot be opened \(.*readonly"):
        Store(old_file, existing=True)
    monkeypatch.undo()
    _open(old_file)


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


def test_a_newer_store_is_refused(location):
    with Store(location) as opened, opened._engine.begin() as connection:
        connection.execute(sa.update(_schema.ABOUT).values(schema=99))
    with pytest.raises(StoreError, match=r"newer varan \(schema 99.*Update varan"):
        Store(location)


def test_queries_see_the_tables_as_they_are(location):
    with Store(location) as opened:
        made = sa.inspect(opened._engine)
        assert SCHEMA == 2
        for table in (_schema.ABOUT, _schema.MEASUREMENTS, _schema.RACES):
            columns = {column["name"] for column in made.get_columns(table.name)}
            assert columns == set(table.c.keys())
