"""ONNX operators as JAX functions: one function an operator, or a family of them.

Each takes the node and its inputs (arrays; absent optional inputs are None) and returns
the output. Inputs that must be known when the file is read (shapes, axes, pads) arrive
as NumPy arrays. Every function is made of operations that bound propagation has rules
for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from ._files import FileProblem

# No array of a network that is read may be larger.
MOST_ENTRIES = 100_000_000
# Limits of `Clip` beyond it are hardly ever reached.
_LARGE_LIMIT = 1e4


class Node(NamedTuple):
    """One node of a file.

    Args:
        operator: Its `op_type`.
        name: What the file calls it, for messages.
        attributes: As Python values; tensors as NumPy arrays.
        inputs: Names of the inputs; empty for an absent one.
        outputs: Names of the outputs.
        fixed: Inputs that were known when the file was read, by place.
    """

    operator: str
    name: str
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fixed: dict[int, np.ndarray]


def _add(node, a, b):
    return a + b


def _subtract(node, a, b):
    return a - b


def _multiply(node, a, b):
    return a * b


def _divide(node, a, b):
    # What the file gives is a NumPy array while the file is read.
    if isinstance(b, np.ndarray) and not np.all(b):
        raise FileProblem("it divides by zero.")
    return a / b


def _relu(node, x):
    return jax.nn.relu(x)


def _leaky_relu(node, x):
    slope = node.attributes.get("alpha", 0.01)
    return jnp.where(x >= 0, x, slope * x)


def _sigmoid(node, x):
    return jax.nn.sigmoid(x)


def _tanh(node, x):
    return jnp.tanh(x)


def _negate(node, x):
    return -x


def _absolute(node, x):
    return jnp.abs(x)


def _identity(node, x, *unused):
    return x


def _dropout(node, x, ratio=None, training=None):
    if training is not None and bool(np.asarray(training)):
        raise FileProblem("it is in training mode. Export the model for inference.")
    return x


def _clip(node, x, low=None, high=None):
    low = node.attributes.get("min") if low is None else low
    high = node.attributes.get("max") if high is None else high
    return _limited(_limited(x, low, 1), high, -1)


def _limited(x, limit, sign):
    """`max(x, limit)` for sign 1, `min(x, limit)` for sign -1."""
    if limit is None:
        return x
    if np.size(limit) != 1:
        raise FileProblem(f"its limits must be single numbers (got {limit}).")
    # A limit among the attributes is a Python float, of the file's single precision.
    kind = limit.dtype if isinstance(limit, np.ndarray) else np.float32
    most = min(float(jnp.finfo(kind).max), float(jnp.finfo(x.dtype).max))
    limit = float(np.reshape(limit, ()))
    if sign * limit >= most:
        raise FileProblem(f"its limit {limit:g} leaves no number.")
    if abs(limit) >= most:
        return x
    if abs(limit) > _LARGE_LIMIT:
        # Bounds of `max` add the limit and subtract it again, which would drown x in
        # rounding; here what is added is exactly zero until x reaches the limit.
        return x + sign * jax.nn.relu(sign * (limit - x))
    limit = jnp.asarray(limit, x.dtype)
    return jnp.maximum(x, limit) if sign > 0 else jnp.minimum(x, limit)


def _largest(node, *xs):
    return _folded(jnp.maximum, xs)


def _smallest(node, *xs):
    return _folded(jnp.minimum, xs)


def _sum(node, *xs):
    return _folded(jnp.add, xs)


def _folded(function, xs):
    out = xs[0]
    for x in xs[1:]:
        out = function(out, x)
    return out


# Products ---------------------------------------------------------------------------


def _matmul(node, a, b):
    # One row is a vector: bound propagation then sees the matrix itself.
    if a.ndim == 2 and a.shape[0] == 1 and b.ndim == 2:
        return (b.T @ a.reshape(-1)).reshape(1, -1)
    return a @ b


def _gemm(node, a, b, c=None):
    get = node.attributes.get
    a = a.T if get("transA", 0) else a
    b = b.T if get("transB", 0) else b
    out = _matmul(node, a, get("alpha", 1.0) * b)
    if c is None:
        return out
    return out + jnp.broadcast_to(get("beta", 1.0) * c, out.shape)


def _convolution(node, x, weight, bias=None):
    axes = weight.ndim - 2
    if x.ndim != weight.ndim:
        raise FileProblem(
            f"its input of shape {x.shape} does not fit a kernel of {weight.shape}."
        )
    given = tuple(node.attributes.get("kernel_shape", weight.shape[2:]))
    if given != weight.shape[2:]:
        raise FileProblem(f"`kernel_shape` {given} is not its kernel's.")
    strides = _per_axis(node, "strides", axes)
    dilations = _per_axis(node, "dilations", axes)
    window = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    out = lax.conv_general_dilated(
        x,
        weight,
        strides,
        _padding(node, x.shape[2:], window, strides),
        rhs_dilation=dilations,
        feature_group_count=node.attributes.get("group", 1),
    )
    return out if bias is None else out + bias.reshape(1, -1, *(1,) * axes)


def _batch_normalisation(node, x, scale, shift, mean, variance):
    if node.attributes.get("training_mode", 0):
        raise FileProblem("it is in training mode. Export the model for inference.")
    variance = variance + node.attributes.get("epsilon", 1e-5)
    if isinstance(variance, np.ndarray) and np.any(variance <= 0):
        raise FileProblem("a variance plus `epsilon` is not positive.")
    factor = scale / jnp.sqrt(variance)
    column = lambda v: v.reshape(1, -1, *(1,) * (x.ndim - 2))  # noqa: E731
    return x * column(factor) + column(shift - mean * factor)


# Pools ------------------------------------------------------------------------------


def _max_pool(node, x):
    window, strides, pads = _pooling(node, x)
    # A padded entry never wins; nor does a copy of the border, which every window that
    # reaches beyond it contains.
    x = jnp.pad(x, ((0, 0), (0, 0), *pads), mode="edge")
    sizes, steps = (1, 1, *window), (1, 1, *strides)
    return lax.reduce_window(x, -jnp.inf, lax.max, sizes, steps, "VALID")


def _average_pool(node, x):
    window, strides, pads = _pooling(node, x)
    sizes, steps = (1, 1, *window), (1, 1, *strides)

    def total(values, padding):
        whole = ((0, 0), (0, 0), *padding)
        return lax.reduce_window(values, 0.0, lax.add, sizes, steps, whole)

    ones = np.ones((1, 1, *x.shape[2:]), x.dtype)
    if node.attributes.get("count_include_pad", 0):
        # What the rounding up of the size adds beyond the padding does not count.
        given = _padding(node, x.shape[2:], window, strides)
        ones = np.pad(ones, ((0, 0), (0, 0), *given), constant_values=1)
        beyond = [
            (0, p[1] - g[1]) if g is not p else (0, 0)
            for p, g in zip(pads, given, strict=True)
        ]
        return total(x, pads) / total(ones, beyond)
    return total(x, pads) / total(ones, pads)


def _global_average_pool(node, x):
    axes = tuple(range(2, x.ndim))
    return jnp.sum(x, axes, keepdims=True) / math.prod(x.shape[2:])


def _pooling(node, x):
    window = tuple(node.attributes["kernel_shape"])
    if min(window, default=0) < 1 or x.ndim != len(window) + 2:
        raise FileProblem(
            f"its input of shape {x.shape} does not fit a window of {window}."
        )
    if any(d != 1 for d in _per_axis(node, "dilations", len(window))):
        raise FileProblem("dilated pooling is not supported.")
    strides = _per_axis(node, "strides", len(window))
    pads = _padding(node, x.shape[2:], window, strides)
    # A window within the padding would hold no entry.
    if any(max(pair) >= k for pair, k in zip(pads, window, strict=True)):
        raise FileProblem(f"`pads` {pads} reach beyond its window of {window}.")
    if node.attributes.get("ceil_mode", 0):
        pads = [
            (low, high + _beyond(n + low + high, k, s, n + low))
            for (low, high), n, k, s in zip(
                pads, x.shape[2:], window, strides, strict=True
            )
        ]
    padded = [n + low + high for n, (low, high) in zip(x.shape[2:], pads, strict=True)]
    fits = all(k <= n for k, n in zip(window, padded, strict=True))
    if not fits or math.prod(padded) > MOST_ENTRIES:
        raise FileProblem(
            f"its input of shape {x.shape} does not fit a window of {window}."
        )
    return window, strides, pads


def _beyond(length: int, window: int, stride: int, last_start: int) -> int:
    """What a size rounded up needs at the end; no window begins beyond the input."""
    steps = -(-(length - window) // stride)
    if steps * stride >= last_start:
        steps -= 1
    return max(steps * stride + window - length, 0)


def _per_axis(node, name, axes):
    given = tuple(node.attributes.get(name) or (1,) * axes)
    if len(given) != axes or min(given, default=1) < 1:
        raise FileProblem(f"`{name}` must be {axes} positive integers (got {given}).")
    return given


def _padding(node, shape, window, strides) -> list[tuple[int, int]]:
    kind = node.attributes.get("auto_pad", "NOTSET")
    axes = len(window)
    if kind in ("NOTSET", ""):
        pads = node.attributes.get("pads") or (0,) * (2 * axes)
        if len(pads) != 2 * axes or min(pads, default=0) < 0:
            raise FileProblem(
                f"`pads` must be {2 * axes} integers from 0 (got {tuple(pads)})."
            )
        return list(zip(pads[:axes], pads[axes:], strict=True))
    if kind == "VALID":
        return [(0, 0)] * axes
    if kind not in ("SAME_UPPER", "SAME_LOWER"):
        raise FileProblem(f"`auto_pad` is {kind!r}, which does not exist.")
    pads = []
    for n, k, s in zip(shape, window, strides, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        half = (total // 2, total - total // 2)
        pads.append(half if kind == "SAME_UPPER" else half[::-1])
    return pads


# Shapes -----------------------------------------------------------------------------


def _flatten(node, x):
    axis = node.attributes.get("axis", 1)
    # All axes may come first; a negative axis counts from the last one.
    axis = axis if axis == x.ndim else _axis(axis, x.ndim)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _reshape(node, x, shape):
    shape = [int(n) for n in shape]
    if not node.attributes.get("allowzero", 0):
        shape = [x.shape[k] if n == 0 else n for k, n in enumerate(shape)]
    return x.reshape(shape)


def _transpose(node, x):
    return x.transpose(node.attributes.get("perm") or tuple(reversed(range(x.ndim))))


def _concatenate(node, *xs):
    return jnp.concatenate(xs, _axis(node.attributes["axis"], xs[0].ndim))


def _squeeze(node, x, axes=None):
    axes = _axes(node, axes)
    return x.squeeze(None if axes is None else axes)


def _unsqueeze(node, x, axes=None):
    axes = _axes(node, axes)
    return x.reshape(_with_ones(x.shape, axes))


def _with_ones(shape, axes):
    rank = len(shape) + len(axes)
    places = {_axis(axis, rank) for axis in axes}
    if len(places) < len(axes):
        raise FileProblem(f"an axis is repeated in {axes}.")
    rest = iter(shape)
    return tuple(1 if k in places else next(rest) for k in range(rank))


def _slice(node, x, starts=None, ends=None, axes=None, steps=None):
    if starts is None:
        starts, ends = node.attributes["starts"], node.attributes["ends"]
        axes = node.attributes.get("axes")
    starts, ends = ([int(v) for v in part] for part in (starts, ends))
    axes = range(len(starts)) if axes is None else axes
    axes = [_axis(int(a), x.ndim) for a in axes]
    steps = [1] * len(starts) if steps is None else [int(s) for s in steps]
    if 0 in steps:
        raise FileProblem("a step is 0.")
    chosen = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # "To the very beginning" is written as a large negative end.
        beyond = step < 0 and end < -x.shape[axis]
        chosen[axis] = slice(start, None if beyond else end, step)
    return x[tuple(chosen)]


def _gather(node, x, indices):
    axis = _axis(node.attributes.get("axis", 0), x.ndim)
    indices = np.asarray(indices)
    length = x.shape[axis]
    if np.any(indices < -length) or np.any(indices >= length):
        raise FileProblem(f"an index lies outside the axis of length {length}.")
    return jnp.take(x, np.where(indices < 0, indices + length, indices), axis)


def _pad(node, x, pads=None, value=None, axes=None):
    mode = node.attributes.get("mode", "constant")
    if mode not in ("constant", "edge"):
        raise FileProblem(f"padding of mode {mode!r} is not supported.")
    pads = node.attributes.get("pads") if pads is None else pads
    value = node.attributes.get("value", 0.0) if value is None else value
    pads = [int(p) for p in pads]
    axes = range(x.ndim) if axes is None else [_axis(int(a), x.ndim) for a in axes]
    if min(pads, default=0) < 0:
        raise FileProblem("negative padding is not supported.")
    half = len(pads) // 2
    widths = [(0, 0)] * x.ndim
    for axis, low, high in zip(axes, pads[:half], pads[half:], strict=True):
        widths[axis] = (low, high)
    if mode == "edge":
        return jnp.pad(x, widths, mode="edge")
    return jnp.pad(x, widths, constant_values=float(np.asarray(value)))


def _reduce_sum(node, x, axes=None):
    axes = _axes(node, axes)
    if axes is None and node.attributes.get("noop_with_empty_axes", 0):
        return x
    keep = bool(node.attributes.get("keepdims", 1))
    return jnp.sum(x, None if axes is None else tuple(axes), keepdims=keep)


def _reduce_mean(node, x, axes=None):
    total = _reduce_sum(node, x, axes)
    return total / (x.size / total.size)


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise FileProblem(f"axis {axis} lies outside its input of {rank} axes.")
    return axis % rank


def _axes(node, given):
    axes = node.attributes.get("axes") if given is None else given
    if axes is None or len(axes) == 0:
        return None
    return tuple(int(a) for a in axes)


def _cast(node, x):
    from onnx.helper import tensor_dtype_to_np_dtype

    target = tensor_dtype_to_np_dtype(node.attributes["to"])
    # Networks run in the precision of their input; a lower one would round.
    if target not in (np.float32, np.float64):
        raise FileProblem(
            f"it casts the network's values to {target}, which is not supported. "
            "Export the model in one precision."
        )
    return x


OPERATORS: dict[str, Callable[..., Array]] = {
    "Abs": _absolute,
    "Add": _add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalisation,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concatenate,
    "Conv": _convolution,
    "Div": _divide,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "Identity": _identity,
    "LeakyRelu": _leaky_relu,
    "MatMul": _matmul,
    "Max": _largest,
    "MaxPool": _max_pool,
    "Min": _smallest,
    "Mul": _multiply,
    "Neg": _negate,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "ReduceSum": _reduce_sum,
    "Relu": _relu,
    "Reshape": _reshape,
    "Sigmoid": _sigmoid,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _subtract,
    "Sum": _sum,
    "Tanh": _tanh,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}

# Inputs that must be known when the file is read, by place.
KNOWN_INPUTS: dict[str, Sequence[int]] = {
    "Clip": (1, 2),
    "Dropout": (1, 2),
    "Gather": (1,),
    "Pad": (1, 2, 3),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}

# Arithmetic on shapes, which exporters write out; ONNX's own evaluator computes it.
_ON_SHAPES = (
    "Abs Add And Cast Concat ConstantOfShape Div Equal Expand Gather Greater Identity "
    "Less Max Min Mod Mul Neg Not Or Range ReduceMax ReduceMin ReduceProd ReduceSum "
    "Reshape ScatterElements Slice Squeeze Sub Transpose Unsqueeze Where"
)
ON_SHAPES = frozenset(_ON_SHAPES.split())
