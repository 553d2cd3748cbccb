"""How sharp a minimum is: worst and average rise of the loss, and of its slope.

All measures are functions of `(loss_fn, params, batch)`, matrix-free, and say what
kind of number they return. A maximum over a ball that was climbed is a proved lower
bound of the true maximum, since its witness attains it; whether the true maximum is
much larger no ascent can say. Averages are estimates with an interval.

Maxima over the same ball are nested: by the mean value theorem the worst rise of the
loss is at most the first-order flatness. For a quadratic at its minimum they are
`rho^2 lambda_max / 2` and `rho^2 lambda_max`.
"""

from __future__ import annotations

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..core._checks import check_choice, check_positive
from ._ascent import ascend, random_start
from ._hessian import LossFn, hessian_top
from ._objective import (
    LogitLoss,
    MeasureResult,
    check_counts,
    checked,
    objective,
    refuse_undefined,
    t_half_width,
)

# Units of rounding of the loss that no rise is made of.
_ROUNDING = 4


def sharpness(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    rho: Float[Array, ""] | float,
    p: float = 2,
    adaptive: bool = False,
    which: Literal["max", "avg"] = "max",
    microbatch: int | None = None,
    normalize_logits: Float[Array, ""] | float | None = None,
    steps: int = 20,
    restarts: int = 1,
    mask: PyTree | None = None,
    key: PRNGKeyArray,
) -> MeasureResult:
    """Worst or average rise of the loss in a ball around the weights.

    With `d = c * z`, elementwise `c = |w|` if adaptive, else 1: the worst case is the
    maximum of `L(w + d) - L(w)` over `||z||_p <= rho`, the average is its mean over
    random z, normal with deviation rho for p = 2, uniform in `[-rho, rho]` for
    p = inf. Adaptive measures do not change when the layers of a ReLU network are
    rescaled against each other, weights at zero are not moved.

    The worst case is climbed by APGD from a random point: `steps` gradients for each
    restart.

    Args:
        loss_fn: `(params, batch) -> scalar`. The same function object does not compile
            again.
        params: Any pytree; its floating arrays are perturbed.
        batch: What the loss is evaluated on.
        rho: Radius, positive; relative to each weight if adaptive.
        p: The norm, 2 or `jnp.inf`.
        adaptive: Measure each perturbation relative to its weight.
        which: `"max"`, the worst case, or `"avg"`.
        microbatch: m-sharpness: the batch's leading axis is cut into chunks of so many
            samples, each with its own perturbation, and the chunks' values averaged.
            Must divide the batch.
        normalize_logits: A positive temperature: measure on logits that are centred
            and divided by their norm and by this, which takes away what a classifier
            gains by scaling its last layer up. Needs a `LogitLoss`.
        steps: APGD's steps, or the average's samples (at least 2).
        restarts: Random starts of APGD; the best is kept, for each chunk.
        mask: A tree of booleans (or boolean arrays) like the parameters, or a prefix
            of it, or a function from the parameters to one: what may be perturbed.
        key: Random key.

    Returns:
        The value; `"lower_bound"` with the perturbation for the worst case (a few units
        of rounding less than its rise, at least 0, which no perturbation attains),
        `"estimate"` with a 95 % interval for the average. NaN if the loss is not finite
        at the weights, or NaN at the random points (half the radius away for p = 2)
        where all climbs begin; for the average at any sample.

    Raises:
        ValueError: If a setting is out of range, parameters have no floating arrays,
            the batch is empty or not divisible, the mask does not fit or selects
            nothing, or (outside of jit) the loss is not finite at the weights.
        TypeError: If `normalize_logits` meets a loss that is no `LogitLoss`, a count is
            no integer or the mask not boolean.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import sharpness
        >>> loss = lambda w, batch: 2 * jnp.sum(w**2)
        >>> key = jax.random.key(0)
        >>> worst = sharpness(loss, jnp.zeros(3), None, rho=0.5, key=key)
        >>> round(float(worst.value), 3), worst.kind
        (0.5, 'lower_bound')

    Source: M. Andriushchenko, F. Croce, M. Müller, M. Hein, N. Flammarion, 2023,
        "A Modern Look at the Relationship between Sharpness and Generalization",
        arXiv:2302.07011, section 3 and appendix (APGD for weights).

    Differences: APGD climbs in z, where the ellipsoid of the adaptive l2 case is a
        ball. So it is the projection that is exact without a root to find, and the
        value itself, not only the unknown maximum, is invariant under rescaled layers.
        The authors' code climbs in d, with the Euclidean projection on the ellipsoid.
        Random starts lie in the ball; theirs may lie far outside it for p = 2.
    """
    check_choice("sharpness", "which", which, ("max", "avg"))
    check_positive("sharpness", "rho", rho)
    if p not in (2, math.inf):
        raise ValueError(f"sharpness: `p` must be 2 or infinity (got {p}).")
    check_counts("sharpness", steps=steps, restarts=restarts)
    least = 2 if which == "avg" else 1
    if steps < least or restarts < 1:
        raise ValueError(
            f"sharpness: `steps` must be at least {least} and `restarts` at least 1 "
            f"(got {steps} and {restarts})."
        )
    if normalize_logits is not None:
        if not isinstance(loss_fn, LogitLoss):
            raise TypeError(
                "sharpness: `normalize_logits` needs a LogitLoss (got "
                f"{type(loss_fn).__name__}): a plain loss hides its logits."
            )
        loss_fn = loss_fn.normalised(normalize_logits)
    params, mask = checked("sharpness", params, batch, mask)
    chunks = _chunks(batch, microbatch)
    settings = (float(p), adaptive, which, microbatch is None, steps, restarts)
    found = _sharpness(loss_fn, params, chunks, mask, jnp.asarray(rho), key, settings)
    refuse_undefined("sharpness", found.value, loss_fn, params, batch, mask)
    return found


def _chunks(batch, microbatch):
    """The batch with a leading axis over its chunks."""
    if microbatch is None:
        return jtu.tree_map(lambda leaf: jnp.asarray(leaf)[None], batch)
    check_counts("sharpness", microbatch=microbatch)
    sizes = sorted({jnp.shape(leaf)[:1] for leaf in jtu.tree_leaves(batch)})
    if len(sizes) != 1 or not sizes[0]:
        raise ValueError(
            "sharpness: with `microbatch` all arrays of `batch` must have one leading "
            f"axis (got lengths {sizes})."
        )
    if microbatch < 1 or sizes[0][0] % microbatch:
        raise ValueError(
            f"sharpness: `microbatch` must divide the batch of {sizes[0][0]} (got "
            f"{microbatch})."
        )
    return jtu.tree_map(
        lambda leaf: jnp.reshape(leaf, (-1, microbatch, *jnp.shape(leaf)[1:])), batch
    )


@eqx.filter_jit
def _sharpness(loss_fn, params, chunks, mask, rho, key, settings):
    p, adaptive, which, whole, steps, restarts = settings

    def of_chunk(inputs):
        chunk, key = inputs
        flat = objective("sharpness", loss_fn, params, chunk, mask)
        scale = flat.selected * (jnp.abs(flat.point) if adaptive else 1)
        radius = rho.astype(scale.dtype)

        def rise(z):
            return flat.value(flat.point + scale * z)

        if which == "avg":
            return _rises(rise, scale, radius, p, steps, key), None
        here = flat.value(flat.point)
        climb = _climber(jax.value_and_grad(rise), rise, here, scale, radius, p, steps)
        z, best = _best_of(climb, key, restarts)
        return _proved_rise(rise, z, best), flat.unravel(scale * z)

    count = jax.tree_util.tree_leaves(chunks)[:1]
    number = count[0].shape[0] if count else 1
    values, witness = jax.lax.map(of_chunk, (chunks, jax.random.split(key, number)))
    if which == "avg":
        samples = jnp.mean(values, 0)
        half = t_half_width(samples)
        return MeasureResult(jnp.mean(samples), "estimate", None, 0, half)
    if whole:
        witness = jtu.tree_map(lambda leaf: leaf[0], witness)
    return MeasureResult(jnp.mean(values), "lower_bound", witness, steps * restarts)


def _rises(loss, scale, rho, p, samples, key):
    def one(inputs):
        key, moved = inputs
        if p == 2:
            z = rho * jax.random.normal(key, scale.shape, scale.dtype)
        else:
            z = random_start(key, scale, rho, p)
        return loss(moved * z)

    # The centre comes first, in the same loop: compiled another way its loss would be
    # rounded in another way.
    keys = jax.random.split(key, samples)[np.r_[0, :samples]]
    moved = jnp.ones(samples + 1, scale.dtype).at[0].set(0)
    losses = jax.lax.map(one, (keys, moved))
    return jnp.where(jnp.isfinite(losses[0]), losses[1:] - losses[0], jnp.nan)


def _proved_rise(loss, z, best):
    """From the centre to z, both evaluated by one compiled loop, without rounding."""
    here, there = jax.lax.map(loss, jnp.stack([jnp.zeros_like(z), z]))
    unit = _ROUNDING * float(jnp.finfo(here.dtype).eps)
    rounding = unit * jnp.maximum(jnp.abs(here), jnp.abs(there))
    rise = there - here - jnp.where(jnp.isfinite(there), rounding, 0)
    known = jnp.isfinite(here) & ~jnp.isnan(best)
    return jnp.where(known, jnp.maximum(rise, 0), jnp.nan)


def _climber(value_and_direction, value, here, scale, rho, p, steps):
    # What cannot move must not use up the radius.
    free = (scale != 0).astype(scale.dtype)

    def climb(key):
        start = free * random_start(key, scale, rho, p)
        return ascend(value_and_direction, value, start, here, rho, p, steps)

    return climb


def _best_of(climb, key, restarts):
    points, values = jax.lax.map(climb, jax.random.split(key, restarts))
    best = jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values))
    return points[best], values[best]


def first_order_flatness(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    rho: Float[Array, ""] | float,
    steps: int = 20,
    restarts: int = 1,
    mask: PyTree | None = None,
    key: PRNGKeyArray,
) -> MeasureResult:
    """The steepest slope around the weights, times the radius.

    `rho max ||grad L(w + d)||` over `||d|| <= rho`, climbed by APGD: a gradient and a
    Hessian-vector product a step. Never below the worst rise of the loss in the same
    ball (if both maxima are found).

    Args:
        loss_fn: `(params, batch) -> scalar`, twice differentiable.
        params: Any pytree; its floating arrays are perturbed.
        batch: What the loss is evaluated on.
        rho: Radius of the ball, positive.
        steps: APGD's steps, at least 1.
        restarts: Random starts; the best is kept.
        mask: As in `sharpness`: what may be perturbed, and whose gradient counts.
        key: Random key.

    Returns:
        A lower bound with the perturbation that attains it. NaN as `sharpness`, and
        where the gradient is not finite at the weights.

    Raises:
        ValueError: As `sharpness` does, for the gradient at the weights, too.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import first_order_flatness
        >>> loss = lambda w, batch: 2 * jnp.sum(w**2)
        >>> key = jax.random.key(0)
        >>> flat = first_order_flatness(loss, jnp.zeros(3), None, rho=0.5, key=key)
        >>> round(float(flat.value), 3), flat.kind
        (1.0, 'lower_bound')

    Source: X. Zhang, R. Xu, H. Yu, H. Zou, P. Cui, 2023, "Gradient Norm Aware
        Minimization Seeks First-Order Flatness and Improves Generalization",
        arXiv:2303.03108, definition 3.1.

    Differences: The authors take one gradient step as the maximum; here it is climbed.
    """
    check_positive("first_order_flatness", "rho", rho)
    check_counts("first_order_flatness", steps=steps, restarts=restarts)
    if steps < 1 or restarts < 1:
        raise ValueError(
            "first_order_flatness: `steps` and `restarts` must be at least 1 (got "
            f"{steps} and {restarts})."
        )
    params, mask = checked("first_order_flatness", params, batch, mask)
    rho, settings = jnp.asarray(rho), (steps, restarts)
    found = _first_order(loss_fn, params, batch, mask, rho, key, settings)
    refuse_undefined("first_order_flatness", found.value, loss_fn, params, batch, mask)
    return found


@eqx.filter_jit
def _first_order(loss_fn, params, batch, mask, rho, key, settings):
    steps, restarts = settings
    flat = objective("first_order_flatness", loss_fn, params, batch, mask)
    radius = rho.astype(flat.point.dtype)

    def at(z):
        return flat.point + flat.selected * z

    def gradient_and_loss(vector):
        return jax.value_and_grad(flat.value)(vector)[::-1]

    def length(gradient, loss):
        # A formula's derivative may have a value where the formula has none.
        return jnp.where(jnp.isnan(loss), jnp.nan, jnp.linalg.norm(gradient))

    def slope(z):
        g, loss = gradient_and_loss(at(z))
        return length(flat.selected * g, loss)

    def slope_and_direction(z):
        g, product, loss = jax.linearize(gradient_and_loss, at(z), has_aux=True)
        g = flat.selected * g
        return length(g, loss), flat.selected * product(g)

    centre, loss = gradient_and_loss(flat.point)
    here = length(flat.selected * centre, loss)
    climb = _climber(
        slope_and_direction, slope, here, flat.selected, radius, 2.0, steps
    )
    z, best = _best_of(climb, key, restarts)
    best = jnp.where(flat.defined(loss, centre), best, jnp.nan)
    cost = restarts * (3 * steps + 1) + 1
    return MeasureResult(
        radius * best, "lower_bound", flat.unravel(flat.selected * z), cost
    )


def sharpness_quadratic(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    rho: Float[Array, ""] | float,
    max_steps: int = 96,
    tol: float = 1e-3,
    mask: PyTree | None = None,
    key: PRNGKeyArray,
) -> MeasureResult:
    """The worst rise by the second-order expansion: `rho ||g|| + rho^2 lambda_max / 2`.

    Never below the maximum of the quadratic model over the ball; equal to it where the
    gradient is zero or along the top eigenvector. Of the loss itself it is an estimate,
    which holds for small radii only. One gradient and Lanczos's products.

    Args:
        loss_fn: `(params, batch) -> scalar`, twice differentiable.
        params: Any pytree; its floating arrays are perturbed.
        batch: What the loss is evaluated on.
        rho: Radius of the ball, positive.
        max_steps: Lanczos steps at most.
        tol: Lanczos stops at this relative residual.
        mask: As in `sharpness`.
        key: Random key.

    Returns:
        An estimate; the witness is the top eigenvector, a unit vector.

    Raises:
        ValueError: As `sharpness` and `hessian_top` do.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.sharpness import sharpness_quadratic
        >>> loss = lambda w, batch: 2 * jnp.sum(w**2)
        >>> key = jax.random.key(0)
        >>> model = sharpness_quadratic(loss, jnp.zeros(3), None, rho=0.5, key=key)
        >>> round(float(model.value), 3), model.kind
        (0.5, 'estimate')
    """
    check_positive("sharpness_quadratic", "rho", rho)
    params, mask = checked("sharpness_quadratic", params, batch, mask)
    slope = _slope(loss_fn, params, batch, mask)
    refuse_undefined("sharpness_quadratic", slope, loss_fn, params, batch, mask)
    top = hessian_top(
        loss_fn, params, batch, max_steps=max_steps, tol=tol, mask=mask, key=key
    )
    rho = jnp.asarray(rho).astype(slope.dtype)
    # In a ball a maximum is never negative.
    value = rho * slope + rho**2 / 2 * jnp.maximum(top.values[0], 0)
    witness = jtu.tree_map(lambda leaf: leaf[0], top.vectors)
    return MeasureResult(value, "estimate", witness, 1 + 2 * top.n_hvp)


@eqx.filter_jit
def _slope(loss_fn, params, batch, mask):
    flat = objective("sharpness_quadratic", loss_fn, params, batch, mask)
    loss, gradient = jax.value_and_grad(flat.value)(flat.point)
    slope = jnp.linalg.norm(flat.selected * gradient)
    return jnp.where(flat.defined(loss, gradient), slope, jnp.nan)
