"""Recurrent classifiers of word sequences."""

from __future__ import annotations

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..core._checks import check_choice


class TanhCell(eqx.Module):
    """The simplest recurrence: `hidden = tanh(W x + U hidden + b)`.

    It has no gates, so that its gradients may grow or vanish with the length: the
    smoothness of a loss through it grows with the gradient's norm.

    Args:
        inputs: Entries of an input.
        width: Entries of the hidden state.
        key: Random key of the weights, uniform within `1 / sqrt(width)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.nets import TanhCell
        >>> TanhCell(3, 4, key=jax.random.key(0))(jnp.ones(3), jnp.zeros(4)).shape
        (4,)

    Source: J. L. Elman, 1990, "Finding structure in time", Cognitive Science 14.
    """

    input_weight: Float[Array, "width inputs"]
    hidden_weight: Float[Array, "width width"]
    bias: Float[Array, " width"]

    def __init__(self, inputs: int, width: int, *, key: PRNGKeyArray):
        bound = width**-0.5

        def draw(key, *shape):
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        one, two, three = jax.random.split(key, 3)
        self.input_weight = draw(one, width, inputs)
        self.hidden_weight = draw(two, width, width)
        self.bias = draw(three, width)

    def __call__(
        self, x: Float[Array, " inputs"], hidden: Float[Array, " width"]
    ) -> Float[Array, " width"]:
        """The next hidden state."""
        return jnp.tanh(self.input_weight @ x + self.hidden_weight @ hidden + self.bias)


class TextClassifier(eqx.Module):
    """Embedding, one recurrent layer, one linear layer.

    Word number 0 is padding, wherever it stands: it leaves the hidden state as it is
    and does not count in a mean, so that a row's answer does not depend on how far it
    was filled up. Sequential in the length: one matrix product a word.

    Args:
        words: Size of the vocabulary, padding included, at least 2.
        classes: Entries of the output, at least 1.
        cell: `"tanh"` (`TanhCell`) or `"lstm"` (Equinox's).
        embedding: Entries of a word's vector.
        width: Entries of the hidden state.
        pooling: What the last layer sees: the `"last"` hidden state or the `"mean"`
            over the words.
        key: Random key of the weights.

    Raises:
        ValueError: If a size or choice is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.nets import TextClassifier
        >>> model = TextClassifier(50, 4, key=jax.random.key(0))
        >>> short, filled = jnp.array([3, 7]), jnp.array([3, 7, 0, 0])
        >>> bool(jnp.allclose(model(short), model(filled)))
        True
    """

    embedding: Float[Array, "words embedding"]
    cell: Any
    head: eqx.nn.Linear
    width: int = eqx.field(static=True)
    pooling: str = eqx.field(static=True)

    def __init__(
        self,
        words: int,
        classes: int,
        *,
        cell: Literal["tanh", "lstm"] = "tanh",
        embedding: int = 32,
        width: int = 64,
        pooling: Literal["last", "mean"] = "last",
        key: PRNGKeyArray,
    ):
        check_choice("TextClassifier", "cell", cell, ("tanh", "lstm"))
        check_choice("TextClassifier", "pooling", pooling, ("last", "mean"))
        if words < 2 or min(classes, embedding, width) < 1:
            raise ValueError(
                "TextClassifier: `words` must be at least 2 and `classes`, "
                f"`embedding`, `width` at least 1 (got {words}, {classes}, "
                f"{embedding}, {width})."
            )
        one, two, three = jax.random.split(key, 3)
        make = TanhCell if cell == "tanh" else eqx.nn.LSTMCell
        self.embedding = jax.random.normal(one, (words, embedding))
        self.cell = make(embedding, width, key=two)
        self.head = eqx.nn.Linear(width, classes, key=three)
        self.width = width
        self.pooling = pooling

    def features(self, tokens: Int[Array, " length"]) -> Float[Array, " width"]:
        """What the last layer sees of one row."""
        zero = jnp.zeros(self.width, self.embedding.dtype)
        start = (zero, zero) if isinstance(self.cell, eqx.nn.LSTMCell) else zero

        def read(state, inputs):
            word, present = inputs
            following = self.cell(word, state)
            state = jax.tree.map(
                lambda new, old: jnp.where(present, new, old), following, state
            )
            return state, _hidden(state)

        present = tokens != 0
        state, hidden = jax.lax.scan(read, start, (self.embedding[tokens], present))
        if self.pooling == "last":
            return _hidden(state)
        weights = present.astype(hidden.dtype)
        # A row without words has the mean 0.
        return weights @ hidden / jnp.maximum(jnp.sum(weights), 1)

    def __call__(self, tokens: Int[Array, " length"]) -> Float[Array, " classes"]:
        """The logits of one row of word numbers."""
        return self.head(self.features(tokens))


def _hidden(state):
    return state[0] if isinstance(state, tuple) else state
