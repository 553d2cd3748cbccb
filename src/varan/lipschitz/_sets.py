"""Sets of inputs over which a certificate holds."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..core._checks import check_finite, check_nonnegative, is_traced


def _dtype(side):
    """That of an array; of anything else the default floating one."""
    dtype = jnp.result_type(side if isinstance(side, jax.Array) else np.asarray(side))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"Box: sides must be real (got {dtype}). Take the real part.")
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)


def _outward(side, dtype, towards: float) -> Array:
    """The side in a dtype, moved outward where that rounded it inward."""
    given = side if isinstance(side, jax.Array) else np.asarray(side)
    if jnp.issubdtype(given.dtype, jnp.complexfloating):
        raise TypeError("Box: sides must be real. Take the real part.")
    # What is known is rounded by NumPy: under jit, too, it stays known.
    numbers = jnp if isinstance(given, jax.Array) else np
    with np.errstate(over="ignore"):
        held = given.astype(dtype)
    if held.dtype == given.dtype:
        return jnp.asarray(held)
    wide = jnp.promote_types(dtype, given.dtype) if numbers is jnp else np.float64
    kept, exact = held.astype(wide), given.astype(wide)
    inward = kept < exact if towards > 0 else kept > exact
    moved = numbers.nextafter(held, numbers.full_like(held, towards))
    return jnp.asarray(numbers.where(inward, moved, held))


@jax.jit
def _ball(x: Array, epsilon: Array) -> tuple[Array, Array]:
    """The ends of `|y - x| <= epsilon`, outward by what rounding loses."""
    epsilon = jnp.broadcast_to(epsilon, x.shape)
    return -_sum_upward(-x, epsilon), _sum_upward(x, epsilon)


def _sum_upward(x: Array, y: Array) -> Array:
    """`x + y`, the next number where that was rounded downward."""
    total = x + y
    # What rounding lost, exactly (Knuth's two-sum).
    part = total - x
    lost = (x - (total - part)) + (y - part)
    return jnp.where(
        lost > 0, jnp.nextafter(total, jnp.full_like(total, jnp.inf)), total
    )


def _clipped(x: Array, lower: Array, upper: Array, clip) -> tuple[Array, Array]:
    """The sides cut to `clip`; NaN, or refused, where the centre is not in it."""
    least, most = clip
    if not is_traced(least) and not is_traced(most) and not np.all(least <= most):
        raise ValueError(
            f"Box.linf: `clip` must be (smallest, largest) (got {tuple(clip)})."
        )
    least, most = (
        _outward(c, x.dtype, s * jnp.inf) for c, s in ((least, -1), (most, 1))
    )
    inside = (x >= least) & (x <= most)
    if not is_traced(inside) and not np.all(np.asarray(inside)):
        out = int(np.sum(~np.asarray(inside)))
        raise ValueError(
            f"Box.linf: the centre must lie in `clip` (it does not in {out} of "
            f"{inside.size} entries). Clip the centre, or leave `clip` out."
        )
    lower = jnp.where(inside, jnp.maximum(lower, least), jnp.nan)
    return lower, jnp.where(inside, jnp.minimum(upper, most), jnp.nan)


class Box(eqx.Module):
    """All points between `lower` and `upper`, entry by entry.

    Bounds of outputs and of Jacobians come back as boxes too. Infinite sides are
    allowed; a side that is NaN or crossed is refused, and under jit it turns every
    bound over the box into NaN.

    Args:
        lower: Smallest value of each entry, any shape. Its dtype is that of the box;
            sides that this cannot hold are rounded outward.
        upper: Largest value of each entry, the shape of `lower`.

    Raises:
        ValueError: shapes that differ, NaN, or `lower > upper` somewhere.
        TypeError: complex sides.

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
        dtype = _dtype(lower)
        self.lower = _outward(lower, dtype, -jnp.inf)
        self.upper = _outward(upper, dtype, jnp.inf)
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
        x = jnp.asarray(x, _dtype(x))
        epsilon = _outward(epsilon, x.dtype, jnp.inf)
        if not is_traced(epsilon) and not np.all(np.asarray(epsilon) >= 0):
            raise ValueError("Box.linf: `epsilon` must be at least 0 and not NaN.")
        lower, upper = _ball(x, epsilon)
        if clip is not None:
            lower, upper = _clipped(x, lower, upper, clip)
        return cls(lower, upper)

    @property
    def centre(self) -> Float[Array, ...]:
        """The midpoint."""
        return self.lower / 2 + self.upper / 2

    @property
    def radius(self) -> Float[Array, ...]:
        """Half the width."""
        return self.upper / 2 - self.lower / 2

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
