"""How far classifiers can be fooled: attacks, and how their examples transfer.

An attack bounds a classifier's robust accuracy from above, as `varan.lipschitz` bounds
it from below. It is a measurement and knows no training, so it stands among the
metrics, where every topic can use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_nonnegative,
    is_traced,
)
from ._intervals import wilson

Logits = Callable[[Float[Array, "samples ..."]], Float[Array, "samples classes"]]


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
    if stepsize is None:
        stepsize = jnp.asarray(eps) / 10
    numbers = _check_attack("bim", x, eps, steps, stepsize, bounds)
    return _attack(logits_fn, x, x, labels, *numbers, "linf")


def fgsm(
    logits_fn: Logits,
    x: Float[Array, "samples ..."],
    labels: Int[Array, " samples"],
    eps: float | Float[Array, ...],
    *,
    bounds: tuple[float, float] | None = None,
) -> Float[Array, "samples ..."]:
    """The fast gradient sign method: one step to the boundary of the l-infinity ball.

    Args:
        logits_fn: Logits of a batch; see `bim`.
        x: The samples.
        labels: 0 .. classes - 1.
        eps: Radius, positive, in the units of `x`; an array gives every entry its own.
        bounds: Least and greatest value of an entry, if there are any.

    Returns:
        Samples that are nowhere farther than `eps` from `x`.

    Raises:
        ValueError: As `bim`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.metrics import fgsm
        >>> logits = lambda x: jnp.stack([x[:, 0], -x[:, 0]], 1)
        >>> fgsm(logits, jnp.array([[1.0]]), jnp.array([0]), 0.25).tolist()
        [[0.75]]

    Source: I. Goodfellow, J. Shlens and C. Szegedy, 2015, "Explaining and harnessing
        adversarial examples", arXiv:1412.6572.
    """
    numbers = _check_attack("fgsm", x, eps, 1, eps, bounds)
    return _attack(logits_fn, x, x, labels, *numbers, "linf")


def pgd(
    logits_fn: Logits,
    x: Float[Array, "samples ..."],
    labels: Int[Array, " samples"],
    eps: float,
    *,
    norm: Literal["linf", "l2"] = "linf",
    steps: int = 50,
    stepsize: float | None = None,
    bounds: tuple[float, float] | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "samples ..."]:
    """Projected gradient ascent on the loss in a ball around each sample.

    Every step goes along the steepest ascent of its norm (the sign of the gradient,
    or the gradient over its length) and is projected on the ball, then cut to
    `bounds`, which keeps it in the ball. A step costs one gradient of the batch.
    Samples do not affect each other.

    Args:
        logits_fn: Logits of a batch; see `bim`.
        x: The samples.
        labels: 0 .. classes - 1.
        eps: Radius, not negative, in the units of `x`.
        norm: `"linf"` or `"l2"` (of a whole sample).
        steps: At least 1.
        stepsize: Positive; `2.5 eps / steps` if left out.
        bounds: Least and greatest value of an entry, if there are any.
        key: Starts at a random point of the ball, uniform in a cube or on a sphere
            scaled by a uniform radius; at `x` if left out.

    Returns:
        Samples within `eps` of `x` (up to rounding).

    Raises:
        ValueError: As `bim`, or an unknown norm.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.metrics import pgd
        >>> logits = lambda x: jnp.stack([3 * x[:, 0] + 4 * x[:, 1], 0 * x[:, 0]], 1)
        >>> found = pgd(logits, jnp.array([[1.0, 0.0]]), jnp.array([0]), 1.0, norm="l2")
        >>> [round(float(v), 3) for v in found[0]]
        [0.4, -0.8]

    Source: A. Madry, A. Makelov, L. Schmidt, D. Tsipras and A. Vladu, 2018, "Towards
        deep learning models resistant to adversarial attacks", arXiv:1706.06083.
    """
    check_choice("pgd", "norm", norm, ("linf", "l2"))
    if stepsize is None:
        stepsize = 2.5 * jnp.asarray(eps) / max(steps, 1)
    numbers = _check_attack("pgd", x, eps, steps, stepsize, bounds)
    start = x if key is None else x + _inside(key, x, numbers[0], norm)
    return _attack(logits_fn, start, x, labels, *numbers, norm)


def _check_attack(owner, x, eps, steps, stepsize, bounds):
    """What every attack asks of its input, and its numbers in the dtype of `x`."""
    check_nonempty(owner, "x", x)
    check_finite(owner, "x", x)
    check_nonnegative(owner, "eps", eps)
    if steps < 1:
        raise ValueError(f"{owner}: `steps` must be at least 1 (got {steps}).")
    # A ball of radius zero has nowhere to step: its stepsize may be zero.
    if not (is_traced(stepsize) or is_traced(eps)):
        bad = (jnp.asarray(stepsize) <= 0) & (jnp.asarray(eps) > 0)
        if bool(jnp.any(bad | jnp.isnan(jnp.asarray(stepsize)))):
            raise ValueError(f"{owner}: `stepsize` must be positive (got {stepsize}).")
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    if not low <= high:
        raise ValueError(f"{owner}: `bounds` must be (least, greatest) (got {bounds}).")
    numbers = [jnp.asarray(v, x.dtype) for v in (eps, stepsize, low, high)]
    return *numbers, jnp.asarray(steps, jnp.int32)


@eqx.filter_jit
def _attack(logits_fn, start, x, labels, eps, stepsize, low, high, steps, norm):
    def loss(x):
        logits = logits_fn(x)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    eps, stepsize = (jnp.broadcast_to(v, x.shape) for v in (eps, stepsize))

    def one(_, here):
        slope = jax.grad(loss)(here)
        if norm == "linf":
            moved = here + stepsize * jnp.sign(slope)
            moved = jnp.clip(moved, x - eps, x + eps)
        else:
            step = here + stepsize * slope / _lengths(slope) - x
            moved = x + step * jnp.minimum(1, eps / _lengths(step))
        return jnp.clip(moved, low, high)

    return jax.lax.fori_loop(0, steps, one, start)


def _lengths(rows):
    """The l2 norm of every sample, in its shape; never zero."""
    squares = jnp.sum(rows**2, tuple(range(1, rows.ndim)), keepdims=True)
    tiny = jnp.asarray(jnp.finfo(rows.dtype).tiny, rows.dtype)
    return jnp.broadcast_to(jnp.sqrt(jnp.maximum(squares, tiny)), rows.shape)


def _inside(key, x, eps, norm):
    direction, radius = jax.random.split(key)
    if norm == "linf":
        return jax.random.uniform(direction, x.shape, x.dtype, -1, 1) * eps
    toward = jax.random.normal(direction, x.shape, x.dtype)
    share = jax.random.uniform(radius, x.shape[:1] + (1,) * (x.ndim - 1), x.dtype)
    return eps * share * toward / _lengths(toward)


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
    fooled = jnp.stack(rows)
    found = (fooled / counts[None], *wilson(fooled, counts[None]))
    return Transfer(*found, jnp.nansum(right, 1).astype(jnp.int32))


@eqx.filter_jit
def _right(logits_fn, x, labels):
    """One or zero; NaN where a logit is, so that no rate hides it."""
    logits = logits_fn(x)
    right = (jnp.argmax(logits, 1) == labels).astype(logits.dtype)
    return jnp.where(jnp.any(jnp.isnan(logits), 1), jnp.nan, right)
