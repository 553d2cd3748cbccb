"""Builds the site: gathers, renders every page, swaps the folder in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..catalogue import Catalogue
from ..store import Store
from .folder import refuse_foreign, replacing
from .gather import gather
from .pages import Pages

_ASSETS = ("site.css", "scheme.js", "catalogue.js", "icon.svg")


@dataclass(frozen=True)
class Built:
    """A site that was written.

    Args:
        folder: Its folder.
        pages: How many pages it has.
        counts: How many rows came to each verdict.
        unknown: Stored rows that it leaves out, since the catalogue lacks them.
    """

    folder: Path
    pages: int
    counts: Mapping[str, int]
    unknown: Sequence[str]

    @property
    def start(self) -> Path:
        """The page to begin with."""
        return self.folder / "index.html"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {
            "site": str(self.folder),
            "start": str(self.start),
            "pages": self.pages,
            "verdicts": dict(self.counts),
            "left_out": list(self.unknown),
        }


def build(
    catalogue: Catalogue,
    store: Store | None,
    folder: Path,
    *,
    docs: str | None = None,
) -> Built:
    """Writes the site; the same store and code give the same bytes.

    Args:
        catalogue: The catalogue.
        store: The store; `None` shows the catalogue alone.
        folder: The site's folder: absent, empty, or an older site, which is replaced
            once the new one is whole.
        docs: Where the documentation is served; rows then link to their pages.

    Returns:
        What was written.

    Raises:
        StoreError: The store cannot be read.
        SiteError: The folder holds anything but an older site.
        OSError: The folder cannot be written.
    """
    # Asked first: nobody should wait for a site that has no place.
    refuse_foreign(folder)
    results = gather(catalogue, store)
    with replacing(folder) as site:
        for name in _ASSETS:
            site.write(f"assets/{name}", _asset(name))
        for name, text in Pages(results, docs).all():
            site.write(name, text)
    written = sum(name.endswith(".html") for name in site.files)
    return Built(folder.resolve(), written, results.counts(), results.unknown)


def _asset(name: str) -> str:
    return (resources.files("varan.lab.report") / "assets" / name).read_text(
        encoding="utf-8"
    )
