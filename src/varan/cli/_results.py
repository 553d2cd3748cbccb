"""`varan results`: what the store has, and what changed between two runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._common import (
    FAILED,
    RESULTS,
    Json,
    Out,
    ScaleName,
    StoreAt,
    Topic,
    console,
    counted,
    emit,
    fail,
    find,
    load,
    select,
)

if TYPE_CHECKING:
    from ..lab.catalogue import Catalogue
    from ..lab.store import Store
    from ..lab.stored import StoredRow


class Outcome(StrEnum):
    held = "held"
    not_held = "not-held"
    inconclusive = "inconclusive"
    no_check = "no-check"
    no_verdict = "no-verdict"
    failed = "failed"


def results(
    run: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            show_default=False,
            help="With --compare: two runs; or one, for it and the newest before it "
            "that measured the same; or none, for the newest. Part of an id is enough.",
        ),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(help="Only this row, by id or number; may be repeated."),
    ] = None,
    topic: Topic = None,
    scale: Annotated[
        ScaleName | None, typer.Option(help="Only results of this scale.")
    ] = None,
    outcome: Annotated[
        Outcome | None, typer.Option(help="Only results that came to this.")
    ] = None,
    of_run: Annotated[
        str | None,
        typer.Option("--run", help="What this run came to, not the newest results."),
    ] = None,
    runs: Annotated[bool, typer.Option("--runs", help="List the runs.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Say what changed between two runs.")
    ] = False,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Write the numbers to this file, one line for each number of each "
            "seed: row, topic, scale, seed, quantity, value, then when, by which run, "
            "commit, code (fingerprint), versions and processor it was taken, and "
            "seconds and MiB it cost."
        ),
    ] = None,
    out: Out = RESULTS,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """List, filter, export and compare what was measured.

    Of each row and scale the newest measurements are shown, judged by the catalogue's
    present checks. A stale one was measured with code or settings that have changed
    since.
    """
    modes = {"--runs": runs, "--compare": compare}
    _refuse(modes, {"--run": of_run, "--csv": csv, "--outcome": outcome}, run or [])
    catalogue = load()
    wanted = _Wanted(catalogue, row or [], topic, scale)
    from ..lab.store import Store, StoreError

    try:
        with Store(store or out, existing=True) as opened:
            if runs:
                _list_runs(opened, wanted, as_json)
            elif compare:
                _compare(catalogue, opened, run or [], wanted, as_json)
            else:
                named = outcome and outcome.value.replace("-", " ")
                _list_rows(catalogue, opened, of_run, wanted, named, csv, as_json)
    except StoreError as error:
        fail(str(error), code=FAILED)


def _refuse(
    modes: dict[str, bool], of_lists: dict[str, object], references: list[str]
) -> None:
    """Refuses options that do not go together: each would be silently ignored."""
    chosen = [name for name, on in modes.items() if on]
    beside = [name for name, value in of_lists.items() if value is not None]
    if len(chosen) == 2:
        fail("--runs and --compare are two different things: give one of them.")
    if chosen and beside:
        fail(f"{beside[0]} does not go with {chosen[0]}.")
    if references and not modes["--compare"]:
        fail(
            f"{' '.join(references)}: runs are named to be compared.",
            f"`--compare {references[0]}` compares, `--run {references[0]}` shows one.",
        )
    if len(references) > 2:
        fail(f"--compare takes at most two runs (got {len(references)}).")


class _Wanted:
    """Which results a command line asks for."""

    def __init__(
        self,
        catalogue: Catalogue,
        references: list[str],
        topic: str | None,
        scale: ScaleName | None,
    ):
        self.scale = scale and scale.value
        self.rows: set[str] | None = None
        if topic is not None:
            self.rows = {row.id for row in select(catalogue, topic, None)}
        if references:
            named = {find(catalogue, reference).id for reference in references}
            self.rows = named if self.rows is None else self.rows & named

    def __call__(self, id: str, scale: str) -> bool:
        row = self.rows is None or id in self.rows
        return row and self.scale in (None, scale)


def _list_rows(
    catalogue: Catalogue,
    store: Store,
    run: str | None,
    wanted: _Wanted,
    outcome: str | None,
    csv: Path | None,
    as_json: bool,
) -> None:
    from ..lab import overview
    from ..lab.stored import stored_rows

    found = stored_rows(catalogue, store, run and _find_run(store, run))
    rows = [
        entry
        for entry in found
        if wanted(entry.id, entry.scale) and outcome in (None, entry.outcome)
    ]
    if csv is not None:
        _export(rows, csv)
    if as_json:
        emit({"store": store.location, "rows": [entry.to_dict() for entry in rows]})
    elif csv is None:
        overview.stored(console(), rows, store.location)


def _find_run(store: Store, reference: str) -> str | None:
    from ..lab.history import HistoryError, find_run

    try:
        return find_run(store.runs(), reference).run
    except HistoryError as error:
        fail(str(error), "`varan results --runs` lists them.")


def _export(rows: list[StoredRow], file: Path) -> None:
    from ..lab.export import to_csv, write_whole

    table = to_csv(rows)
    try:
        write_whole(file, table)
    except OSError as error:
        fail(f"{file} cannot be written ({error.strerror}).", code=FAILED)
    lines = counted(table.count("\n") - 1, "number")
    console(stderr=True).print(
        f"{lines} of {counted(len(rows), 'result')} in {file}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _list_runs(store: Store, wanted: _Wanted, as_json: bool) -> None:
    from ..lab import history, overview

    found = [run for run in store.runs() if any(wanted(*key) for key in run.covers)]
    if as_json:
        runs = [history.run_dict(run) for run in found]
        emit({"store": store.location, "runs": runs})
    else:
        overview.runs(console(), found, store.location)


def _compare(
    catalogue: Catalogue,
    store: Store,
    references: list[str],
    wanted: _Wanted,
    as_json: bool,
) -> None:
    from ..lab import history, overview

    try:
        before, after = history.pair(store.runs(), references)
    except history.HistoryError as error:
        fail(str(error), "`varan results --runs` lists them.")
    compared = history.compare(catalogue, store, before, after).only(wanted)
    if as_json:
        emit({"store": store.location, **compared.to_dict()})
    else:
        overview.comparison(console(), compared)
