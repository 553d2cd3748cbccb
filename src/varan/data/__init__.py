"""Real data that libraries bundle, and what experiments do to it."""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._tabular import breast_cancer as breast_cancer
    from ._tabular import flip_labels as flip_labels
    from ._tabular import split as split
    from ._tabular import standardise as standardise

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "breast_cancer": "_tabular",
        "flip_labels": "_tabular",
        "split": "_tabular",
        "standardise": "_tabular",
    },
)
