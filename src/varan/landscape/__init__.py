"""Theorems about training, as functions that can be run.

A theorem's prediction (an optimal value, an explicit solution, a spectrum, a curve)
is a plain function, and beside it stands what measures the prediction on data.

Neural collapse: `collapse_metrics` measures it on any features; `UnconstrainedFeatures`
is the model in which it is proved, plain or held near given features;
`global_optimum` is its closed form, `AlternatingRidge` a solver, `proximal_features`
the solution near given features; `central_path` follows its gradient flow;
`response_operator` says how the answer moves with the given features, and
`collapse_spectrum` what that operator's spectrum is near collapse.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._central_path import CentralPath as CentralPath
    from ._central_path import central_path as central_path
    from ._collapse_metrics import CollapseMetrics as CollapseMetrics
    from ._collapse_metrics import class_means as class_means
    from ._collapse_metrics import collapse_metrics as collapse_metrics
    from ._response import CollapseSpectrum as CollapseSpectrum
    from ._response import collapse_spectrum as collapse_spectrum
    from ._response import response_operator as response_operator
    from ._unconstrained_features import AlternatingRidge as AlternatingRidge
    from ._unconstrained_features import HeadAndFeatures as HeadAndFeatures
    from ._unconstrained_features import UnconstrainedFeatures as UnconstrainedFeatures
    from ._unconstrained_features import global_optimum as global_optimum
    from ._unconstrained_features import proximal_features as proximal_features

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "AlternatingRidge": "_unconstrained_features",
        "CentralPath": "_central_path",
        "CollapseMetrics": "_collapse_metrics",
        "CollapseSpectrum": "_response",
        "HeadAndFeatures": "_unconstrained_features",
        "UnconstrainedFeatures": "_unconstrained_features",
        "central_path": "_central_path",
        "class_means": "_collapse_metrics",
        "collapse_metrics": "_collapse_metrics",
        "collapse_spectrum": "_response",
        "global_optimum": "_unconstrained_features",
        "proximal_features": "_unconstrained_features",
        "response_operator": "_response",
    },
)
