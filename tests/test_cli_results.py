"""`varan results` as a user meets it: lists, filters, tables, what changed."""

import csv
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from varan import cli
from varan.lab import catalogue, provenance
from varan.lab.catalogue import Check, Row, Scale
from varan.lab.store import FILE, Record, Store

OLD, NEW = "20260101-000000-bcdfg", "20260102-000000-hjkmn"


def invoke(*arguments, **environment):
    words = ["results", *map(str, arguments)]
    return CliRunner().invoke(cli.app, words, prog_name="varan", env=environment)


def row(id, number, topic):
    settings = Scale(2, {"n": 3})
    return Row(
        topic=topic,
        number=number,
        id=id,
        title="A claim",
        pages=("000",),
        state="built",
        scales=dict.fromkeys(("smoke", "laptop", "paper"), settings),
        checks=(Check("gain", "gain", ">=", 1.5, "worst", "theory"),),
    )


ROWS = (row("first-row", 5, "games"), row("second-row", 6, "matrix"))


def fill(location):
    """Two runs: the second row falls, the first one moves and has a failure."""
    with Store(location) as store:
        for run, day, first, second in (
            (OLD, 1, (2.0, 2.1), (2.0, 2.1)),
            (NEW, 2, (2.0, None), (1.0, 1.1)),
        ):
            for entry, gains in zip(ROWS, (first, second), strict=True):
                mark = provenance.fingerprint(
                    entry.id, "laptop", "float32", {"n": 3}, {}
                )
                for seed, gain in enumerate(gains):
                    store.add(
                        Record(
                            entry.id,
                            "laptop",
                            seed,
                            "failed" if gain is None else "measured",
                            {"n": 3},
                            {"commit": f"{day}" * 40},
                            fingerprint=mark,
                            numbers={} if gain is None else {"gain": gain},
                            message="it broke." if gain is None else None,
                            wall_s=1.5,
                            run=run,
                            taken=f"2026-01-0{day}T10:00:0{seed}+00:00",
                        )
                    )


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setattr(catalogue, "load", lambda: catalogue.Catalogue(ROWS))


@pytest.fixture
def store(tmp_path):
    fill(tmp_path / "results")
    return tmp_path / "results"


def test_one_line_a_row_and_scale(store):
    done = invoke("--store", store)
    assert done.exit_code == 0
    heading, first, second, *rest = done.stdout.splitlines()
    assert heading.split()[:4] == ["row", "id", "scale", "verdict"]
    words = ["005", "first-row", "laptop", "failed", "1", "of", "2", "2026-01-02"]
    assert first.split()[:8] == words
    assert second.split()[3:6] == ["not", "held", "2"]
    assert NEW in second and "2222222222" in second
    assert "2 results: 1 not held, 1 failed" in rest
    assert "first-row (laptop): 1 of 2 seeds failed; seed 1: it broke." in rest
    assert rest[-1] == f"store  {store / FILE}"


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (["--row", "6"], ["second-row"]),
        (["--row", "6", "--row", "first-row"], ["first-row", "second-row"]),
        (["--topic", "games"], ["first-row"]),
        (["--topic", "games", "--row", "6"], []),
        (["--scale", "smoke"], []),
        (["--outcome", "not-held"], ["second-row"]),
        (["--outcome", "held", "--run", "bcdfg"], ["first-row", "second-row"]),
    ],
)
def test_filters(store, arguments, ids):
    done = invoke("--store", store, "--json", *arguments)
    assert [entry["id"] for entry in json.loads(done.stdout)["rows"]] == ids
    assert invoke("--store", store, *arguments).exit_code == 0


def test_the_store_is_found_by_option_variable_and_folder(store, tmp_path, monkeypatch):
    expected = invoke("--store", store, "--json").stdout
    assert invoke("--json", VARAN_STORE=str(store)).stdout == expected
    assert invoke("--json", "--out", store).stdout == expected
    assert invoke("--json", "--store", store / FILE).stdout == expected
    # An option says more than a variable, and a store more than a folder.
    assert (
        invoke("--json", "--store", store, "--out", tmp_path, VARAN_STORE="x").stdout
        == expected
    )


def test_a_store_on_a_server(postgres, store):
    url = postgres.new_database()
    fill(url)
    here, there = (
        json.loads(invoke("--json", "--store", where).stdout) for where in (store, url)
    )
    assert here["rows"] == there["rows"]
    assert there["store"].startswith("postgresql://varan:***@127.0.0.1:")


def test_runs(store):
    done = invoke("--store", store, "--runs")
    assert done.exit_code == 0
    _, old, new, *_ = done.stdout.splitlines()
    assert old.split()[0] == OLD
    assert new.split()[5:] == ["laptop", "2", "3", "1", "6.0", "s", "2222222222"]
    runs = json.loads(invoke("--store", store, "--runs", "--json").stdout)["runs"]
    assert [(run["run"], run["failed"]) for run in runs] == [(OLD, 0), (NEW, 1)]
    done = invoke("--store", store, "--runs", "--scale", "smoke", "--json")
    assert json.loads(done.stdout)["runs"] == []


@pytest.mark.parametrize("named", [[], ["hjkmn"], [NEW, OLD]])
def test_what_changed_since(store, named):
    done = invoke("--store", store, "--compare", *named)
    assert done.exit_code == 0
    text = done.stdout
    assert "2 results in both runs: 2 with changed verdicts" in text
    assert "first-row, laptop: held → failed" in text
    assert "second-row, laptop: held → not held" in text
    assert "2 [2, 2.1]  → 1 [1, 1.1]  held → not held  intervals apart" in text
    assert "Irreproducible (same code, settings and seed):" in text
    assert "second-row (laptop), seed 0: gain 2.0, then 1.0, and 1 more number" in text
    assert f"commit    {'1' * 10}" in text
    found = json.loads(invoke("--store", store, "--compare", "--json", *named).stdout)
    assert (found["before"]["run"], found["after"]["run"]) == (OLD, NEW)
    assert [entry["irreproducible"] for entry in found["rows"]] == [False, True]


def test_a_comparison_of_one_row_fits_the_question(store):
    done = invoke("--store", store, "--compare", "--row", "5", "--json")
    assert [entry["id"] for entry in json.loads(done.stdout)["rows"]] == ["first-row"]


def test_a_table_for_other_programs(store, tmp_path):
    file = tmp_path / "numbers.csv"
    done = invoke("--store", store, "--csv", file, "--row", "6")
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"2 numbers of 1 result in {file}" in done.stderr
    with file.open() as table:
        lines = list(csv.DictReader(table))
    assert [(line["seed"], line["value"]) for line in lines] == [
        ("0", "1.0"),
        ("1", "1.1"),
    ]
    assert {line["run"] for line in lines} == {NEW}
    done = invoke("--store", store, "--csv", tmp_path / "absent" / "numbers.csv")
    assert done.exit_code == cli.FAILED
    assert "cannot be written (No such file or directory)" in done.stderr


def test_output_that_cannot_be_written(store):
    if not sys.platform.startswith("linux"):
        pytest.skip("no full device")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "varan.cli", "results", "--store", store, "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == cli.FAILED
    assert done.stderr == "varan: standard output: No space left on device.\n"


# Arguments, what must be said, and the exit code.
WRONG = {
    "two things": (["--runs", "--compare"], "two different things", cli.USAGE),
    "idle filter": (["--runs", "--run", "x"], "--run does not go with", cli.USAGE),
    "idle export": (["--compare", "--csv", "x"], "--csv does not go", cli.USAGE),
    "idle outcome": (["--runs", "--outcome", "held"], "--outcome does not", cli.USAGE),
    "idle runs": ([OLD], f"`--compare {OLD}` compares", cli.USAGE),
    "many runs": (["--compare", "a", "b", "c"], "at most two runs", cli.USAGE),
    "unknown run": (["--run", "nonesuch"], "There is no run 'nonesuch'", cli.USAGE),
    "first run": (["--compare", OLD], "No earlier run measured", cli.USAGE),
    "unknown row": (["--row", "third-row"], "no row 'third-row'", cli.USAGE),
    "no store": (["--store", "absent"], "There is no store at absent", cli.FAILED),
    "no URL": (["--store", "http://x:pw@y"], "a postgresql:// URL", cli.FAILED),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_command_is_a_sentence(store, mistake):
    arguments, sentence, code = WRONG[mistake]
    done = invoke("--store", store, *arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert sentence in done.stderr
    assert "pw" not in done.stderr and "Traceback" not in done.stderr
