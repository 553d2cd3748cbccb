"""One perturbation for all inputs: universal attacks by aggregated gradients.

A perturbation that is added to every input and changes as many predictions as it can.
Ascent along the signs of small batches' gradients loses what the noisy signs undo, and
large batches end in poor optima; stochastic gradient aggregation searches ahead with
small batches, throws the point it reaches away, and makes one step along the sign of
the mean of the gradients that it met. `aggregate_gradients` is that idea alone, for any
variable that all data share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core import Certificate
from ..core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_nonnegative,
    check_positive,
    check_shape,
)
from ..metrics import clopper_pearson
from ..train import epoch_batches

Logits = Callable[[Float[Array, "samples ..."]], Float[Array, "samples classes"]]
Method = Literal["sga", "spgd"]
Loss = Literal["cross_entropy", "logit"]


def aggregate_gradients(
    search: optax.GradientTransformation,
    steps: int,
    *,
    project: Callable[[PyTree[Array]], PyTree[Array]] = lambda params: params,
) -> optax.GradientTransformationExtraArgs:
    """Replaces a gradient by the mean of those that a search ahead meets.

    From the parameters, `search` makes some steps of its own, each along the gradient
    of another small batch; the point that it reaches is dropped. A step costs `steps`
    gradients; the one that is handed in is not used. Chain it before what makes the
    step, such as `optax.scale_by_sign`.

    Args:
        search: Optimiser of the search; it starts afresh every time.
        steps: Gradients a step, at least 1.
        project: Brings a point of the search back into the set that is allowed.

    Returns:
        An optax transformation whose `update` needs `params` and `grad_fn(params, j)`,
        the gradient of the search's j-th batch.

    Raises:
        ValueError: If `steps` is below 1, or `update` gets no parameters or `grad_fn`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from varan.lipschitz import aggregate_gradients
        >>> ahead = aggregate_gradients(optax.sgd(0.5), 2)
        >>> x, grad_fn = jnp.array(1.0), lambda x, j: 2 * x
        >>> mean, _ = ahead.update(None, ahead.init(x), x, grad_fn=grad_fn)
        >>> float(mean)  # of 2 at x = 1 and 0 at x = 0
        1.0

    Source: X. Liu, Y. Zhong, Y. Zhang, L. Qin and W. Deng, 2023, "Enhancing
        generalization of universal adversarial perturbation through gradient
        aggregation", arXiv:2308.06015, algorithm 1.
    """
    if steps < 1:
        raise ValueError(
            f"aggregate_gradients: `steps` must be at least 1 (got {steps})."
        )

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, **extra):
        del updates
        grad_fn = extra.get("grad_fn")
        if params is None or grad_fn is None:
            raise ValueError(
                "aggregate_gradients: `update` needs `params` and `grad_fn(params, j)` "
                "(got none). Pass both."
            )

        def one_step(carry, j):
            here, inner, total = carry
            slope = grad_fn(here, j)
            moves, inner = search.update(slope, inner, here)
            here = project(optax.apply_updates(here, moves))
            return (here, inner, jtu.tree_map(jnp.add, total, slope)), None

        zero = jtu.tree_map(jnp.zeros_like, params)
        start = (params, search.init(params), zero)
        (_, _, total), _ = jax.lax.scan(one_step, start, jnp.arange(steps))
        return jtu.tree_map(lambda leaf: leaf / steps, total), state

    return optax.GradientTransformationExtraArgs(init, update)


class UniversalPerturbation(eqx.Module):
    """A perturbation, and how many of the samples it was made from it fools.

    Args:
        delta: Added to every sample; no entry exceeds `epsilon` in size.
        losses: Mean loss of the samples after each epoch, without the cap; the attack
            raises it.
        certificate: Of the fooling rate on these samples; see `fooling_rate`.
        gradients: How many gradients of a single sample it took.
    """

    delta: Float[Array, ...]
    losses: Float[Array, " epochs"]
    certificate: Certificate
    gradients: int = eqx.field(static=True)


def universal_perturbation(
    logits_fn: Logits,
    x: Float[Array, "samples ..."],
    *,
    epsilon: float,
    key: PRNGKeyArray,
    method: Method = "sga",
    epochs: int = 20,
    batch_size: int = 250,
    minibatch_size: int = 10,
    passes: int = 4,
    stepsize: float | None = None,
    loss: Loss = "cross_entropy",
    cap: float = 9.0,
    momentum: float = 0.0,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    start: Float[Array, ...] | None = None,
) -> UniversalPerturbation:
    """Makes one perturbation that changes the predictions of as many samples as it can.

    Ascends the mean loss of the samples against their own clean predictions, step by
    step along the sign of a gradient: with `"spgd"` that of a batch, with `"sga"` the
    mean of those that a search through `passes batch_size / minibatch_size` small
    batches of the batch meets. An epoch costs one gradient a sample, or `passes`.

    Args:
        logits_fn: Logits of a batch; see `varan.metrics.bim`.
        x: The samples, inside `bounds`. Labels are not needed.
        epsilon: Largest size of an entry of the perturbation, positive, in the units
            of `x`.
        key: Randomness of the batches.
        method: `"sga"`, aggregated gradients, or `"spgd"`, stochastic projected
            gradients.
        epochs: Passes through the samples, at least 1.
        batch_size: Samples in a batch, at most all; what does not fill a last batch is
            left out of its epoch.
        minibatch_size: Samples in a batch of the search, at most `batch_size`.
        passes: How often the search goes through a batch, at least 1.
        stepsize: Positive; a tenth of `epsilon` if left out.
        loss: `"cross_entropy"`, a sample's at most `cap`, or `"logit"`, minus the
            logit of the clean prediction.
        cap: Beyond it a sample no longer counts, positive; may be infinite.
        momentum: Of the step's gradient, scaled to length 1 in the l1 norm; in [0, 1).
            The paper's variant has 0.9.
        bounds: Least and greatest value that an entry of a perturbed sample is cut to.
        start: Perturbation to begin with; none if left out.

    Returns:
        A `UniversalPerturbation`. Ask `fooling_rate` on other samples and classifiers.

    Raises:
        ValueError: On samples that are empty, not finite or outside `bounds`, an
            `epsilon` that is not positive, a minibatch larger than a batch or a batch
            larger than the data, counts below 1, numbers out of range, or logits that
            are not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import universal_perturbation
        >>> logits = lambda x: jnp.stack([x[:, 0], x[:, 1]], 1)
        >>> x = jnp.array([[0.6, 0.5], [0.7, 0.5], [0.9, 0.1]])
        >>> found = universal_perturbation(
        ...     logits, x, epsilon=0.2, key=jax.random.key(0), batch_size=3,
        ...     minibatch_size=1)
        >>> [round(float(v), 3) for v in found.delta], round(float(
        ...     found.certificate.value), 3)
        ([-0.2, 0.2], 0.667)

    Source: X. Liu, Y. Zhong, Y. Zhang, L. Qin and W. Deng, 2023, arXiv:2308.06015,
        algorithm 1; `"spgd"`: A. Shafahi, M. Najibi, Z. Xu, J. Dickerson, L. Davis and
        T. Goldstein, 2020, "Universal adversarial training", arXiv:1811.11304.

    Differences: Batches of 250 as in the authors' code (the paper has 100). Their
        Nesterov variant is not here.
    """
    owner = "universal_perturbation"
    check_choice(owner, "method", method, ("sga", "spgd"))
    check_choice(owner, "loss", loss, ("cross_entropy", "logit"))
    check_positive(owner, "epsilon", epsilon)
    check_nonnegative(owner, "momentum", momentum)
    stepsize = epsilon / 10 if stepsize is None else stepsize
    check_positive(owner, "stepsize", stepsize)
    if not cap > 0 or momentum >= 1:
        raise ValueError(
            f"{owner}: `cap` must be positive and `momentum` below 1 (got {cap} and "
            f"{momentum})."
        )
    bounds = (-math.inf, math.inf) if bounds is None else bounds
    _check_samples(owner, x, bounds)
    steps = _check_sizes(owner, len(x), epochs, batch_size, minibatch_size, passes)
    start = jnp.zeros_like(x[0]) if start is None else jnp.asarray(start, x.dtype)
    check_shape(owner, "start", start, x.shape[1:])
    check_finite(owner, "start", start)
    numbers = [
        jnp.asarray(v, x.dtype) for v in (epsilon, stepsize, cap, momentum, *bounds)
    ]
    sizes = (epochs, batch_size, minibatch_size, steps if method == "sga" else 0)
    delta, losses = _craft(logits_fn, x, start, numbers, key, sizes, loss)
    each = steps * minibatch_size if method == "sga" else batch_size
    return UniversalPerturbation(
        delta,
        losses,
        fooling_rate(logits_fn, x, delta, bounds=bounds),
        epochs * (len(x) // batch_size) * each,
    )


def fooling_rate(
    logits_fn: Logits,
    x: Float[Array, "samples ..."],
    delta: Float[Array, ...],
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    confidence: float = 0.95,
) -> Certificate:
    """The share of samples whose prediction a perturbation changes.

    Whether the prediction was right does not matter.

    Args:
        logits_fn: Logits of a batch.
        x: Samples, inside `bounds`.
        delta: Added to each, the shape of a sample.
        bounds: Least and greatest value that an entry is cut to.
        confidence: Of the interval, in (0, 1).

    Returns:
        A certificate: the share is a lower bound of what the worst perturbation of this
        size does to these samples. The details hold the Clopper-Pearson interval,
        `low` to `high`, of the rate over what the samples were drawn from, if `delta`
        was not made from them.

    Raises:
        ValueError: As `universal_perturbation`, or a `delta` of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import fooling_rate
        >>> logits = lambda x: jnp.concatenate([x, 1 - x], 1)
        >>> x = jnp.array([[0.4], [0.9], [0.6], [0.1]])
        >>> float(fooling_rate(logits, x, jnp.array([0.2])).value)
        0.25

    Source: S.-M. Moosavi-Dezfooli, A. Fawzi, O. Fawzi and P. Frossard, 2017,
        "Universal adversarial perturbations", arXiv:1610.08401.
    """
    owner = "fooling_rate"
    bounds = (-math.inf, math.inf) if bounds is None else bounds
    _check_samples(owner, x, bounds)
    check_shape(owner, "delta", delta, x.shape[1:])
    delta = jnp.asarray(delta, x.dtype)
    low, high = (jnp.asarray(v, x.dtype) for v in bounds)
    changed, finite = _changed(logits_fn, x, delta, low, high)
    if not bool(finite):
        raise ValueError(f"{owner}: logits must be finite. Check the classifier.")
    interval = clopper_pearson(int(changed), len(x), confidence=confidence)
    details: dict[str, Any] = {"low": interval.low, "high": interval.high}
    return Certificate(
        "fooling rate",
        changed.astype(x.dtype) / len(x),
        proof=True,
        statement="`delta` changes the prediction of this share of the samples; the "
        "worst perturbation of its size changes at least as many",
        details=details,
    )


@eqx.filter_jit
def _changed(logits_fn, x, delta, low, high):
    clean, fooled = logits_fn(x), logits_fn(jnp.clip(x + delta[None], low, high))
    changed = jnp.sum(jnp.argmax(clean, 1) != jnp.argmax(fooled, 1))
    return changed, jnp.all(jnp.isfinite(clean)) & jnp.all(jnp.isfinite(fooled))


@eqx.filter_jit
def _craft(logits_fn, x, start, numbers, key, sizes, loss):
    epsilon, stepsize, cap, momentum, low, high = numbers
    epochs, batch_size, minibatch_size, steps = sizes
    targets = jnp.argmax(logits_fn(x), 1)

    def project(delta):
        return jnp.clip(delta, -epsilon, epsilon)

    def losses_of(delta, chosen):
        logits = logits_fn(jnp.clip(x[chosen] + delta[None], low, high))
        if loss == "logit":
            own = jax.nn.one_hot(targets[chosen], logits.shape[1], dtype=bool)
            return -jnp.sum(jnp.where(own, logits, 0), 1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets[chosen])

    @jax.grad
    def descent(delta, chosen):
        losses = losses_of(delta, chosen)
        # Optimisers descend; the cap is one of cross-entropies.
        capped = losses if loss == "logit" else jnp.minimum(losses, cap)
        return -jnp.mean(capped)

    sign = optax.chain(optax.scale_by_sign(), optax.scale(-stepsize))
    step = optax.chain(_unit_l1(), optax.trace(momentum), sign)
    if steps:
        ahead = aggregate_gradients(sign, steps, project=project)
        step = optax.chain(ahead, step)
    step = optax.with_extra_args_support(step)

    def one_batch(carry, inputs):
        delta, state = carry
        chosen, key = inputs

        def grad_fn(delta, j):
            picked = jax.random.permutation(jax.random.fold_in(key, j), chosen)
            return descent(delta, picked[:minibatch_size])

        # The search needs no gradient of the whole batch.
        slope = jnp.zeros_like(delta) if steps else descent(delta, chosen)
        moves, state = step.update(slope, state, delta, grad_fn=grad_fn)
        return (project(delta + moves), state), None

    def one_epoch(carry, key):
        for_order, for_search = jax.random.split(key)
        order = epoch_batches(for_order, len(x), batch_size)
        keys = jax.random.split(for_search, len(order))
        carry, _ = jax.lax.scan(one_batch, carry, (order, keys))
        return carry, jnp.mean(losses_of(carry[0], jnp.arange(len(x))))

    start = project(start)
    carry = (start, step.init(start))
    (delta, _), losses = jax.lax.scan(one_epoch, carry, jax.random.split(key, epochs))
    return delta, losses


def _unit_l1() -> optax.GradientTransformation:
    """Scales updates to length 1 in the l1 norm, and leaves zero alone."""

    def scale(updates, params):
        del params
        total = jnp.sum(jnp.abs(updates))
        return updates / jnp.where(total > 0, total, 1)

    return optax.stateless(scale)


def _check_samples(owner, x, bounds) -> None:
    check_nonempty(owner, "x", x)
    check_finite(owner, "x", x)
    low, high = bounds
    entries = np.asarray(x)
    least, greatest = float(entries.min()), float(entries.max())
    if not low < high or least < low or greatest > high:
        raise ValueError(
            f"{owner}: `x` must lie in `bounds` {bounds} (got entries in "
            f"[{least:.4g}, {greatest:.4g}]). Scale it, or pass its own bounds."
        )


def _check_sizes(owner, samples, epochs, batch_size, minibatch_size, passes) -> int:
    if min(epochs, batch_size, minibatch_size, passes) < 1:
        raise ValueError(
            f"{owner}: `epochs`, `batch_size`, `minibatch_size`, `passes` must be at "
            f"least 1 (got {epochs}, {batch_size}, {minibatch_size}, {passes})."
        )
    if not minibatch_size <= batch_size <= samples:
        raise ValueError(
            f"{owner}: `minibatch_size` must not exceed `batch_size`, nor that the "
            f"number of samples (got {minibatch_size}, {batch_size}, {samples})."
        )
    return passes * batch_size // minibatch_size
