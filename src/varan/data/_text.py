"""Real sentences that every installation has, and their form as integer sequences."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import numpy as np
from jaxtyping import Int

_PACKAGES = ("numpy", "scipy", "sklearn", "matplotlib")
_WORD = re.compile(r"[a-z]+")
_SENTENCE_END = re.compile(r"(?<=[a-z)])[.:;]\s+(?=[A-Z])")
_WORDS = range(6, 41)
# A sentence that states its own label would make the task trivial.
_NAMES = {"numpy", "np", "scipy", "sklearn", "scikit", "matplotlib", "plt", "mpl"}
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef)


def documentation_sentences(
    per_package: int = 1000,
) -> tuple[list[str], Int[np.ndarray, " sentences"]]:
    """Sentences of the documentation of four packages; the label is the package.

    Text that is real, needs no download, and is about as hard as short reviews: the
    packages share most of their words. The sources of NumPy, SciPy, scikit-learn and
    matplotlib are read as data and parsed, not run. A sentence has 6 to 40 words, in
    lower case without digits and signs; it stands once; the names of the packages are
    taken out. The order is fixed, and nothing is random, but **what is read depends on
    the versions that are installed**.

    Args:
        per_package: Sentences of each package, at least 1.

    Returns:
        The sentences, package after package, and the labels 0 (numpy), 1 (scipy), 2
        (sklearn), 3 (matplotlib).

    Raises:
        ValueError: If `per_package` is below 1 or a package has fewer sentences.
        ImportError: If a package is not installed.

    Example:
        >>> from varan.data import documentation_sentences
        >>> sentences, labels = documentation_sentences(20)
        >>> len(sentences), labels[[0, 20, 40, 60]].tolist()
        (80, [0, 1, 2, 3])
    """
    if per_package < 1:
        raise ValueError(
            f"documentation_sentences: `per_package` must be at least 1 (got "
            f"{per_package})."
        )
    found: dict[str, int] = {}
    for label, package in enumerate(_PACKAGES):
        before = len(found)
        for sentence in _package_sentences(package):
            found.setdefault(sentence, label)
            if len(found) == before + per_package:
                break
        else:
            raise ValueError(
                "documentation_sentences: `per_package` must be at most "
                f"{len(found) - before}, what {package} has (got {per_package})."
            )
    return list(found), np.array(list(found.values()), np.int32)


def token_sequences(
    train: Sequence[str], *others: Sequence[str], length: int = 24, words: int = 2000
) -> tuple[list[Int[np.ndarray, "sentences length"]], list[str]]:
    """Turns sentences into rows of word numbers of one length.

    Args:
        train: Sentences from which the vocabulary is taken.
        *others: Further sentences, written in the same vocabulary.
        length: Words of a row; longer sentences are cut, shorter ones filled with 0.
        words: Size of the vocabulary: the most frequent words of `train` that occur
            twice at least, and two more for 0 (no word) and 1 (any other word).

    Returns:
        The rows of each part in order, and the vocabulary: the word of each number.

    Raises:
        ValueError: If `train` holds no word, `length` is below 1 or `words` below 3.

    Example:
        >>> from varan.data import token_sequences
        >>> (train, test), words = token_sequences(
        ...     ["a cat", "a dog a dog"], ["the dog"], length=3)
        >>> train.tolist(), test.tolist(), words
        ([[2, 1, 0], [2, 3, 2]], [[1, 3, 0]], ['', '?', 'a', 'dog'])
    """
    if length < 1:
        raise ValueError(f"token_sequences: `length` must be at least 1 (got {length})")
    if words < 3:
        raise ValueError(f"token_sequences: `words` must be at least 3 (got {words}).")
    counts = Counter(word for text in train for word in _WORD.findall(text.lower()))
    if not counts:
        raise ValueError("token_sequences: `train` must hold words (got none).")
    # Ties in alphabetical order, whatever the order of the sentences.
    ranked = sorted((-count, word) for word, count in counts.items() if count > 1)
    vocabulary = ["", "?", *(word for _, word in ranked[: words - 2])]
    number = {word: index for index, word in enumerate(vocabulary)}

    def rows(texts):
        filled = np.zeros((len(texts), length), np.int32)
        for row, text in zip(filled, texts, strict=True):
            known = [number.get(w, 1) for w in _WORD.findall(text.lower())[:length]]
            row[: len(known)] = known
        return filled

    return [rows(part) for part in (train, *others)], vocabulary


def _package_sentences(package: str) -> Iterator[str]:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"documentation_sentences: {package} is needed and not installed."
        )
    root = Path(spec.origin).parent
    files = [
        file
        for file in root.rglob("*.py")
        if not {"tests", "testing"} & set(file.relative_to(root).parts)
    ]
    # Spread over the package, by a rule that no machine changes.
    names = {file: file.relative_to(root).as_posix() for file in files}
    for file in sorted(files, key=lambda f: (crc32(names[f].encode()), names[f])):
        for text in _docstrings(file):
            yield from _sentences(text)


def _docstrings(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, _DEFINITIONS):
            text = ast.get_docstring(node)
            if text:
                yield text


def _sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        # Examples, tables, and titles of sections are no prose.
        if re.search(r">>>|\.\. |--|==|__", paragraph):
            continue
        for sentence in _SENTENCE_END.split(paragraph):
            found = [w for w in _WORD.findall(sentence.lower()) if w not in _NAMES]
            if len(found) in _WORDS:
                yield " ".join(found)
