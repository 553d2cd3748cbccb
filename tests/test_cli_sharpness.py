"""`varan sharpness` as a user meets it: files in, table and picture out, sentences."""

import json
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer.testing import CliRunner

from varan import cli
from varan.train import save_checkpoint

SOURCE = """
import equinox as eqx, jax, jax.numpy as jnp

class Net(eqx.Module):
    layer: eqx.nn.Linear
    scale: float
    def __init__(self, width, *, key):
        self.layer = eqx.nn.Linear(2, width, dtype="float32", key=key)
        self.scale = 2.0
    def __call__(self, x):
        return self.scale * self.layer(x)

class Pair(Net):
    def __call__(self, x):
        return x, x

class Tokens(eqx.Module):
    table: eqx.nn.Embedding
    layer: eqx.nn.Linear
    def __init__(self, *, key):
        self.table = eqx.nn.Embedding(5, 2, dtype="float32", key=key)
        self.layer = eqx.nn.Linear(2, 3, dtype="float32", key=key)
    def __call__(self, x):
        return self.layer(jax.vmap(self.table)(x).mean(0))

def half(*, key):
    conv = eqx.nn.Conv1d(1, 2, 2, dtype=jnp.bfloat16, key=key)
    return eqx.nn.Sequential(
        [eqx.nn.Lambda(lambda x: x[None]), conv, eqx.nn.Lambda(jnp.ravel)]
    )

class Root(eqx.Module):
    weight: jax.Array
    def __init__(self, *, key):
        self.weight = jnp.zeros(2, "float32")
    def __call__(self, x):
        return jnp.sqrt(self.weight) * x

def broken():
    raise RuntimeError("no model today")
"""


def invoke(*arguments):
    words = [str(argument) for argument in ("sharpness", *arguments)]
    return CliRunner().invoke(cli.app, words, prog_name="varan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharpness")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 2))
    y = (x[:, 0] > 0).astype(int)
    np.savez(folder / "data.npz", x=x, y=y)
    np.savetxt(folder / "data.csv", np.c_[x, y], delimiter=",", header="a,b,class")
    model = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0), dtype=jnp.float32)
    eqx.tree_serialise_leaves(folder / "mlp.eqx", model)
    save_checkpoint(folder / "mlp.varan", model)
    (folder / "their_model.py").write_text(SOURCE)
    return folder, model, x, y


def test_the_numbers_are_those_of_the_model_and_the_pictures_are_written(folder):
    folder, model, x, y = folder
    out = folder / "out"
    done = invoke(
        folder / "mlp.eqx", folder / "data.npz", "--arch", "mlp:2-3-2", "--out", out,
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)

    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    vector, unravel = jax.flatten_util.ravel_pytree(arrays)
    inputs = jnp.asarray(x, jnp.float32)

    @jax.jit
    def loss(v):
        logits = jax.vmap(eqx.combine(unravel(v), static))(inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    H = np.asarray(jax.jit(jax.hessian(loss))(vector))
    exact = np.linalg.eigvalsh(H)
    assert report["parameters"] == len(H) and report["samples"] == 30
    assert report["loss"] == pytest.approx(float(loss(vector)), rel=1e-5)
    found = {row["name"]: row for row in report["measures"]}
    top, low = found["largest eigenvalue"], found["smallest eigenvalue"]
    assert abs(top["value"] - exact[-1]) <= top["plus_minus"] + 1e-5
    assert abs(low["value"] - exact[0]) <= low["plus_minus"] + 1e-5
    trace = found["trace of the Hessian"]
    assert trace["kind"] == "exact" and trace["value"] == pytest.approx(
        np.trace(H), rel=1e-4
    )
    assert found["worst rise within 0.05"]["kind"] == "lower bound"
    assert report["files"] == [
        str(out / f"sharpness.{s}") for s in ("npz", "png", "svg")
    ]
    assert (out / "sharpness.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "sharpness.svg").read_text("utf-8")
    drawn = np.load(out / "sharpness.npz")
    assert drawn["loss"][12, 12] == pytest.approx(report["loss"], rel=1e-5)
    assert np.trapezoid(drawn["density"], drawn["eigenvalue"]) == pytest.approx(
        1, rel=0.05
    )


def read(folder, file, **model):
    """The model as the verb reads it."""
    from varan.cli._models import load_model

    with jax.enable_x64(True):
        return load_model(folder / file, model.get("arch"), model.get("make"))


def test_all_forms_of_saved_models_are_read(folder, monkeypatch):
    folder, model, *_ = folder
    for file in ("mlp.eqx", "mlp.varan"):
        same = read(folder, file, arch="mlp:2-3-2")
        assert eqx.tree_equal(
            eqx.filter(same, eqx.is_array), eqx.filter(model, eqx.is_array)
        )
    # The form of Equinox's own guide: a line of hyperparameters, then the leaves.
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    import their_model

    theirs = their_model.Net(2, key=jax.random.key(1))
    theirs = eqx.tree_at(lambda m: m.scale, theirs, 3.0)
    with (folder / "net.eqx").open("wb") as file:
        file.write(b'{"width": 2}\n')
        eqx.tree_serialise_leaves(file, theirs)
    same = read(folder, "net.eqx", make="their_model:Net")
    assert same.scale == 3.0
    np.testing.assert_array_equal(same.layer.weight, theirs.layer.weight)
    done = invoke("net.eqx", "data.npz", "--make", "their_model:Pair")
    assert done.exit_code == cli.USAGE and "must return one array" in done.stderr
    del sys.modules["their_model"]


def test_tokens_half_precision_and_roots(folder, monkeypatch):
    folder, *_ = folder
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    import their_model

    key = jax.random.key(1)
    tokens = np.random.default_rng(1).integers(0, 5, (30, 4))
    np.savez("tokens.npz", x=tokens, y=tokens[:, 0] % 3)
    model = their_model.Tokens(key=key)
    eqx.tree_serialise_leaves("tokens.eqx", model)
    done = invoke("tokens.eqx", "tokens.npz", "--make", "their_model:Tokens", "--json")
    assert done.exit_code == 0, done.output
    logits = jax.vmap(model)(jnp.asarray(tokens))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 0] % 3)
    assert json.loads(done.stdout)["loss"] == pytest.approx(
        float(losses.mean()), rel=1e-5
    )

    eqx.tree_serialise_leaves("half.eqx", their_model.half(key=key))
    done = invoke("half.eqx", "data.npz", "--make", "their_model:half", "--json")
    # One convolution of two inputs: two outputs.
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["loss_name"] == "cross-entropy"

    eqx.tree_serialise_leaves("root.eqx", their_model.Root(key=key))
    done = invoke("root.eqx", "data.npz", "--make", "their_model:Root")
    assert done.exit_code == cli.USAGE and "no finite gradient" in done.stderr
    del sys.modules["their_model"]


def test_one_output_for_two_classes_is_a_logit(folder):
    folder, _, x, y = folder
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(2), dtype=jnp.float32)
    eqx.tree_serialise_leaves(folder / "one.eqx", model)
    logit = jax.vmap(model)(jnp.asarray(x, jnp.float32))[:, 0]
    wanted = optax.sigmoid_binary_cross_entropy(logit, jnp.asarray(y, jnp.float32))
    np.savez(folder / "counts.npz", x=x, y=y + 3)
    given = ("--arch", "mlp:2-3-1", "--out", folder / "out", "--json")
    done = invoke(folder / "one.eqx", folder / "data.npz", *given)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["loss_name"] == "cross-entropy"
    assert report["loss"] == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert report["accuracy"] == pytest.approx(np.mean((np.asarray(logit) > 0) == y))
    # Other whole numbers are no classes of one output.
    done = invoke(folder / "one.eqx", folder / "counts.npz", *given)
    assert json.loads(done.stdout)["loss_name"] == "squared"
    given = (*given, "--loss", "cross-entropy")
    done = invoke(folder / "one.eqx", folder / "counts.npz", *given)
    assert done.exit_code == cli.USAGE and "from 0 to 1" in done.stderr


def test_bad_files_give_one_sentence(folder, monkeypatch):
    folder, *_ = folder
    monkeypatch.chdir(folder)
    whole = (folder / "mlp.eqx").read_bytes()
    checked = (folder / "mlp.varan").read_bytes()
    header = b"\x93NUMPY\x01\x00v\x00"
    huge = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 2), }"
    huge = header + huge.ljust(0x75) + b"\n"
    code = b"{'descr': '<f4', 'fortran_order': False, 'shape': __import__('os'), }"
    code = header + code.ljust(0x75) + b"\n"
    pickled = whole.replace(b"'<f4'", b"'|O' ", 1)
    files = {
        "cut.eqx": (whole[:-4], "ends within"),
        "header.eqx": (whole[:20], "does not hold the weights of .layers[0].weight"),
        "more.eqx": (whole + b"x", "holds more than the model"),
        "empty.eqx": (b"", "does not hold the weights"),
        "text.eqx": (b"hello", "does not hold the weights"),
        "huge.eqx": (huge, "holds float32 of shape (99999999999, 2)"),
        "code.eqx": (code, "does not hold the weights"),
        "pickled.eqx": (pickled, "holds object of shape"),
        "line.eqx": (b"{not json\n" + whole, "a line that is not JSON"),
        "bad.varan": (checked[:-1] + b"x", "its checksum is wrong"),
    }
    arch = ("--arch", "mlp:2-3-2", "--out", folder / "bad")
    for name, (content, message) in files.items():
        (folder / name).write_bytes(content)
        done = invoke(folder / name, folder / "data.npz", *arch)
        assert done.exit_code == cli.USAGE, (name, done.output)
        assert message in done.stderr.replace("\n", " "), (name, done.stderr)
        assert "Traceback" not in done.output
    good = (folder / "mlp.eqx", folder / "data.npz")
    for options, message in (
        ((), "--arch or --make, one of the two"),
        (("--arch", "cnn:3"), "--arch must be mlp:SIZES"),
        (("--arch", "mlp:2-x"), "--arch must be mlp:SIZES"),
        (("--arch", "mlp:2-3-4-2"), "hidden layers of one width"),
        (("--arch", "mlp:2-4-2"), "where .layers[0].weight is"),
        (("--make", "their_model:broken"), "RuntimeError: no model today"),
        (("--make", "absent_module:f"), "ModuleNotFoundError"),
        (("--make", "their_model:Net"), "TypeError"),
        (("--arch", "mlp:2-3-2", "--rho", "0"), "--rho must be positive"),
    ):
        done = invoke(*good, *options)
        assert done.exit_code == cli.USAGE, done.output
        assert message in done.stderr.replace("\n", " "), done.stderr
    sys.modules.pop("their_model", None)


def test_bad_data_give_one_sentence(folder):
    folder, _, x, y = folder
    np.savez(folder / "names.npz", a=x)
    np.savez(folder / "lengths.npz", x=x, y=y[:3])
    np.savez(folder / "nan.npz", x=x * np.nan, y=y)
    np.savez(folder / "classes.npz", x=x, y=y + 1)
    np.savez(folder / "wide.npz", x=np.ones((4, 3)), y=[0, 1, 0, 1])
    np.savez(folder / "objects.npz", x=np.array([{}], object), y=y)
    (folder / "cut.npz").write_bytes((folder / "data.npz").read_bytes()[:100])
    np.save(folder / "array.npy", x)
    (folder / "array.npy").rename(folder / "array.npz")
    (folder / "one.csv").write_text("1\n2\n")
    for name, message in (
        ("absent.npz", "No such file"),
        ("names.npz", "must hold two arrays, x and y"),
        ("lengths.npz", "one row of x for each of y"),
        ("nan.npz", "NaN or infinite"),
        ("classes.npz", "classes must be whole numbers from 0 to 1"),
        ("wide.npz", "does not take one input of shape (3,)"),
        ("objects.npz", "is no NPZ file of numbers"),
        ("cut.npz", "is no NPZ file of numbers"),
        ("array.npz", "is no NPZ file of numbers"),
        ("one.csv", "must have features and a target"),
        ("data.txt", "must end in .npz or .csv"),
    ):
        done = invoke(
            folder / "mlp.eqx", folder / name, "--arch", "mlp:2-3-2", "--out",
            folder / "bad",
        )  # fmt: skip
        assert done.exit_code == cli.USAGE, (name, done.output)
        assert message in done.stderr.replace("\n", " "), (name, done.stderr)
        assert "Traceback" not in done.output
    assert not (folder / "bad").exists()
