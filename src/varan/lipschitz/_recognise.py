"""Activations written out in elementary operations, recognised by their expression."""

from __future__ import annotations

from functools import reduce
from typing import Any

import jax
import numpy as np

from ._curves import PiecewiseLinear
from ._nodes import Const, Value

# The value that an expression is one of.
X = "x"


def _scalar(const: Const):
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


def expression_keys(eqn, inputs) -> dict[int, Any]:
    """The output as an expression of one node, for every node all operands know."""
    if eqn.primitive.name not in _ELEMENTWISE or len(eqn.outvars) != 1:
        return {}
    scalars = [_scalar(a) if isinstance(a, Const) else None for a in inputs]
    values = [a for a in inputs if isinstance(a, Value)]
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
                a.keys[base] if isinstance(a, Value) else s
                for a, s in zip(inputs, scalars, strict=True)
            ),
        )
        for base in common
    }


def piecewise(key) -> PiecewiseLinear | None:
    """`select(x >= 0, a x, b x)` and its relatives; `max(x, 0)`; `|x|`."""
    if key in (("max", X, 0.0), ("max", 0.0, X)):
        return PiecewiseLinear(0.0, 1.0)
    if key == ("abs", X):
        return PiecewiseLinear(-1.0, 1.0)
    if not (isinstance(key, tuple) and key[0] == "select_n" and len(key) == 4):
        return None
    _, test, if_false, if_true = key
    slopes = (_slope(if_false), _slope(if_true))
    if None in slopes or not isinstance(test, tuple) or test[1:] != (X, 0.0):
        return None
    if test[0] in ("ge", "gt"):
        return PiecewiseLinear(*slopes)
    if test[0] in ("le", "lt"):
        return PiecewiseLinear(*slopes[::-1])
    return None


def _slope(key) -> float | None:
    if key == X:
        return 1.0
    if isinstance(key, int | float) and key == 0:
        return 0.0
    if isinstance(key, tuple) and key[0] == "neg" and key[1] == X:
        return -1.0
    if isinstance(key, tuple) and key[0] == "mul" and X in key[1:]:
        factor = key[1] if key[2] == X else key[2]
        return float(factor) if isinstance(factor, int | float) else None
    return None
