"""Unexplained variance: how far a learned map or plan is from the true one, in percent.

0 is exact. 100 is what the constant map to the target's mean scores (`l2_uvp`), so that
numbers compare across dimensions and scales.

Source: Korotin, Li, Genevay, Solomon, Filippov, Burnaev, 2021 (arXiv 2106.01954),
section 4.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core._checks import check_finite, check_nonempty, check_shape
from ._gaussian import bures_wasserstein


def l2_uvp(mapped: Float[Array, "n d"], exact: Float[Array, "n d"]) -> Float[Array, ""]:
    """Unexplained variance of a map: `100 E |T(x) - T*(x)|^2 / Var(T*(x))`.

    Args:
        mapped: Images of points under the map.
        exact: Images of the same points under the true map, not all equal.

    Returns:
        Percent, not negative; 100 for the constant map to the mean.

    Raises:
        ValueError: If the arrays are empty, not finite, or of different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import l2_uvp
        >>> exact = jnp.array([[0.0], [2.0]])
        >>> float(l2_uvp(exact + 0.5, exact))
        25.0

    Source:
        Korotin et al., 2021 (arXiv 2106.01954), section 4.2.
    """
    check_shape("l2_uvp", "exact", exact, (None, None))
    check_nonempty("l2_uvp", "exact", exact)
    check_shape("l2_uvp", "mapped", mapped, jnp.shape(exact))
    for name, array in (("mapped", mapped), ("exact", exact)):
        check_finite("l2_uvp", name, array)
    error = jnp.mean(jnp.sum((mapped - exact) ** 2, axis=1))
    return 100 * error / jnp.sum(jnp.var(exact, axis=0))


def bw_uvp(
    samples: Float[Array, "n d"],
    mean: Float[Array, " d"],
    covariance: Float[Array, "d d"],
) -> Float[Array, ""]:
    """Unexplained variance of a law: `100 BW^2 / (Var / 2)` of the moments.

    The samples enter through mean and covariance alone. With n samples of the right
    law it is about `100 d / n`, not zero.

    Args:
        samples: Of the law to be judged; more than `d` of them.
        mean: Of the true law.
        covariance: Of the true law, positive definite.

    Returns:
        Percent, not negative.

    Raises:
        ValueError: If shapes do not fit, entries are not finite, or there are fewer
            than two samples.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import bw_uvp
        >>> samples = jnp.array([[-1.0], [1.0]])
        >>> round(float(bw_uvp(samples, jnp.zeros(1), jnp.eye(1))), 3)
        0.0

    Source:
        Korotin et al., 2021 (arXiv 2106.01954), section 4.3.
    """
    check_shape("bw_uvp", "samples", samples, (None, jnp.shape(mean)[0]))
    check_finite("bw_uvp", "samples", samples)
    if samples.shape[0] < 2:
        raise ValueError(
            f"bw_uvp: `samples` must be two or more (got {samples.shape[0]})."
        )
    middle = jnp.mean(samples, axis=0)
    centred = samples - middle[None, :]
    found = centred.T @ centred / samples.shape[0]
    apart = bures_wasserstein(mean, covariance, middle, found)
    return 200 * apart / jnp.trace(covariance)
