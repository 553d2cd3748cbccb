"""`varan sharpness`: how flat a saved model is at its weights."""

from __future__ import annotations

import importlib
import math
import zipfile
import zlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ._arrays import read_array
from ._common import FAILED, Json, console, emit, fail
from ._models import load_model

if TYPE_CHECKING:
    import numpy as np

# Relative to each weight, for the worst case in l-infinity: it moves all at once.
_RELATIVE = 0.002
# Of the loss surface, a side; of the density, and its width as a share of the spectrum.
_POINTS, _BINS, _WIDTH = 25, 1000, 0.005


class LossName(StrEnum):
    auto = "auto"
    cross_entropy = "cross-entropy"
    squared = "squared"


def sharpness(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="Weights that Equinox or varan.train saved."
        ),
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="NPZ with x and y, or CSV with the target in the last column.",
        ),
    ],
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:SIZES",
            help="mlp:40-128-10 (equinox.nn.MLP) or mlpnet:... (varan.nets.MLPNet).",
        ),
    ] = None,
    make: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="What builds the model. Importing the module runs its code.",
        ),
    ] = None,
    loss: Annotated[
        LossName, typer.Option(help="By default cross-entropy for whole numbers.")
    ] = LossName.auto,
    rho: Annotated[
        float, typer.Option(help="Radius of the ball around the weights.")
    ] = (0.05),
    samples: Annotated[
        int, typer.Option(help="Rows of the data that are used.")
    ] = 1000,
    out: Annotated[Path, typer.Option(help="The folder for the picture.")] = Path(
        "varan-sharpness"
    ),
    as_json: Json = False,
) -> None:
    """Curvature and sharpness of a saved Equinox model, each with its kind of proof.

    The loss on a plane through the weights and the density of the Hessian's
    eigenvalues are drawn as sharpness.png and sharpness.svg and kept in sharpness.npz.
    """
    for name, value in (("--rho", rho), ("--samples", samples)):
        if not 0 < value < math.inf:
            fail(f"{name} must be positive (got {value}).")
    x, y = _read_data(data, samples)

    import jax

    with jax.enable_x64(True):
        network = load_model(model, arch, make)
        report, drawn = _measure(network, x, y, loss, rho)
    report["files"] = _write(out, drawn)
    if as_json:
        emit(report)
    else:
        _show(report)


def _read_data(file: Path, samples: int) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    if file.suffix.lower() == ".npz":
        x, y = _read_npz(file)
    elif file.suffix.lower() == ".csv":
        values = read_array(file)
        if values.ndim != 2 or values.shape[1] < 2:
            fail(f"{file} must have features and a target in each row.")
        x, y = values[:, :-1], values[:, -1]
    else:
        fail(f"{file}: data files must end in .npz or .csv.")
    if x.ndim < 2 or len(x) != len(y) or len(x) == 0:
        fail(
            f"{file} must hold one row of x for each of y (got shapes {x.shape} and "
            f"{y.shape})."
        )
    x, y = x[:samples], y[:samples]
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        fail(f"{file} holds NaN or infinite entries.", "Remove or impute them.")
    return x, y


def _read_npz(file):
    import numpy as np

    try:
        # Opened here: of a damaged file NumPy would leave it open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except KeyError:
        fail(f"{file} must hold two arrays, x and y.")
    except OSError as error:
        fail(f"{file}: {error.strerror or error}.")
    except (
        ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error
    ):  # fmt: skip
        fail(f"{file} is no NPZ file of numbers.", "It must be what numpy.savez wrote.")
    if any(array.dtype.kind not in "fiub" for array in (x, y)) or np.ndim(y) == 0:
        fail(f"{file} must hold numbers (got {x.dtype} and {y.dtype}).")
    return x, y


def _measure(network, x, y, loss: LossName, rho: float):
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np

    # By name: the command line knows the lab and no topic, but for this verb's own.
    topic = importlib.import_module("varan.sharpness")
    network = eqx.nn.inference_mode(network)
    floats = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    if not floats:
        fail("the model has no floating weights: there is nothing to measure.")
    x, outputs = _outputs(network, x, jnp.result_type(*floats))
    labels, classify = _targets(y, outputs, loss)
    one_logit = classify and outputs.size == len(y)
    loss_fn = topic.LogitLoss(
        _two_logits if one_logit else _all_logits, None if classify else _squared
    )
    batch, key = (x, labels), jax.random.key(0)
    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn))(network, batch)
    value = float(value)
    if not math.isfinite(value):
        fail(f"the loss is {value} at the weights: there is nothing to measure.")
    if not all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(gradient)):
        fail("the loss has no finite gradient at the weights.")
    given = (loss_fn, network, batch)
    top, low = (
        topic.hessian_top(*given, which=which, key=key)
        for which in ("largest", "smallest")
    )
    relative = {"rho": _RELATIVE, "p": math.inf, "adaptive": True}
    rows = [
        _row("largest eigenvalue", top.values[0], "proved", top.residuals[0]),
        _row("smallest eigenvalue", low.values[0], "proved", low.residuals[0]),
        _result("trace of the Hessian", topic.hessian_trace(*given, key=key)),
        _result(
            f"worst rise within {rho:g}", topic.sharpness(*given, rho=rho, key=key)
        ),
        _result(
            f"worst rise, each weight by {100 * _RELATIVE:g} %",
            topic.sharpness(*given, **relative, key=key),
        ),
        _result(
            "average rise, each weight by 10 %",
            topic.sharpness(
                *given, rho=0.1, adaptive=True, which="avg", steps=100, key=key
            ),
        ),
        _result(
            f"first-order flatness within {rho:g}",
            topic.first_order_flatness(*given, rho=rho, key=key),
        ),
    ]
    spectrum = topic.spectral_density(*given, key=key)
    surface = topic.loss_surface(*given, points=_POINTS, key=key)
    report: dict[str, Any] = {
        "samples": len(x),
        "parameters": int(sum(leaf.size for leaf in floats)),
        "loss_name": "cross-entropy" if classify else "squared",
        "loss": value,
        "measures": rows,
    }
    if classify:
        guess = loss_fn.logits(network, x).argmax(1).astype(labels.dtype)
        report["accuracy"] = float(jnp.mean(guess == labels))
    low_end, high_end = float(spectrum.nodes.min()), float(spectrum.nodes.max())
    spread = max(high_end - low_end, 1e-6)
    grid = jnp.linspace(low_end - 0.05 * spread, high_end + 0.05 * spread, _BINS)
    drawn = {
        "a": surface.a,
        "b": surface.b,
        "loss": surface.loss,
        "eigenvalue": grid,
        "density": spectrum.density(grid, _WIDTH * spread),
        "nodes": spectrum.nodes,
        "weights": spectrum.weights,
    }
    return report, {name: np.asarray(array) for name, array in drawn.items()}


def _squared(outputs, y):
    return ((outputs - y) ** 2).mean()


def _all_logits(network, x):
    import jax

    return jax.vmap(network)(x)


def _two_logits(network, x):
    """One logit is that of class 1 against a zero for class 0."""
    import jax.numpy as jnp

    logit = _all_logits(network, x).reshape(-1)
    return jnp.stack([jnp.zeros_like(logit), logit], 1)


def _outputs(network, x, dtype):
    """Inputs as the model takes them, and its outputs."""
    import jax

    try:
        inputs, outputs = _first_taken(network, x, dtype)
    # The user's model: whatever it raises, it does not take these inputs.
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        fail(
            f"the model does not take one input of shape {x.shape[1:]}: "
            f"{type(error).__name__}: {first[0] if first else ''}",
            "It is called with one sample, without key or state.",
        )
    if not isinstance(outputs, jax.Array):
        fail(f"the model must return one array (got {type(outputs).__name__}).")
    return inputs, outputs


def _first_taken(network, x, dtype):
    import jax.numpy as jnp

    inputs = jnp.asarray(x, dtype)
    try:
        return inputs, _all_logits(network, inputs)
    except Exception as error:
        # Tokens are indices: what looks them up takes no floats.
        if x.dtype.kind not in "iu":
            raise
        first = error
    try:
        return jnp.asarray(x), _all_logits(network, jnp.asarray(x))
    except Exception:
        raise first from None


def _targets(y, outputs, loss: LossName):
    """Targets in the form that the loss takes, and whether they are classes."""
    import jax.numpy as jnp
    import numpy as np

    whole = bool(np.all(y == np.round(y)))
    one_logit = outputs.shape in ((len(y),), (len(y), 1))
    binary = one_logit and bool(np.all((y == 0) | (y == 1)))
    classes = 2 if one_logit else outputs.shape[-1]
    classify = loss is LossName.cross_entropy or (
        loss is LossName.auto and whole and y.ndim == 1
        and (binary or (outputs.ndim == 2 and not one_logit))
    )  # fmt: skip
    if not classify:
        shaped = y.reshape(outputs.shape) if y.size == outputs.size else y
        if shaped.shape != outputs.shape:
            fail(
                f"targets have shape {y.shape}, the model's outputs {outputs.shape}.",
                "For class numbers use --loss cross-entropy.",
            )
        return jnp.asarray(shaped, outputs.dtype), False
    if (outputs.ndim != 2 and not one_logit) or y.ndim != 1:
        fail(
            "cross-entropy needs one output a class and one class a row (got outputs "
            f"of shape {outputs.shape} and targets of {y.shape})."
        )
    if not whole or np.min(y) < 0 or np.max(y) >= classes:
        fail(
            f"classes must be whole numbers from 0 to {classes - 1} (got "
            f"{np.min(y):g} to {np.max(y):g})."
        )
    return jnp.asarray(y.astype(int)), True


def _row(name, value, kind, width=None) -> dict[str, Any]:
    numbers = [float(value), None if width is None else float(width)]
    if not all(number is None or math.isfinite(number) for number in numbers):
        fail(f"{name}: the loss is not finite around the weights.", code=FAILED)
    return {"name": name, "value": numbers[0], "kind": kind, "plus_minus": numbers[1]}


def _result(name, result) -> dict[str, Any]:
    kind = result.kind.replace("_", " ")
    return _row(name, result.value, kind, result.half_width)


def _write(out: Path, drawn) -> list[str]:
    import numpy as np

    files = [out / f"sharpness.{suffix}" for suffix in ("npz", "png", "svg")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        np.savez(files[0], **drawn)
        _draw(files[1:], drawn)
    except OSError as error:
        fail(f"{out}: {error.strerror or error}.", code=FAILED)
    return [str(file) for file in files]


def _draw(files: list[Path], drawn) -> None:
    """The loss on the plane, and the density of the eigenvalues."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    plane, curve = figure.subplots(1, 2)
    # Levels in equal ratios: around a minimum the loss spans orders of magnitude.
    levels = np.log10(np.maximum(drawn["loss"], 1e-12))
    levels = np.where(np.isfinite(levels), levels, np.nan)
    filled = plane.contourf(drawn["a"], drawn["b"], levels.T, levels=20, cmap="viridis")
    figure.colorbar(filled, label="log10 of the loss")
    plane.plot(0, 0, "o", color="white", markeredgecolor="black")
    plane.set(xlabel="first direction", ylabel="second direction")
    plane.set_title("loss around the weights (filter-normalised)", fontsize=10)
    # Narrower than a node's width nothing is seen: far tails are cut.
    density = np.maximum(drawn["density"], 1e-6 * drawn["density"].max())
    curve.semilogy(drawn["eigenvalue"], density, color="#0072B2")
    curve.set(xlabel="eigenvalue of the Hessian", ylabel="density")
    curve.set_title("spectral density (Lanczos quadrature)", fontsize=10)
    for file in files:
        figure.savefig(file, dpi=150)


def _show(report: dict[str, Any]) -> None:
    screen = console()
    line = "{samples} samples, {parameters} parameters, {loss_name} {loss:.6g}"
    if "accuracy" in report:
        line += ", accuracy {accuracy:.4g}"
    screen.print(line.format(**report), markup=False, highlight=False, soft_wrap=True)
    table = Table("measure", "value", "known as", box=None, pad_edge=False)
    for row in report["measures"]:
        known = row["kind"]
        if row["plus_minus"] is not None:
            known += f", within {row['plus_minus']:.2g}"
            known += " (95 %)" if row["kind"] == "estimate" else ""
        table.add_row(row["name"], f"{row['value']:.5g}", known)
    screen.print(table)
    for file in report["files"]:
        screen.print(f"written {file}", markup=False, highlight=False, soft_wrap=True)
