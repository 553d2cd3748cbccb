"""A network as a linear map and its activations in a loop: what bounds over all layers
at once read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core._checks import check_finite, check_nonempty, check_shape
from ._exact import OUTPUT, affine_blocks
from ._graph import BoundGraph
from ._sets import Box


class LinearFractional(eqx.Module):
    """A network as one linear map in a loop with its activations, biases left out.

    `v = input x + feedback w`, `w = activation(v)`, `y = skip x + output w`: `v` and
    `w` hold the hidden units of all layers. A strictly block lower triangular
    `feedback` is a network of layers, any other an implicit model.

    Args:
        input: (hidden, inputs).
        feedback: (hidden, hidden).
        skip: (outputs, inputs).
        output: (outputs, hidden).
        widths: The hidden units of each layer, in order; their sum is `hidden`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import LinearFractional, lipsdp
        >>> block = (None, 0.5 * jnp.eye(2), jnp.eye(2))
        >>> net = LinearFractional.residual([block])
        >>> round(float(lipsdp(net, activation="maxmin").bound), 3)
        1.5
    """

    input: Float[np.ndarray, "hidden inputs"]
    feedback: Float[np.ndarray, "hidden hidden"]
    skip: Float[np.ndarray, "outputs inputs"]
    output: Float[np.ndarray, "outputs hidden"]
    widths: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, input, feedback, skip, output, widths: Sequence[int]):
        self.widths, hidden = tuple(widths), sum(widths)
        check_nonempty("LinearFractional", "widths", widths)
        shapes = {
            "input": (input, (hidden, None)),
            "feedback": (feedback, (hidden, hidden)),
            "skip": (skip, (None, np.shape(input)[-1])),
            "output": (output, (np.shape(skip)[0], hidden)),
        }
        for name, (matrix, shape) in shapes.items():
            check_shape("LinearFractional", name, matrix, shape)
            check_nonempty("LinearFractional", name, matrix)
            check_finite("LinearFractional", name, matrix)
            # In float64 on the host, whatever they came in: the proof is made there.
            setattr(self, name, np.asarray(matrix, float))

    @classmethod
    def feedforward(cls, weights: Sequence[Float[Array, "rows columns"]]):
        """The network `W_n p(... W_2 p(W_1 x))`.

        Args:
            weights: `W_1` to `W_n`, at least two, in the order of the layers.

        Returns:
            The network.

        Raises:
            ValueError: Fewer than two matrices, or sizes that do not follow each other.
        """
        if len(weights) < 2:
            raise ValueError(
                "LinearFractional.feedforward: `weights` must hold at least two "
                f"matrices (got {len(weights)}). Of one, take the norm."
            )
        before = [np.zeros(np.shape(w)) for w in weights[:-1]]
        after = [np.eye(len(w)) for w in weights[:-1]]
        blocks = zip(before, after, weights[:-1], strict=True)
        return cls.residual(list(blocks), head=weights[-1])

    @classmethod
    def residual(cls, blocks, *, head: Float[Array, "outputs features"] | None = None):
        """A chain of blocks `x -> H x + G p(W x + b)`.

        Args:
            blocks: Triples `(H, G, W)`; `None` for an `H` that is the identity.
            head: A linear map of the last block's result, if there is one.

        Returns:
            The network.

        Raises:
            ValueError: No blocks, or sizes that do not follow each other.
        """
        check_nonempty("LinearFractional.residual", "blocks", [0] * len(blocks))
        features = np.shape(blocks[0][2])[-1]
        widths = tuple(len(weight) for _, _, weight in blocks)
        # What the present signal is of the input and of the hidden units.
        signal = np.eye(features, features + sum(widths))
        arguments, start = [], features
        for skip, out, weight in blocks:
            stop = start + len(weight)
            arguments.append(_times("W", weight, signal))
            moved = signal if skip is None else _times("H", skip, signal)
            moved = moved.copy()
            check_shape("LinearFractional", "G", out, (len(moved), len(weight)))
            moved[:, start:stop] += np.asarray(out, float)
            signal, start = moved, stop
        if head is not None:
            signal = _times("head", head, signal)
        whole = np.concatenate(arguments)
        return cls(
            whole[:, :features],
            whole[:, features:],
            signal[:, :features],
            signal[:, features:],
            widths,
        )

    @classmethod
    def from_callable(cls, model: Callable[[Array], Array], example: Array):
        """A network that `BoundGraph` reads, whose slopes are between 0 and 1.

        Args:
            model: As for `local_lipschitz`; take `activation="relu"` with it.
            example: An input; only its shape and dtype matter.

        Returns:
            The network, on flattened inputs and outputs.

        Raises:
            ValueError: No activation, or one with a slope below 0 or above 1.
            UnsupportedPrimitive: An operation of the model without a rule.
        """
        box = Box(example, example)
        graph = BoundGraph.from_callable(model, box.lower)
        order = graph.activations
        check_nonempty("LinearFractional.from_callable", "activations", order)
        for k in order:
            side = jnp.asarray(jnp.inf, graph.dtype)
            low, high = graph.nodes[k].curve.slope_range(-side, side)
            if low < 0 or high > 1:
                raise ValueError(
                    "LinearFractional.from_callable: slopes of activations must be "
                    f"between 0 and 1 (got {float(low):.3g} to {float(high):.3g}). "
                    "Scale the activation, or use `local_lipschitz`."
                )
        blocks = affine_blocks(model, box)
        sources = [0, *order]
        widths = [graph.size(k) for k in order]
        sizes = [graph.size(k) for k in sources]

        def row(k):
            parts, bias = blocks[k]
            empty = [np.zeros((len(bias), size)) for size in sizes]
            found = zip(sources, empty, strict=True)
            return np.concatenate([np.asarray(parts.get(s, e)) for s, e in found], 1)

        whole, ends = np.concatenate([row(k) for k in order]), row(OUTPUT)
        cut = sizes[0]
        return cls(whole[:, :cut], whole[:, cut:], ends[:, :cut], ends[:, cut:], widths)


def _times(name: str, matrix, signal: np.ndarray) -> np.ndarray:
    check_shape("LinearFractional", name, matrix, (None, len(signal)))
    check_finite("LinearFractional", name, matrix)
    return np.asarray(matrix, float) @ signal
