"""`varan transport` as a user meets it: files in, plan and picture out, sentences."""

import json

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from typer.testing import CliRunner

from varan import cli


def invoke(*arguments):
    words = [str(argument) for argument in ("transport", *arguments)]
    return CliRunner().invoke(cli.app, words, prog_name="varan")


@pytest.fixture
def clouds(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 2)), rng.normal(size=(12, 2)) + 1
    np.savetxt(tmp_path / "a.csv", x, delimiter=",", header="first,second", comments="")
    np.save(tmp_path / "b.npy", y)
    return tmp_path, x, y


def test_the_bounds_hold_and_the_plan_is_written(clouds):
    folder, x, y = clouds
    out = folder / "out"
    done = invoke(folder / "a.csv", folder / "b.npy", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    matrix = ((x[:, None] - y[None]) ** 2).sum(-1)
    least = matrix[linear_sum_assignment(matrix)].mean()
    assert report["lower_bound"] <= least + 1e-9 <= report["cost"] + 2e-9
    assert report["independent_cost"] == pytest.approx(matrix.mean())
    plan = np.load(out / "plan.npy")
    np.testing.assert_allclose(plan.sum(0), 1 / 12, atol=1e-12)
    np.testing.assert_allclose(plan.sum(1), 1 / 12, atol=1e-12)
    assert np.sum(plan * matrix) == pytest.approx(report["cost"])
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "plan.svg").read_text("utf-8")
    assert report["files"] == [str(out / f"plan.{s}") for s in ("npy", "png", "svg")]


def test_histograms_move_along_their_grid(tmp_path):
    (tmp_path / "a.csv").write_text("0,1,0,0,1\n")
    (tmp_path / "b.csv").write_text("0\n0\n2\n0\n2\n")
    done = invoke(
        tmp_path / "a.csv",
        tmp_path / "b.csv",
        "--histogram",
        "--cost",
        "euclidean",
        "--epsilon",
        "0.01",
        "--out",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.output
    assert "2 points to 2, dimension 1, cost euclidean" in done.stdout
    # Half of the mass moves by one bin.
    assert "cost of the plan    0.5" in done.stdout
    assert "(proved)" in done.stdout


def test_bad_files_give_one_sentence(clouds):
    folder, _, _ = clouds
    good = folder / "b.npy"
    (folder / "words.csv").write_text("a,b\nc,d\n")
    (folder / "ragged.csv").write_text("1,2\n3\n")
    (folder / "empty.csv").write_text("")
    (folder / "nan.csv").write_text("1,nan\n")
    (folder / "line.csv").write_text("1\n2\n")
    (folder / "minus.csv").write_text("1,-1\n")
    (folder / "points.txt").write_text("1,2\n")
    (folder / "cut.npy").write_bytes(b"\x93NUMPY")
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name, message in (
        ("absent.csv", "No such file"),
        ("words.csv", "does not hold an array of numbers (line 2 has 'c')"),
        ("ragged.csv", "(line 2 has 1 entries, the first 2)"),
        ("objects.npy", "does not hold an array of numbers"),
        ("cut.npy", "does not hold an array of numbers"),
        ("empty.csv", "holds no numbers"),
        ("nan.csv", "holds NaN or infinite entries"),
        ("line.csv", "points of dimension 1"),
        ("points.txt", "must end in .csv or .npy"),
    ):
        done = invoke(folder / name, good, "--out", folder / "out")
        assert done.exit_code == cli.USAGE, name
        assert message in done.stderr.replace("\n", " "), done.stderr
        assert "Traceback" not in done.output
    done = invoke(folder / "minus.csv", folder / "minus.csv", "--histogram")
    assert done.exit_code == cli.USAGE and "none negative" in done.stderr
    done = invoke(good, good, "--epsilon", "0")
    assert done.exit_code == cli.USAGE and "--epsilon must be positive" in done.stderr
    np.save(folder / "same.npy", np.zeros((3, 2)))
    done = invoke(folder / "same.npy", folder / "same.npy")
    assert done.exit_code == cli.USAGE and "nothing to move" in done.stderr
    assert not (folder / "out").exists()
