"""`varan race`: ours against the installed peers, on the same instances."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._common import (
    FAILED,
    INTERRUPTED,
    RESULTS,
    Json,
    Out,
    StoreAt,
    console,
    counted,
    emit,
    fail,
    find,
    load,
)

if TYPE_CHECKING:
    from ..lab.catalogue import Row
    from ..lab.store import RaceRecord, Store


class Threads(StrEnum):
    one = "1"
    default = "default"


def race(
    row: Annotated[str, typer.Argument(help="The row's id, or its number.")],
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds; what the row declares if left out."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The small race: seconds, not minutes.")
    ] = False,
    heat: Annotated[
        str | None, typer.Option(help="Only the heats with this in their name.")
    ] = None,
    threads: Annotated[
        Threads, typer.Option(help="Threads of a contestant.")
    ] = Threads.one,
    out: Out = RESULTS,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """Race ours against the peers that are installed.

    All solve the same instances, in turns. A heat is stored as soon as it is over; an
    interrupted one with the rounds it has.
    """
    rows = load()
    found = find(rows, row)
    from ..lab import racing
    from ..lab.store import Store, StoreError

    try:
        settings = racing.settings_of(found, quick=quick, repeats=repeats)
    except racing.RaceError as error:
        with_race = ", ".join(entry.id for entry in rows.rows if entry.race)
        fail(str(error), f"These have one: {with_race or 'none yet'}.")
    kept: list[RaceRecord] = []
    trouble: tuple[str, int] | None = None
    location = store or out
    try:
        with Store(location) as opened:
            location = opened.location
            _run(found, settings, heat, threads, opened, kept)
    except racing.NoSuchHeat as error:
        fail(str(error))
    except KeyboardInterrupt:
        word = counted(len(kept), "heat")
        trouble = f"interrupted; {word} kept in {location}.", INTERRUPTED
    except (racing.RaceError, StoreError) as error:
        trouble = str(error), FAILED
    _show(found, kept, location, as_json)
    if trouble:
        fail(trouble[0], code=trouble[1])
    if any(record.contestants[record.reference]["failed"] for record in kept):
        raise typer.Exit(FAILED)


def _run(
    row: Row,
    settings: dict[str, Any],
    heat: str | None,
    threads: Threads,
    store: Store,
    kept: list[RaceRecord],
) -> None:
    from ..lab import racing
    from ..lab.race_progress import RaceProgress

    def keep(record: RaceRecord) -> None:
        # Shown even when it cannot be stored.
        kept.append(record)
        store.add_race(record)

    with RaceProgress(settings["repeats"], console(stderr=True)) as progress:
        racing.run(
            row,
            settings,
            keep,
            heat=heat,
            one_thread=threads is Threads.one,
            report=progress,
        )


def _show(
    row: Row, kept: list[RaceRecord], location: Path | str, as_json: bool
) -> None:
    from ..lab import standings

    if as_json:
        heats = [standings.to_dict(record) for record in kept]
        emit({"row": row.id, "store": str(location), "heats": heats})
        return
    screen = console()
    for record in kept:
        standings.show(screen, record)
    if kept:
        line = f"store  {location}"
        screen.print()
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
