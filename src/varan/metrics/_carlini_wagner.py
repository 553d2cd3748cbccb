"""The smallest l2 perturbation that changes a class, by Carlini and Wagner's attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core._checks import (
    check_finite,
    check_nonempty,
    check_positive,
    check_shape,
    is_traced,
)

Logits = Callable[[Float[Array, "samples ..."]], Float[Array, "samples classes"]]
# Inside the open interval (-1, 1), where artanh is finite.
_INSIDE = 1 - 1e-6


class MinimalPerturbation(NamedTuple):
    """The nearest misclassified points that were found.

    Args:
        x: One for each sample; the sample itself where it is misclassified already or
            where nothing was found.
        distance: Their l2 distances from the samples: 0 where misclassified already,
            infinite where nothing was found. Never below the smallest one that exists.
    """

    x: Float[Array, "samples ..."]
    distance: Float[Array, " samples"]


class _Search(NamedTuple):
    constant: Array
    low: Array
    high: Array
    x: Array
    distance: Array


def carlini_wagner(
    logits_fn: Logits,
    x: Float[Array, "samples ..."],
    labels: Int[Array, " samples"],
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    steps: int = 1000,
    searches: int = 9,
    stepsize: float = 0.01,
    constant: float = 1e-3,
) -> MinimalPerturbation:
    """Carlini and Wagner's l2 attack: the nearest misclassified point, one a sample.

    Minimises `|x' - x|^2 + c max(z_label - max_other z, 0)` by Adam in the variable
    `artanh` of `x'`, which keeps it in `bounds`; `c` is sought for every sample by
    itself: tenfold until something is found, then by bisection. Costs
    `steps * searches` gradients of the batch. Samples do not affect each other. What
    is found lies beyond the nearest boundary by up to about a step of Adam, `stepsize`
    times half the width of `bounds` in every entry.

    Args:
        logits_fn: Logits of a batch; see `bim`.
        x: The samples, inside `bounds`.
        labels: 0 .. classes - 1.
        bounds: Least and greatest value of an entry.
        steps: Of Adam for each `c`, at least 1.
        searches: Values of `c` that are tried, at least 1.
        stepsize: Of Adam, positive.
        constant: The first `c`, positive.

    Returns:
        A `MinimalPerturbation`. An attack bounds the smallest perturbation from above:
        an estimate, whose distances are those of points that are misclassified.

    Raises:
        ValueError: On empty or non-finite samples, samples outside `bounds`, a shape
            that does not fit, or a number that is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.metrics import carlini_wagner
        >>> logits = lambda x: jnp.stack([3 * x[:, 0] - 1, 1 - 4 * x[:, 1]], 1)
        >>> found = carlini_wagner(logits, jnp.array([[0.6, 0.5]]), jnp.array([0]))
        >>> round(float(found.distance[0]), 2)  # (3 x + 4 y - 2) / 5
        0.36

    Source: N. Carlini and D. Wagner, 2017, "Towards evaluating the robustness of neural
        networks", arXiv:1608.04644, section VI.A.

    Differences: Confidence 0, and no stop before the last step.
    """
    owner = "carlini_wagner"
    check_nonempty(owner, "x", x)
    check_finite(owner, "x", x)
    check_shape(owner, "labels", labels, (x.shape[0],))
    for name, number in (("stepsize", stepsize), ("constant", constant)):
        check_positive(owner, name, number)
    if steps < 1 or searches < 1:
        raise ValueError(
            f"{owner}: `steps` and `searches` must be at least 1 (got {steps} and "
            f"{searches})."
        )
    _check_bounds(owner, x, bounds)
    numbers = [jnp.asarray(v, x.dtype) for v in (*bounds, stepsize, constant)]
    counts = [jnp.asarray(v, jnp.int32) for v in (steps, searches)]
    return _attack(logits_fn, x, labels, *numbers, *counts)


@eqx.filter_jit
def _attack(logits_fn, x, labels, low, high, stepsize, constant, steps, searches):
    middle, half = (low + high) / 2, (high - low) / 2
    start = jnp.arctanh(jnp.clip((x - middle) / half, -_INSIDE, _INSIDE))
    axes = tuple(range(1, x.ndim))

    def leads(x):
        logits = logits_fn(x)
        own = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
        mine = jnp.sum(jnp.where(own, logits, 0), 1)
        return mine - jnp.max(jnp.where(own, -jnp.inf, logits), 1)

    def distance(there):
        return jnp.sqrt(jnp.sum((there - x) ** 2, axes))

    def loss(w, constant):
        there = middle + half * jnp.tanh(w)
        lead = leads(there)
        cost = jnp.sum((there - x) ** 2) + jnp.sum(constant * jnp.maximum(lead, 0))
        return cost, (there, lead)

    def one_search(_, search):
        def one_step(step, carry):
            w, moments, best, nearest, found = carry
            slope, (there, lead) = jax.grad(loss, has_aux=True)(w, search.constant)
            far = jnp.where(lead < 0, distance(there), jnp.inf)
            best = jnp.where(_beside(far < nearest, x), there, best)
            move, moments = _adam(slope, moments, step)
            w = w - stepsize * move
            return w, moments, best, jnp.minimum(far, nearest), found | (lead < 0)

        moments = (jnp.zeros_like(x), jnp.zeros_like(x))
        carry = (start, moments, search.x, search.distance, lead0 < 0)
        *_, best, nearest, found = jax.lax.fori_loop(0, steps, one_step, carry)
        low = jnp.where(found, search.low, search.constant)
        high = jnp.where(found, search.constant, search.high)
        between = jnp.where(jnp.isinf(high), 10 * search.constant, (low + high) / 2)
        return _Search(between, low, high, best, nearest)

    lead0 = leads(x)
    zero = jnp.zeros_like(lead0)
    nearest = jnp.where(lead0 < 0, 0, jnp.inf).astype(x.dtype)
    search = _Search(zero + constant, zero, zero + jnp.inf, x, nearest)
    search = jax.lax.fori_loop(0, searches, one_search, search)
    # What is no number is neither misclassified nor safe.
    known = jnp.isfinite(lead0)
    return MinimalPerturbation(search.x, jnp.where(known, search.distance, jnp.nan))


def _adam(slope, moments, step):
    # By hand: optax's mixes dtypes, which strict promotion refuses.
    mean, square = moments
    mean = 0.9 * mean + 0.1 * slope
    square = 0.999 * square + 0.001 * slope**2
    power = (step + 1).astype(slope.dtype)
    size = jnp.sqrt(square / (1 - 0.999**power)) + 1e-8
    return mean / (1 - 0.9**power) / size, (mean, square)


def _beside(flags, x):
    return flags.reshape(-1, *[1] * (x.ndim - 1))


def _check_bounds(owner, x, bounds):
    low, high = bounds
    if not low < high:
        raise ValueError(f"{owner}: `bounds` must be (least, greatest) (got {bounds}).")
    if is_traced(x):
        return
    entries = np.asarray(x)
    least, greatest = float(entries.min()), float(entries.max())
    if least < low or greatest > high:
        raise ValueError(
            f"{owner}: `x` must lie in `bounds` {bounds} (got entries in "
            f"[{least:.4g}, {greatest:.4g}]). Scale it, or pass its own bounds."
        )
