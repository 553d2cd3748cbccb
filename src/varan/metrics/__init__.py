"""Metrics: how good predictions are, how easily fooled, how far samples are apart.

All are plain functions of arrays that work under `jit` and `vmap`; the exact interval
of counts, `clopper_pearson`, is computed on the host.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._attacks import Transfer as Transfer
    from ._attacks import bim as bim
    from ._attacks import fgsm as fgsm
    from ._attacks import pgd as pgd
    from ._attacks import transfer_matrix as transfer_matrix
    from ._carlini_wagner import MinimalPerturbation as MinimalPerturbation
    from ._carlini_wagner import carlini_wagner as carlini_wagner
    from ._classification import accuracy as accuracy
    from ._classification import (
        expected_calibration_error as expected_calibration_error,
    )
    from ._classification import negative_log_likelihood as negative_log_likelihood
    from ._classification import roc_auc as roc_auc
    from ._intervals import Interval as Interval
    from ._intervals import clopper_pearson as clopper_pearson
    from ._intervals import empirical_bernstein as empirical_bernstein
    from ._intervals import hoeffding as hoeffding
    from ._intervals import wilson as wilson
    from ._samples import mmd as mmd
    from ._samples import sliced_wasserstein as sliced_wasserstein

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "Interval": "_intervals",
        "MinimalPerturbation": "_carlini_wagner",
        "Transfer": "_attacks",
        "accuracy": "_classification",
        "bim": "_attacks",
        "carlini_wagner": "_carlini_wagner",
        "clopper_pearson": "_intervals",
        "empirical_bernstein": "_intervals",
        "expected_calibration_error": "_classification",
        "fgsm": "_attacks",
        "hoeffding": "_intervals",
        "mmd": "_samples",
        "negative_log_likelihood": "_classification",
        "pgd": "_attacks",
        "roc_auc": "_classification",
        "sliced_wasserstein": "_samples",
        "transfer_matrix": "_attacks",
        "wilson": "_intervals",
    },
)
