"""Where an image has features: SIFT's detector."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ..core._checks import check_finite, check_nonempty, check_positive

# Lowe's values: the base scale, scales an octave, the least contrast for grey values in
# [0, 1] (shared among the scales of an octave), the largest ratio of the curvatures.
_SCALE, _INTERVALS, _CONTRAST, _EDGE = 1.6, 3, 0.04, 10.0
_SMALLEST = 8  # pixels a side, below which an octave says nothing


class Keypoints(NamedTuple):
    """Features of an image.

    Args:
        position: Row and column of each, in pixels of the image, the first pixel's
            centre at 0.
        size: The standard deviation of the blob, in pixels.
        response: How distinct it is, positive.
    """

    position: Float[np.ndarray, "keypoints 2"]
    size: Float[np.ndarray, " keypoints"]
    response: Float[np.ndarray, " keypoints"]


def sift_keypoints(
    image: Float[np.ndarray, "height width ..."], *, enlarge: int = 15
) -> Keypoints:
    """Extremes of an image's differences of Gaussians, over place and scale.

    Of the transform the detector alone: positions, sizes and responses, no orientation
    and no descriptor. The cost is that of six Gaussian filters an octave.

    Args:
        image: Values in [0, 1]; channels, if any, are averaged.
        enlarge: By how much the image is enlarged first, bilinearly, at least 1. The
            default is for images of 8 to 32 pixels a side; take 2 for photographs.

    Returns:
        The keypoints, in pixels of the image as given; none for an even image.

    Raises:
        ValueError: An image that is not finite, empty or of one dimension, or a factor
            below 1.

    Example:
        >>> import numpy as np
        >>> from varan.lipschitz import sift_keypoints
        >>> image = np.zeros((8, 8))
        >>> image[2:4, 4:6] = 1.0
        >>> found = sift_keypoints(image)
        >>> strongest = int(np.argmax(found.response))
        >>> [round(2 * float(p)) / 2 for p in found.position[strongest]]
        [2.5, 4.5]

    Source:
        Lowe (2004), "Distinctive Image Features from Scale-Invariant Keypoints",
        International Journal of Computer Vision 60, sections 3 and 4, as used in
        arXiv:1710.07859.

    Differences:
        Places and scales are those of the samples, without the parabola through them.
    """
    from scipy.ndimage import zoom

    image = np.asarray(image, float)
    check_nonempty("sift_keypoints", "image", image)
    check_finite("sift_keypoints", "image", image)
    check_positive("sift_keypoints", "enlarge", enlarge)
    if image.ndim not in (2, 3):
        raise ValueError(
            "sift_keypoints: `image` must be (height, width) or (height, width, "
            f"channels) (got shape {image.shape})."
        )
    grey = image if image.ndim == 2 else image.mean(2)
    # On a grid of pixels, not of corners: a pixel becomes a block of its own.
    large = np.asarray(zoom(grey, enlarge, order=1, mode="nearest", grid_mode=True))
    rows, step, blur = [], 1, 0.0
    while min(*large.shape) >= _SMALLEST or not rows:
        places, scales, responses, large = _octave(large, blur)
        position = (step * places + 0.5) / enlarge - 0.5
        rows.append(np.column_stack([position, step * scales / enlarge, responses]))
        step, blur = 2 * step, _SCALE
    found = np.concatenate(rows)
    return Keypoints(found[:, :2], found[:, 2], found[:, 3])


def _octave(image: np.ndarray, blur: float):
    """Extremes within one octave, and the image at half its resolution.

    The blur that an image has already, in its own pixels, need not be added again.
    """
    from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

    sigmas = _SCALE * 2 ** (np.arange(_INTERVALS + 3) / _INTERVALS)
    added = np.sqrt(sigmas**2 - blur**2)
    blurred = np.stack([gaussian_filter(image, s, mode="nearest") for s in added])
    steps = np.diff(blurred, axis=0)
    # An extreme is among its 26 neighbours the largest or the smallest.
    extreme = (steps == maximum_filter(steps, 3)) | (steps == minimum_filter(steps, 3))
    extreme &= np.abs(steps) > _CONTRAST / _INTERVALS
    extreme[[0, -1]] = False
    extreme &= _is_blob(steps)
    level, *place = np.nonzero(extreme)
    return (
        np.column_stack(place).astype(float),
        sigmas[level],
        np.abs(steps[extreme]),
        blurred[_INTERVALS, ::2, ::2],
    )


def _is_blob(steps: np.ndarray) -> np.ndarray:
    """Whether the curvatures of both directions are alike: no edge."""
    down, across = np.gradient(steps, axis=(1, 2))
    down_down, down_across = np.gradient(down, axis=(1, 2))
    across_across = np.gradient(across, axis=2)
    trace = down_down + across_across
    determinant = down_down * across_across - down_across**2
    return (determinant > 0) & (trace**2 * _EDGE < (_EDGE + 1) ** 2 * determinant)
