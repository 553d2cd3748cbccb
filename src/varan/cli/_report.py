"""`varan report`: the catalogue and what was measured, as a site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._common import (
    FAILED,
    RESULTS,
    Json,
    Out,
    StoreAt,
    console,
    counted,
    emit,
    fail,
    load,
)

if TYPE_CHECKING:
    from ..lab.catalogue import Catalogue
    from ..lab.report import Built


def report(
    out: Out = RESULTS,
    store: StoreAt = None,
    site: Annotated[
        Path | None,
        typer.Option(
            show_default="`site` in the --out folder", help="The folder for the site."
        ),
    ] = None,
    docs: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Where the documentation is served, for rows to link."
        ),
    ] = None,
    open_it: Annotated[
        bool, typer.Option("--open", help="Open the site in the browser.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a site of the catalogue and what was measured; it needs no network."""
    built = _build(load(), store, out, site or out / "site", docs)
    if built.unknown:
        left_out = ", ".join(built.unknown)
        typer.echo(f"varan: not in the catalogue, left out: {left_out}.", err=True)
    if as_json:
        emit(built.to_dict())
    else:
        _show(built)
    if open_it:
        import webbrowser

        if not webbrowser.open(built.start.as_uri()):
            fail("no browser was found.", f"Open {built.start} yourself.", FAILED)


def _build(
    catalogue: Catalogue, store: str | None, out: Path, site: Path, docs: str | None
) -> Built:
    from ..lab.report import SiteError, build
    from ..lab.store import NoStoreError, Store, StoreError

    try:
        try:
            with Store(store or out, existing=True) as opened:
                return build(catalogue, opened, site, docs=docs)
        except NoStoreError:
            if store is not None:
                raise
            typer.echo(
                "varan: nothing has been measured yet, so the site shows the "
                "catalogue alone; `varan run --all` measures it.",
                err=True,
            )
            return build(catalogue, None, site, docs=docs)
    except StoreError as error:
        fail(str(error), code=FAILED)
    except SiteError as error:
        fail(str(error))
    except OSError as error:
        fail(
            f"{error.filename or site}: {error.strerror}.",
            "Choose another folder with --site.",
            FAILED,
        )


def _show(built: Built) -> None:
    verdicts = ", ".join(f"{n} {name}" for name, n in built.counts.items() if n)
    line = f"{counted(built.pages, 'page')}: {verdicts}"
    for text in (line, f"site  {built.start}"):
        console().print(text, markup=False, highlight=False, soft_wrap=True)
