"""A small convolutional classifier for signals and images."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class ConvClassifier(eqx.Module):
    """Convolutions of stride 2, the mean over positions, one linear layer.

    Each layer halves the sides and applies a ReLU, so that a layer of twice the
    channels costs half (signals) or as much (images) as the one before. No
    normalisation: samples of a batch do not meet, and there is no state.

    Args:
        classes: Entries of the output, at least 1.
        dimensions: 1 for signals, 2 for images.
        channels: Of the input.
        widths: Channels after each convolution, at least one layer.
        kernel: Side of the filters, odd.
        key: Random key of the weights.

    Raises:
        ValueError: If a size is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.nets import ConvClassifier
        >>> model = ConvClassifier(10, key=jax.random.key(0))
        >>> jax.vmap(model)(jnp.ones((5, 1, 8, 8))).shape
        (5, 10)
    """

    convolutions: tuple[eqx.nn.Conv, ...]
    head: eqx.nn.Linear

    def __init__(
        self,
        classes: int,
        *,
        dimensions: int = 2,
        channels: int = 1,
        widths: Sequence[int] = (16, 32),
        kernel: int = 3,
        key: PRNGKeyArray,
    ):
        if dimensions not in (1, 2):
            raise ValueError(
                f"ConvClassifier: `dimensions` must be 1 or 2 (got {dimensions})."
            )
        if not widths or min(classes, channels, *widths) < 1:
            raise ValueError(
                "ConvClassifier: `classes`, `channels` and at least one of `widths` "
                f"must be positive (got {classes}, {channels}, {tuple(widths)})."
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"ConvClassifier: `kernel` must be odd (got {kernel}).")
        *keys, last = jax.random.split(key, len(widths) + 1)
        sizes = (channels, *widths)
        self.convolutions = tuple(
            eqx.nn.Conv(
                dimensions, a, b, kernel, stride=2, padding=kernel // 2, key=one
            )
            for a, b, one in zip(sizes, sizes[1:], keys, strict=False)
        )
        self.head = eqx.nn.Linear(sizes[-1], classes, key=last)

    def features(self, x: Float[Array, "channels ..."]) -> Float[Array, " width"]:
        """What the last layer sees of one sample."""
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return jnp.mean(x, axis=range(1, x.ndim))

    def __call__(self, x: Float[Array, "channels ..."]) -> Float[Array, " classes"]:
        """The logits of one sample, channels first."""
        return self.head(self.features(x))
