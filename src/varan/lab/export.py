"""Stored measurements as a table for other programs."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ._records import Record
from .stored import StoredRow, origin

# One line a measured number; the later columns are the same for all numbers of a seed.
COLUMNS = (
    *("row", "topic", "scale", "seed", "quantity", "value"),
    *("taken", "run", "commit", "fingerprint", "varan", "jax", "processor"),
    *("wall_s", "compile_s", "cpu_s", "peak_memory_mib"),
)


def to_csv(rows: Iterable[StoredRow]) -> str:
    """The numbers of every measured seed, one a line, under a line of `COLUMNS`.

    Args:
        rows: The rows.

    Returns:
        The table; an absent value is empty, infinity is `inf`.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for record in row.measured.values():
            writer.writerows(_lines(row, record))
    return text.getvalue()


def _lines(row: StoredRow, record: Record) -> Iterable[dict[str, object]]:
    seed = {
        "row": row.id,
        "topic": row.row.topic if row.row else None,
        "scale": row.scale,
        "seed": record.seed,
        **origin(record),
    }
    for quantity, value in record.numbers.items():
        yield {**seed, "quantity": quantity, "value": repr(value)}


def write_whole(path: Path, text: str) -> None:
    """Writes a file, whole or not at all: what was there before stays until then.

    Args:
        path: The file; a device or a pipe is written as it is.
        text: Its content.

    Raises:
        OSError: It cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    # A link stays one: what it leads to is replaced.
    path = path.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(_mode(path))
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _mode(path: Path) -> int:
    """The permissions of a file that is replaced, or those of a new one."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
