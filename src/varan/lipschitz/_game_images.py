"""What a game on an image's features is played with: saliency, changes, queries."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from ..core._checks import check_choice, check_finite, check_positive, check_shape
from ._keypoints import Keypoints

Options = Callable[[np.ndarray], np.ndarray]
Manipulation = Literal["paint"] | float | Options

BATCH = 64  # images a call of the classifier; the last call is filled up


class Queries:
    """The classifier, asked in batches of one size and never twice for an image."""

    def __init__(self, predict, image: np.ndarray, label: int | None):
        self.predict, self.shape, self.dtype = predict, image.shape, image.dtype
        self.known: dict[bytes, float] = {}
        scores = self._scores(image[None])
        self.label = int(np.argmax(scores)) if label is None else label
        if not 0 <= self.label < scores.shape[1]:
            raise ValueError(
                f"feature_game: `label` must be one of {scores.shape[1]} classes "
                f"(got {label})."
            )
        self.margin = float(self(image[None])[0])
        if self.margin < 0 or self.label != np.argmax(scores):
            raise ValueError(
                f"feature_game: `image` must be classified as {self.label} (got "
                f"{int(np.argmax(scores))}): there is nothing to search for."
            )

    @property
    def count(self) -> int:
        return len(self.known)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The lead of the class over the next best, for each image."""
        names = [
            hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in images
        ]
        new = {name: k for k, name in enumerate(names) if name not in self.known}
        if new:
            scores = self._scores(images[list(new.values())])
            leads = scores[:, self.label] - np.delete(scores, self.label, 1).max(1)
            self.known.update(zip(new, leads.tolist(), strict=True))
        return np.array([self.known[name] for name in names])

    def _scores(self, images: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(images), BATCH):
            own = images[start : start + BATCH]
            filled = np.concatenate([own, np.repeat(own[:1], BATCH - len(own), 0)])
            scores = np.asarray(self.predict(filled.reshape(-1, *self.shape)))
            if scores.ndim != 2 or len(scores) != BATCH or scores.shape[1] < 2:
                raise ValueError(
                    "feature_game: `predict` must return scores (images, classes) (got "
                    f"shape {scores.shape} for {BATCH} images)."
                )
            parts.append(scores[: len(own)])
        scores = np.concatenate(parts)
        check_finite("feature_game", "predict(images)", scores)
        return scores


def saliency(points: Keypoints, grid, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Each feature's share, and its density over the pixels; without any, uniform."""
    owner = "feature_game"
    position, size, response = (np.asarray(part, float) for part in points)
    count = len(size)
    if not count:
        return np.ones(1), np.full((1, math.prod(grid)), 1 / math.prod(grid))
    check_shape(owner, "keypoints.position", position, (count, 2))
    check_shape(owner, "keypoints.response", response, (count,))
    check_positive(owner, "keypoints.response", response)
    if np.any((position < -0.5) | (position > np.array(grid) - 0.5)):
        raise ValueError(
            f"{owner}: `keypoints` must lie in the image of {grid} pixels (got "
            f"positions from {position.min(0)} to {position.max(0)})."
        )
    rows, columns = np.indices(grid).reshape(2, -1)
    away = (rows - position[:, [0]]) ** 2 + (columns - position[:, [1]]) ** 2
    densities = np.exp(-away / 2 / (size[:, None] + sigma) ** 2)
    return response / response.sum(), densities / densities.sum(1, keepdims=True)


def as_options(manipulate: Manipulation, pixels: np.ndarray) -> Options:
    """The function from pixels to what they can become."""
    if callable(manipulate):
        options = np.asarray(manipulate(pixels))
        check_shape(
            "feature_game", "manipulate(pixels)", options, (None, *pixels.shape)
        )
        check_finite("feature_game", "manipulate(pixels)", options)
        return manipulate
    if isinstance(manipulate, str):
        check_choice("feature_game", "manipulate", manipulate, ("paint",))
        return lambda pixels: np.stack([np.zeros_like(pixels), np.ones_like(pixels)])
    check_positive("feature_game", "manipulate", manipulate)
    step = pixels.dtype.type(manipulate)
    return lambda pixels: np.clip(np.stack([pixels - step, pixels + step]), 0, 1)
