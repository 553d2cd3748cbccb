"""Two photographs, from scikit-learn."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def sample_images(side: int = 64) -> Float[np.ndarray, "2 side side"]:
    """A temple and a flower, in grey, cropped to the square middle and resized.

    Args:
        side: Pixels a side, from 2 to 427 (the photographs' height).

    Returns:
        The two images, brightness in [0, 1]; each pixel is the mean of the part of the
        photograph that it covers.

    Raises:
        ValueError: If `side` is out of range.

    Example:
        >>> from varan.data import sample_images
        >>> images = sample_images(32)
        >>> images.shape, bool(0 <= images.min() and images.max() <= 1)
        ((2, 32, 32), True)

    Source:
        `china.jpg` and `flower.jpg` of scikit-learn, both under Creative Commons
        Attribution licences (authors in its documentation).
    """
    from sklearn.datasets import load_sample_image

    photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    height, width, _ = photographs[0].shape
    if not 2 <= side <= height:
        raise ValueError(
            f"sample_images: `side` must lie between 2 and {height} (got {side})."
        )
    left = (width - height) // 2
    # Luma of ITU-R BT.601.
    weights = np.array([0.299, 0.587, 0.114]) / 255
    squares = [photo[:, left : left + height] @ weights for photo in photographs]
    # Means over areas: the integral image, read where the new pixels end.
    ends = np.linspace(0, height, side + 1)
    means = []
    for square in squares:
        total = np.zeros((height + 1, height + 1))
        total[1:, 1:] = square.cumsum(0).cumsum(1)
        rows = _at(total, ends)
        both = _at(rows.T, ends).T
        means.append(np.diff(np.diff(both, axis=0), axis=1) * (side / height) ** 2)
    return np.clip(np.stack(means), 0, 1)


def _at(table, places):
    """Rows of a table, linear between them."""
    low = np.minimum(places.astype(int), len(table) - 2)
    part = (places - low)[:, None]
    return (1 - part) * table[low] + part * table[low + 1]
