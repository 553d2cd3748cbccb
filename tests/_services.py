"""Services that some tests use beside Python: found, started and stopped here.

`scripts/services` installs them. A test that needs an absent one is skipped by name;
with VARAN_REQUIRE_SERVICES set, as in continuous integration, it fails instead.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import quote

import pytest

_PASSWORD = "a secret, @/:% and all"
_USER = "varan"


def require(found, name):
    """What was found; a skip, or a failure where services must be there, if nothing."""
    if found:
        return found
    sentence = f"{name} is not installed; scripts/services does it"
    if os.environ.get("VARAN_REQUIRE_SERVICES"):
        pytest.fail(sentence)
    pytest.skip(sentence)


class Postgres:
    """A running PostgreSQL server on a loopback port."""

    def __init__(self, port):
        self.port = port
        self._made = 0

    def url(self, database, user=_USER, password=_PASSWORD):
        """The URL of a database, as a user of varan writes it."""
        return (
            f"postgresql://{user}:{quote(password, safe='')}@127.0.0.1:{self.port}"
            f"/{database}"
        )

    def new_database(self):
        """The URL of a new, empty database."""
        import psycopg

        self._made += 1
        name = f"varan_{self._made}"
        # `with psycopg.connect(...)` would begin a transaction.
        connection = psycopg.connect(self.url("postgres"), autocommit=True)
        with contextlib.closing(connection):
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server in a temporary folder, for the whole session."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = programs[-1] if programs else shutil.which("initdb")
    initdb = Path(require(initdb, "PostgreSQL"))
    folder = Path(tempfile.mkdtemp(prefix="varan-postgres-"))
    # The server refuses to run as root.
    owner = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    if owner:
        shutil.chown(folder, **owner)

    def call(program, *arguments):
        # Into a file: the server would keep a pipe open.
        with (folder / "output").open("w") as output:
            done = subprocess.run(
                [initdb.with_name(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                **owner,
            )
        assert not done.returncode, (folder / "output").read_text()

    data, port = folder / "data", _free_port()
    (folder / "password").write_text(_PASSWORD)
    (folder / "password").chmod(0o644)
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
    start = ("-D", data, "-l", folder / "log", "-o", settings, "-w", "start")
    try:
        call(
            "initdb",
            *("-D", data, "-U", _USER, "--no-sync", "--encoding=UTF8", "--locale=C"),
            *("--auth=scram-sha-256", f"--pwfile={folder / 'password'}"),
        )
        call("pg_ctl", *start)
        try:
            yield Postgres(port)
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
