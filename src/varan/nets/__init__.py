"""The few small networks that methods and claims share, as Equinox modules.

Only what Equinox does not bring: plain layers and perceptrons are `equinox.nn`'s.
Every network takes one sample; `jax.vmap` makes it a batch.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._conv import ConvClassifier as ConvClassifier
    from ._input_convex import InputConvex as InputConvex
    from ._mixed_cell import DiscreteCell as DiscreteCell
    from ._mixed_cell import MixedCell as MixedCell
    from ._mixed_cell import Zero as Zero
    from ._normalised import Conv1DNet as Conv1DNet
    from ._normalised import MLPNet as MLPNet
    from ._samformer import RevIN as RevIN
    from ._samformer import SAMformer as SAMformer
    from ._samformer import attention_entropy as attention_entropy
    from ._text import TanhCell as TanhCell
    from ._text import TextClassifier as TextClassifier

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "Conv1DNet": "_normalised",
        "ConvClassifier": "_conv",
        "DiscreteCell": "_mixed_cell",
        "InputConvex": "_input_convex",
        "MLPNet": "_normalised",
        "MixedCell": "_mixed_cell",
        "RevIN": "_samformer",
        "SAMformer": "_samformer",
        "TanhCell": "_text",
        "TextClassifier": "_text",
        "Zero": "_mixed_cell",
        "attention_entropy": "_samformer",
    },
)
