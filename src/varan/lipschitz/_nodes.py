"""The nodes of a bound graph, and what a variable of a jaxpr is on the way to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from ._curves import Curve


class UnsupportedPrimitive(TypeError):
    """An operation that bound propagation has no rule for.

    Args:
        name: The primitive's name in the jaxpr.
        where: File and line of the model that used it, if known.
    """

    def __init__(self, name: str, where: str = ""):
        self.name, self.where = name, where
        hint = {
            "exp": " If this is a softmax, return the logits instead.",
            "Softmax": " Export the logits instead.",
            "LogSoftmax": " Export the logits instead.",
            "reduce_max": " If this is a softmax, return the logits instead.",
            "scan": " Unroll the loop.",
            "while": " Unroll the loop.",
        }.get(name, " Rewrite the model, or see `register_activation`.")
        place = f" at {where}" if where else ""
        super().__init__(f"BoundGraph: no rule for `{name}`{place}.{hint}")


class Affine(NamedTuple):
    """A node `sum_k linear_k(parent_k) + bias`.

    `magnitude` is the linear map with every coefficient replaced by its absolute
    value: it carries radii. `positive` and `negative` have the positive and the
    negative coefficients' sizes only: they carry signs, without rounding; None for no
    coefficients. `matrix` is the map as a matrix where it is stored so.
    """

    parents: tuple[int, ...]
    shape: tuple[int, ...]
    linear: Callable[..., Array]
    magnitude: Callable[..., Array]
    positive: Callable[..., Array] | None
    negative: Callable[..., Array] | None
    bias: Array | None = None
    matrix: Array | None = None
    identity: bool = False


class Activation(NamedTuple):
    """A node `curve(parent)`, entry by entry."""

    parents: tuple[int, ...]
    shape: tuple[int, ...]
    curve: Curve


class Input(NamedTuple):
    """The node that stands for the model's argument."""

    shape: tuple[int, ...]
    parents: tuple[int, ...] = ()


class Const(NamedTuple):
    value: Any


class Value(NamedTuple):
    """A node, or an expression that has not become one yet (`node=None`).

    `keys` maps a node to this value's expression in it, for recognising activations.
    """

    node: int | None
    keys: dict[int, Any]
    primitive: str = ""
    where: str = ""


def pending(value) -> bool:
    return isinstance(value, Value) and value.node is None


def bind(eqn, values):
    return eqn.primitive.bind(*values, **eqn.params)
