"""The command line: `varan list`, `show`, `run`, `doctor`.

Nothing numerical is imported before a verb needs it.
"""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from .lab import catalogue as _catalogue
from .lab import listing as _listing

if TYPE_CHECKING:
    from .lab.results import RowResult

FAILED = 1
USAGE = 2
INTERRUPTED = 130

_HELP = """Published optimisation and variational methods, their claims executable.

Exit codes: 0 all went well (also when a claim is not held), 1 a run failed,
2 the command was wrong, 130 interrupted.
"""

app = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Piped output is not cut to the 80 columns that rich falls back to.
_PIPED_WIDTH = 120


class State(StrEnum):
    planned = "planned"
    built = "built"


class ScaleName(StrEnum):
    smoke = "smoke"
    laptop = "laptop"
    paper = "paper"


_Json = Annotated[
    bool, typer.Option("--json", help="Write JSON and nothing else to standard output.")
]
_Topic = Annotated[str | None, typer.Option(help="Only the rows of this topic.")]
_Out = Annotated[Path, typer.Option(help="The folder for the store and the plots.")]

_RESULTS = Path("varan-results")


@app.command("list")
def list_rows(
    topic: _Topic = None,
    state: Annotated[
        State | None, typer.Option(help="Only the rows in this state.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """List the catalogue's rows."""
    rows = _select(_load(), topic, state)
    if as_json:
        _emit([row.to_dict() for row in rows])
    else:
        _listing.rows(_console(), rows)


@app.command()
def show(
    row: Annotated[str, typer.Argument(help="The row's id, or its number.")],
    as_json: _Json = False,
) -> None:
    """Show all that the catalogue knows of a row."""
    found = _find(_load(), row)
    if as_json:
        _emit(found.to_dict())
    else:
        _listing.row(_console(), found)


@app.command()
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
    out: _Out = _RESULTS,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what is already stored.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Run claims and say whether they held.

    What is measured is stored at once: an interrupted run goes on from there when the
    same command is given again.
    """
    selected = _to_run(_load(), rows or [], topic, every)
    from .lab import render

    results, store = _measure(selected, scale.value, seeds, jobs, out, fresh)
    if as_json:
        entries = [result.to_dict() for result in results]
        _emit({"scale": scale.value, "store": str(store), "rows": entries})
    else:
        console = _console()
        for result in results:
            render.result(console, result)
        render.summary(console, results, store)
    if any(result.run.failures for result in results):
        raise typer.Exit(FAILED)


def _measure(
    rows: list[_catalogue.Row],
    scale: str,
    seeds: int | None,
    jobs: int | None,
    out: Path,
    fresh: bool,
) -> tuple[list[RowResult], Path]:
    from .lab import results, runner
    from .lab.progress import RunProgress
    from .lab.store import Store, StoreError

    console = _console(stderr=True)
    jobs = jobs or runner.default_jobs()
    total = sum(seeds or row.scales[scale].seeds for row in rows)
    console.print(
        f"{_counted(len(rows), 'row')}, {_counted(total, 'seed')} at {scale} scale, "
        f"{_counted(min(jobs, len(rows)), 'row')} at a time",
        highlight=False,
    )
    try:
        with Store(out) as store:
            progress = RunProgress(rows, scale, seeds, console)
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
                _fail(
                    f"interrupted; {_counted(progress.measured, 'new seed')} kept in "
                    f"{store.path}.",
                    "The same command goes on from there"
                    + (" (without --fresh)." if fresh else "."),
                    INTERRUPTED,
                )
            return results.conclude(runs, out / "plots"), store.path
    except StoreError as error:
        _fail(str(error), code=FAILED)
    except OSError as error:
        _fail(f"{error.filename or out}: {error.strerror}.", code=FAILED)


@app.command()
def doctor(out: _Out = _RESULTS, as_json: _Json = False) -> None:
    """Say what is installed, what is missing, and how to get it."""
    from .lab.doctor import examine

    report = examine(out)
    if as_json:
        _emit(report)
    else:
        _show_report(_console(), report)
    if report["complaints"]:
        raise typer.Exit(FAILED)


def _show_report(console: Console, report: dict[str, Any]) -> None:
    machine = report["machine"]
    lines = [
        f"varan {report['varan']}, Python {report['python']}",
        f"{machine['system']}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB",
        f"devices: {', '.join(report['devices']) or 'none'}",
        "packages: "
        + ", ".join(
            f"{name} {version or 'MISSING'}"
            for name, version in report["packages"].items()
        ),
    ]
    for extra in report["extras"]:
        missing = [name for name, version in extra["packages"].items() if not version]
        if missing:
            absent = f"lacks {', '.join(missing)}: {extra['install']}"
            lines.append(f"extra {extra['name']} (optional): {absent}")
        else:
            lines.append(f"extra {extra['name']}: complete")
    lines.append(f"results go to {report['output']}")
    lines.extend(report["complaints"] or ["All that varan needs is there."])
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _load() -> _catalogue.Catalogue:
    try:
        return _catalogue.load()
    except _catalogue.CatalogueError as error:
        _fail(str(error), "Mend the file; CONTRIBUTING.md explains every field.")


def _find(rows: _catalogue.Catalogue, reference: str) -> _catalogue.Row:
    try:
        return rows.find(reference)
    except _catalogue.CatalogueError as error:
        _fail(str(error), "`varan list` shows all rows.")


def _select(
    rows: _catalogue.Catalogue, topic: str | None, state: str | None
) -> tuple[_catalogue.Row, ...]:
    try:
        return rows.select(topic, state)
    except _catalogue.CatalogueError as error:
        _fail(str(error))


def _to_run(
    rows: _catalogue.Catalogue, references: list[str], topic: str | None, every: bool
) -> list[_catalogue.Row]:
    """The rows that a command line asks for, each once, all of them built."""
    if (bool(references), topic is not None, every).count(True) != 1:
        _fail(
            "Say which rows to run: ids or numbers, --topic TOPIC, or --all; one of "
            "the three.",
            "`varan list --state built` shows what can run.",
        )
    if references:
        found = [_find(rows, entry) for entry in references]
        chosen = list({row.id: row for row in found}.values())
    else:
        chosen = list(_select(rows, topic, "built"))
    planned = [row.id for row in chosen if row.state == "planned"]
    if planned or not chosen:
        what = f"{', '.join(planned)}: planned, not built yet."
        _fail(
            what if planned else "No row of this selection is built yet.",
            "`varan list --state built` shows what can run.",
        )
    return chosen


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    return console


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _emit(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _fail(message: str, hint: str | None = None, code: int = USAGE) -> NoReturn:
    typer.echo(f"varan: {message}", err=True)
    if hint:
        typer.echo(hint, err=True)
    raise typer.Exit(code)


def main() -> None:
    """The entry point: no traceback reaches a user, unless VARAN_DEBUG is set."""
    try:
        app(prog_name="varan")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get("VARAN_DEBUG"):
            raise
        typer.echo(f"varan: unexpected {type(error).__name__}: {error}", err=True)
        typer.echo("This is a bug; VARAN_DEBUG=1 shows where.", err=True)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
