"""Training with interval bounds: losses whose value bounds the worst case in a ball.

The lead of a sample's class over every other is bounded below by intervals over the
ball around the sample, the last layer merged into the differences of logits; the loss
of those bounds is one that no perturbation in the ball exceeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..core._checks import check_nonnegative, is_traced
from ..metrics import bim
from ._sets import Box
from ._tightness import interval_bounds

Clip = tuple[float, float] | None


def ibp_margins(
    model: Callable[[Array], Array],
    x: Float[Array, "batch ..."],
    y: Int[Array, " batch"],
    epsilon: float | Float[Array, ""],
    *,
    clip: Clip = None,
) -> Float[Array, "batch classes"]:
    """Lower bounds of the lead of each sample's class over every class in a ball.

    A sample is certified if all are positive but its own, which is 0. Costs about two
    evaluations of the model.

    Args:
        model: As for `local_lipschitz`; returns a vector of logits.
        x: Samples.
        y: Their classes.
        epsilon: Radius of the l_inf ball, not negative, in the units of `x`.
        clip: Smallest and largest value an entry can take.

    Returns:
        One bound for each sample and class, a proof up to the rounding that it is
        widened by.

    Raises:
        ValueError: If `epsilon` is negative.
        UnsupportedPrimitive: An operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import ibp_margins
        >>> net = lambda x: jnp.stack([x[0], -x[0]])
        >>> leads = ibp_margins(net, jnp.array([[1.0]]), jnp.array([0]), 0.25)
        >>> round(float(leads[0, 1]), 3)
        1.5

    Source:
        Gowal, Dvijotham, Stanforth et al., 2018, arXiv:1810.12715, section 3.
    """
    check_nonnegative("ibp_margins", "epsilon", epsilon)
    box = Box.linf(x, epsilon, clip=clip)
    return _margins(model, box, y)


def ibp_loss(
    model: Callable[[Array], Array],
    x: Float[Array, "batch ..."],
    y: Int[Array, " batch"],
    epsilon: float | Float[Array, ""],
    *,
    kappa: float | Float[Array, ""] = 0.0,
    clip: Clip = None,
) -> Float[Array, ""]:
    """The mean cross-entropy of interval bounds: an upper bound of the worst one.

    Args:
        model: As for `local_lipschitz`; returns a vector of logits.
        x: Samples.
        y: Their classes.
        epsilon: Radius of the l_inf ball; let it grow from 0 in training.
        kappa: Weight of the cross-entropy at the samples themselves, in [0, 1].
        clip: Smallest and largest value an entry can take.

    Returns:
        The loss, differentiable in the model.

    Raises:
        ValueError: If `epsilon` is negative.
        UnsupportedPrimitive: An operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import ibp_loss
        >>> net = lambda x: jnp.stack([x[0], -x[0]])
        >>> x, y = jnp.array([[1.0]]), jnp.array([0])
        >>> bool(ibp_loss(net, x, y, 0.5) > ibp_loss(net, x, y, 0.0))
        True

    Source:
        Gowal, Dvijotham, Stanforth et al., 2018, arXiv:1810.12715, equation 12.
    """
    worst = jnp.mean(_cross_entropy(ibp_margins(model, x, y, epsilon, clip=clip)))
    return kappa * _clean(model, x, y) + (1 - kappa) * worst


def sabr_loss(
    model: Callable[[Array], Array],
    x: Float[Array, "batch ..."],
    y: Int[Array, " batch"],
    epsilon: float | Float[Array, ""],
    *,
    share: float = 0.4,
    steps: int = 8,
    clip: Clip = None,
) -> Float[Array, ""]:
    """Small boxes: interval bounds around the worst point found, not around the sample.

    A box of `share` times the radius, inside the ball and as near as possible to a
    point that projected gradient ascent finds; not a bound of the worst case, but a
    regularisation that costs less accuracy. Costs `steps` gradients in the input more
    than `ibp_loss`, which it is for `share = 1`.

    Args:
        model: As for `local_lipschitz`; returns a vector of logits.
        x: Samples.
        y: Their classes.
        epsilon: Radius of the l_inf ball, not negative.
        share: Radius of the small box as a share of `epsilon`, in (0, 1].
        steps: Ascents, at least 1.
        clip: Smallest and largest value an entry can take.

    Returns:
        The loss, differentiable in the model (not through the ascent).

    Raises:
        ValueError: If `epsilon` is negative, `share` outside (0, 1] or `steps` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import ibp_loss, sabr_loss
        >>> net = lambda x: jnp.stack([x[0], -x[0]])
        >>> x, y = jnp.array([[1.0]]), jnp.array([0])
        >>> bool(jnp.isclose(sabr_loss(net, x, y, 0.5), ibp_loss(net, x, y, 0.5)))
        True

    Source:
        Müller, Eckert, Fischer and Vechev, 2023, arXiv:2210.04871, section 4.
    """
    check_nonnegative("sabr_loss", "epsilon", epsilon)
    if not 0 < share <= 1 or steps < 1:
        raise ValueError(
            "sabr_loss: `share` must lie in (0, 1] and `steps` be at least 1 "
            f"(got {share} and {steps})."
        )
    centre = x
    if share < 1 and (is_traced(epsilon) or epsilon > 0):
        reach = (1 - share) * epsilon
        settings = {"steps": steps, "stepsize": 2.5 * reach / steps, "bounds": clip}
        centre = lax.stop_gradient(bim(jax.vmap(model), x, y, reach, **settings))
    box = Box.linf(centre, share * epsilon, clip=clip)
    return jnp.mean(_cross_entropy(_margins(model, box, y)))


def ibp_initialise(model: PyTree, *, key: PRNGKeyArray) -> PyTree:
    """Weights with which intervals neither explode nor vanish from layer to layer.

    Normal of deviation `sqrt(2 pi) / fan_in` for arrays of two or more axes, whose
    first is the output's; zero for the others.

    Args:
        model: Any pytree of floating arrays: Equinox layers, dense or convolutional.
        key: Random key.

    Returns:
        The model with new weights.

    Example:
        >>> import equinox as eqx, jax
        >>> from varan.lipschitz import ibp_initialise
        >>> net = eqx.nn.MLP(4, 3, 64, 2, key=jax.random.key(0))
        >>> float(ibp_initialise(net, key=jax.random.key(1)).layers[0].bias[0])
        0.0

    Source:
        Shi, Wang, Zhang, Yi and Hsieh, 2021, arXiv:2103.17268, section 3.
    """
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, structure = jtu.tree_flatten(arrays)
    fresh = []
    for leaf, one in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        if leaf.ndim < 2:
            fresh.append(jnp.zeros_like(leaf))
            continue
        size = math.sqrt(2 * math.pi) / math.prod(leaf.shape[1:])
        fresh.append(size * jax.random.normal(one, leaf.shape, leaf.dtype))
    return eqx.combine(structure.unflatten(fresh), rest)


def _margins(model, boxes: Box, y) -> Array:
    def one(lower, upper, label):
        box = Box(lower, upper)
        classes = math.prod(jax.eval_shape(model, lower).shape)
        eye = jnp.eye(classes, dtype=lower.dtype)
        low, _ = interval_bounds(model, box, eye[label][None] - eye)
        return jnp.where(jnp.arange(classes) == label, 0, low)

    return jax.vmap(one)(boxes.lower, boxes.upper, y)


def _cross_entropy(leads: Array) -> Array:
    return jax.nn.logsumexp(-leads, axis=-1)


def _clean(model, x, y) -> Array:
    logits = jax.vmap(model)(x)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))
