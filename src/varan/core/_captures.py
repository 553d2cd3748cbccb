"""What a callable reads besides its arguments, as a key for the compiled loop.

JAX compiles a function once and remembers it by identity. A function that reads a
global, a closure cell or an attribute gets those values baked in: change one, call
again, and the old answer comes back with the old derivative, silently. So the values
that a problem's callables read belong to the key under which its loop is remembered.
Immutable values and arrays are compared; whatever could change unseen makes a key that
equals nothing, and the loop is compiled again.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Hashable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from ._checks import is_traced

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, np.dtype, np.generic)
_TRUSTED = ("varan.", "jax", "equinox.", "optax.", "optimistix.", "lineax.", "numpy")


def capture_key(*modules: eqx.Module) -> Hashable:
    """A key that is equal for two calls only if nothing captured has changed.

    Args:
        *modules: Problems and solvers; their fields are searched for callables, and
            the methods of classes that are not varan's own are callables too.
    """
    seen: set[int] = set()
    return tuple(_module_key(module, seen) for module in modules)


class _Same:
    """Compares by identity; holds its object, so that no other takes its id."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self):
        return id(self.value)


def _module_key(module, seen) -> Hashable:
    if id(module) in seen:
        return None
    seen.add(id(module))
    parts: list[Hashable] = [type(module)]
    if not _trusted(type(module)):
        for cls in type(module).__mro__:
            if not _trusted(cls) and cls is not object:
                parts += [
                    _key(value, seen)
                    for value in vars(cls).values()
                    if isinstance(value, (types.FunctionType, property))
                ]
    for field in dataclasses.fields(module):
        value = getattr(module, field.name, None)
        # A module within is an argument as well: its arrays are not baked in.
        if isinstance(value, eqx.Module):
            parts.append(_module_key(value, seen))
        elif callable(value):
            parts.append(_key(value, seen))
    return tuple(parts)


def _key(value, seen) -> Hashable:
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (types.ModuleType, types.BuiltinFunctionType)):
        return _Same(value)
    if isinstance(value, jax.Array):
        # A tracer is new in each trace; an array never changes.
        return object() if is_traced(value) else _Same(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, hash(value.tobytes())
    if id(value) in seen:
        return None
    if isinstance(value, types.FunctionType):
        return _function_key(value, seen)
    if isinstance(value, types.MethodType):
        return _key(value.__func__, seen), _key(value.__self__, seen)
    if isinstance(value, functools.partial):  # jax.tree_util.Partial is one
        arguments = [] if isinstance(value, jtu.Partial) else [value.args]
        return _key(value.func, seen), tuple(_key(a, seen) for a in arguments)
    if isinstance(value, property):
        return _key(value.fget, seen)
    if isinstance(value, tuple):
        return tuple(_key(item, seen) for item in value)
    if isinstance(value, eqx.Module):
        leaves = tuple(_key(leaf, seen) for leaf in jtu.tree_leaves(value))
        return _module_key(value, seen), leaves
    wrapped = getattr(value, "__wrapped__", None)
    if wrapped is not None:
        return _Same(value), _key(wrapped, seen)
    if _trusted(type(value)):
        return _Same(value)
    return object()


def _function_key(function, seen) -> Hashable:
    seen.add(id(function))
    if (function.__module__ or "").startswith(_TRUSTED):
        return _Same(function)
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(_key(cell.cell_contents, seen))
        except ValueError:  # not assigned yet
            cells.append(None)
    names = _names(function.__code__)
    scope = function.__globals__
    read = tuple(_key(scope[name], seen) for name in names if name in scope)
    defaults = _key(function.__defaults__ or (), seen)
    return _Same(function), tuple(cells), read, defaults


def _names(code) -> list[str]:
    """Global names that a function reads, its inner functions included."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names(constant)
    return names


def _trusted(cls) -> bool:
    return (cls.__module__ or "").startswith(_TRUSTED) or cls is eqx.Module
