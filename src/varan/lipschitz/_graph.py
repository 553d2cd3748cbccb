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

import itertools
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ._curves import Curve, PiecewiseLinear, known_curves


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
            "reduce_max": " If this is a softmax, return the logits instead.",
            "scan": " Unroll the loop.",
            "while": " Unroll the loop.",
        }.get(name, " Rewrite the model, or see `register_activation`.")
        place = f" at {where}" if where else ""
        super().__init__(f"BoundGraph: no rule for `{name}`{place}.{hint}")


class Affine(NamedTuple):
    """A node `sum_k linear_k(parent_k) + bias`.

    `magnitude` is the linear map with every coefficient replaced by its absolute
    value: it carries radii. `matrix` is the map as a matrix where it is stored so.
    """

    parents: tuple[int, ...]
    shape: tuple[int, ...]
    linear: Callable[..., Array]
    magnitude: Callable[..., Array]
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
        builder = _Builder()
        start = builder.add(Input(aval.shape))
        (out,) = builder.run(closed.jaxpr, closed.consts, [start])
        if isinstance(out, _Const):
            raise TypeError("BoundGraph: the model's output ignores its input.")
        return cls(_prune(builder.nodes, builder.node_of(out)), aval.dtype)

    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        """Evaluates the graph; equals the model."""
        values = [x]
        for node in self.nodes[1:]:
            parents = [values[p] for p in node.parents]
            if isinstance(node, Activation):
                values.append(node.curve(parents[0]))
            else:
                value = node.linear(*parents)
                values.append(value if node.bias is None else value + node.bias)
        return values[-1]

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


def register_activation(function: Callable[[Array], Array], curve: Curve) -> None:
    """Teaches the front end an elementwise function that it does not know.

    The function is recognised wherever a model applies the same elementary operations
    with the same constants to one value.

    Args:
        function: An elementwise JAX function of one array.
        curve: Its description, a `SmoothCurve` or `PiecewiseLinear`.

    Example:
        >>> import jax
        >>> from varan.lipschitz import SmoothCurve, register_activation
        >>> register_activation(jax.nn.softplus,
        ...                     SmoothCurve(jax.nn.softplus, turns=(), bends=(0.0,)))
    """
    known_curves().append((function, curve))
    _signatures.cache_clear()


class _Const(NamedTuple):
    value: Any


class _Value(NamedTuple):
    """A node, or an expression that has not become one yet (`node=None`).

    `keys` maps a node to this value's expression in it, for recognising activations.
    """

    node: int | None
    keys: dict[int, Any]
    primitive: str = ""
    where: str = ""


_X = "x"


class _Builder:
    """Interprets a jaxpr into nodes."""

    def __init__(self):
        self.nodes: list[Any] = []
        self.avals: list[Any] = []

    def add(self, node, keys: dict[int, Any] | None = None) -> _Value:
        self.nodes.append(node)
        index = len(self.nodes) - 1
        return _Value(index, {**(keys or {}), index: _X})

    def node_of(self, value: _Value) -> int:
        if value.node is None:
            raise UnsupportedPrimitive(value.primitive, value.where)
        return value.node

    def inline(self, function, *args: _Value | _Const) -> _Value:
        """Interprets a rewrite given as a JAX function."""
        avals = [self._aval(a) for a in args]
        closed = jax.make_jaxpr(function)(*avals)
        (out,) = self.run(closed.jaxpr, closed.consts, list(args))
        return out

    def _aval(self, arg):
        if isinstance(arg, _Const):
            return jax.ShapeDtypeStruct(
                jnp.shape(arg.value), jnp.result_type(arg.value)
            )
        return jax.ShapeDtypeStruct(self.nodes[self.node_of(arg)].shape, self.dtype)

    def run(self, jaxpr, consts, args) -> list[_Value | _Const]:
        env: dict[Any, Any] = {}

        def read(atom):
            is_literal = isinstance(atom, jax.extend.core.Literal)
            return _Const(atom.val) if is_literal else env[atom]

        env.update(zip(jaxpr.constvars, map(_Const, consts), strict=True))
        for var, arg in zip(jaxpr.invars, args, strict=True):
            env[var] = arg
            if isinstance(arg, _Value):
                self.dtype = var.aval.dtype
        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            outputs = self._equation(eqn, inputs)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn, inputs) -> list[_Value | _Const]:
        name = eqn.primitive.name
        inner = next(
            (eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params), None
        )
        if inner is not None and name in _CALLS:
            consts = getattr(inner, "consts", ())
            return self.run(getattr(inner, "jaxpr", inner), consts, inputs)
        if all(isinstance(a, _Const) for a in inputs):
            out = _bind(eqn, [a.value for a in inputs])
            several = eqn.primitive.multiple_results
            return [_Const(o) for o in out] if several else [_Const(out)]
        keys = _expression_keys(eqn, inputs)
        curve = _recognise(keys, self.dtype)
        if curve is not None:
            base, found = curve
            return [
                self.add(Activation((base,), eqn.outvars[0].aval.shape, found), keys)
            ]
        if name in _RULES and not any(_pending(a) for a in inputs):
            out = _RULES[name](self, eqn, inputs)
            if out is not None:
                return [out._replace(keys={**keys, **out.keys})]
        if not keys:
            late = next((a for a in inputs if _pending(a)), None)
            if late is not None:
                raise UnsupportedPrimitive(late.primitive, late.where)
            raise UnsupportedPrimitive(name, _source(eqn))
        first = next((a for a in inputs if _pending(a)), None)
        where = (first.primitive, first.where) if first else (name, _source(eqn))
        return [_Value(None, keys, *where)] * len(eqn.outvars)


_CALL_NAMES = (
    "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call "
    "custom_vjp_call custom_vjp_call_jaxpr"
)
_CALLS = frozenset(_CALL_NAMES.split())


def _pending(value) -> bool:
    return isinstance(value, _Value) and value.node is None


def _bind(eqn, values):
    return eqn.primitive.bind(*values, **eqn.params)


def _source(eqn) -> str:
    """The first line outside the libraries that produced the equation."""
    traceback = eqn.source_info.traceback
    libraries = ("/jax/", "/equinox/", "/varan/lipschitz/", "/jaxtyping/")
    for frame in traceback.frames if traceback is not None else ():
        if not any(part in frame.file_name for part in libraries):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


# Recognising activations -----------------------------------------------------------


def _scalar(const: _Const):
    """A concrete scalar's value; None for arrays and traced constants."""
    value = const.value
    if isinstance(value, jax.core.Tracer) or np.ndim(value) != 0:
        return None
    return np.asarray(value).item()


_ELEMENTWISE_NAMES = (
    "add sub mul div neg max min abs sign tanh logistic erf erfc exp exp2 log log1p "
    "expm1 integer_pow pow square sqrt rsqrt cbrt ge gt le lt eq ne select_n copy "
    "copy_p is_finite and or not clamp sin cos tan atan sinh cosh asinh atan2"
)
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())


def _expression_keys(eqn, inputs) -> dict[int, Any]:
    """The output as an expression of one node, for every node all operands know."""
    if eqn.primitive.name not in _ELEMENTWISE or len(eqn.outvars) != 1:
        return {}
    scalars = [_scalar(a) if isinstance(a, _Const) else None for a in inputs]
    values = [a for a in inputs if isinstance(a, _Value)]
    if sum(s is not None for s in scalars) + len(values) != len(inputs):
        return {}
    shape = eqn.outvars[0].aval.shape
    if any(v.aval.shape not in ((), shape) for v in eqn.invars):
        return {}
    common = reduce(lambda a, b: a & b, (v.keys.keys() for v in values))
    if eqn.primitive.name in ("copy", "copy_p"):
        return {base: values[0].keys[base] for base in common}
    extra = (eqn.params["y"],) if eqn.primitive.name == "integer_pow" else ()
    return {
        base: (
            eqn.primitive.name,
            *extra,
            *(
                a.keys[base] if isinstance(a, _Value) else s
                for a, s in zip(inputs, scalars, strict=True)
            ),
        )
        for base in common
    }


def _recognise(keys: dict[int, Any], dtype) -> tuple[int, Curve] | None:
    for base, key in keys.items():
        curve = _piecewise(key)
        if curve is None:
            curve = _signatures(np.dtype(dtype).name).get(key)
        if curve is not None:
            return base, curve
    return None


def _piecewise(key) -> PiecewiseLinear | None:
    """`select(x >= 0, a x, b x)` and its relatives; `max(x, 0)`; `|x|`."""
    if key in (("max", _X, 0.0), ("max", 0.0, _X)):
        return PiecewiseLinear(0.0, 1.0)
    if key == ("abs", _X):
        return PiecewiseLinear(-1.0, 1.0)
    if not (isinstance(key, tuple) and key[0] == "select_n" and len(key) == 4):
        return None
    _, test, if_false, if_true = key
    slopes = (_slope(if_false), _slope(if_true))
    if None in slopes or not isinstance(test, tuple) or test[1:] != (_X, 0.0):
        return None
    if test[0] in ("ge", "gt"):
        return PiecewiseLinear(*slopes)
    if test[0] in ("le", "lt"):
        return PiecewiseLinear(*slopes[::-1])
    return None


def _slope(key) -> float | None:
    if key == _X:
        return 1.0
    if isinstance(key, int | float) and key == 0:
        return 0.0
    if isinstance(key, tuple) and key[0] == "neg" and key[1] == _X:
        return -1.0
    if isinstance(key, tuple) and key[0] == "mul" and _X in key[1:]:
        factor = key[1] if key[2] == _X else key[2]
        return float(factor) if isinstance(factor, int | float) else None
    return None


class _Signatures:
    """The expression of every known curve, traced once a dtype."""

    def __init__(self):
        self._table: dict[str, dict[Any, Curve]] = {}

    def __call__(self, dtype: str) -> dict[Any, Curve]:
        if dtype not in self._table:
            self._table[dtype] = {}  # the tracing below looks up this very table
            found = {}
            for function, curve in known_curves():
                builder = _Builder()
                start = builder.add(Input(()))
                aval = jax.ShapeDtypeStruct((), dtype)
                closed = jax.make_jaxpr(function)(aval)
                (out,) = builder.run(closed.jaxpr, closed.consts, [start])
                found[out.keys[0]] = curve
            self._table[dtype] = found
        return self._table[dtype]

    def cache_clear(self) -> None:
        self._table.clear()


_signatures = _Signatures()


# Rules for the affine primitives ------------------------------------------------------


def _structural(positions: Callable[[Any], tuple[int, ...]], builder, eqn, inputs):
    """Primitives that move, repeat and add up entries: every coefficient is 1."""
    data = positions(eqn)
    if any(isinstance(a, _Value) for k, a in enumerate(inputs) if k not in data):
        return None
    nodes = [k for k in data if isinstance(inputs[k], _Value)]
    consts = [a.value if isinstance(a, _Const) else None for a in inputs]
    cleared = list(consts)
    for k in data:
        if consts[k] is not None:
            cleared[k] = jnp.zeros_like(consts[k])

    def linear(*xs, operands=cleared):
        operands = list(operands)
        for k, x in zip(nodes, xs, strict=True):
            operands[k] = x
        return _bind(eqn, operands)

    bias = None
    if len(nodes) < len(data):
        blanks = [jnp.zeros(eqn.invars[k].aval.shape, builder.dtype) for k in nodes]
        bias = linear(*blanks, operands=consts)
    parents = tuple(inputs[k].node for k in nodes)
    shape = eqn.outvars[0].aval.shape
    return builder.add(Affine(parents, shape, linear, linear, bias))


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


def _bilinear(builder, eqn, inputs):
    """Products with a constant tensor: dot_general and convolution."""
    which = [k for k, a in enumerate(inputs) if isinstance(a, _Value)]
    if len(which) != 1 or (eqn.primitive.name != "dot_general" and which != [0]):
        return None
    (k,) = which
    weight = inputs[1 - k].value

    def apply(weight, x):
        return _bind(eqn, [x, weight] if k == 0 else [weight, x])

    return builder.add(
        Affine(
            (inputs[k].node,),
            eqn.outvars[0].aval.shape,
            partial(apply, weight),
            partial(apply, jnp.abs(weight)),
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
    if all(isinstance(a, _Value) for a in inputs):
        return None
    k = 0 if isinstance(inputs[0], _Value) else 1
    if name == "div" and k == 1:
        return None
    factor = jnp.asarray(inputs[1 - k].value, builder.dtype)
    factor = 1 / factor if name == "div" else factor
    magnitude = jnp.abs(factor)
    return builder.add(
        Affine((inputs[k].node,), shape, lambda x: x * factor, lambda x: x * magnitude)
    )


def _sum(builder, eqn, inputs):
    """add and sub."""
    sign = -1 if eqn.primitive.name == "sub" else 1
    shape = eqn.outvars[0].aval.shape
    a, b = inputs
    if isinstance(a, _Value) and isinstance(b, _Value):
        return builder.add(
            Affine(
                (a.node, b.node),
                shape,
                (lambda x, y: x - y) if sign < 0 else (lambda x, y: x + y),
                lambda x, y: x + y,
            )
        )
    node, const = (a, b) if isinstance(a, _Value) else (b, a)
    if builder.nodes[node.node].shape != shape:
        return None
    negated = sign < 0 and node is b
    bias = jnp.asarray(const.value, builder.dtype)
    bias = -bias if sign < 0 and node is a else bias
    linear = (lambda x: -x) if negated else (lambda x: x)
    return builder.add(
        Affine(
            (node.node,),
            shape,
            linear,
            lambda x: x,
            jnp.broadcast_to(bias, shape),
            identity=not negated,
        )
    )


def _negate(builder, eqn, inputs):
    shape = eqn.outvars[0].aval.shape
    return builder.add(Affine((inputs[0].node,), shape, lambda x: -x, lambda x: x))


def _maximum(builder, eqn, inputs):
    sign = 1 if eqn.primitive.name == "max" else -1

    def rewrite(a, b):
        return a + sign * jax.nn.relu(sign * (b - a))

    a, b = inputs
    # The constant first, so that it is the part outside the ReLU.
    a, b = (b, a) if isinstance(b, _Const) else (a, b)
    if isinstance(a, _Const):
        shape = eqn.outvars[0].aval.shape
        a = _Const(jnp.broadcast_to(jnp.asarray(a.value, builder.dtype), shape))
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
    "gather reduce_sum cumsum reduce_window_sum copy copy_p"
)
_RULES: dict[str, Callable] = {
    **{name: partial(_structural, _operand(0)) for name in _MOVES.split()},
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
        same = Affine((0,), nodes[0].shape, lambda x: x, lambda x: x, identity=True)
        return [nodes[0], same]
    new = {old: k for k, old in enumerate(order)}
    return [
        nodes[k]._replace(parents=tuple(new[p] for p in nodes[k].parents))
        for k in order
    ]
