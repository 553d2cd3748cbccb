"""The command line as a user meets it: output, exit codes, sentences, imports."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from varan import cli
from varan.lab import catalogue
from varan.lab.catalogue import Check, Row, Scale

NUMERICAL = ("jax", "numpy", "scipy", "matplotlib", "sqlalchemy", "sklearn", "equinox")


def invoke(*arguments):
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.app, words, prog_name="varan")


@pytest.fixture
def failing(monkeypatch):
    """A catalogue of one built row without experiment, and one planned row."""
    settings = Scale(2, {"n": 3})
    built = Row(
        topic="games",
        number=5,
        id="absent-experiment",
        title="A claim",
        pages=("000",),
        state="built",
        claim="It is so.",
        method=("varan:solve",),
        scales=dict.fromkeys(("smoke", "laptop", "paper"), settings),
        checks=(Check("c", "q", "in", (0.0, 1.0), "mean", "theory"),),
    )
    planned = Row("games", 6, "planned-row", "A plan", ("001",), "planned")
    monkeypatch.setattr(
        catalogue, "load", lambda: catalogue.Catalogue((built, planned))
    )


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["show", "21"], ["--help"], ["run", "--help"], ["list", "--json"]],
)
def test_looking_imports_nothing_numerical(arguments):
    script = (
        "import sys; from varan import cli\n"
        f"sys.argv = ['varan', *{arguments!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"loaded = [m for m in {NUMERICAL!r} if m in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_list_shows_the_whole_road():
    done = invoke("list")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("001  ")
    assert len(lines) == 366 + 2
    assert lines[-1].startswith("366 rows in 27 topics: ")


def test_list_filters_and_speaks_json():
    everything = json.loads(invoke("list", "--json").stdout)
    transport = json.loads(invoke("list", "--topic", "transport", "--json").stdout)
    assert [row for row in everything if row["topic"] == "transport"] == transport
    states = {
        state: json.loads(invoke("list", "--state", state, "--json").stdout)
        for state in ("planned", "built")
    }
    assert sum(map(len, states.values())) == len(everything) == 366


def test_show_by_id_and_number():
    by_id = invoke("show", "sinkhorn-newton-sparse")
    assert by_id.exit_code == 0
    assert "Accelerating Sinkhorn Algorithm" in by_id.stdout
    assert invoke("show", "21").stdout == invoke("show", "021").stdout == by_id.stdout
    shown = json.loads(invoke("show", "21", "--json").stdout)
    assert (shown["number"], shown["arxiv"]) == (21, "2401.12253")


def test_show_names_checks_and_scales(failing):
    shown = invoke("show", "5").stdout
    assert "c: mean q in [0, 1] (theory)" in shown
    assert "laptop: seeds = 2, n = 3" in shown
    assert "Run it: varan run absent-experiment" in shown


# Arguments, and what must be said; all are usage errors.
WRONG = {
    "unknown id": (["show", "sinkhorn-newton"], "Nearest: sinkhorn-newton-sparse"),
    "unknown number": (["show", "999"], "There is no row with number 999"),
    "unknown topic": (["list", "--topic", "game"], "no topic 'game'. Nearest: games"),
    "nothing to run": (["run"], "Say which rows to run"),
    "too much to run": (["run", "21", "--all"], "one of the three"),
    "unknown to run": (["run", "nonesuch-at-all"], "no row 'nonesuch-at-all'"),
    "no such scale": (["run", "21", "--scale", "huge"], "huge"),
    "no seeds": (["run", "21", "--seeds", "0"], "greater than or equal to 1"),
    "no such verb": (["walk"], "walk"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_command_is_a_usage_error(mistake):
    arguments, sentence = WRONG[mistake]
    done = invoke(*arguments)
    assert done.exit_code == cli.USAGE
    assert sentence in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_planned_row_does_not_run(failing):
    done = invoke("run", "planned-row")
    assert done.exit_code == cli.USAGE
    assert "planned-row: planned, not built yet." in done.stderr
    assert "`varan list --state built`" in done.stderr


def test_a_failed_run(failing, tmp_path):
    done = invoke("run", "5", "005", "--out", tmp_path, "--jobs", 1)
    assert done.exit_code == cli.FAILED
    assert "seed 0 failed: ModuleNotFoundError" in done.stdout
    assert "verdict: failed" in done.stdout
    done = invoke("run", "--topic", "games", "--out", tmp_path, "--json")
    assert done.exit_code == cli.FAILED
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["outcome"], row["checks"]) == ("failed", [])
    assert [failure["seed"] for failure in row["failures"]] == [0, 1]


def test_a_store_that_is_in_the_way(failing, tmp_path):
    (tmp_path / "file").write_text("")
    done = invoke("run", "--all", "--out", tmp_path / "file")
    assert done.exit_code == cli.FAILED
    assert "cannot be made" in done.stderr and "--out" in done.stderr


def test_a_bad_catalogue(monkeypatch):
    def broken():
        raise catalogue.CatalogueError("games/rows.toml is not valid TOML: line 3.")

    monkeypatch.setattr(catalogue, "load", broken)
    done = invoke("list")
    assert done.exit_code == cli.USAGE
    assert "varan: games/rows.toml is not valid TOML" in done.stderr


def test_a_bug_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda **_: 1 / 0)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == cli.FAILED
    assert "unexpected ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setenv("VARAN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_doctor_finds_what_is_there(tmp_path):
    done = invoke("doctor", "--out", tmp_path, "--json")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["complaints"]) == (0, [])
    assert report["packages"]["jax"] and report["devices"]
    extras = {extra["name"]: extra for extra in report["extras"]}
    assert {"peers", "onnx"} <= set(extras)
    for extra in extras.values():
        complete = all(extra["packages"].values())
        assert (extra["install"] is None) == complete
    assert not list(tmp_path.iterdir())
    assert (
        "All that varan needs is there." in invoke("doctor", "--out", tmp_path).stdout
    )


def test_doctor_complains(tmp_path):
    (tmp_path / "file").write_text("")
    done = invoke("doctor", "--out", tmp_path / "file" / "results")
    assert done.exit_code == cli.FAILED
    assert "cannot be written" in done.stdout


def test_help_documents_the_exit_codes():
    text = " ".join(invoke("--help").stdout.split())
    for code in (cli.FAILED, cli.USAGE, cli.INTERRUPTED):
        assert f"{code} " in text[text.index("Exit codes") :]


def test_doctor_asks_the_store(tmp_path):
    url = "postgresql://me:secret@127.0.0.1:1/results"
    done = invoke("doctor", "--out", tmp_path, "--store", url)
    assert done.exit_code == cli.FAILED
    assert "***@127.0.0.1:1/results cannot be opened" in done.stdout
    assert "secret" not in done.stdout
