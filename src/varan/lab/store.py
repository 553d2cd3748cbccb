"""The store: every measurement and race ever taken, in SQLite or PostgreSQL.

Nothing is ever overwritten: a row measured again gives further records, and the newest
one counts. Several processes may write at once: the SQLite file is in write-ahead mode.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from . import _schema, provenance
from ._database import FILE, StoreError, database, write_ahead
from ._migrations import SCHEMA, NewerSchemaError, migrate
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
    "RaceRecord",
    "Record",
    "RunSummary",
    "Store",
    "StoreError",
    "new_run_id",
]

_M = MEASUREMENTS.c
_MEASURED = _M.outcome == "measured"


class Store:
    """An open store; a context manager.

    Args:
        location: A folder, whose file is made when absent, or a `postgresql://` URL.

    Attributes:
        location: The file, or the URL without its password; fit for printing.
        path: The SQLite file; `None` where the store is no file.

    Raises:
        StoreError: The folder, file or database cannot be used.
    """

    def __init__(self, location: Path | str):
        self._database = database(location)
        self._engine = self._database.engine
        self.location = self._database.location
        self.path = self._database.path
        try:
            with self._guarded("opened"), self._engine.connect() as connection:
                if self.path:
                    write_ahead(connection)
                migrate(connection)
        except NewerSchemaError as error:
            self._engine.dispose()
            raise StoreError(
                f"The store {self.location} was written by a newer varan (schema "
                f"{error.args[0]}, this one knows {SCHEMA}). Update varan, or choose "
                "another store with --store."
            ) from None
        except BaseException:
            self._engine.dispose()
            raise

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
        raise StoreError(
            f"The store {self.location} cannot be {action} ({reason}). Free or repair "
            "it, or choose another one with --store."
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
            _M[name] == value for name, value in wanted.items() if value is not None
        )

    def current(self, row: Row, scale: str) -> dict[int, Record]:
        """By seed, the newest measurement that the present code would repeat.

        Args:
            row: The row.
            scale: The scale.
        """
        query = sa.select(_M.id, _M.seed, _M.fingerprint, _M.sources).where(
            _MEASURED, _M.row == row.id, _M.scale == scale
        )
        hash_source = functools.cache(provenance.hash_source)

        @functools.cache
        def present(sources: str) -> str:
            return present_fingerprint(row, scale, json.loads(sources), hash_source)

        newest = {
            known["seed"]: known["id"]
            for known in self._fetch(query.order_by(_M.id))
            if known["fingerprint"] == present(known["sources"])
        }
        found = self._read([_M.id.in_(newest.values())])
        return {record.seed: record for record in found}

    def newest(self, row: str, scale: str) -> dict[int, Record]:
        """By seed, the newest measurements that belong together.

        They share the fingerprint of the row's newest measurement at this scale: the
        same code and settings, whether or not the present code would repeat them.

        Args:
            row: The row's id.
            scale: The scale.
        """
        found = self._read([_M.id.in_(_newest(_M.row == row, _M.scale == scale))])
        return {record.seed: record for record in found}

    def newest_all(self) -> dict[tuple[str, str], dict[int, Record]]:
        """What `newest` gives, for every row and scale at once."""
        return _by_row(self._read([_M.id.in_(_newest())]))

    def runs(self) -> list[RunSummary]:
        """Every run that left a record, oldest first."""
        scales: dict[str | None, list[str]] = defaultdict(list)
        for entry in self._fetch(sa.select(_M.run, _M.scale).distinct()):
            scales[entry["run"]].append(entry["scale"])
        found = []
        for entry in self._fetch(_runs()):
            fields = dict(entry)
            environment = json.loads(fields.pop("environment"))
            ran = tuple(sorted(scales[fields["run"]]))
            found.append(RunSummary(**fields, scales=ran, environment=environment))
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
        newest = sa.select(sa.func.max(RACES.c.id)).group_by(RACES.c.row, RACES.c.heat)
        query = sa.select(RACES).where(RACES.c.id.in_(newest))
        if row is not None:
            query = query.where(RACES.c.row == row)
        found = self._fetch(query.order_by(RACES.c.row, RACES.c.heat))
        with self._guarded("read"):
            return [_schema.race(entry) for entry in found]

    def _append(self, table: sa.TableClause, values: Mapping[str, Any]) -> None:
        with self._guarded("written"), self._engine.begin() as connection:
            connection.execute(sa.insert(table).values(values))

    def _fetch(self, query: sa.Executable) -> Sequence[sa.RowMapping]:
        with self._guarded("read"), self._engine.connect() as connection:
            return connection.execute(query).mappings().all()

    def _read(self, conditions: Iterable[sa.ColumnElement[bool]]) -> list[Record]:
        query = sa.select(MEASUREMENTS).where(*conditions).order_by(_M.id)
        found = self._fetch(query)
        with self._guarded("read"):
            return [_schema.measurement(entry) for entry in found]


def _newest(*conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """The ids of the newest measurements of every row, scale and seed.

    Of each row and scale, only those with the fingerprint of the newest one.
    """
    latest = sa.func.first_value(_M.fingerprint).over(
        partition_by=(_M.row, _M.scale), order_by=_M.id.desc()
    )
    place = sa.func.row_number().over(
        partition_by=(_M.row, _M.scale, _M.seed, _M.fingerprint),
        order_by=_M.id.desc(),
    )
    ranked = (
        sa.select(_M.id, _M.fingerprint, latest.label("latest"), place.label("place"))
        .where(_MEASURED, *conditions)
        .subquery()
        .c
    )
    return sa.select(ranked.id).where(
        ranked.place == 1, ranked.fingerprint.is_not_distinct_from(ranked.latest)
    )


def _runs() -> sa.Select[Any]:
    """What the records of each run come to, and the environment of its last one."""
    total = sa.func.sum
    runs = (
        sa.select(
            _M.run,
            sa.func.min(_M.id).label("first"),
            sa.func.max(_M.id).label("last"),
            sa.func.min(_M.taken).label("began"),
            sa.func.max(_M.taken).label("ended"),
            sa.func.count(_M.row.distinct()).label("rows"),
            total(sa.case((_MEASURED, 1), else_=0)).label("measured"),
            total(sa.case((_MEASURED, 0), else_=1)).label("failed"),
            sa.func.coalesce(total(_M.wall_s), 0.0).label("wall_s"),
        )
        .group_by(_M.run)
        .subquery()
    )
    shown = [column for column in runs.c if column.name not in ("first", "last")]
    return (
        sa.select(*shown, _M.environment)
        .join(MEASUREMENTS, _M.id == runs.c.last)
        .order_by(runs.c.first)
    )


def _by_row(records: Iterable[Record]) -> dict[tuple[str, str], dict[int, Record]]:
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for record in records:
        found.setdefault((record.row, record.scale), {})[record.seed] = record
    return found
