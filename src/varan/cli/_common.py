"""What every verb shares: options, the console, JSON, errors, choosing rows."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from ..lab import catalogue as _catalogue

FAILED = 1
USAGE = 2
INTERRUPTED = 130

# Piped output is not cut to the 80 columns that rich falls back to.
_PIPED_WIDTH = 120


class ScaleName(StrEnum):
    smoke = "smoke"
    laptop = "laptop"
    paper = "paper"


Json = Annotated[
    bool, typer.Option("--json", help="Write JSON and nothing else to standard output.")
]
Topic = Annotated[str | None, typer.Option(help="Only the rows of this topic.")]
Out = Annotated[Path, typer.Option(help="The folder for the store and the plots.")]
StoreAt = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="VARAN_STORE",
        metavar="FOLDER|URL",
        show_default="the --out folder",
        help="Where measurements are kept: a folder, or a postgresql:// URL.",
    ),
]

RESULTS = Path("varan-results")


def load() -> _catalogue.Catalogue:
    try:
        return _catalogue.load()
    except _catalogue.CatalogueError as error:
        fail(str(error), "Mend the file; CONTRIBUTING.md explains every field.")


def find(rows: _catalogue.Catalogue, reference: str) -> _catalogue.Row:
    try:
        return rows.find(reference)
    except _catalogue.CatalogueError as error:
        fail(str(error), "`varan list` shows all rows.")


def select(
    rows: _catalogue.Catalogue, topic: str | None, state: str | None
) -> tuple[_catalogue.Row, ...]:
    try:
        return rows.select(topic, state)
    except _catalogue.CatalogueError as error:
        fail(str(error))


def to_run(
    rows: _catalogue.Catalogue, references: list[str], topic: str | None, every: bool
) -> list[_catalogue.Row]:
    """The rows that a command line asks for, each once, all of them built."""
    if (bool(references), topic is not None, every).count(True) != 1:
        fail(
            "Say which rows to run: ids or numbers, --topic TOPIC, or --all; one of "
            "the three.",
            "`varan list --state built` shows what can run.",
        )
    if references:
        found = [find(rows, entry) for entry in references]
        chosen = list({row.id: row for row in found}.values())
    else:
        chosen = list(select(rows, topic, "built"))
    planned = [row.id for row in chosen if row.state == "planned"]
    if planned or not chosen:
        what = f"{', '.join(planned)}: planned, not built yet."
        fail(
            what if planned else "No row of this selection is built yet.",
            "`varan list --state built` shows what can run.",
        )
    return chosen


def console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    return console


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def emit(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def fail(message: str, hint: str | None = None, code: int = USAGE) -> NoReturn:
    typer.echo(f"varan: {message}", err=True)
    if hint:
        typer.echo(hint, err=True)
    raise typer.Exit(code)
