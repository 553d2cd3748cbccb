"""The arms of the comparison, one entry each; `_benchmark.py` says what an arm is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from optax.contrib import normalize
from optax.contrib import sam as optax_sam

from varan.sharpness import (
    Rule,
    amp,
    asam,
    complement,
    elementwise_scale,
    fad,
    gam,
    gr,
    norm_params,
    perturbed,
    random_mask_like,
    sam,
)

from ._benchmark import Arm, momentum_sgd

# Radii of the specification, and strengths of gradient regularisation.
RADII = (0.05, 0.1, 0.3, 0.5, 0.8)
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)


def _smoothed(logits, labels, smoothing):
    targets = optax.smooth_labels(
        jnp.eye(logits.shape[1], dtype=logits.dtype)[labels], smoothing
    )
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def _adamw(schedule, weight_decay):
    # A hundredth: the grid of learning rates is then 3e-4, 1e-3 and 3e-3.
    return optax.adamw(lambda step: schedule(step) / 100, weight_decay=weight_decay)


def _adam(schedule, weight_decay):
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.adam(lambda step: schedule(step) / 100),
    )


def _optax_sam(schedule, rho):
    return optax_sam(
        momentum_sgd(schedule),
        optax.chain(normalize(), optax.sgd(rho)),
        opaque_mode=True,
    )


def _sam_on(schedule, rho):
    return sam(momentum_sgd(schedule), rho, mask=norm_params)


def _sam_no_norm(schedule, rho):
    return sam(momentum_sgd(schedule), rho, mask=complement(norm_params))


def _asam_on(schedule, rho):
    base = momentum_sgd(schedule)
    return sam(base, rho, adaptive=elementwise_scale, mask=norm_params)


def _sam_random(schedule, rho):
    """SAM on as many random parameters as the norms have: a mask for each start."""

    def drawn(params):
        bits = jax.lax.bitcast_convert_type(jtu.tree_leaves(params)[0], jnp.uint32)
        return random_mask_like(
            norm_params, params, key=jax.random.key(bits.ravel()[0])
        )

    def direction(g0, params, mask, grad_fn, call):
        kept = jtu.tree_map(lambda m, g: jnp.where(m, g, 0), mask, g0)
        length = jnp.maximum(optax.tree.norm(kept), 1e-12)
        e = jtu.tree_map(lambda g: rho * g / length, kept)
        return grad_fn(jtu.tree_map(jnp.add, params, e)), mask, e

    return perturbed(momentum_sgd(schedule), Rule(direction, drawn))


def _gr(scheme):
    # The paper's "relatively large" ascent, the same for both differences.
    return lambda schedule, gamma: gr(momentum_sgd(schedule), gamma, 0.1, scheme=scheme)


def _gam(schedule, rho):
    # Of a gradient's length, so that the learning rates mean the same.
    return gam(momentum_sgd(schedule), rho, normalize_scale=True)


def _sam_gam(schedule, rho):
    return gam(momentum_sgd(schedule), sam_rho=rho, normalize_scale=True)


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
    # Row 116.
    Arm("gr-forward", _gr("forward"), 2, STRENGTHS, 0.1),
    Arm("gr-backward", _gr("backward"), 2, STRENGTHS, 0.1),
    Arm("gr-exact", _gr("exact"), 3, STRENGTHS, 0.1),
    # Row 250: a ball for each tensor, as in the released code.
    Arm(
        "amp",
        lambda s, eps: amp(momentum_sgd(s), eps, ball="leaf"),
        2,
        (0.03, 0.1, 0.3, 0.5, 1.0),
        0.5,
    ),
    # Row 075.
    Arm("gam", _gam, 4, (0.05, 0.1, 0.2, 0.5, 1.0), 0.2),
    Arm("sam-gam", _sam_gam, 4, RADII, 0.05),
    # Row 169; Adam's parameter is the weight decay, as in DomainBed.
    Arm("adam", _adam, 1, (0.0, 1e-5, 1e-4, 1e-3, 1e-2), 0.0),
    Arm(
        "fad",
        lambda s, rho: fad(momentum_sgd(s), rho),
        4,
        (0.05, 0.1, 0.2, 0.5, 1.0),
        0.05,
    ),
    # Row 123.
    Arm("sam-on", _sam_on, 2, (0.5, 1, 2, 4, 8), 0.5),
    Arm("sam-no-norm", _sam_no_norm, 2, RADII, 0.05),
    Arm("sam-random", _sam_random, 2, (0.5, 1, 2, 4, 8), 0.5),
    Arm("asam-on", _asam_on, 2, (0.5, 1, 2, 4, 8), 10.0),
)
ARMS = {arm.name: arm for arm in _ARMS}
