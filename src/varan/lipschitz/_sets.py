"""Sets of inputs over which a certificate holds."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..core._checks import check_finite, check_nonnegative, is_traced


class Box(eqx.Module):
    """All points between `lower` and `upper`, entry by entry.

    Bounds of outputs and of Jacobians come back as boxes too. Infinite sides are
    allowed; a side that is NaN or crossed is refused, and under jit it turns every
    bound over the box into NaN.

    Args:
        lower: Smallest value of each entry, any shape.
        upper: Largest value of each entry, the shape and dtype of `lower`.

    Raises:
        ValueError: shapes that differ, NaN, or `lower > upper` somewhere.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import Box
        >>> box = Box.linf(jnp.array([0.1, 0.5]), 0.2, clip=(0.0, 1.0))
        >>> [round(float(v), 3) for v in box.lower]
        [0.0, 0.3]
    """

    lower: Float[Array, ...]
    upper: Float[Array, ...]

    def __init__(self, lower, upper):
        lower, upper = jnp.asarray(lower), jnp.asarray(upper)
        if not jnp.issubdtype(lower.dtype, jnp.floating):
            lower = lower.astype(jnp.result_type(float))
        self.lower = lower
        self.upper = upper.astype(lower.dtype)
        self._check()

    def _check(self) -> None:
        if self.lower.shape != self.upper.shape:
            raise ValueError(
                "Box: `lower` and `upper` must have one shape "
                f"(got {self.lower.shape} and {self.upper.shape})."
            )
        if is_traced(self.lower) or is_traced(self.upper):
            return
        lower, upper = np.asarray(self.lower), np.asarray(self.upper)
        if np.isnan(lower).any() or np.isnan(upper).any():
            raise ValueError("Box: sides must not be NaN. Remove or impute them.")
        if (lower > upper).any():
            raise ValueError(
                "Box: `lower` must not exceed `upper` "
                f"(it does in {int((lower > upper).sum())} of {lower.size} entries). "
                "Swap the sides."
            )

    @classmethod
    def linf(
        cls,
        x: Float[Array, ...],
        epsilon: float | Float[Array, ...],
        *,
        clip: tuple[float, float] | None = None,
    ) -> Box:
        """The ball `|y - x|_inf <= epsilon`, cut to the range `clip` of the data.

        Args:
            x: The centre.
            epsilon: Radius, at least 0, in the units of `x`; one for all entries or
                one for each.
            clip: Smallest and largest value an entry can take.

        Returns:
            The box.

        Raises:
            ValueError: a negative or NaN radius, or a centre outside `clip`.
        """
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.result_type(float))
        epsilon = jnp.asarray(epsilon, x.dtype)
        if not is_traced(epsilon) and not np.all(np.asarray(epsilon) >= 0):
            raise ValueError("Box.linf: `epsilon` must be at least 0 and not NaN.")
        if epsilon.ndim:
            epsilon = jnp.broadcast_to(epsilon, x.shape)
        lower, upper = x - epsilon, x + epsilon
        if clip is not None:
            lower, upper = jnp.maximum(lower, clip[0]), jnp.minimum(upper, clip[1])
        return cls(lower, upper)

    @property
    def centre(self) -> Float[Array, ...]:
        """The midpoint."""
        return self.lower + (self.upper - self.lower) / 2

    @property
    def radius(self) -> Float[Array, ...]:
        """Half the width."""
        return (self.upper - self.lower) / 2

    @property
    def bounded(self) -> Bool[Array, ""]:
        """Whether every side is finite."""
        return jnp.all(jnp.isfinite(self.lower) & jnp.isfinite(self.upper))

    @property
    def valid(self) -> Bool[Array, ""]:
        """Whether no side is NaN or crossed."""
        return jnp.all(self.lower <= self.upper)


class Ball(eqx.Module):
    """All points within `radius` of `centre` in the Euclidean norm.

    Args:
        centre: Any shape.
        radius: At least 0, in the units of the centre.

    Raises:
        ValueError: a centre that is not finite, or a radius that is negative or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import Ball
        >>> ball = Ball(jnp.array([0.5, 0.5]), 0.25)
        >>> ball.box.upper.tolist()
        [0.75, 0.75]
    """

    centre: Float[Array, ...]
    radius: Float[Array, ""]

    def __init__(self, centre, radius):
        centre = jnp.asarray(centre)
        if not jnp.issubdtype(centre.dtype, jnp.floating):
            centre = centre.astype(jnp.result_type(float))
        check_finite("Ball", "centre", centre)
        check_nonnegative("Ball", "radius", radius)
        self.centre, self.radius = centre, jnp.asarray(radius, centre.dtype)

    @property
    def box(self) -> Box:
        """The smallest `Box` around the ball."""
        return Box(self.centre - self.radius, self.centre + self.radius)
