"""Optimisers that look around the weights, and measures of how flat it is there.

`perturbed` turns a rule (where else to take gradients, and what to make of them) into
an optax transformation around any base optimiser; `sam` and its relatives are such.
The measures say how sharp a minimum is, each with its kind of proof and a witness.
"""

from typing import TYPE_CHECKING

from .._lazy import attach as _attach

if TYPE_CHECKING:
    from ._engine import Call as Call
    from ._engine import Diagnostics as Diagnostics
    from ._engine import PerturbedState as PerturbedState
    from ._engine import Rule as Rule
    from ._engine import grad_fn_from as grad_fn_from
    from ._engine import perturbed as perturbed
    from ._sam import asam as asam
    from ._sam import sam as sam
    from ._sam import usam as usam

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "Call": "_engine",
        "Diagnostics": "_engine",
        "PerturbedState": "_engine",
        "Rule": "_engine",
        "asam": "_sam",
        "grad_fn_from": "_engine",
        "perturbed": "_engine",
        "sam": "_sam",
        "usam": "_sam",
    },
)
