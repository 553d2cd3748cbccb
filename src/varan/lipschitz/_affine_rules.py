"""What the primitives that are affine in the input become: one rule a primitive."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._nodes import Affine, Const, Value, bind


def _structural(positions: Callable[[Any], tuple[int, ...]], builder, eqn, inputs):
    """Primitives that move, repeat and add up entries: every coefficient is 1."""
    data = positions(eqn)
    if any(isinstance(a, Value) for k, a in enumerate(inputs) if k not in data):
        return None
    nodes = [k for k in data if isinstance(inputs[k], Value)]
    consts = [a.value if isinstance(a, Const) else None for a in inputs]
    cleared = list(consts)
    for k in data:
        if consts[k] is not None:
            cleared[k] = jnp.zeros_like(consts[k])

    def linear(*xs, operands=cleared):
        operands = list(operands)
        for k, x in zip(nodes, xs, strict=True):
            operands[k] = x
        return bind(eqn, operands)

    bias = None
    if len(nodes) < len(data):
        blanks = [jnp.zeros(eqn.invars[k].aval.shape, builder.dtype) for k in nodes]
        bias = linear(*blanks, operands=consts)
    parents = tuple(inputs[k].node for k in nodes)
    shape = eqn.outvars[0].aval.shape
    return builder.add(Affine(parents, shape, *_all_positive(linear), bias))


def _all_positive(linear):
    return linear, linear, linear, None


def _weighted(apply, weight):
    """A map that is linear in its coefficients too, and its three companions."""
    sides = jnp.abs(weight), jnp.maximum(weight, 0), jnp.maximum(-weight, 0)
    return [partial(apply, w) for w in (weight, *sides)]


def _operand(k: int):
    return lambda eqn: (k,)


def _every(start: int):
    return lambda eqn: tuple(range(start, len(eqn.invars)))


def _convert(builder, eqn, inputs):
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return None
    if eqn.params["new_dtype"] == builder.dtype:
        return inputs[0]
    return None  # a change of precision inside the model has no sound rule


def _gather(builder, eqn, inputs):
    """Moves entries; those outside of the operand are a constant."""
    if "fill_value" in eqn.params and eqn.params["fill_value"] is None:
        # What JAX fills with by default.
        eqn = eqn.replace(params={**eqn.params, "fill_value": math.nan})
    bare = eqn.replace(params={**eqn.params, "fill_value": 0})
    out = _structural(_operand(0), builder, bare, inputs)
    if out is None or eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return out
    blank = jnp.zeros(eqn.invars[0].aval.shape, builder.dtype)
    filled = bind(eqn, [blank, *(a.value for a in inputs[1:])])
    shape = eqn.outvars[0].aval.shape
    maps = _all_positive(_same)
    return builder.add(Affine((out.node,), shape, *maps, filled, identity=True))


def _bilinear(builder, eqn, inputs):
    """Products with a constant tensor: dot_general and convolution."""
    which = [k for k, a in enumerate(inputs) if isinstance(a, Value)]
    if len(which) != 1 or (eqn.primitive.name != "dot_general" and which != [0]):
        return None
    (k,) = which
    weight = inputs[1 - k].value

    def apply(weight, x):
        return bind(eqn, [x, weight] if k == 0 else [weight, x])

    return builder.add(
        Affine(
            (inputs[k].node,),
            eqn.outvars[0].aval.shape,
            *_weighted(apply, weight),
            matrix=_matrix(eqn, k, weight),
        )
    )


def _matrix(eqn, k: int, weight) -> Array | None:
    if eqn.primitive.name != "dot_general" or jnp.ndim(weight) != 2:
        return None
    contract, batch = eqn.params["dimension_numbers"]
    if eqn.invars[k].aval.ndim != 1 or any(batch):
        return None
    (axis,) = contract[1 - k]
    return weight if axis == 1 else weight.T


def _scale(builder, eqn, inputs):
    """mul and div by a constant."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if all(isinstance(a, Value) for a in inputs):
        return None
    k = 0 if isinstance(inputs[0], Value) else 1
    if name == "div" and k == 1:
        return None
    factor = jnp.asarray(inputs[1 - k].value, builder.dtype)
    factor = 1 / factor if name == "div" else factor
    maps = _weighted(lambda w, x: x * w, factor)
    return builder.add(Affine((inputs[k].node,), shape, *maps))


def _same(x):
    return x


_NEGATION = (lambda x: -x, _same, None, _same)


def _sum(builder, eqn, inputs):
    """add and sub."""
    sign = -1 if eqn.primitive.name == "sub" else 1
    shape = eqn.outvars[0].aval.shape
    a, b = inputs
    if isinstance(a, Value) and isinstance(b, Value):
        maps = _all_positive(lambda x, y: x + y)
        if sign < 0:
            first, second = lambda x, y: x + 0 * y, lambda x, y: 0 * x + y
            maps = (lambda x, y: x - y, maps[0], first, second)
        return builder.add(Affine((a.node, b.node), shape, *maps))
    node, const = (a, b) if isinstance(a, Value) else (b, a)
    if builder.nodes[node.node].shape != shape:
        return None
    negated = sign < 0 and node is b
    bias = jnp.asarray(const.value, builder.dtype)
    bias = -bias if sign < 0 and node is a else bias
    bias = jnp.broadcast_to(bias, shape)
    maps = _NEGATION if negated else _all_positive(_same)
    node = Affine((node.node,), shape, *maps, bias, identity=not negated)
    return builder.add(node)


def _negate(builder, eqn, inputs):
    shape = eqn.outvars[0].aval.shape
    return builder.add(Affine((inputs[0].node,), shape, *_NEGATION))


def _maximum(builder, eqn, inputs):
    sign = 1 if eqn.primitive.name == "max" else -1

    def rewrite(a, b):
        return a + sign * jax.nn.relu(sign * (b - a))

    a, b = inputs
    # The constant first, so that it is the part outside the ReLU.
    a, b = (b, a) if isinstance(b, Const) else (a, b)
    if isinstance(a, Const):
        shape = eqn.outvars[0].aval.shape
        a = Const(jnp.broadcast_to(jnp.asarray(a.value, builder.dtype), shape))
    return builder.inline(rewrite, a, b)


def _max_pool(builder, eqn, inputs):
    p = eqn.params
    plain = all(d == 1 for d in (*p["base_dilation"], *p["window_dilation"]))
    if not plain or any(any(pair) for pair in p["padding"]):
        return None
    shape, strides = eqn.outvars[0].aval.shape, p["window_strides"]

    def rewrite(x):
        parts = [
            lax.slice(
                x,
                corner,
                [
                    c + s * (n - 1) + 1
                    for c, s, n in zip(corner, strides, shape, strict=True)
                ],
                strides,
            )
            for corner in itertools.product(*map(range, p["window_dimensions"]))
        ]
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=False)
            rest = parts[-1:] if len(parts) % 2 else []
            parts = [a + jax.nn.relu(b - a) for a, b in pairs] + rest
        return parts[0]

    return builder.inline(rewrite, inputs[0])


_MOVES = (
    "reshape transpose broadcast_in_dim squeeze expand_dims rev slice dynamic_slice "
    "reduce_sum cumsum reduce_window_sum copy copy_p"
)
RULES: dict[str, Callable] = {
    **{name: partial(_structural, _operand(0)) for name in _MOVES.split()},
    "gather": _gather,
    "concatenate": partial(_structural, _every(0)),
    "stack": partial(_structural, _every(0)),
    "pad": partial(_structural, _every(0)),
    "select_n": partial(_structural, _every(1)),
    "convert_element_type": _convert,
    "dot_general": _bilinear,
    "conv_general_dilated": _bilinear,
    "mul": _scale,
    "div": _scale,
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
    "neg": _negate,
    "max": _maximum,
    "min": _maximum,
    "reduce_window_max": _max_pool,
}
