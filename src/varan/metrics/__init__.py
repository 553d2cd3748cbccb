"""Metrics: how good predictions are, and how far two samples are from each other.

All are plain functions of arrays, compile, and work under `vmap`.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._classification import accuracy as accuracy
    from ._classification import (
        expected_calibration_error as expected_calibration_error,
    )
    from ._classification import negative_log_likelihood as negative_log_likelihood
    from ._classification import roc_auc as roc_auc
    from ._samples import mmd as mmd
    from ._samples import sliced_wasserstein as sliced_wasserstein

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "accuracy": "_classification",
        "expected_calibration_error": "_classification",
        "mmd": "_samples",
        "negative_log_likelihood": "_classification",
        "roc_auc": "_classification",
        "sliced_wasserstein": "_samples",
    },
)
