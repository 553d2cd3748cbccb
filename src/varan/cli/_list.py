"""`varan list` and `varan show`: the catalogue."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from ..lab import listing
from ._common import Json, Topic, console, emit, find, load, select


class State(StrEnum):
    planned = "planned"
    built = "built"


def list_rows(
    topic: Topic = None,
    state: Annotated[
        State | None, typer.Option(help="Only the rows in this state.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the catalogue's rows."""
    rows = select(load(), topic, state)
    if as_json:
        emit([row.to_dict() for row in rows])
    else:
        listing.rows(console(), rows)


def show(
    row: Annotated[str, typer.Argument(help="The row's id, or its number.")],
    as_json: Json = False,
) -> None:
    """Show all that the catalogue knows of a row."""
    found = find(load(), row)
    if as_json:
        emit(found.to_dict())
    else:
        listing.row(console(), found)
