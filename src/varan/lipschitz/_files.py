"""Files of users: bytes in, data out, and one sentence when that fails."""

from __future__ import annotations

import gzip
from pathlib import Path


class FileProblem(Exception):
    """One sentence on what is wrong with a file."""


def read_bytes(owner: str, path: Path, most: int) -> bytes:
    """All of a file, unpacked if it ends in `.gz`.

    Args:
        owner: Who reads, for the message.
        path: The file.
        most: Bytes (unpacked) that it may have.

    Returns:
        Its bytes.

    Raises:
        ValueError: If it cannot be read or is larger.
    """
    try:
        with open(path, "rb") as file:
            opened = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            data = opened.read(most + 1)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{owner}: {path}: {reason}.") from error
    if len(data) > most:
        raise ValueError(f"{owner}: {path.name} is larger than {most} bytes.")
    return data
