"""`varan certify`: what can be proved about a network in an ONNX file."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ._arrays import read_array
from ._common import FAILED, Json, console, emit, fail

if TYPE_CHECKING:
    import numpy as np

# The largest radius tried, as a multiple of --eps.
_RADII = 10


class Forward(StrEnum):
    ibp = "ibp"
    crown = "crown"
    alpha = "alpha"


def certify(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="ONNX file.")],
    inputs: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="CSV or NPY: one input a row."),
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="Radius of the l_inf ball around each input.")
    ] = None,
    clip: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH", help="Range of the data: balls are cut to it."
        ),
    ] = None,
    property_file: Annotated[
        Path | None,
        typer.Option("--property", metavar="FILE", help="VNN-LIB file to decide."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds for each property or input.")
    ] = 60.0,
    forward: Annotated[
        Forward, typer.Option(help="How the network's values are bounded.")
    ] = Forward.crown,
    out: Annotated[Path, typer.Option(help="Folder for counterexamples.")] = Path(
        "varan-certify"
    ),
    as_json: Json = False,
) -> None:
    """Local Lipschitz constants, robustness radii and verdicts of a network.

    With --input and --eps for each input: the class that leads, a Lipschitz constant
    of the ball, the largest proved radius, and whether the class leads everywhere in
    the ball. With --property: whether a VNN-LIB property holds. Every counterexample
    was run through the network in float64, and in onnxruntime where that is installed.
    """
    if (inputs is None) != (eps is None):
        fail("--input and --eps belong together.")
    if inputs is None and property_file is None:
        fail("Say what to certify: --input FILE with --eps RADIUS, or --property FILE.")
    if eps is not None and not eps >= 0:
        fail(f"--eps must not be negative (got {eps}).")
    if not timeout > 0:
        fail(f"--timeout must be positive (got {timeout}).")
    import jax

    with jax.enable_x64(True):
        # By name: the command line knows the lab and no topic, but for this verb's own.
        topic = importlib.import_module("varan.lipschitz")
        network = _network(topic, model)
        work = _Work(topic, network, model, timeout, forward.value, out)
        report: dict[str, Any] = {"model": str(model)}
        if property_file is not None:
            report["property"] = work.property(property_file)
        if inputs is not None and eps is not None:
            points = _points(inputs, network.input_shape)
            report["inputs"] = [
                work.point(k, x, eps, clip) for k, x in enumerate(points)
            ]
    if as_json:
        emit(report)
    else:
        _show(report, eps)


class _Work:
    """One network and how to certify it."""

    def __init__(self, topic, network, file, timeout, forward, out):
        self.topic, self.network, self.file = topic, network, file
        self.timeout, self.forward, self.out = timeout, forward, out

    def property(self, file: Path) -> dict[str, Any]:
        try:
            cases = self.topic.read_vnnlib(file)
            return {"file": str(file), **self._verdict(cases, "counterexample.npy")}
        except (ValueError, TypeError) as error:
            fail(_sentence(error))

    def point(self, index: int, x, eps: float, clip) -> dict[str, Any]:
        import numpy as np

        try:
            logits = np.asarray(self.network(x))
            label = int(np.argmax(logits))
            box = self.topic.Box.linf(x, eps, clip=clip)
            lipschitz = self.topic.local_lipschitz(
                self.network, box, forward=self.forward
            )
            found: dict[str, Any] = {
                "label": label,
                "lipschitz": float(lipschitz.bound),
                "lipschitz_attained": float(lipschitz.attained),
            }
            if logits.size < 2 or eps == 0:
                return found
            radius = self.topic.certified_radius(
                self.network, x, label, _RADII * eps, clip=clip, forward=self.forward
            )
            cases = self.topic.robustness_property(
                x, eps, label, logits.size, clip=clip
            )
            verdict = self._verdict(cases, f"counterexample-{index}.npy")
        except (ValueError, TypeError) as error:
            fail(_sentence(error))
        return {**found, "radius": float(radius.value), **verdict}

    def _verdict(self, cases, name: str) -> dict[str, Any]:
        import numpy as np

        found = self.topic.verify(
            self.network,
            cases,
            self.network.input_shape,
            timeout=self.timeout,
            forward=self.forward,
        )
        verdict: dict[str, Any] = {"verdict": found.status, "boxes": found.boxes}
        if found.status == "holds":
            verdict["distance"] = float(found.certificate.value)
        if found.counterexample is not None:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                np.save(self.out / name, found.counterexample)
            except OSError as error:
                fail(f"{self.out}: {error.strerror or error}.", code=FAILED)
            verdict["counterexample"] = str(self.out / name)
            verdict["output"] = found.output.ravel().tolist()
            verdict["onnxruntime"] = self._elsewhere(cases, found.counterexample)
        return verdict

    def _elsewhere(self, cases, x) -> bool | None:
        """Whether onnxruntime's output is unsafe too; None where it is absent."""
        import numpy as np

        try:
            runtime = importlib.import_module("onnxruntime")
        except ModuleNotFoundError:
            return None
        session = runtime.InferenceSession(str(self.file))
        batch = x[None] if self.network.batched else x
        feed = {self.network.input_name: batch.astype(np.float32)}
        (y,) = session.run(None, feed)
        return any(case.contains(x.ravel(), np.float64(y).ravel()) for case in cases)


def _network(topic, file: Path):
    try:
        return topic.load_onnx(file)
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        fail(_sentence(error))


def _points(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    import math

    import numpy as np

    values, size = read_array(file), math.prod(shape)
    if not np.all(np.isfinite(values)):
        fail(f"{file} holds NaN or infinite entries.", "Remove or impute them.")
    if values.size % size or (values.size != size and values[0].size != size):
        fail(
            f"{file} holds an array of shape {values.shape}; the network's inputs have "
            f"shape {shape}."
        )
    return values.reshape(-1, *shape)


def _sentence(error: Exception) -> str:
    """The library's message without the function that raised it."""
    _, _, rest = str(error).partition(": ")
    return rest or str(error)


_VERDICTS = {
    "holds": "holds (proved)",
    "violated": "violated (counterexample)",
    "unknown": "unknown (no proof and no counterexample in time)",
}


def _show(report: dict[str, Any], eps: float | None) -> None:
    screen = console()

    def line(text: str) -> None:
        screen.print(text, markup=False, highlight=False, soft_wrap=True)

    if "property" in report:
        found = report["property"]
        line(f"{found['file']}: {_VERDICTS[found['verdict']]}, {found['boxes']} boxes")
        _show_counterexample(line, found)
    if "inputs" in report:
        table = Table(title=f"{report['model']}, balls of radius {eps:g}")
        for head in (
            "input",
            "class",
            "Lipschitz constant at most (proof)",
            "attained",
            "radius at least (proof)",
            "class leads in the ball",
        ):
            table.add_column(head)
        for k, found in enumerate(report["inputs"]):
            table.add_row(
                str(k),
                str(found["label"]),
                f"{found['lipschitz']:.6g}",
                f"{found['lipschitz_attained']:.6g}",
                f"{found['radius']:.4g}" if "radius" in found else "",
                _VERDICTS[found["verdict"]] if "verdict" in found else "",
            )
        screen.print(table)
        for found in report["inputs"]:
            _show_counterexample(line, found)


def _show_counterexample(line, found: dict[str, Any]) -> None:
    if "counterexample" not in found:
        return
    checked = {
        True: "; onnxruntime's output is unsafe too",
        False: "; onnxruntime's output, in float32, is NOT unsafe",
        None: "",
    }[found["onnxruntime"]]
    line(f"written {found['counterexample']} (run in float64{checked})")
