"""The cell of differentiable architecture search: edges that mix operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_shape, is_traced


class Zero(eqx.Module):
    """The operation that returns zeros: an edge that is not there.

    `MixedCell.discretise` never chooses it.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.nets import Zero
        >>> Zero()(jnp.ones(2)).tolist()
        [0.0, 0.0]
    """

    def __call__(self, x: Array) -> Array:
        """Zeros like `x`."""
        return jnp.zeros_like(x)


class MixedCell(eqx.Module):
    """A graph of nodes whose edges carry all operations at once, weighted.

    Node 0 is the input. Every further node is the sum of its edges from all earlier
    nodes, and an edge is `sum_k softmax(alpha)_k operation_k(x)`. The output is the
    nodes but the input, stacked along the first axis. `alpha` is no part of the cell:
    it belongs to another level of the search than the weights.

    A cell of `nodes` nodes has `nodes (nodes + 1) / 2` edges, each of which runs all
    its operations.

    Args:
        operations: One function a kind, from a random key to a callable that keeps
            the shape of its input (`lambda key: equinox.nn.Identity()`); every edge
            has its own.
        nodes: Nodes beside the input, at least 1.
        key: Random key of the operations.

    Raises:
        ValueError: If there are no operations or no nodes, or an operation changes
            the shape (when called).

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from varan.nets import MixedCell, Zero
        >>> kinds = [lambda key: Zero(), lambda key: eqx.nn.Identity()]
        >>> cell = MixedCell(kinds, nodes=2, key=jax.random.key(0))
        >>> cell(jnp.ones(3), jnp.zeros(cell.alpha_shape)).tolist()
        [0.5, 0.5, 0.5, 0.75, 0.75, 0.75]

    Source: H. Liu, K. Simonyan, Y. Yang, 2019, "DARTS: differentiable architecture
        search", arXiv:1806.09055, section 2.

    Differences: One input node instead of two (there is no second cell before it).
    """

    edges: tuple[tuple[Callable, ...], ...]
    nodes: int = eqx.field(static=True)

    def __init__(
        self,
        operations: Sequence[Callable[[PRNGKeyArray], Callable]],
        *,
        nodes: int = 2,
        key: PRNGKeyArray,
    ):
        if not operations or nodes < 1:
            raise ValueError(
                "MixedCell: at least one of `operations` and of `nodes` is needed "
                f"(got {len(operations)} and {nodes})."
            )
        keys = jax.random.split(key, (nodes * (nodes + 1) // 2, len(operations)))
        self.edges = tuple(
            tuple(make(one) for make, one in zip(operations, row, strict=True))
            for row in keys
        )
        self.nodes = nodes

    @property
    def alpha_shape(self) -> tuple[int, int]:
        """Edges and operations; zeros of this shape weigh all alike."""
        return len(self.edges), len(self.edges[0])

    def __call__(
        self, x: Float[Array, "channels ..."], alpha: Float[Array, "edges operations"]
    ) -> Float[Array, "nodes*channels ..."]:
        """The mixture at `softmax(alpha)`."""
        return self.mix(x, jax.nn.softmax(alpha))

    def mix(
        self, x: Float[Array, "channels ..."], weights: Float[Array, "edges operations"]
    ) -> Float[Array, "nodes*channels ..."]:
        """The mixture at any weights; `discretise` makes those of one architecture."""
        check_shape("MixedCell", "weights", weights, self.alpha_shape)

        def apply(edge, value):
            outputs = [operation(value) for operation in self.edges[edge]]
            if any(out.shape != value.shape for out in outputs):
                shapes = [out.shape for out in outputs]
                raise ValueError(
                    "MixedCell: every operation must keep the shape of its input "
                    f"{value.shape} (got {shapes})."
                )
            return sum(
                weights[edge, k].astype(out.dtype) * out
                for k, out in enumerate(outputs)
            )

        return _run(x, self.nodes, apply)

    def discretise(
        self, alpha: Float[Array, "edges operations"], keep: int = 2
    ) -> Float[Array, "edges operations"]:
        """The weights of the architecture that `alpha` stands for.

        At each node the `keep` edges stay whose best operation weighs most, each with
        that operation alone, at weight 1. `Zero` competes for no place. Jittable.

        Args:
            alpha: As in the call.
            keep: Edges into a node, at least 1; nodes with fewer keep all.

        Returns:
            Rows with a single 1, and rows of zeros for edges that fall away.

        Raises:
            ValueError: If `keep` is below 1 or `Zero` is the only operation.
        """
        real = np.array([not isinstance(o, Zero) for o in self.edges[0]])
        if keep < 1 or not real.any():
            raise ValueError(
                "MixedCell.discretise: `keep` must be at least 1 and there must be an "
                f"operation beside Zero (got keep {keep} and {real.sum()} operations)."
            )
        weights = jnp.where(real[None], jax.nn.softmax(alpha), -1)
        strength = jnp.max(weights, 1)
        chosen = jax.nn.one_hot(
            jnp.argmax(weights, 1), weights.shape[1], dtype=alpha.dtype
        )
        stays, first = [], 0
        for node in range(1, self.nodes + 1):
            # Ranks within the node; of equal edges the earlier is the stronger.
            order = jnp.argsort(-strength[first : first + node], stable=True)
            stays.append(jnp.argsort(order) < keep)
            first += node
        return chosen * jnp.concatenate(stays)[:, None].astype(alpha.dtype)

    def prune(self, weights: Float[Array, "edges operations"]) -> DiscreteCell:
        """The network of the operations whose weight is not zero, without the rest.

        Args:
            weights: From `discretise`; concrete, since they decide the structure.

        Returns:
            A `DiscreteCell` that computes what `mix` does at weights of 0 and 1, and
            runs nothing else.

        Raises:
            ValueError: If the weights are traced.
        """
        if is_traced(weights):
            raise ValueError(
                "MixedCell.prune: `weights` must be concrete (got a traced array): "
                "they decide which operations exist. Call it outside jit."
            )
        kept = tuple(
            tuple(op for op, weight in zip(edge, row, strict=True) if weight != 0)
            for edge, row in zip(self.edges, np.asarray(weights), strict=True)
        )
        return DiscreteCell(kept, self.nodes)


class DiscreteCell(eqx.Module):
    """One architecture of a `MixedCell`: what `MixedCell.prune` returns.

    Args:
        edges: The operations of each edge, none where it fell away.
        nodes: Nodes beside the input.
    """

    edges: tuple[tuple[Any, ...], ...]
    nodes: int = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "channels ..."]
    ) -> Float[Array, "nodes*channels ..."]:
        """The nodes but the input, stacked along the first axis."""

        def apply(edge, value):
            return sum((o(value) for o in self.edges[edge]), jnp.zeros_like(value))

        return _run(x, self.nodes, apply)


def _run(x, nodes, apply):
    values, edge = [x], 0
    for node in range(1, nodes + 1):
        values.append(sum(apply(edge + k, values[k]) for k in range(node)))
        edge += node
    return jnp.concatenate(values[1:])
