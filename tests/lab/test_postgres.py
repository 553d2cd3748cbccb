"""What only a PostgreSQL store can meet: servers, users, passwords, URLs."""

import sys

import psycopg
import pytest
import sqlalchemy as sa

from varan.lab import store
from varan.lab.store import Record, Store, StoreError


def record(seed=0):
    return Record("toy", "laptop", seed, "measured", {"n": 3}, {"python": "3"})


@pytest.fixture
def url(postgres):
    return postgres.new_database()


def execute(url, *statements):
    """Runs statements as the server's owner, each by itself."""
    with psycopg.connect(url, autocommit=True) as connection:
        return [connection.execute(statement) for statement in statements]


def test_the_password_is_never_shown(url):
    password = sa.make_url(url).password
    with Store(url) as opened:
        assert opened.path is None
        assert opened.location.startswith("postgresql://varan:***@127.0.0.1:")
        assert password not in opened.location
    asked = f"{sa.make_url(url).set(password=None)}?password=secret"
    with pytest.raises(StoreError) as refused:
        Store(asked)
    assert "secret" not in str(refused.value)


def test_a_wrong_password(postgres):
    with pytest.raises(StoreError, match=r"cannot be opened \(.*password auth") as said:
        Store(postgres.url("postgres", password="guessed"))
    assert "guessed" not in str(said.value) and "\n" not in str(said.value)


def test_a_database_that_does_not_exist(postgres):
    with pytest.raises(StoreError, match=r'"nonesuch" does not exist'):
        Store(postgres.url("nonesuch"))


def test_a_server_that_does_not_answer():
    # Nothing listens on port 1.
    with pytest.raises(StoreError, match=r"cannot be opened \(.*refused\)") as said:
        Store("postgresql://somebody:secret@127.0.0.1:1/results")
    assert "secret" not in str(said.value) and "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("mysql://me:secret@host/db", r"folder or a postgresql:// URL \(got mysql"),
        ("postgresql://me:sec@ret@host/db", "URL cannot be read. Write postgresql"),
        ("postgresql://me:secret@host:port/db", "URL cannot be read"),
    ],
)
def test_a_url_that_is_none(location, sentence):
    with pytest.raises(StoreError, match=sentence) as said:
        Store(location)
    assert "sec" not in str(said.value)


def test_an_absent_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"pip install 'varan\[postgres\]'"):
        Store("postgresql://me@host/db")


def test_a_store_that_is_not_there_is_not_made(url):
    with pytest.raises(StoreError, match="There is no store at postgresql://"):
        Store(url, existing=True)
    (tables,) = execute(url, "SELECT 1 FROM pg_tables WHERE tablename = 'measurement'")
    assert tables.fetchall() == []


def test_a_user_who_may_only_read(postgres, url):
    with Store(url) as opened:
        opened.add(record())
    execute(
        url,
        "DROP ROLE IF EXISTS reader",
        "CREATE ROLE reader LOGIN PASSWORD 'reading'",
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader",
    )
    theirs = postgres.url(sa.make_url(url).database, "reader", "reading")
    try:
        with Store(theirs, existing=True) as opened:
            assert len(opened.records()) == 1
        # What would measure is refused before it begins.
        with pytest.raises(StoreError, match=r"opened \(permission denied for table"):
            Store(theirs)
    finally:
        execute(url, "DROP OWNED BY reader", "DROP ROLE reader")


def test_a_connection_that_is_cut(url):
    with Store(url) as opened:
        opened.add(record(0))
        execute(
            url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        opened.add(record(1))
        assert [kept.seed for kept in opened.records()] == [0, 1]


def test_a_server_that_is_away_for_a_while(postgres, url, monkeypatch):
    name = sa.make_url(url).database
    owner = postgres.url("postgres")
    waited = []

    def pause(seconds):
        waited.append(seconds)
        execute(owner, f"ALTER DATABASE {name}_away RENAME TO {name}")

    monkeypatch.setattr(store.time, "sleep", pause)
    with Store(url) as opened:
        opened._engine.dispose()
        execute(owner, f"ALTER DATABASE {name} RENAME TO {name}_away")
        opened.add(record())
        assert waited == [1.0]
        assert len(opened.records()) == 1
        # It does not wait for ever.
        monkeypatch.setattr(store, "_PATIENCE_S", -1)
        opened._engine.dispose()
        execute(owner, f"ALTER DATABASE {name} RENAME TO {name}_away")
        with pytest.raises(StoreError, match=r"cannot be written \(.*does not exist"):
            opened.add(record(1))
