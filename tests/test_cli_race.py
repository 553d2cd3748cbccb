"""`varan race` as a user meets it: tables, JSON, the store, Ctrl-C, sentences."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from varan import cli
from varan.lab.store import Store

LAB = Path(__file__).parent / "lab"
# Tests that are run in the background of a shell inherit that Ctrl-C is ignored.
_SCRIPT = """
    import os, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, {lab!r})
    from conftest import make_row
    from varan import cli
    from varan.lab import catalogue, store
    if "FULL_DISK" in os.environ:
        def add_race(self, record):
            raise store.StoreError("The store cannot be written (disk full).")
        store.Store.add_race = add_race
    race = {{"repeats": 5, "limit_s": 1.0, "quick": {{"repeats": 2}}}}
    rows = tuple(
        make_row("good", id="toy-" + toy, number=number, race={{"toy": toy, **race}})
        for number, toy in enumerate(("good", "killed", "waiting", "no ours"), 1)
    )
    rows += (make_row("good", id="no-race", number=9),)
    catalogue.load = lambda: catalogue.Catalogue(rows)
    cli.main()
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts `varan race` on toys; results go to `tmp_path`."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(_SCRIPT.format(lab=str(LAB))))
    monkeypatch.setenv("PYTHONPATH", str(LAB / "toys"))

    def start(*arguments):
        command = [sys.executable, str(script), "race", *arguments]
        return subprocess.Popen(
            [*command, "--out", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finished(process):
    stdout, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stdout + stderr
    return process.returncode, stdout, stderr


def test_a_race_is_shown_and_stored(started, tmp_path):
    code, stdout, stderr = finished(started("toy-good", "--quick"))
    assert code == 0
    lines = stdout.splitlines()
    assert "good, n = 1" in lines
    (slow,) = (line for line in lines if line.startswith("slow "))
    assert "ms" in slow
    assert "  2 rounds, threads: 1; peers: numpy " in stdout
    (wrong,) = (line for line in lines if line.startswith("wrong "))
    assert wrong.rstrip().endswith("5.0e-01 missed")
    assert "The quick race" in stdout
    assert "absent skipped: toy-peer is not installed: pip install" in stdout
    assert "raises failed: RuntimeError: it broke" in stdout
    assert lines[-1] == f"store  {tmp_path / 'results.sqlite'}"
    assert "round 2 of 2" in stderr and "preparing slow" in stderr
    with Store(tmp_path) as store:
        assert [record.heat for record in store.races()] == ["good, n = 1"]


def test_json_is_json_and_nothing_else(started):
    code, stdout, _ = finished(started("1", "--repeats", "3", "--json"))
    written = json.loads(stdout)
    assert (code, written["row"]) == (0, "toy-good")
    (heat,) = written["heats"]
    entries = {entry["name"]: entry for entry in heat["standings"]}
    assert entries["slow"]["ratio"] > 1 and len(entries["slow"]["times"]["wall_s"]) == 3
    assert entries["nan"]["error"] == "nan" and entries["nan"]["met"] is False
    assert set(heat["skipped"]) == {"absent", "broken"}


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process")
def test_ctrl_c_shows_and_stores_what_was_measured(started, tmp_path):
    process = started("toy-waiting")
    for line in process.stderr:
        # The second round hangs in one of its two contestants.
        if "round 2 of 5" in line:
            process.send_signal(signal.SIGINT)
            break
    code, stdout, stderr = finished(process)
    assert code == cli.INTERRUPTED
    assert "Interrupted after 1 of 5 rounds." in stdout
    assert f"interrupted; 1 heat kept in {tmp_path / 'results.sqlite'}" in stderr
    with Store(tmp_path) as store:
        (record,) = store.races("toy-waiting")
    assert len(record.contestants["ours"]["wall_s"]) == 1


def test_what_fails_has_an_exit_code_and_a_sentence(started):
    code, stdout, stderr = finished(started("toy-killed"))
    assert code == cli.FAILED
    assert "ended by SIGKILL" in stderr and "after 2 of 5 rounds." in stdout
    code, stdout, _ = finished(started("toy-no ours", "--quick"))
    assert code == cli.FAILED and "ours failed: RuntimeError: it broke" in stdout


def test_what_cannot_be_stored_is_shown(started, monkeypatch):
    monkeypatch.setenv("FULL_DISK", "1")
    code, stdout, stderr = finished(started("toy-good", "--quick"))
    assert code == cli.FAILED
    assert "The store cannot be written (disk full)." in stderr
    assert "good, n = 1" in stdout and "5.0e-01 missed" in stdout


# Arguments, and what must be said; all are usage errors.
WRONG = {
    "no such row": (["nonesuch"], "There is no row 'nonesuch'"),
    "no race": (["no-race"], "The row no-race has no race.\nThese have one: toy-good,"),
    "no such heat": (["toy-good", "--heat", "n = 7"], "No heat has 'n = 7'"),
    "no rounds": (["toy-good", "--repeats", "0"], "greater than or equal to 1"),
    "threads": (["toy-good", "--threads", "3"], "3"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_command_is_a_usage_error(started, mistake):
    arguments, sentence = WRONG[mistake]
    code, stdout, stderr = finished(started(*arguments))
    assert (code, stdout) == (cli.USAGE, "")
    assert sentence in stderr
