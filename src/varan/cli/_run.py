"""`varan run`: claims measured and judged."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ._common import (
    FAILED,
    INTERRUPTED,
    RESULTS,
    Json,
    Out,
    ScaleName,
    StoreAt,
    console,
    counted,
    emit,
    fail,
    load,
    to_run,
)

if TYPE_CHECKING:
    from ..lab.catalogue import Row
    from ..lab.jobs import Executor
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
        typer.Option(
            min=1,
            help="Workers at a time; 2 where there are two cores, all of a cluster.",
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="Run on a Ray cluster: `ray` (the one of this machine, or of "
            "RAY_ADDRESS) or `ray://HOST:PORT`; in processes here if left out."
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Seconds for each seed; long ones by scale if left out."
        ),
    ] = None,
    out: Out = RESULTS,
    store: StoreAt = None,
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
    from ..lab.jobs import ExecutorError

    progress = console(stderr=True)
    total = sum(seeds or row.scales[scale].seeds for row in selected)
    try:
        with _executor(on) as executor:
            progress.print(
                f"{counted(len(selected), 'row')}, {counted(total, 'seed')} at {scale} "
                f"scale, {counted(jobs or executor.jobs, 'worker')} at a time",
                highlight=False,
            )
            options = {"seeds": seeds, "jobs": jobs, "fresh": fresh}
            options |= {"time_limit": time_limit, "executor": executor}
            results, location = _measure(
                selected, scale.value, store or out, out, progress, options
            )
    except ExecutorError as error:
        fail(str(error), error.hint, FAILED)
    if as_json:
        entries = [result.to_dict() for result in results]
        emit({"scale": scale.value, "store": location, "rows": entries})
    else:
        screen = console()
        for result in results:
            render.result(screen, result)
        render.summary(screen, results, location)
    if any(result.run.failures for result in results):
        raise typer.Exit(FAILED)


@contextmanager
def _executor(on: str | None) -> Iterator[Executor]:
    if on is None:
        from ..lab.processes import Processes

        yield Processes()
        return
    if on != "ray" and not on.startswith("ray://"):
        fail(f"There is no {on!r} to run on.", "Write `ray` or `ray://HOST:PORT`.")
    from ..lab.cluster import Cluster

    # What Ray itself has to say is no result.
    with redirect_stdout(sys.stderr), Cluster(on) as cluster:
        yield cluster


def _measure(
    rows: list[Row],
    scale: str,
    at: Path | str,
    out: Path,
    screen: Console,
    options: dict[str, Any],
) -> tuple[list[RowResult], str]:
    from ..lab import results, runner
    from ..lab.progress import RunProgress
    from ..lab.store import Store, StoreError

    progress = RunProgress(rows, scale, options["seeds"], screen)
    again = "The same command goes on from there"
    again += " (without --fresh)." if options["fresh"] else "."
    try:
        with Store(at) as store:
            try:
                with progress:
                    runs = runner.run(rows, scale, store, report=progress, **options)
            except KeyboardInterrupt:
                kept = f"{counted(progress.measured, 'new seed')} kept"
                fail(f"interrupted; {kept} in {store.location}.", again, INTERRUPTED)
            return results.conclude(runs, out / "plots"), store.location
    except StoreError as error:
        kept = f"{counted(progress.measured, 'new seed')} kept. {again}"
        fail(str(error), kept if progress.measured else None, FAILED)
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror}.", code=FAILED)
