"""Arrays of numbers in users' files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._common import fail

if TYPE_CHECKING:
    import numpy as np


def read_array(file: Path) -> np.ndarray:
    """The numbers of a file, which is parsed as data: nothing in it is executed."""
    import numpy as np

    if file.suffix.lower() not in (".csv", ".npy"):
        fail(f"{file}: files must end in .csv or .npy.")
    try:
        if file.suffix.lower() == ".npy":
            values = np.load(file, allow_pickle=False)
        else:
            values = _read_csv(file)
        values = np.asarray(values, float)
    except OSError as error:
        fail(f"{file}: {error.strerror or error}.")
    except (ValueError, TypeError, EOFError) as error:
        where = f" ({error})" if isinstance(error, _BadLine) else ""
        fail(
            f"{file} does not hold an array of numbers{where}.",
            "A CSV file has numbers separated by commas, with at most one line of "
            "headings; an NPY file is what numpy.save writes.",
        )
    if values.size == 0 or values.ndim == 0:
        fail(f"{file} holds no numbers.")
    return values


def _read_csv(file: Path) -> np.ndarray:
    import numpy as np

    text = file.read_text("utf-8").splitlines()
    lines = [(number, line) for number, line in enumerate(text, 1) if line.strip()]
    if lines and not any(map(_is_number, lines[0][1].split(","))):
        del lines[0]
    rows = []
    for number, line in lines:
        entries = line.split(",")
        wrong = [entry.strip() for entry in entries if not _is_number(entry)]
        if wrong:
            raise _BadLine(f"line {number} has {wrong[0][:20]!r}")
        if rows and len(entries) != len(rows[0]):
            raise _BadLine(
                f"line {number} has {len(entries)} entries, the first {len(rows[0])}"
            )
        rows.append([float(entry) for entry in entries])
    return np.array(rows)


class _BadLine(ValueError):
    """What is wrong with which line of a CSV file."""


def _is_number(entry: str) -> bool:
    try:
        float(entry)
    except ValueError:
        return False
    return True
