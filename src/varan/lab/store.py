"""The store: every measurement and race ever taken, in SQLite or PostgreSQL.

Nothing is ever overwritten: a row measured again gives further records, and the newest
one counts. Several processes may write at once: the SQLite file is in write-ahead mode.
"""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from . import _queries, _schema, provenance
from ._database import (
    FILE,
    NoStoreError,
    StoreError,
    database,
    write_ahead,
)
from ._migrations import SCHEMA, NewerSchemaError, migrate, version
from ._records import (
    RaceRecord,
    Record,
    RunSummary,
    new_run_id,
    present_fingerprint,
)
from ._schema import MEASUREMENTS, RACES
from .catalogue import Row

__all__ = [
    "FILE",
    "SCHEMA",
    "NoStoreError",
    "RaceRecord",
    "Record",
    "RunSummary",
    "Store",
    "StoreError",
    "new_run_id",
]

# Row and scale, then seed, to record.
ByRow = dict[tuple[str, str], dict[int, Record]]

# How long a measurement waits for a server that is away, and between two attempts.
_PATIENCE_S = 60
_PAUSE_S = 1.0

_M = MEASUREMENTS.c
_NO_CURVES = sa.literal("[]").label("curves")


class Store:
    """An open store; a context manager.

    Args:
        location: A folder, the store's file in it, or a `postgresql://` URL.
        existing: Open only a store that is there already, be it one that may only be
            read; else it is made where there is none, and must be writable.

    Attributes:
        location: The file, or the URL without its password; fit for printing.
        path: The SQLite file; `None` where the store is no file.

    Raises:
        StoreError: The folder, file or database cannot be used.
    """

    def __init__(self, location: Path | str, *, existing: bool = False):
        self._database = database(location, existing=existing)
        self._engine = self._database.engine
        self.location = self._database.location
        self.path = self._database.path
        try:
            with self._guarded("opened"), self._engine.connect() as connection:
                self._prepare(connection, existing)
        except BaseException:
            self._engine.dispose()
            raise

    def _prepare(self, connection: sa.Connection, existing: bool) -> None:
        try:
            if existing:
                if version(connection) == 0:
                    raise NoStoreError(self.location)
                migrate(connection)
            else:
                write_ahead(connection)
                migrate(connection)
                _try_writing(connection)
        except NewerSchemaError as error:
            raise StoreError(
                f"The store {self.location} was written by a newer varan (schema "
                f"{error.args[0]}, this one knows {SCHEMA}). Update varan, or choose "
                "another store with --store."
            ) from None

    @contextmanager
    def _guarded(self, action: str) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            reason = self._database.reason(error.orig or error)
        except ValueError as error:
            reason = f"a damaged record: {self._database.reason(error)}"
        else:
            return
        remedy = "Free or repair it" if self.path else "Check the server and the URL"
        raise StoreError(
            f"The store {self.location} cannot be {action} ({reason}). {remedy}, or "
            "choose another one with --store."
        ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.dispose()

    def add(self, record: Record) -> None:
        """Appends a record; when this returns it survives a crash.

        Args:
            record: What was measured, or how it failed.
        """
        self._append(MEASUREMENTS, _schema.measurement_values(record))

    def records(
        self,
        row: str | None = None,
        scale: str | None = None,
        *,
        run: str | None = None,
        outcome: str | None = None,
    ) -> list[Record]:
        """All records of a row, a scale, a run, an outcome; oldest first.

        Args:
            row: The row's id; every row when left out.
            scale: The scale; every scale when left out.
            run: The run's id; every run when left out.
            outcome: `"measured"` or `"failed"`; both when left out.
        """
        wanted = {"row": row, "scale": scale, "run": run, "outcome": outcome}
        return self._read(
            *(_M[name] == value for name, value in wanted.items() if value is not None)
        )

    def current(self, row: Row, scale: str) -> dict[int, Record]:
        """By seed, the newest measurement that the present code would repeat.

        Args:
            row: The row.
            scale: The scale.
        """
        query = sa.select(_M.id, _M.seed, _M.fingerprint, _M.sources).where(
            _queries.MEASURED, _M.row == row.id, _M.scale == scale
        )
        hash_source = functools.cache(provenance.hash_source)

        @functools.cache
        def present(sources: str) -> str:
            return present_fingerprint(row, scale, json.loads(sources), hash_source)

        with self._guarded("read"):
            newest = {
                known["seed"]: known["id"]
                for known in self._fetch(query.order_by(_M.id))
                if known["fingerprint"] == present(known["sources"])
            }
        return _by_seed(self._read(_M.id.in_(newest.values())))

    def newest(self, row: str, scale: str) -> dict[int, Record]:
        """By seed, the newest measurements that belong together.

        They share the fingerprint of the row's newest measurement at this scale: the
        same code and settings, whether or not the present code would repeat them.

        Args:
            row: The row's id.
            scale: The scale.
        """
        ids = _queries.newest(_M.row == row, _M.scale == scale)
        return _by_seed(self._read(_M.id.in_(ids)))

    def newest_all(self, *, curves: bool = True) -> ByRow:
        """What `newest` gives, for every row and scale at once.

        Args:
            curves: Whether to read the curves, most of what a store holds.
        """
        return _by_row(self._read(_M.id.in_(_queries.newest()), curves=curves))

    def failing(self) -> ByRow:
        """By row, scale and seed, the failures that nothing newer has made good.

        Each is the last word on its seed, and no older than the row's newest
        measurement at its scale, or of the same run.
        """
        return _by_row(self._read(_M.id.in_(_queries.failing())))

    def of_run(self, run: str, *, curves: bool = True) -> ByRow:
        """What a run came to, by row, scale and seed: measurements and failures.

        A run takes from the store what was measured before it with the same code and
        settings: of the rows that it measured at all, that counts as its own.

        Args:
            run: The run's id.
            curves: Whether to read the curves, most of what a store holds.
        """
        chosen: dict[tuple[str, str, int], int] = {}
        for ids in (_queries.known_to(run), sa.select(_M.id).where(_M.run == run)):
            query = sa.select(_M.id, _M.row, _M.scale, _M.seed).where(_M.id.in_(ids))
            for entry in self._fetch(query.order_by(_M.id)):
                # What it took itself is read last, and stays.
                chosen[entry["row"], entry["scale"], entry["seed"]] = entry["id"]
        return _by_row(self._read(_M.id.in_(chosen.values()), curves=curves))

    def runs(self) -> list[RunSummary]:
        """Every run that left a record, oldest first."""
        covers: dict[str | None, list[tuple[str, str]]] = defaultdict(list)
        for entry in self._fetch(sa.select(_M.run, _M.row, _M.scale).distinct()):
            covers[entry["run"]].append((entry["row"], entry["scale"]))
        found = []
        for entry in self._fetch(_queries.runs()):
            fields = dict(entry)
            environment = json.loads(fields.pop("environment"))
            covered = tuple(sorted(covers[fields["run"]]))
            found.append(RunSummary(**fields, covers=covered, environment=environment))
        return found

    def add_race(self, record: RaceRecord) -> None:
        """Appends a heat of a race; when this returns it survives a crash.

        Args:
            record: What was measured.
        """
        self._append(RACES, _schema.race_values(record))

    def races(self, row: str | None = None) -> list[RaceRecord]:
        """The newest race of each row and heat, in the order of rows and heats.

        Args:
            row: The row's id; every row when left out.
        """
        query = _queries.newest_races()
        if row is not None:
            query = query.where(RACES.c.row == row)
        with self._guarded("read"):
            return [_schema.race(entry) for entry in self._fetch(query)]

    def _append(self, table: sa.TableClause, values: Mapping[str, Any]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        with self._guarded("written"):
            while True:
                try:
                    with self._engine.begin() as connection:
                        connection.execute(sa.insert(table).values(values))
                    return
                except OperationalError:
                    # What was measured is worth waiting for a server that restarts; a
                    # file does not come back by itself.
                    if self.path or time.monotonic() > deadline:
                        raise
                    time.sleep(_PAUSE_S)

    def _fetch(self, query: sa.Executable) -> Sequence[sa.RowMapping]:
        with self._guarded("read"), self._engine.connect() as connection:
            return connection.execute(query).mappings().all()

    def _read(
        self, *conditions: sa.ColumnElement[bool], curves: bool = True
    ) -> list[Record]:
        columns: list[Any] = [
            column if curves or column is not _M.curves else _NO_CURVES for column in _M
        ]
        query = sa.select(*columns).where(*conditions).order_by(_M.id)
        with self._guarded("read"):
            return [_schema.measurement(entry) for entry in self._fetch(query)]


def _try_writing(connection: sa.Connection) -> None:
    """Finds out, before anything is measured, whether a measurement can be kept."""
    nothing = Record("", "", 0, "failed", {}, {})
    values = _schema.measurement_values(nothing)
    connection.execute(sa.insert(MEASUREMENTS).values(values))
    connection.rollback()


def _by_row(records: Iterable[Record]) -> ByRow:
    found: ByRow = {}
    for record in records:
        found.setdefault((record.row, record.scale), {})[record.seed] = record
    return found


def _by_seed(records: Iterable[Record]) -> dict[int, Record]:
    return {record.seed: record for record in records}
