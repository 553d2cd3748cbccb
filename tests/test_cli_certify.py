"""`varan certify` as a user meets it: an ONNX file in, constants and verdicts out."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from varan import cli

pytest.importorskip("onnx")
NETWORK = Path(__file__).parent / "lipschitz" / "onnx" / "perceptron.onnx"


def invoke(*arguments):
    words = [str(argument) for argument in ("certify", *arguments)]
    return CliRunner().invoke(cli.app, words, prog_name="varan")


@pytest.fixture
def image(tmp_path):
    x = load_digits().data[1600] / 16
    np.savetxt(tmp_path / "x.csv", x[None], delimiter=",")
    return tmp_path / "x.csv", x


def unsafe_file(folder, x, eps, other, label):
    """A VNN-LIB file: `other` leads `label` somewhere in the ball."""
    lines = [f"(declare-const X_{k} Real)" for k in range(64)]
    lines += [f"(declare-const Y_{k} Real)" for k in range(10)]
    for k, value in enumerate(x):
        lines.append(f"(assert (>= X_{k} {max(value - eps, 0):.17f}))")
        lines.append(f"(assert (<= X_{k} {min(value + eps, 1):.17f}))")
    lines.append(f"(assert (<= Y_{label} Y_{other}))")
    file = folder / "p.vnnlib"
    file.write_text("\n".join(lines))
    return file


def test_small_ball_is_certified(image, tmp_path):
    file, _ = image
    out = tmp_path / "out"
    done = invoke(NETWORK, "--input", file, "--eps", 0.01, "--json", "--out", out)
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["inputs"]
    assert found["verdict"] == "holds" and found["distance"] > 0
    assert found["lipschitz_attained"] <= found["lipschitz"]
    assert found["radius"] >= 0.01
    assert not out.exists()


def test_violated_property_comes_with_its_input(image, tmp_path):
    _, x = image
    file = unsafe_file(tmp_path, x, 0.5, other=8, label=2)
    out = tmp_path / "out"
    done = invoke(NETWORK, "--property", file, "--out", out, "--timeout", 5)
    assert done.exit_code == 0, done.output
    assert "violated (counterexample)" in done.stdout
    found = np.load(out / "counterexample.npy")
    assert np.all(np.abs(found - x) <= 0.5 + 1e-12)
    assert "run in float64" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([NETWORK], "Say what to certify"),
        ([NETWORK, "--eps", "0.1"], "belong together"),
        ([NETWORK, "--input", "x.csv", "--eps", "-1"], "--eps must not be negative"),
        (["absent.onnx", "--property", "p.vnnlib"], "No such file"),
        ([NETWORK, "--property", "absent.vnnlib"], "No such file"),
        ([NETWORK, "--input", "short.csv", "--eps", "0.1"], "inputs have shape (64,)"),
        ([NETWORK, "--property", "p", "--timeout", "0"], "--timeout must be positive"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.csv").write_text("1,2,3\n")
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr
