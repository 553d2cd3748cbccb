"""The arms of the comparison, one entry each; `_benchmark.py` says what an arm is."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from optax.contrib import normalize
from optax.contrib import sam as optax_sam

from varan.sharpness import asam, sam

from ._benchmark import Arm, momentum_sgd

# Radii of the specification.
RADII = (0.05, 0.1, 0.3, 0.5, 0.8)


def _smoothed(logits, labels, smoothing):
    targets = optax.smooth_labels(
        jnp.eye(logits.shape[1], dtype=logits.dtype)[labels], smoothing
    )
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def _adamw(schedule, weight_decay):
    # A hundredth: the grid of learning rates is then 3e-4, 1e-3 and 3e-3.
    return optax.adamw(lambda step: schedule(step) / 100, weight_decay=weight_decay)


def _optax_sam(schedule, rho):
    return optax_sam(
        momentum_sgd(schedule),
        optax.chain(normalize(), optax.sgd(rho)),
        opaque_mode=True,
    )


_ARMS = (
    # Baselines.
    Arm("sgd", lambda schedule, _: momentum_sgd(schedule), 1, (0.0,), 0.0),
    Arm("sgd-decay", momentum_sgd, 1, (1e-4, 5e-4, 2e-3, 5e-3, 1e-2)),
    Arm(
        "sgd-early",  # its parameter is the share of the budget
        lambda schedule, _: momentum_sgd(schedule),
        1,
        (0.025, 0.05, 0.1, 0.2, 0.5),
        share=float,
    ),
    Arm(
        "sgd-smoothing",
        lambda schedule, _: momentum_sgd(schedule),
        1,
        (0.05, 0.1, 0.2, 0.4, 0.6),
        0.1,
        loss=_smoothed,
    ),
    Arm("adamw", _adamw, 1, (1e-4, 1e-3, 1e-2, 1e-1, 1.0), 1e-2),
    # Row 089.
    Arm("sam", lambda s, rho: sam(momentum_sgd(s), rho), 2, RADII, 0.05),
    Arm("optax-sam", _optax_sam, 2, RADII, 0.05),
    Arm("asam", lambda s, rho: asam(momentum_sgd(s), rho), 2, (0.5, 1, 2, 4, 8), 0.5),
)
ARMS = {arm.name: arm for arm in _ARMS}
