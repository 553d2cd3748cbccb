"""How far classifiers can be fooled: an attack, and how its examples transfer.

An attack bounds a classifier's robust accuracy from above, as `varan.lipschitz` bounds
it from below. It is a measurement and knows no training, so it stands among the
metrics, where every topic can use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..core._checks import check_finite, check_nonempty, check_nonnegative, is_traced

Logits = Callable[[Float[Array, "samples ..."]], Float[Array, "samples classes"]]
_Z = 1.959964  # of the two-sided 95 % interval


def bim(
    logits_fn: Logits,
    x: Float[Array, "samples ..."],
    labels: Int[Array, " samples"],
    eps: float | Float[Array, ...],
    *,
    steps: int = 50,
    stepsize: float | Float[Array, ...] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Float[Array, "samples ..."]:
    """The basic iterative method (I-FGSM): adversarial examples in an l-infinity ball.

    Steps along the sign of the loss's gradient in the input, clipped back into the
    ball. A step costs one gradient of the batch. Samples do not affect each other.

    Args:
        logits_fn: Logits of a batch. `eqx.filter_vmap(model)` makes it from a model of
            one sample, and new weights do not compile anew.
        x: The samples.
        labels: 0 .. classes - 1.
        eps: Radius, not negative, in the units of `x`; an array gives every entry its
            own (standardised inputs).
        steps: At least 1.
        stepsize: Positive; a tenth of `eps` if left out.
        bounds: Least and greatest value of an entry, if there are any.

    Returns:
        Samples that are nowhere farther than `eps` from `x`.

    Raises:
        ValueError: On a negative or non-finite `eps`, a stepsize that is not positive,
            fewer than one step, reversed bounds, or empty or non-finite samples.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.metrics import bim
        >>> logits = lambda x: jnp.stack([x[:, 0] - x[:, 1], x[:, 1]], 1)
        >>> bim(logits, jnp.array([[1.0, 0.0]]), jnp.array([0]), 0.5).tolist()
        [[0.5, 0.5]]

    Source: A. Kurakin, I. Goodfellow and S. Bengio, 2017, "Adversarial examples in the
        physical world", arXiv:1607.02533.
    """
    check_nonempty("bim", "x", x)
    check_finite("bim", "x", x)
    check_nonnegative("bim", "eps", eps)
    if steps < 1:
        raise ValueError(f"bim: `steps` must be at least 1 (got {steps}).")
    if stepsize is None:
        stepsize = jnp.asarray(eps) / 10
    elif not is_traced(stepsize) and not bool(jnp.all(jnp.asarray(stepsize) > 0)):
        raise ValueError(f"bim: `stepsize` must be positive (got {stepsize}).")
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    if not low <= high:
        raise ValueError(f"bim: `bounds` must be (least, greatest) (got {bounds}).")
    numbers = [jnp.asarray(v, x.dtype) for v in (eps, stepsize, low, high)]
    return _attack(logits_fn, x, labels, *numbers, jnp.asarray(steps, jnp.int32))


@eqx.filter_jit
def _attack(logits_fn, x, labels, eps, stepsize, low, high, steps):
    def loss(x):
        logits = logits_fn(x)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    eps, stepsize = (jnp.broadcast_to(v, x.shape) for v in (eps, stepsize))

    def one(_, here):
        moved = here + stepsize * jnp.sign(jax.grad(loss)(here))
        return jnp.clip(jnp.clip(moved, x - eps, x + eps), low, high)

    return jax.lax.fori_loop(0, steps, one, x)


class Transfer(NamedTuple):
    """How many of a surrogate's adversarial examples fool each target.

    Args:
        rates: Share of the samples that the target classifies correctly without the
            attack and wrongly with it; NaN where it gets none right or has a logit
            that is NaN.
        low, high: Wilson's 95 % interval of each rate.
        counts: Samples that each target classifies correctly.
    """

    rates: Float[Array, "surrogates targets"]
    low: Float[Array, "surrogates targets"]
    high: Float[Array, "surrogates targets"]
    counts: Int[Array, " targets"]


def transfer_matrix(
    surrogates: Sequence[Logits],
    targets: Sequence[Logits],
    x: Float[Array, "samples ..."],
    labels: Int[Array, " samples"],
    eps: float | Float[Array, ...],
    *,
    steps: int = 50,
    stepsize: float | Float[Array, ...] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Transfer:
    """Success of the adversarial examples of some classifiers on others.

    Examples are made by `bim` on each surrogate and shown to each target. A surrogate
    that is among the targets gives its white-box rate there.

    Args:
        surrogates, targets: Logits of a batch each; see `bim`.
        x: The samples.
        labels: 0 .. classes - 1.
        eps, steps, stepsize, bounds: As in `bim`.

    Returns:
        A `Transfer`.

    Raises:
        ValueError: If there are no surrogates or targets, if they differ in their
            classes, or as `bim`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.metrics import transfer_matrix
        >>> one = lambda x: jnp.stack([x[:, 0], -x[:, 0]], 1)
        >>> x, y = jnp.array([[0.2, 5.0], [1.0, 5.0]]), jnp.array([0, 0])
        >>> found = transfer_matrix([one], [one, lambda x: one(x[:, ::-1])], x, y, 0.5)
        >>> found.rates.tolist()
        [[0.5, 0.0]]

    Source: interval: E. B. Wilson, 1927, "Probable inference, the law of succession,
        and statistical inference", Journal of the American Statistical Association 22.
    """
    if not surrogates or not targets:
        raise ValueError(
            "transfer_matrix: `surrogates` and `targets` must not be empty (got "
            f"{len(surrogates)} and {len(targets)})."
        )
    classes = {jax.eval_shape(f, x).shape[1] for f in (*surrogates, *targets)}
    if len(classes) > 1:
        raise ValueError(
            "transfer_matrix: surrogates and targets must have the same classes (got "
            f"{sorted(classes)} of them)."
        )
    right = jnp.stack([_right(target, x, labels) for target in targets])
    counts = jnp.sum(right, 1)
    rows = []
    for surrogate in surrogates:
        there = bim(
            surrogate, x, labels, eps, steps=steps, stepsize=stepsize, bounds=bounds
        )
        still = jnp.stack([_right(target, there, labels) for target in targets])
        rows.append(jnp.sum(right * (1 - still), 1))
    shares = _wilson(jnp.stack(rows), counts[None])
    return Transfer(*shares, jnp.nansum(right, 1).astype(jnp.int32))


@eqx.filter_jit
def _right(logits_fn, x, labels):
    """One or zero; NaN where a logit is, so that no rate hides it."""
    logits = logits_fn(x)
    right = (jnp.argmax(logits, 1) == labels).astype(logits.dtype)
    return jnp.where(jnp.any(jnp.isnan(logits), 1), jnp.nan, right)


def _wilson(fooled, n):
    rate = fooled / n
    middle = (rate + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    spread = jnp.sqrt(rate * (1 - rate) / n + _Z**2 / (4 * n**2))
    half = _Z * spread / (1 + _Z**2 / n)
    return rate, middle - half, middle + half
