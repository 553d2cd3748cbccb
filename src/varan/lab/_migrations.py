"""The store's schema, version by version, for SQLite and PostgreSQL alike.

A new store is made by the same steps that bring an old one up to date. A step that has
been released is never edited: what is wrong with it is mended by the next one.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from ._schema import ABOUT


class NewerSchemaError(Exception):
    """The store's schema is one that this varan does not know; `args[0]` is which."""


# The key of the lock that migrating holds in PostgreSQL, the same for every varan.
_LOCK = int.from_bytes(b"varan", "big")


def migrate(connection: sa.Connection) -> None:
    """Brings a store to the present schema, if it is not there already.

    Args:
        connection: A connection in no transaction; all steps are one transaction.

    Raises:
        NewerSchemaError: The store was written by a newer varan.
    """
    # Most stores are up to date, and one that may only be read cannot be locked.
    if version(connection) == SCHEMA:
        return
    connection.rollback()
    with connection.begin():
        _lock(connection)
        # Another process may have been faster: look again under the lock.
        found = version(connection)
        for step in _STEPS[found:]:
            step(connection)
        if found < SCHEMA:
            connection.execute(sa.delete(ABOUT))
            connection.execute(sa.insert(ABOUT).values(schema=SCHEMA))


def version(connection: sa.Connection) -> int:
    """The store's schema; 0 when there is none yet.

    Args:
        connection: A connection to it.

    Raises:
        NewerSchemaError: The store was written by a newer varan.
    """
    if not sa.inspect(connection).has_table(ABOUT.name):
        return 0
    found = connection.scalar(sa.select(ABOUT.c.schema)) or 0
    if found > SCHEMA:
        raise NewerSchemaError(found)
    return found


def _lock(connection: sa.Connection) -> None:
    """Keeps other processes out until the transaction ends."""
    if connection.dialect.name == "sqlite":
        # Python's driver would begin the transaction only at the first insertion.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))


def _make(connection: sa.Connection, name: str, *parts: sa.schema.SchemaItem) -> None:
    sa.Table(name, sa.MetaData(), *parts).create(connection)


def _add_column(connection: sa.Connection, table: str, column: sa.Column) -> None:
    definition = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
    connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {definition}")


def _measurements(connection: sa.Connection) -> None:
    _make(connection, "varan_store", sa.Column("schema", sa.Integer))
    structured = ("settings", "numbers", "curves", "notes", "sources", "environment")
    _make(
        connection,
        "measurement",
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
        *(sa.Column(name, sa.Text, nullable=False) for name in structured),
        sa.Index("measurement_of", "row", "scale", "seed"),
    )


def _runs_and_races(connection: sa.Connection) -> None:
    _add_column(connection, "measurement", sa.Column("compile_s", sa.Float))
    _add_column(connection, "measurement", sa.Column("run", sa.String))
    connection.exec_driver_sql("CREATE INDEX measurement_in ON measurement (run)")
    structured = ("contestants", "environment", "settings", "skipped", "remarks")
    _make(
        connection,
        "race",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("row", sa.String, nullable=False),
        sa.Column("heat", sa.String, nullable=False),
        sa.Column("reference", sa.String, nullable=False),
        sa.Column("taken", sa.String, nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in structured),
        sa.Index("race_of", "row", "heat"),
    )


# The step at place n brings a store from schema n to n + 1.
_STEPS: tuple[Callable[[sa.Connection], None], ...] = (_measurements, _runs_and_races)
SCHEMA = len(_STEPS)
