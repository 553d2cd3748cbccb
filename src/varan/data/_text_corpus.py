"""Characters of real text that every installation of Python has."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from zlib import crc32

import numpy as np
from jaxtyping import Int

_SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))


def source_characters(
    characters: int = 400_000,
) -> tuple[Int[np.ndarray, " characters"], str]:
    """The sources of Python's standard library, one symbol after another.

    Text that is real, needs no download, and can be learned letter by letter: a few
    megabytes of English comments and Python. The modules right in the library's folder
    are read as data, none is run, in an order that no machine changes; what is no
    printable ASCII and no line break is left out. **What is read depends on the
    version of Python.**

    Args:
        characters: How many, at least 1.

    Returns:
        Numbers from 0 to 95, and the symbol of each number: the line break, then
        ASCII from the blank to the tilde.

    Raises:
        ValueError: If `characters` is below 1 or more than the library has.

    Example:
        >>> from varan.data import source_characters
        >>> numbers, symbols = source_characters(1000)
        >>> numbers.shape, len(symbols), symbols[:4]
        ((1000,), 96, '\\n !"')
    """
    if characters < 1:
        raise ValueError(
            f"source_characters: `characters` must be at least 1 (got {characters})."
        )
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("*.py"), key=lambda f: (crc32(f.name.encode()), f.name))
    number = np.full(128, -1, np.int32)
    number[[ord(symbol) for symbol in _SYMBOLS]] = np.arange(len(_SYMBOLS))
    parts, found = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        read = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
        part = number[read]
        parts.append(part[part >= 0])
        found += len(parts[-1])
        if found >= characters:
            return np.concatenate(parts)[:characters], _SYMBOLS
    raise ValueError(
        f"source_characters: `characters` must be at most {found}, what the standard "
        f"library here has (got {characters})."
    )
