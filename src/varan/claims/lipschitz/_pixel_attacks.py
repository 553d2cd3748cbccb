"""What the game of features is compared with: random pixels, and a greedy white box.

Both paint pixels black or white until the class changes. The random search gets as many
different images classified as the game did, and takes needless pixels back like it.
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

_BATCH = 64  # images a call
_GROUP = 10  # pixels taken back together at first


def random_pixels(
    predict: Callable, image: np.ndarray, label: int, queries: int, rng
) -> float:
    """The fewest pixels that random painting needed, within a number of queries."""
    search = _RandomSearch(predict, image, label, queries, rng)
    best = np.inf
    while search.left > 0:
        found = search.paint()
        if found is not None:
            best = min(best, float(np.sum(search.take_back(found) != image)))
    return best


class _RandomSearch:
    """A search with a number of queries to spend."""

    def __init__(self, predict, image, label, queries, rng):
        self.predict, self.image, self.label = predict, image, label
        self.left, self.rng = queries, rng

    def lost(self, images: np.ndarray) -> np.ndarray:
        """Which images are misclassified; all are paid for."""
        self.left -= len(images)
        found = []
        for start in range(0, len(images), _BATCH):
            own = images[start : start + _BATCH]
            filled = np.concatenate([own, np.repeat(own[:1], _BATCH - len(own), 0)])
            scores = np.asarray(self.predict(filled))[: len(own)]
            found.append(np.argmax(scores, 1) != self.label)
        return np.concatenate(found)

    def paint(self) -> np.ndarray | None:
        """Pixels in random order, black or white at random, until the class changes."""
        order = self.rng.permutation(self.image.size)
        colours = self.rng.integers(0, 2, self.image.size).astype(self.image.dtype)
        moves = [k for k in order if self.image.flat[k] != colours[k]]
        image = self.image.copy()
        for start in range(0, len(moves), _BATCH):
            prefixes = []
            for pixel in moves[start : start + _BATCH]:
                image.flat[pixel] = colours[pixel]
                prefixes.append(image.copy())
            lost = self.lost(np.array(prefixes))
            if lost.any():
                return prefixes[int(np.argmax(lost))]
        return None

    def take_back(self, best: np.ndarray) -> np.ndarray:
        """The image without the pixels that it does not need."""
        size = _GROUP
        while size:
            changed = self.rng.permutation(np.flatnonzero(best != self.image))
            groups = [changed[k : k + size] for k in range(0, len(changed), size)]
            images = np.repeat(best[None], len(groups), 0)
            for one, group in zip(images, groups, strict=True):
                one.flat[group] = self.image.flat[group]
            lost = np.flatnonzero(self.lost(images))
            if len(lost):
                kept = [np.sum(images[k] != self.image) for k in lost]
                best = images[lost[int(np.argmin(kept))]].copy()
            else:
                size //= 2
        return best


@eqx.filter_jit
def greedy_saliency(model, image, label) -> jax.Array:
    """Pixels that a greedy white box paints: each the one whose gradient promises most.

    One gradient of the lead a pixel, no pixel twice; infinite where none is left.
    """
    pixels = jnp.ravel(image)

    def lead(x):
        scores = model(x.reshape(image.shape)[None])
        own = jnp.arange(len(scores)) == label
        return scores[label] - jnp.max(jnp.where(own, -jnp.inf, scores))

    def step(state):
        x, free = state
        change = jnp.stack([0 - x, 1 - x]) * jax.grad(lead)(x)[None]
        pick = jnp.argmin(jnp.where(free[None], change, jnp.inf))
        colour, pixel = pick // x.size, pick % x.size
        return x.at[pixel].set(colour.astype(x.dtype)), free.at[pixel].set(False)

    def holds(state):
        x, free = state
        return (lead(x) >= 0) & jnp.any(free)

    x, _ = jax.lax.while_loop(holds, step, (pixels, jnp.ones(pixels.shape, bool)))
    return jnp.where(lead(x) < 0, jnp.sum(x != pixels).astype(x.dtype), jnp.inf)
