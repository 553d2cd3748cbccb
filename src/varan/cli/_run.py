"""`varan run`: claims measured and judged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._common import (
    FAILED,
    INTERRUPTED,
    RESULTS,
    Json,
    Out,
    ScaleName,
    console,
    counted,
    emit,
    fail,
    load,
    to_run,
)

if TYPE_CHECKING:
    from ..lab.catalogue import Row
    from ..lab.results import RowResult


def run(
    rows: Annotated[
        list[str] | None, typer.Argument(help="Ids or numbers of rows.")
    ] = None,
    topic: Annotated[
        str | None, typer.Option(help="Run every built row of this topic.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run every built row.")] = False,
    scale: Annotated[
        ScaleName, typer.Option(help="How large the runs are.")
    ] = ScaleName.laptop,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Seeds of each row; what it declares if left out."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Rows at a time; 2 where there are two cores."),
    ] = None,
    out: Out = RESULTS,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what is already stored.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run claims and say whether they held.

    What is measured is stored at once: an interrupted run goes on from there when the
    same command is given again.
    """
    selected = to_run(load(), rows or [], topic, every)
    from ..lab import render

    results, store = _measure(selected, scale.value, seeds, jobs, out, fresh)
    if as_json:
        entries = [result.to_dict() for result in results]
        emit({"scale": scale.value, "store": str(store), "rows": entries})
    else:
        screen = console()
        for result in results:
            render.result(screen, result)
        render.summary(screen, results, store)
    if any(result.run.failures for result in results):
        raise typer.Exit(FAILED)


def _measure(
    rows: list[Row],
    scale: str,
    seeds: int | None,
    jobs: int | None,
    out: Path,
    fresh: bool,
) -> tuple[list[RowResult], Path]:
    from ..lab import results, runner
    from ..lab.progress import RunProgress
    from ..lab.store import Store, StoreError

    screen = console(stderr=True)
    jobs = jobs or runner.default_jobs()
    total = sum(seeds or row.scales[scale].seeds for row in rows)
    screen.print(
        f"{counted(len(rows), 'row')}, {counted(total, 'seed')} at {scale} scale, "
        f"{counted(min(jobs, len(rows)), 'row')} at a time",
        highlight=False,
    )
    try:
        with Store(out) as store:
            progress = RunProgress(rows, scale, seeds, screen)
            try:
                with progress:
                    runs = runner.run(
                        rows,
                        scale,
                        store,
                        seeds=seeds,
                        jobs=jobs,
                        fresh=fresh,
                        report=progress,
                    )
            except KeyboardInterrupt:
                fail(
                    f"interrupted; {counted(progress.measured, 'new seed')} kept in "
                    f"{store.path}.",
                    "The same command goes on from there"
                    + (" (without --fresh)." if fresh else "."),
                    INTERRUPTED,
                )
            return results.conclude(runs, out / "plots"), store.path
    except StoreError as error:
        fail(str(error), code=FAILED)
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror}.", code=FAILED)
