"""Small real tables, and what experiments do to them: split, standardise, corrupt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float


def breast_cancer() -> tuple[Float[np.ndarray, "569 30"], Float[np.ndarray, " 569"]]:
    """The Wisconsin diagnostic breast cancer table, labels -1 (malignant) and +1.

    Returns:
        569 samples of 30 positive measurements, and their labels.

    Raises:
        ImportError: if scikit-learn is not installed.

    Example:
        >>> from varan.data import breast_cancer
        >>> features, labels = breast_cancer()
        >>> features.shape, sorted(set(labels.tolist()))
        ((569, 30), [-1.0, 1.0])

    Source: W. Wolberg, O. Mangasarian, N. Street and W. Street (1995), UCI machine
        learning repository, as bundled with scikit-learn.
    """
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    return features, 2.0 * labels - 1.0


def split(
    arrays: Sequence[np.ndarray], sizes: Sequence[int], seed: int
) -> list[tuple[np.ndarray, ...]]:
    """Shuffles samples and cuts them into parts.

    Args:
        arrays: Arrays with one length in common.
        sizes: Samples in each part but the last, which takes the rest.
        seed: Of the shuffle.

    Returns:
        One tuple of arrays a part.

    Raises:
        ValueError: if the lengths differ or the parts leave nothing for the last.

    Example:
        >>> import numpy as np
        >>> from varan.data import split
        >>> [len(part[0]) for part in split([np.arange(10)], [3, 2], seed=0)]
        [3, 2, 5]
    """
    lengths = {len(a) for a in arrays}
    if len(lengths) != 1:
        raise ValueError(
            f"split: `arrays` must have one length (got {sorted(lengths)})."
        )
    (length,) = lengths
    if min(sizes) < 1 or sum(sizes) >= length:
        raise ValueError(
            f"split: `sizes` must be positive and leave samples over (got "
            f"{list(sizes)} of {length})."
        )
    order = np.random.default_rng(seed).permutation(length)
    parts = np.split(order, np.cumsum(sizes))
    return [tuple(a[part] for a in arrays) for part in parts]


def standardise(
    train: Float[np.ndarray, "n d"], *others: Float[np.ndarray, "... d"]
) -> list[Float[np.ndarray, "... d"]]:
    """Shifts and scales all parts by the training part's mean and deviation.

    Args:
        train: Training samples.
        *others: Further samples, changed by the same map.

    Returns:
        The parts in order. A column that is constant in `train` is only shifted.

    Raises:
        ValueError: if `train` is empty.

    Example:
        >>> import numpy as np
        >>> from varan.data import standardise
        >>> standardise(np.array([[1.0], [3.0]]), np.array([[5.0]]))[1].item()
        3.0
    """
    if train.size == 0:
        raise ValueError(f"standardise: `train` must not be empty (got {train.shape}).")
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    return [(part - mean) / deviation for part in (train, *others)]


def flip_labels(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, Bool[np.ndarray, " n"]]:
    """Replaces the labels of a random part of the samples by another class.

    Args:
        labels: One label a sample, of any kind.
        fraction: How many to flip, in [0, 1]; rounded to whole samples.
        seed: Of the choice.

    Returns:
        The corrupted labels, and which were flipped.

    Raises:
        ValueError: if `fraction` is out of range or there is only one class.

    Example:
        >>> import numpy as np
        >>> from varan.data import flip_labels
        >>> noisy, flipped = flip_labels(np.array([-1, 1, 1, -1, 1]), 0.4, seed=0)
        >>> int(flipped.sum())
        2
    """
    classes = np.unique(labels)
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"flip_labels: `fraction` must lie in [0, 1] (got {fraction})."
        )
    if classes.size < 2:
        raise ValueError("flip_labels: at least two classes are needed (got one).")
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(labels.size)[: round(fraction * labels.size)]
    shift = draw.integers(1, classes.size, chosen.size)
    noisy = labels.copy()
    noisy[chosen] = classes[
        (np.searchsorted(classes, labels[chosen]) + shift) % classes.size
    ]
    flipped = np.zeros(labels.size, bool)
    flipped[chosen] = True
    return noisy, flipped


def long_tail(
    x: np.ndarray,
    labels: np.ndarray,
    imbalance: float,
    *,
    largest: int | None = None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Thins classes out to a long tail: class c keeps `largest * imbalance^(c/(C-1))`.

    Args:
        x: The samples.
        labels: 0 .. C - 1; the order of the classes is that of the tail.
        imbalance: Size of the last class against the first, in (0, 1]; 1 gives equal
            classes.
        largest: Samples of class 0; as many as the data allow if left out.
        seed: Of the choice and the order.

    Returns:
        The samples that are left and their labels, in random order.

    Raises:
        ValueError: If `imbalance` is out of range, a class has too few samples, or a
            class would have none.

    Example:
        >>> import numpy as np
        >>> from varan.data import long_tail
        >>> labels = np.repeat(np.arange(3), 100)
        >>> _, kept = long_tail(labels, labels, 0.01, seed=0)
        >>> np.bincount(kept).tolist()
        [100, 10, 1]

    Source: K. Cao, C. Wei, A. Gaidon, N. Arechiga and T. Ma, 2019, arXiv:1906.07413,
        section 4.
    """
    if not 0 < imbalance <= 1:
        raise ValueError(
            f"long_tail: `imbalance` must lie in (0, 1] (got {imbalance})."
        )
    counts = np.bincount(labels)
    shares = imbalance ** (np.arange(counts.size) / max(counts.size - 1, 1))
    # A hair more, for quotients that are whole but for rounding.
    most = int(np.min(counts / shares) * (1 + 1e-12))
    wanted = most if largest is None else largest
    kept = np.round(wanted * shares).astype(int)
    if np.any(kept > counts) or np.any(kept < 1):
        raise ValueError(
            f"long_tail: classes of {kept.tolist()} samples need as many and at least "
            f"one each (got {counts.tolist()}). With this imbalance `largest` may be "
            f"up to {most}."
        )
    draw = np.random.default_rng(seed)
    rows = [
        draw.permutation(np.flatnonzero(labels == c))[:size]
        for c, size in enumerate(kept)
    ]
    order = draw.permutation(np.concatenate(rows))
    return x[order], labels[order]
