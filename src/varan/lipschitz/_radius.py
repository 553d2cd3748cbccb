"""Certified radii of classifiers from local Lipschitz constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..core import Certificate
from ..core._checks import check_choice, check_finite, check_positive
from ._forward import FORWARD_METHODS, ForwardMethod
from ._graph import as_callable
from ._lipschitz import _rows
from ._sets import Box


def certified_radius(
    model: Callable[[Array], Array],
    x: Float[Array, ...],
    label: int,
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
    halving finds a large one. Costs one Jacobian bound a step, compiled once.

    Args:
        model: As for `local_lipschitz`; returns logits, one for each class.
        x: The input.
        label: The class whose lead is certified.
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
            input that is not finite, a single logit.
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
    point = Box.linf(x, 0.0)
    classes = math.prod(jax.eval_shape(as_callable(model), point.lower).shape)
    if classes < 2 or not 0 <= label < classes:
        raise ValueError(
            f"{owner}: `label` must be one of at least two classes "
            f"(got {label} of {classes})."
        )
    eye = np.eye(classes)
    rows = jnp.asarray(eye[label] - np.delete(eye, label, 0), point.lower.dtype)
    radius, lead = _bisect(
        model,
        point.lower,
        rows,
        epsilon_max,
        clip,
        forward,
        smooth == "linear",
        halvings,
    )
    return Certificate(
        "certified radius",
        radius,
        proof=True,
        statement=f"class {label} leads at every y with |y - x|_inf <= value"
        + ("" if clip is None else f" and entries in {list(clip)}"),
        details={"lead": lead},
    )


@eqx.filter_jit
def _bisect(model, x, rows, epsilon_max, clip, forward, linear, halvings):
    leads = rows @ jnp.ravel(as_callable(model)(x))

    def holds(epsilon):
        box = Box.linf(x, epsilon, clip=clip)
        _, per_row, *_ = _rows(
            model, box, rows, "crown", "linf", forward, linear, False
        )
        # NaN compares false: what cannot be bounded is not certified.
        return jnp.all(leads > per_row * epsilon)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        passed = holds(middle)
        return jnp.where(passed, middle, low), jnp.where(passed, high, middle)

    top = jnp.asarray(epsilon_max, x.dtype)
    low, _ = lax.fori_loop(0, halvings, halve, (jnp.zeros_like(top), top))
    low = jnp.where(holds(top), top, low)
    return jnp.where(jnp.all(leads > 0), low, 0), jnp.min(leads)
