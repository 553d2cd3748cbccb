"""The store: every measurement ever taken, appended to one SQLite file.

Nothing is ever overwritten: a row measured again gives further entries, and the newest
one counts. The file is in write-ahead mode, so that several processes may share it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, OperationalError

from . import provenance
from .catalogue import Row

SCHEMA = 1
FILE = "results.sqlite"
# Seconds to wait for another process that is writing.
_BUSY_S = 30

_TABLES = sa.MetaData()
_ABOUT = sa.Table("varan_store", _TABLES, sa.Column("schema", sa.Integer))
_MEASUREMENTS = sa.Table(
    "measurement",
    _TABLES,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("row", sa.String, nullable=False),
    sa.Column("scale", sa.String, nullable=False),
    sa.Column("seed", sa.Integer, nullable=False),
    sa.Column("outcome", sa.String, nullable=False),
    sa.Column("taken", sa.String, nullable=False),
    sa.Column("fingerprint", sa.String),
    sa.Column("wall_s", sa.Float),
    sa.Column("cpu_s", sa.Float),
    sa.Column("peak_memory_mib", sa.Float),
    sa.Column("message", sa.Text),
    sa.Column("detail", sa.Text),
    # Structured fields are JSON text: read whole, never searched.
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("numbers", sa.Text, nullable=False),
    sa.Column("curves", sa.Text, nullable=False),
    sa.Column("notes", sa.Text, nullable=False),
    sa.Column("sources", sa.Text, nullable=False),
    sa.Column("environment", sa.Text, nullable=False),
    sa.Index("measurement_of", "row", "scale", "seed"),
)
_JSON = ("settings", "numbers", "curves", "notes", "sources", "environment")


class StoreError(RuntimeError):
    """A store that cannot be opened, read or written; one sentence and what to do."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Record:
    """One seed of one row at one scale: measured, or failed with its message.

    Args:
        row: The row's id.
        scale: The scale.
        seed: The seed.
        outcome: `"measured"` or `"failed"`.
        settings: The scale's settings.
        environment: Versions, machine and commit.
        fingerprint: What the numbers depend on, hashed; see `provenance.fingerprint`.
        sources: The files of varan that were loaded.
        numbers: The named numbers.
        curves: The curves, as plain data.
        notes: What a reader must know.
        message: Why it failed, in a sentence.
        detail: The traceback or the end of the standard error, if it failed.
        wall_s: Wall-clock seconds.
        cpu_s: Seconds of processor time.
        peak_memory_mib: The process's largest memory so far.
        taken: When it was stored (UTC).
    """

    row: str
    scale: str
    seed: int
    outcome: Literal["measured", "failed"]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    fingerprint: str | None = None
    sources: list[str] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    message: str | None = None
    detail: str | None = None
    wall_s: float | None = None
    cpu_s: float | None = None
    peak_memory_mib: float | None = None
    taken: str = field(default_factory=_now)

    def is_current(self, row: Row, scale: str) -> bool:
        """Whether the row, measured now, would run the same code and settings."""
        hashes = {file: provenance.hash_source(file) for file in self.sources}
        settings = row.scales[scale].settings
        return self.fingerprint == provenance.fingerprint(
            row.id, scale, row.precision, settings, hashes
        )


class Store:
    """An open store; a context manager.

    Args:
        folder: The folder of the file; made when absent.

    Raises:
        StoreError: The folder or file cannot be used.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"The folder {folder} cannot be made ({error.strerror}). "
                "Choose another one with --out."
            ) from None
        self._engine = sa.create_engine(
            f"sqlite:///{self.path}", connect_args={"timeout": _BUSY_S}
        )
        with self._guarded("opened"), self._engine.begin() as connection:
            _write_ahead(connection)
            # Locked before it looks: two runs may make the file at the same moment.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            self._prepare(connection)

    def _prepare(self, connection: sa.Connection) -> None:
        _TABLES.create_all(connection)
        schema = connection.scalar(sa.select(_ABOUT.c.schema))
        if schema is None:
            connection.execute(_ABOUT.insert().values(schema=SCHEMA))
        elif schema > SCHEMA:
            raise StoreError(
                f"The store {self.path} was written by a newer varan (schema {schema}, "
                f"this one knows {SCHEMA}). Update varan, or choose another folder "
                "with --out."
            )

    @contextmanager
    def _guarded(self, action: str):
        try:
            yield
        except DatabaseError as error:
            reason = str(error.orig).rstrip(".")
            raise StoreError(
                f"The store {self.path} cannot be {action} ({reason}). Free or repair "
                "it, or choose another folder with --out."
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
        values = dict(vars(record))
        values.update({name: json.dumps(values[name], default=str) for name in _JSON})
        with self._guarded("written"), self._engine.begin() as connection:
            connection.execute(_MEASUREMENTS.insert().values(values))

    def records(self, row: str, scale: str) -> list[Record]:
        """All records of a row at a scale, oldest first.

        Args:
            row: The row's id.
            scale: The scale.
        """
        columns = [column for column in _MEASUREMENTS.c if column.name != "id"]
        query = (
            sa.select(*columns)
            .where(_MEASUREMENTS.c.row == row, _MEASUREMENTS.c.scale == scale)
            .order_by(_MEASUREMENTS.c.id)
        )
        with self._guarded("read"), self._engine.connect() as connection:
            found = connection.execute(query).mappings().all()
        return [_record(dict(entry)) for entry in found]

    def current(self, row: Row, scale: str) -> dict[int, Record]:
        """By seed, the newest measurement that the present code would repeat.

        Args:
            row: The row.
            scale: The scale.
        """
        return {
            record.seed: record
            for record in self.records(row.id, scale)
            if record.outcome == "measured" and record.is_current(row, scale)
        }


def _write_ahead(connection: sa.Connection) -> None:
    # Changing the mode fails at once while another process opens the file; everything
    # else waits by itself.
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            return
        except OperationalError as error:
            if "locked" not in str(error.orig) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _record(values: Any) -> Record:
    values.update({name: json.loads(values[name]) for name in _JSON})
    values["numbers"] = {name: float(x) for name, x in values["numbers"].items()}
    return Record(**values)
