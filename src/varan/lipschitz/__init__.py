"""Lipschitz constants of networks, proved.

How far can a network's output move when its input moves? `local_lipschitz` answers
with an upper bound that is a proof and a value that is attained; `jacobian_bounds`,
`jvp_bounds`, `monotone` and `certified_radius` are its uses. `bounds` encloses the
outputs themselves.

A model is an Equinox module in inference mode, any JAX callable of one input without
batch axis, or a pair `(weights, biases)` of a ReLU network. A set of inputs is a `Box`.
Everything but branch and bound works under `jit`, `vmap` and `grad`.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._branch import BaB as BaB
    from ._builder import register_activation as register_activation
    from ._certified_training import ibp_initialise as ibp_initialise
    from ._certified_training import ibp_loss as ibp_loss
    from ._certified_training import ibp_margins as ibp_margins
    from ._certified_training import sabr_loss as sabr_loss
    from ._curves import PiecewiseLinear as PiecewiseLinear
    from ._curves import SmoothCurve as SmoothCurve
    from ._exact import ExactLipschitz as ExactLipschitz
    from ._exact import exact_lipschitz as exact_lipschitz
    from ._forward import bounds as bounds
    from ._graph import BoundGraph as BoundGraph
    from ._lipschitz import jacobian_bounds as jacobian_bounds
    from ._lipschitz import jvp_bounds as jvp_bounds
    from ._lipschitz import local_lipschitz as local_lipschitz
    from ._milp import exact_bounds as exact_bounds
    from ._monotone import Monotonicity as Monotonicity
    from ._monotone import monotone as monotone
    from ._nodes import UnsupportedPrimitive as UnsupportedPrimitive
    from ._norms import spectral_norm_bound as spectral_norm_bound
    from ._norms import spectral_norm_estimate as spectral_norm_estimate
    from ._onnx import OnnxNetwork as OnnxNetwork
    from ._onnx import load_onnx as load_onnx
    from ._radius import certified_radius as certified_radius
    from ._result import LipschitzResult as LipschitzResult
    from ._sets import Ball as Ball
    from ._sets import Box as Box
    from ._tightness import expected_tightness as expected_tightness
    from ._tightness import propagation_tightness as propagation_tightness
    from ._verify import Verification as Verification
    from ._verify import robustness_property as robustness_property
    from ._verify import verify as verify
    from ._vnnlib import UnsafeCase as UnsafeCase
    from ._vnnlib import read_vnnlib as read_vnnlib

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "BaB": "_branch",
        "Ball": "_sets",
        "BoundGraph": "_graph",
        "Box": "_sets",
        "ExactLipschitz": "_exact",
        "LipschitzResult": "_result",
        "Monotonicity": "_monotone",
        "OnnxNetwork": "_onnx",
        "PiecewiseLinear": "_curves",
        "SmoothCurve": "_curves",
        "UnsafeCase": "_vnnlib",
        "UnsupportedPrimitive": "_nodes",
        "Verification": "_verify",
        "bounds": "_forward",
        "certified_radius": "_radius",
        "exact_bounds": "_milp",
        "exact_lipschitz": "_exact",
        "expected_tightness": "_tightness",
        "ibp_initialise": "_certified_training",
        "ibp_loss": "_certified_training",
        "ibp_margins": "_certified_training",
        "jacobian_bounds": "_lipschitz",
        "jvp_bounds": "_lipschitz",
        "load_onnx": "_onnx",
        "local_lipschitz": "_lipschitz",
        "monotone": "_monotone",
        "propagation_tightness": "_tightness",
        "read_vnnlib": "_vnnlib",
        "register_activation": "_builder",
        "robustness_property": "_verify",
        "sabr_loss": "_certified_training",
        "spectral_norm_bound": "_norms",
        "spectral_norm_estimate": "_norms",
        "verify": "_verify",
    },
)
