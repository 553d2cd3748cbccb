"""Proofs that a network rises or falls in one of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..core import Certificate
from ..core._checks import is_traced
from ._forward import ForwardMethod
from ._lipschitz import jvp_bounds
from ._sets import Box


class Monotonicity(eqx.Module):
    """The range of a partial derivative, and what its sign proves.

    Args:
        lower: Lower bound of the derivative of every output (flattened).
        upper: Upper bound.
        direction: 1 where the output never falls in the feature, -1 where it never
            rises, 0 where neither is proved.
        certificate: The smallest distance of the proved signs' bounds from zero.
    """

    lower: Float[Array, " out"]
    upper: Float[Array, " out"]
    direction: Int[Array, " out"]
    certificate: Certificate


def monotone(
    model: Callable[[Array], Array],
    box: Box,
    feature: int | tuple[int, ...],
    *,
    forward: ForwardMethod = "alpha",
    smooth: Literal["linear", "interval"] = "linear",
) -> Monotonicity:
    """Asks whether every output is monotone in one feature over a box.

    Let the feature vary over its whole range and the others over what they are known
    to be: the derivative's bounds over that box decide. One directional pass for all
    outputs, far cheaper than the whole Jacobian.

    Args:
        model: As for `local_lipschitz`.
        box: The inputs.
        feature: Index of the entry of the input; a tuple where the input has axes.
        forward: How the activations' ranges are bounded.
        smooth: As for `local_lipschitz`.

    Returns:
        The derivative's bounds, the proved directions and a certificate. Direction 0
        says that no proof was found, not that the output is not monotone. Where a box
        under jit is not finite the bounds are NaN and the direction is 0.

    Raises:
        ValueError: a feature that does not exist.
        UnsupportedPrimitive: an operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import Box, monotone
        >>> net = lambda x: jnp.tanh(jnp.stack([x[0] - x[1], 2 * x[1]]))
        >>> [int(d) for d in monotone(net, Box.linf(jnp.zeros(2), 1.0), 1).direction]
        [-1, 1]

    Source:
        Shi, Wang, Zhang, Kolter, Hsieh (2022), arXiv:2210.07394, the monotonicity
        analysis of the experiments.

    Differences:
        The directional derivative is bounded by its own pass instead of an entry of
        the Jacobian's bounds.
    """
    place = feature if isinstance(feature, tuple) else (feature,)
    shape = box.lower.shape
    if len(place) != len(shape) or not all(
        -n <= k < n for k, n in zip(place, shape, strict=False)
    ):
        raise ValueError(
            f"monotone: `feature` must index the input of shape {shape} "
            f"(got {feature!r})."
        )
    direction = jnp.zeros(shape, box.lower.dtype).at[place].set(1)
    found = jvp_bounds(model, box, direction, forward=forward, smooth=smooth)
    rises, falls = found.lower >= 0, found.upper <= 0
    sign = jnp.where(rises, 1, jnp.where(falls, -1, 0))
    margin = jnp.min(jnp.maximum(found.lower, -found.upper))
    proved = (
        "an unknown number" if is_traced(sign) else int(np.sum(np.asarray(sign) != 0))
    )
    return Monotonicity(
        found.lower,
        found.upper,
        sign,
        Certificate(
            "monotonicity margin",
            margin,
            proof=True,
            statement=f"{proved} of {sign.size} outputs are monotone in feature "
            f"{feature} over the box; all are if value >= 0",
        ),
    )
