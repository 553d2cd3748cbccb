"""Training: the one loop that methods and claims share.

`start_training` makes a `TrainState`, `train_epochs` runs a chunk of epochs in one
compiled scan and returns the next state; calling it again continues.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._loop import TrainState as TrainState
    from ._loop import epoch_batches as epoch_batches
    from ._loop import start_training as start_training
    from ._loop import train_epochs as train_epochs

__getattr__, __dir__, __all__ = _attach(
    __name__,
    dict.fromkeys(
        ("TrainState", "epoch_batches", "start_training", "train_epochs"), "_loop"
    ),
)
