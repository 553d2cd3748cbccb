"""The interpreter that turns a jaxpr into the nodes of a bound graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._affine_rules import RULES
from ._curves import Curve, known_curves
from ._nodes import (
    Activation,
    Const,
    Input,
    UnsupportedPrimitive,
    Value,
    bind,
    pending,
)
from ._recognise import X, expression_keys, piecewise


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


class Builder:
    """Interprets a jaxpr into nodes."""

    def __init__(self):
        self.nodes: list[Any] = []
        self.avals: list[Any] = []

    def add(self, node, keys: dict[int, Any] | None = None) -> Value:
        self.nodes.append(node)
        index = len(self.nodes) - 1
        return Value(index, {**(keys or {}), index: X})

    def node_of(self, value: Value) -> int:
        if value.node is None:
            raise UnsupportedPrimitive(value.primitive, value.where)
        return value.node

    def inline(self, function, *args: Value | Const) -> Value:
        """Interprets a rewrite given as a JAX function."""
        avals = [self._aval(a) for a in args]
        closed = jax.make_jaxpr(function)(*avals)
        (out,) = self.run(closed.jaxpr, closed.consts, list(args))
        return out

    def _aval(self, arg):
        if isinstance(arg, Const):
            return jax.ShapeDtypeStruct(
                jnp.shape(arg.value), jnp.result_type(arg.value)
            )
        return jax.ShapeDtypeStruct(self.nodes[self.node_of(arg)].shape, self.dtype)

    def run(self, jaxpr, consts, args) -> list[Value | Const]:
        env: dict[Any, Any] = {}

        def read(atom):
            is_literal = isinstance(atom, jax.extend.core.Literal)
            return Const(atom.val) if is_literal else env[atom]

        env.update(zip(jaxpr.constvars, map(Const, consts), strict=True))
        for var, arg in zip(jaxpr.invars, args, strict=True):
            env[var] = arg
            if isinstance(arg, Value):
                self.dtype = var.aval.dtype
        for eqn in _needed(jaxpr):
            inputs = [read(atom) for atom in eqn.invars]
            outputs = self._equation(eqn, inputs)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn, inputs) -> list[Value | Const]:
        name = eqn.primitive.name
        inner = next(
            (eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params), None
        )
        if inner is not None and name in _CALLS:
            consts = getattr(inner, "consts", ())
            return self.run(getattr(inner, "jaxpr", inner), consts, inputs)
        if all(isinstance(a, Const) for a in inputs):
            out = _fold(eqn, [a.value for a in inputs])
            several = eqn.primitive.multiple_results
            return [Const(o) for o in out] if several else [Const(out)]
        keys = expression_keys(eqn, inputs)
        curve = recognise(keys, self.dtype)
        if curve is not None:
            base, found = curve
            return [
                self.add(Activation((base,), eqn.outvars[0].aval.shape, found), keys)
            ]
        if name in RULES and not any(pending(a) for a in inputs):
            out = RULES[name](self, eqn, inputs)
            if out is not None:
                return [out._replace(keys={**keys, **out.keys})]
        if not keys:
            late = next((a for a in inputs if pending(a)), None)
            if late is not None:
                raise UnsupportedPrimitive(late.primitive, late.where)
            raise UnsupportedPrimitive(name, _source(eqn))
        first = next((a for a in inputs if pending(a)), None)
        where = (first.primitive, first.where) if first else (name, _source(eqn))
        return [Value(None, keys, *where)] * len(eqn.outvars)


def _needed(jaxpr) -> list[Any]:
    """The equations that the results depend on."""
    literal = jax.extend.core.Literal
    wanted = {v for v in jaxpr.outvars if not isinstance(v, literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            kept.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, literal))
    return kept[::-1]


_CALL_NAMES = (
    "jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call "
    "custom_vjp_call custom_vjp_call_jaxpr"
)
_CALLS = frozenset(_CALL_NAMES.split())


def _fold(eqn, values):
    """Constants of constants; under jit, too, known numbers stay known."""
    if any(isinstance(value, jax.core.Tracer) for value in values):
        return bind(eqn, values)
    with jax.ensure_compile_time_eval():
        return bind(eqn, values)


def _source(eqn) -> str:
    """The first line outside the libraries that produced the equation."""
    traceback = eqn.source_info.traceback
    libraries = ("/jax/", "/equinox/", "/varan/lipschitz/", "/jaxtyping/")
    for frame in traceback.frames if traceback is not None else ():
        if not any(part in frame.file_name for part in libraries):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


def recognise(keys: dict[int, Any], dtype) -> tuple[int, Curve] | None:
    for base, key in keys.items():
        curve = piecewise(key)
        if curve is None:
            curve = _signatures(np.dtype(dtype).name).get(key)
        if curve is not None:
            return base, curve
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
                builder = Builder()
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
