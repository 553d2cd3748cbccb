"""`varan transport`: what it costs to move one file's points onto another's."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._arrays import read_array
from ._common import FAILED, Json, console, emit, fail

if TYPE_CHECKING:
    import numpy as np

# Of the matrix of costs: 200 MB in float64.
_MOST_ENTRIES = 25_000_000
# Epsilon by default, as a share of the mean cost.
_SHARE = 0.01
# Lines in a picture of plane points.
_LINES = 1000


class CostName(StrEnum):
    sqeuclidean = "sqeuclidean"
    euclidean = "euclidean"


def transport(
    source: Annotated[Path, typer.Argument(metavar="A", help="CSV or NPY file.")],
    target: Annotated[Path, typer.Argument(metavar="B", help="CSV or NPY file.")],
    histogram: Annotated[
        bool,
        typer.Option(
            "--histogram",
            help="The files hold masses on a grid (a vector, or an image), not points.",
        ),
    ] = False,
    cost: Annotated[
        CostName, typer.Option(help="Of moving a unit of mass.")
    ] = CostName.sqeuclidean,
    epsilon: Annotated[
        float | None,
        typer.Option(
            show_default="0.01 of the mean cost",
            help="Weight of the entropy, in units of the cost; smaller is sharper.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The folder for the plan and its picture.")
    ] = Path("varan-transport"),
    as_json: Json = False,
) -> None:
    """Transport plan between two point clouds or histograms, with a certificate.

    A file of points has one point a row. The plan is written as plan.npy, rows for A
    and columns for B, and drawn as plan.png and plan.svg.
    """
    if epsilon is not None and not epsilon > 0:
        fail(f"--epsilon must be positive (got {epsilon}).")
    first, second = (_measure(file, histogram) for file in (source, target))
    if first[0].shape[1] != second[0].shape[1]:
        fail(
            f"{source} has points of dimension {first[0].shape[1]}, {target} of "
            f"{second[0].shape[1]}.",
            "Both must live in one space.",
        )
    entries = len(first[0]) * len(second[0])
    if entries > _MOST_ENTRIES:
        fail(
            f"{len(first[0])} and {len(second[0])} points make {entries} costs, more "
            f"than {_MOST_ENTRIES}.",
            "Take a sample of the points.",
        )
    plan, report = _solve(first, second, cost.value, epsilon)
    report["files"] = _write(out, plan, first[0], second[0])
    if as_json:
        emit(report)
    else:
        _show(report)
    if not report["converged"]:
        raise typer.Exit(FAILED)


def _measure(file: Path, histogram: bool) -> tuple[np.ndarray, np.ndarray]:
    """Points and their masses."""
    import numpy as np

    values = read_array(file)
    if not np.all(np.isfinite(values)):
        fail(f"{file} holds NaN or infinite entries.", "Remove or impute them.")
    if not histogram:
        if values.ndim > 2:
            fail(f"{file} must hold one point a row (got shape {values.shape}).")
        points = values if values.ndim == 2 else values[:, None]
        return points, np.full(len(points), 1 / len(points))
    # A file with one row or one column holds a vector.
    values = np.squeeze(values) if values.size > 1 else values.reshape(1)
    if np.any(values < 0) or not values.sum() > 0:
        fail(f"{file} must hold masses: none negative, not all zero.")
    places = np.argwhere(values > 0)
    masses = values[tuple(places.T)]
    return places.astype(float), masses / masses.sum()


def _solve(first, second, cost: str, epsilon: float | None):
    import jax
    import numpy as np

    # By name: the command line knows the lab and no topic, but for this verb's own.
    topic = importlib.import_module("varan.transport")
    with jax.enable_x64(True):
        (x, a), (y, b) = (tuple(map(jax.numpy.asarray, m)) for m in (first, second))
        matrix = topic.cost_matrix(x, y, cost)
        mean = float(a @ matrix @ b)
        if mean == 0:
            fail("all points of both files coincide: there is nothing to move.")
        chosen = _SHARE * mean if epsilon is None else epsilon
        run = topic.entropic_transport(matrix, a, b, epsilon=chosen, method="newton")
        plan = np.asarray(run.rounded_plan)
        rounded = float(run.certificate.details["rounded_cost"])
        # Row potentials and the best columns for them are feasible for the dual of the
        # problem without entropy: nearer than the entropic dual's value.
        f = run.potentials[0]
        bound = float(a @ f + b @ (matrix - f[:, None]).min(axis=0))
        report: dict[str, Any] = {
            "points": [len(x), len(y)],
            "dimension": int(x.shape[1]),
            "cost_name": cost,
            "cost": rounded,
            "lower_bound": min(bound, rounded),
            "independent_cost": mean,
            "epsilon": chosen,
            "marginal_error": float(run.certificate.value),
            "converged": bool(run.converged),
        }
    return plan, report


def _write(out: Path, plan, x, y) -> list[str]:
    import numpy as np

    try:
        out.mkdir(parents=True, exist_ok=True)
        np.save(out / "plan.npy", plan)
        pictures = [out / "plan.png", out / "plan.svg"]
        _draw(pictures, plan, x, y)
    except OSError as error:
        fail(f"{out}: {error.strerror or error}.", code=FAILED)
    return [str(file) for file in (out / "plan.npy", *pictures)]


def _draw(files: list[Path], plan, x, y) -> None:
    """Plane points with the heaviest entries as lines; other plans as an image."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if x.shape[1] == 2:
        order = np.argsort(plan, axis=None)[::-1][:_LINES]
        order = order[plan.flat[order] > 1e-3 * plan.max()]
        i, j = np.unravel_index(order, plan.shape)
        shade = np.clip(plan[i, j] / plan.max(), 0.05, 1)
        lines = LineCollection(
            list(np.stack([x[i], y[j]], axis=1)), colors="0.5", alpha=shade, zorder=1
        )
        axes.add_collection(lines)
        for points, colour, marker, label in (
            (x, "#0072B2", "o", "A"),
            (y, "#D55E00", "^", "B"),
        ):
            axes.scatter(*points.T, s=12, c=colour, marker=marker, label=label)
        axes.legend(frameon=False)
        axes.set_aspect("equal", adjustable="datalim")
    else:
        shown = axes.imshow(plan, aspect="auto", cmap="viridis", interpolation="none")
        figure.colorbar(shown, label="mass")
        axes.set(xlabel="B", ylabel="A")
    for file in files:
        figure.savefig(file, dpi=150)


def _show(report: dict[str, Any]) -> None:
    gap = report["cost"] - report["lower_bound"]
    lines = [
        "{points[0]} points to {points[1]}, dimension {dimension}, cost {cost_name}",
        "cost of the plan    {cost:.6g}",
        f"  the least cost is at most {gap:.3g} below: between "
        "{lower_bound:.6g} and {cost:.6g} (proved)",
        "  moving without plan {independent_cost:.6g}",
        "epsilon             {epsilon:.3g}, marginals met to {marginal_error:.2g}",
    ]
    if not report["converged"]:
        lines.append("The run did not converge: take a larger --epsilon.")
    screen = console()
    for line in lines:
        screen.print(
            line.format(**report), markup=False, highlight=False, soft_wrap=True
        )
    for file in report["files"]:
        screen.print(f"written {file}", markup=False, highlight=False, soft_wrap=True)
