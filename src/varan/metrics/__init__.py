"""Metrics: how good predictions are, how easily fooled, how far samples are apart.

All are plain functions of arrays, compile, and work under `vmap`.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._attacks import Transfer as Transfer
    from ._attacks import bim as bim
    from ._attacks import transfer_matrix as transfer_matrix
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
        "Transfer": "_attacks",
        "accuracy": "_classification",
        "bim": "_attacks",
        "expected_calibration_error": "_classification",
        "mmd": "_samples",
        "negative_log_likelihood": "_classification",
        "roc_auc": "_classification",
        "sliced_wasserstein": "_samples",
        "transfer_matrix": "_attacks",
    },
)
