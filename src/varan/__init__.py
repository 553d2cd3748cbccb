"""varan: variational analysis in JAX.

A problem states what it means to be solved; solving, differentiating, certifying and
stability follow from that for every solver.
"""

from typing import TYPE_CHECKING

from ._lazy import attach as _attach

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .core import *  # noqa: F403

_CORE = (
    "Certificate",
    "Comparison",
    "FixedPoint",
    "FixedPointIteration",
    "GradientDescent",
    "Newton",
    "NewtonCG",
    "Problem",
    "Root",
    "Smooth",
    "Solution",
    "Solver",
    "Stability",
    "State",
    "Status",
    "Trace",
    "compare",
    "custom_fixed_point",
    "custom_root",
    "solve",
    "stability",
)

__getattr__, __dir__, __all__ = _attach(
    __name__,
    dict.fromkeys(_CORE, "core"),
    (
        "bilevel",
        "constrained",
        "core",
        "data",
        "fenchel_young",
        "firstorder",
        "games",
        "landscape",
        "lipschitz",
        "metrics",
        "nets",
        "operators",
        "problems",
        "secondorder",
        "sharpness",
        "testing",
        "train",
        "transport",
    ),
)
