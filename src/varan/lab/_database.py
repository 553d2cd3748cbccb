"""Opening the store's database: an SQLite file in a folder, or a PostgreSQL URL."""

from __future__ import annotations

import os
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, OperationalError

FILE = "results.sqlite"
# Seconds to wait for another process that is writing, or for a server to answer.
_BUSY_S = 30
_CONNECT_S = 10
_POSTGRESQL = ("postgresql", "postgresql+psycopg", "postgres")


class StoreError(RuntimeError):
    """A store that cannot be opened, read or written; one sentence and what to do."""


class NoStoreError(StoreError):
    """There is no store where an existing one is asked for.

    Args:
        location: Where it would be; fit for printing.
    """

    def __init__(self, location: str):
        super().__init__(
            f"There is no store at {location}. `varan run` makes one; --store says "
            "where another one is."
        )
        self.location = location


@dataclass(frozen=True)
class Database:
    """Where a store lives.

    Args:
        engine: SQLAlchemy's engine.
        location: The file, or the URL without its password; fit for printing.
        path: The SQLite file, if it is one.
        password: The URL's password, which nothing may show.
    """

    engine: sa.Engine
    location: str
    path: Path | None = None
    password: str | None = None

    def reason(self, error: BaseException) -> str:
        """What a driver says of an error, in one line and without the password."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = lines[0].removeprefix("connection failed: ").rstrip(".")
        return text.replace(self.password, "***") if self.password else text


def database(location: Path | str, *, existing: bool) -> Database:
    """Finds the database of a location; nothing is opened yet.

    Args:
        location: A folder, the store's file in it, or a `postgresql://` URL.
        existing: Whether it must be there; else its folder is made.

    Raises:
        StoreError: The folder cannot be made, the URL is none, or its driver is absent.
    """
    if "://" in str(location):
        return _postgresql(str(location))
    folder = Path(location)
    return _sqlite(folder.parent if folder.name == FILE else folder, existing)


def _sqlite(folder: Path, existing: bool) -> Database:
    path = folder / FILE
    if existing and not path.exists():
        raise NoStoreError(str(path))
    if existing and not _writable(path):
        return Database(_read_only(path), str(path), path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The folder {folder} cannot be made ({error.strerror}). "
            "Choose another one with --out or --store."
        ) from None
    url = sa.URL.create("sqlite", database=str(path))
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_S})
    return Database(engine, str(path), path)


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _read_only(path: Path) -> sa.Engine:
    # SQLite wants to make files beside one in write-ahead mode, if only to read it. It
    # does without once it is told that nobody writes; a log left behind it must read.
    log = path.with_name(f"{path.name}-wal")
    mode = "mode=ro" if log.exists() else "mode=ro&immutable=1"
    return sa.create_engine(
        "sqlite://",
        creator=lambda: sqlite3.connect(
            f"{path.resolve().as_uri()}?{mode}", uri=True, check_same_thread=False
        ),
        poolclass=sa.NullPool,
    )


def _postgresql(text: str) -> Database:
    scheme = text.partition("://")[0]
    if scheme not in _POSTGRESQL:
        raise StoreError(
            f"A store is a folder or a postgresql:// URL (got {scheme}://...)."
        )
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):
        # The text may hold a password: it is not repeated.
        url = None
    if url is None or "@" in (url.host or ""):
        raise StoreError(
            "The store's URL cannot be read. Write "
            "postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with other characters than "
            "letters and digits in the password as %XX."
        )
    options = {} if "connect_timeout" in url.query else {"connect_timeout": _CONNECT_S}
    try:
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            connect_args=options,
            # A long run may outlive the server's patience with an idle connection.
            pool_pre_ping=True,
        )
    except ImportError:
        raise StoreError(
            "A store in PostgreSQL needs psycopg: pip install 'varan[postgres]'."
        ) from None
    secret = url.password or url.query.get("password")
    # A query may hold a password too.
    shown = url.set(drivername="postgresql", query={})
    return Database(
        engine, shown.render_as_string(), password=str(secret) if secret else None
    )


def write_ahead(connection: sa.Connection) -> None:
    """Puts an SQLite file into write-ahead mode, so that processes may share it.

    Args:
        connection: A connection in no transaction; one to a server is left alone.
    """
    if connection.dialect.name != "sqlite":
        return
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal":
        return
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
