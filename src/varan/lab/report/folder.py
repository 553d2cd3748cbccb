"""The folder of a site: written beside, then swapped in; nothing foreign is deleted."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# It names every file of the site, so that nothing else is ever taken for one.
MARKER = "varan-site.json"


class SiteError(RuntimeError):
    """A folder that must not be replaced by a site; one sentence."""


class Site:
    """A site that is being written.

    Args:
        folder: Where its files go.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.files: list[str] = []

    def write(self, name: str, text: str) -> None:
        """Writes one file.

        Args:
            name: Its path in the site, with `/`.
            text: What stands in it.
        """
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
        self.files.append(name)


@contextmanager
def replacing(folder: Path) -> Iterator[Site]:
    """Writes a site and puts it in the place of the last one, once it is whole.

    When anything goes wrong the last one stays as it was.

    Args:
        folder: The site's folder: absent, empty, or an older site.

    Yields:
        The site to write.

    Raises:
        SiteError: The folder holds anything else.
        OSError: The folder or the one above it cannot be written.
    """
    folder = folder.resolve()
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        site = Site(new)
        yield site
        site.write(MARKER, json.dumps({"files": sorted(site.files)}, indent=1) + "\n")
        # Something may have been put there in the meantime.
        refuse_foreign(folder)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def refuse_foreign(folder: Path) -> None:
    """Refuses a folder that holds anything but a site of varan.

    Args:
        folder: The folder.

    Raises:
        SiteError: It does, or it is no folder.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SiteError(f"{folder} is a file: choose a folder with --site.")
    found = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if not file.is_dir() or file.is_symlink()
    }
    if not found and not any(folder.iterdir()):
        return
    if MARKER not in found:
        raise SiteError(
            f"{folder} holds files and is no site of varan, so it is not replaced: "
            "choose another folder with --site."
        )
    try:
        known = set(json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        known = set()
    foreign = sorted(found - known - {MARKER})
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise SiteError(
            f"{folder} holds files that `varan report` did not write ({foreign[0]}"
            f"{more}): move them, or choose another folder with --site."
        )
