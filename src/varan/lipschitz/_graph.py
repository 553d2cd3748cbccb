"""Networks as graphs of affine maps and elementwise nonlinearities.

Bound propagation needs three things of a network: its affine parts as matrix-free
linear maps that can be run forward and transposed, its elementwise nonlinearities with
the place where each stands, and nothing else. `BoundGraph` reads them from the jaxpr
of a JAX callable. Whatever does not depend on the input is folded into constants;
convolutions, pools and reshapes keep their own kernels and are never written out as
matrices; maxima become `max(a, b) = a + relu(b - a)`. An activation written out in
elementary operations (GELU, SiLU, leaky ReLU) is recognised by the exact structure of
its expression.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._builder import Builder
from ._nodes import Activation, Affine, Const, Input


class BoundGraph:
    """A network in the form that bound propagation reads.

    Args:
        nodes: The nodes, parents before children; node 0 is the input, the last one
            the output.
        dtype: The floating dtype of the input.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import BoundGraph
        >>> graph = BoundGraph.from_callable(lambda x: jax.nn.relu(2 * x) - 1,
        ...                                  jnp.zeros(3))
        >>> [type(node).__name__ for node in graph.nodes]
        ['Input', 'Affine', 'Activation', 'Affine']
    """

    def __init__(self, nodes: list[Any], dtype):
        self.nodes, self.dtype = nodes, dtype

    @classmethod
    def from_callable(cls, model: Callable[[Array], Array], example) -> BoundGraph:
        """Reads the graph of a callable on one input (no batch axis).

        Args:
            model: An `equinox.Module` in inference mode, any JAX callable, or a pair
                `(weights, biases)` of the layers of a ReLU network, each weight of
                shape (out, in).
            example: An array, or `jax.ShapeDtypeStruct`, like the model's input.

        Returns:
            The graph; it may close over traced weights.

        Raises:
            UnsupportedPrimitive: an operation without a rule.
            TypeError: a model that is not callable or returns no single array.
        """
        aval = jax.ShapeDtypeStruct(jnp.shape(example), jnp.result_type(example))
        if not jnp.issubdtype(aval.dtype, jnp.floating):
            raise TypeError(
                f"BoundGraph: the input must be floating point (got {aval.dtype})."
            )
        closed = jax.make_jaxpr(as_callable(model))(aval)
        if len(closed.out_avals) != 1:
            raise TypeError(
                "BoundGraph: the model must return one array "
                f"(got {len(closed.out_avals)}). Wrap it in a function that does."
            )
        builder = Builder()
        start = builder.add(Input(aval.shape))
        (out,) = builder.run(closed.jaxpr, closed.consts, [start])
        if isinstance(out, Const):
            raise TypeError("BoundGraph: the model's output ignores its input.")
        return cls(_prune(builder.nodes, builder.node_of(out)), aval.dtype)

    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        """Evaluates the graph; equals the model."""
        return self.values(x)[-1]

    def values(self, x: Array) -> list[Array]:
        """The value of every node at an input."""
        values = [x]
        for node in self.nodes[1:]:
            parents = [values[p] for p in node.parents]
            if isinstance(node, Activation):
                values.append(node.curve(parents[0]))
            else:
                value = node.linear(*parents)
                values.append(value if node.bias is None else value + node.bias)
        return values

    def on_kink(self, x: Array, direction: Array) -> Array:
        """Whether an argument that moves with `x` stands on its activation's kink.

        The derivative that is computed there need not be one of the function's. An
        argument moves if it does along `direction`: draw it at random.
        """
        bent = [k for k in self.activations if not self.nodes[k].curve.smooth]
        places = [self.nodes[k].parents[0] for k in bent]

        def arguments(x):
            values = self.values(x)
            return [values[p] for p in places]

        at, moved = jax.jvp(arguments, (x,), (direction,))
        found = [jnp.any((z == 0) & (dz != 0)) for z, dz in zip(at, moved, strict=True)]
        return jnp.any(jnp.stack([jnp.zeros((), bool), *found]))

    @property
    def output(self) -> int:
        """Index of the output node."""
        return len(self.nodes) - 1

    @property
    def activations(self) -> list[int]:
        """Indices of the nonlinear nodes, parents before children."""
        return [k for k, n in enumerate(self.nodes) if isinstance(n, Activation)]

    def size(self, index: int) -> int:
        """Number of entries of a node."""
        return int(np.prod(self.nodes[index].shape, dtype=int))

    def transpose(self, index: int, cotangent: Array) -> tuple[Array, ...]:
        """Pulls one cotangent of an affine node back to its parents."""
        return self._transposed(index, self.nodes[index].linear)(cotangent)

    def transpose_magnitude(self, index: int, cotangent: Array) -> tuple[Array, ...]:
        """The same through the absolute coefficients."""
        return self._transposed(index, self.nodes[index].magnitude)(cotangent)

    def transpose_signed(
        self, index: int, positive: Array, negative: Array
    ) -> list[tuple[Array, Array]]:
        """The sizes of the positive and the negative terms of the parents' cotangents.

        Sums of numbers of one sign only: zero where there are no terms, exactly.
        """
        node = self.nodes[index]
        totals = [
            [jnp.zeros(self.nodes[p].shape, self.dtype)] * 2 for p in node.parents
        ]
        for part, ways in (
            (node.positive, (positive, negative)),
            (node.negative, (negative, positive)),
        ):
            if part is None:
                continue
            for side, cotangent in enumerate(ways):
                terms = self._transposed(index, part)(cotangent)
                for total, term in zip(totals, terms, strict=True):
                    total[side] = total[side] + term
        return [tuple(total) for total in totals]

    def _transposed(self, index: int, linear) -> Callable[[Array], tuple[Array, ...]]:
        shapes = [
            jax.ShapeDtypeStruct(self.nodes[p].shape, self.dtype)
            for p in self.nodes[index].parents
        ]
        return jax.linear_transpose(linear, *shapes)


class _Dense(eqx.Module):
    weights: list[Array]
    biases: list[Array]

    def __call__(self, x: Array) -> Array:
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = jax.nn.relu(weight @ x + bias)
        return self.weights[-1] @ x + self.biases[-1]


def as_callable(model) -> Callable[[Array], Array]:
    """The model itself, or the ReLU network of a pair `(weights, biases)`."""
    if callable(model):
        return model
    if not (isinstance(model, tuple | list) and len(model) == 2):
        raise TypeError(
            "lipschitz: `model` must be callable or a pair (weights, biases) "
            f"(got {type(model).__name__})."
        )
    weights, biases = ([jnp.asarray(a) for a in part] for part in model)
    if len(weights) != len(biases) or not weights:
        raise ValueError(
            "lipschitz: as many weights as biases are needed, at least one "
            f"(got {len(weights)} and {len(biases)})."
        )
    return _Dense(weights, biases)


def _prune(nodes: list[Any], output: int) -> list[Any]:
    """Drops what the output does not need; the output becomes the last node."""
    needed, stack = {0}, [output]
    while stack:
        index = stack.pop()
        if index not in needed:
            needed.add(index)
            stack.extend(nodes[index].parents)
    order = sorted(needed)
    if output == 0:
        # A model that returns its argument still needs a node of its own.
        shape, same = nodes[0].shape, lambda x: x
        return [nodes[0], Affine((0,), shape, same, same, same, None, identity=True)]
    new = {old: k for k, old in enumerate(order)}
    return [
        nodes[k]._replace(parents=tuple(new[p] for p in nodes[k].parents))
        for k in order
    ]
