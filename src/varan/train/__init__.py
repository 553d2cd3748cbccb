"""Training: the one loop that methods and claims share.

`start_training` makes a `TrainState`, `train_epochs` runs a chunk of epochs in one
compiled scan and returns the next state; calling it again continues. `fit` does so to
the end, with progress, checkpoints and resuming.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._checkpoint import load_checkpoint as load_checkpoint
    from ._checkpoint import save_checkpoint as save_checkpoint
    from ._fit import FitResult as FitResult
    from ._fit import fit as fit
    from ._loop import TrainState as TrainState
    from ._loop import epoch_batches as epoch_batches
    from ._loop import gradient_update as gradient_update
    from ._loop import start_training as start_training
    from ._loop import train_epochs as train_epochs
    from ._progress import TrainingProgress as TrainingProgress

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "FitResult": "_fit",
        "TrainState": "_loop",
        "TrainingProgress": "_progress",
        "epoch_batches": "_loop",
        "fit": "_fit",
        "gradient_update": "_loop",
        "load_checkpoint": "_checkpoint",
        "save_checkpoint": "_checkpoint",
        "start_training": "_loop",
        "train_epochs": "_loop",
    },
)
