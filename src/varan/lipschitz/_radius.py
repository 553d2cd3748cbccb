"""Certified radii of classifiers from local Lipschitz constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..core import Certificate
from ..core._checks import check_choice, check_finite, check_positive, is_traced
from ._forward import FORWARD_METHODS, ForwardMethod, bounds, refuse_nan
from ._graph import as_callable
from ._lipschitz import _rows
from ._sets import Box


def certified_radius(
    model: Callable[[Array], Array],
    x: Float[Array, ...],
    label: int | Int[Array, ""],
    epsilon_max: float,
    *,
    clip: tuple[float, float] | None = None,
    forward: ForwardMethod = "crown",
    smooth: Literal["linear", "interval"] = "linear",
    halvings: int = 12,
) -> Certificate:
    """The largest proved radius of the l_inf ball in which a class keeps its lead.

    Within the ball of radius epsilon the lead of `label` over class `j` falls by at
    most `L_j(epsilon) epsilon`, with `L_j` the local Lipschitz constant of the
    difference of the two logits. Every radius that passes is a proof by itself;
    halving finds a large one. Costs one Jacobian bound a step, compiled once; under
    `vmap` over inputs and labels all are certified together. The leads at `x` and the
    ends of the ball are rounded outward too.

    Args:
        model: As for `local_lipschitz`; returns logits, one for each class.
        x: The input.
        label: The class whose lead is certified; one that does not exist gives NaN
            where it is traced.
        epsilon_max: The largest radius tried, positive, in the units of `x`.
        clip: Smallest and largest value an entry can take.
        forward: How the activations' ranges are bounded.
        smooth: As for `local_lipschitz`.
        halvings: Steps of bisection; the answer is within `epsilon_max / 2^halvings`
            of the radius where the test first fails.

    Returns:
        A certificate with the radius; 0 if `label` does not lead at `x`. The details
        hold the smallest `lead` at `x`.

    Raises:
        ValueError: a label that does not exist, a radius that is not positive, an
            input that is not finite or not in `clip`, a single logit, NaN bounds. Under
            jit the radius is NaN where the input is not in `clip`.
        UnsupportedPrimitive: an operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import certified_radius
        >>> net = lambda x: jnp.stack([x[0] + x[1], x[0] - x[1]])
        >>> found = certified_radius(net, jnp.array([0.0, 0.5]), 0, 2.0)
        >>> round(float(found.value), 2)
        0.5

    Source:
        Hein, Andriushchenko (2017), arXiv:1705.08475, theorem 2.1, with the constants
        of Shi, Wang, Zhang, Kolter, Hsieh (2022), arXiv:2210.07394.
    """
    owner = "certified_radius"
    check_choice(owner, "forward", forward, FORWARD_METHODS)
    check_choice(owner, "smooth", smooth, ("linear", "interval"))
    check_finite(owner, "x", x)
    check_positive(owner, "epsilon_max", epsilon_max)
    if not isinstance(halvings, int) or halvings < 1:
        raise ValueError(
            f"{owner}: `halvings` must be an integer >= 1 (got {halvings})."
        )
    point = Box.linf(x, 0.0, clip=clip)
    classes = math.prod(jax.eval_shape(as_callable(model), point.lower).shape)
    traced = is_traced(label)
    whole = jnp.issubdtype(jnp.result_type(label), jnp.integer)
    if classes < 2 or not whole or not (traced or 0 <= label < classes):
        raise ValueError(
            f"{owner}: `label` must be one of at least two classes "
            f"(got {label} of {classes})."
        )
    radius, lead = _bisect(
        model,
        point.lower,
        jnp.asarray(label),
        classes,
        epsilon_max,
        clip,
        forward,
        smooth == "linear",
        halvings,
    )
    refuse_nan(owner, radius)
    leader = "its class" if traced else f"class {label}"
    return Certificate(
        "certified radius",
        radius,
        proof=True,
        statement=f"{leader} leads at every y with |y - x|_inf <= value"
        + ("" if clip is None else f" and entries in {list(clip)}"),
        details={"lead": lead},
    )


@eqx.filter_jit
def _bisect(model, x, label, classes, epsilon_max, clip, forward, linear, halvings):
    rows = _differences(label, classes, x.dtype)
    model = as_callable(model)
    at_x = bounds(lambda y: rows @ jnp.ravel(model(y)), Box(x, x), method="ibp")
    leads = jnp.where((label >= 0) & (label < classes), at_x.lower, jnp.nan)

    def holds(epsilon):
        box = _around(x, epsilon, clip)
        _, per_row, *_ = _rows(
            model, box, rows, "crown", "linf", forward, linear, False
        )
        # NaN compares false: what cannot be bounded is not certified.
        return jnp.all(leads > per_row * epsilon * (1 + 4 * jnp.finfo(x.dtype).eps))

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        passed = holds(middle)
        return jnp.where(passed, middle, low), jnp.where(passed, high, middle)

    top = jnp.asarray(epsilon_max, x.dtype)
    low, _ = lax.fori_loop(0, halvings, halve, (jnp.zeros_like(top), top))
    low = jnp.where(holds(top), top, low)
    lead = jnp.min(leads)
    return jnp.where(jnp.isnan(lead), jnp.nan, jnp.where(lead > 0, low, 0)), lead


def _differences(label, classes, dtype):
    """The logit of the class less each of the others."""
    places = jnp.arange(classes)
    others = jnp.argsort(places == label)[: classes - 1]
    eye = jnp.eye(classes, dtype=dtype)
    return eye[label][None] - eye[others]


def _around(x, epsilon, clip):
    """The ball, its ends a unit outward so that no point of it is rounded away."""
    box = Box.linf(x, epsilon, clip=clip)
    below, above = (jnp.full_like(x, v) for v in (-jnp.inf, jnp.inf))
    lower, upper = jnp.nextafter(box.lower, below), jnp.nextafter(box.upper, above)
    return Box(lower, upper)
