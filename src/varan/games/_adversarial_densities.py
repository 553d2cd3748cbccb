"""What the adversarial flows require of the classes: shares, densities of mass one."""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from ..core._checks import is_traced

# The rule is exact to many digits for smooth densities as wide as the boundaries are
# spread; this much is left for jumps, heavy tails and narrow peaks.
MASS_TOLERANCE = 0.05
NODES = {1: 2001, 2: 201}


def check_share(owner: str, share0) -> None:
    """Refuses a share of class 0 that leaves a class empty."""
    if not (is_traced(share0) or 0 < share0 < 1):
        raise ValueError(f"{owner}: `share0` must be between 0 and 1 (got {share0}).")


def warn_unless_normalised(owner: str, name: str, density, near) -> None:
    """Warns of a density whose integral, by a rule around some points, is not one."""
    near = np.asarray(near)
    dimension = 1 if near.ndim == 1 else near.shape[1]
    centre = near.mean(axis=0)
    scale = 1.0 + float(np.max(np.abs(near - centre)))
    # The rule of the middle in x = scale tan(pi t / 2), t from -1 to 1.
    count = NODES[dimension]
    angle = (np.arange(count) + 0.5) / count * math.pi - math.pi / 2
    weight = scale * math.pi / count / np.cos(angle) ** 2
    line = scale * np.tan(angle)
    if dimension == 1:
        nodes = centre + line
    else:
        nodes = centre + np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
        weight = np.outer(weight, weight).ravel()
    values = np.asarray(jax.jit(jax.vmap(density))(jnp.asarray(nodes, near.dtype)))
    mass = float(np.sum(weight * values))
    if not abs(mass - 1) <= MASS_TOLERANCE:
        warnings.warn(
            f"{owner}: `{name}` integrates to about {mass:.3g} instead of 1, so the "
            f"shares are not what `share0` says. Normalise it; if it is a peak too "
            f"narrow for {count} nodes a direction, pass over this.",
            stacklevel=3,
        )
