"""Handwritten digits as images, from scikit-learn: 1797 of 8 x 8 pixels."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def digit_images(
    side: int = 8,
) -> tuple[Float[np.ndarray, "1797 side side"], Int[np.ndarray, " 1797"]]:
    """All digits, resized bilinearly.

    Args:
        side: Pixels a side of the images returned; at least 2.

    Returns:
        The images, in [0, 1], and the digits 0 to 9 that they show.

    Raises:
        ValueError: If `side` is below 2.

    Example:
        >>> from varan.data import digit_images
        >>> images, labels = digit_images(20)
        >>> images.shape, int(labels[0])
        ((1797, 20, 20), 0)

    Source:
        Alpaydin, Kaynak, 1998, UCI repository; the copy in scikit-learn.
    """
    if side < 2:
        raise ValueError(f"digit_images: `side` must be at least 2 (got {side}).")
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    data = load_digits()
    images = data.images / 16.0
    if side != 8:
        images = zoom(images, (1, side / 8, side / 8), order=1)
    return images, data.target.astype(np.int32)
