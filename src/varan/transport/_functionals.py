"""Functionals of a measure in variational form, so that samples suffice.

`F(P) = offset + sup_u E_P A(u(X), X) - E_G B(u(Z))`: at the optimum the critic `u` is a
function of the density ratio of P to the reference G, and for every u the right side is
a lower bound. No density of P is needed: that of G is, which is refitted to the
particles or given by samples.

Source: Fan, Zhang, Taghvaei, Chen, 2022 (arXiv 2112.02424), section 3; X. Nguyen,
M. Wainwright and M. Jordan, 2010 (arXiv 0809.0853).
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_finite, check_nonempty, is_traced

# The reference's spread beyond the particles' own: their images must stay where it has
# mass. Standard deviations of the Gaussian, sides of the box.
_WIDER = 1.1
_MARGIN = 1.5
# Added to the fitted covariance, relative to its trace.
_RIDGE = 1e-6


class Reference(eqx.Module):
    """A measure that is drawn from and evaluated; subclass it for one of your own."""

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, count: int) -> Float[Array, "count d"]:
        """Points."""

    def log_density(self, x: Float[Array, "n d"]) -> Float[Array, " n"]:
        """The logarithm of its density, where the functional asks for it."""
        raise TypeError(f"{type(self).__name__}: this reference has no density.")


class Functional(eqx.Module):
    """`F(P) = offset + sup_u E_P first(u(X), X, G) - E_G second(u(Z), Z, G)`.

    Args:
        first: From the critic's values, the points and the fitted reference to A.
        second: From the critic's values, the points and the fitted reference to B.
        fit: From the particles to the reference G that covers them.
        offset: A number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.transport import kl_to_samples
        >>> y = jnp.zeros((5, 2))
        >>> functional = kl_to_samples(y)
        >>> value, error = functional.value(
        ...     lambda x: 0.0 * x[0], y, functional.fit(y), jax.random.key(0))
        >>> float(value), float(error)
        (0.0, 0.0)
    """

    first: Callable
    second: Callable
    fit: Callable[[Float[Array, "n d"]], Reference]
    offset: float

    def estimate(self, critic, x, z, reference):
        """The summands on points x of P and z of the reference."""
        first = self.first(jax.vmap(critic)(x), x, reference)
        return first, self.second(jax.vmap(critic)(z), z, reference)

    def value(
        self, critic: Callable, x: Float[Array, "n d"], reference: Reference, key
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """A lower bound on F at the particles, and its standard error.

        The reference's expectation is taken over as many draws.
        """
        first, second = self.estimate(
            critic, x, reference.sample(key, x.shape[0]), reference
        )
        value = self.offset + jnp.mean(first) - jnp.mean(second)
        error = jnp.sqrt((jnp.var(first) + jnp.var(second)) / x.shape[0])
        return value, error


class _Gaussian(Reference):
    mean: Float[Array, " d"]
    factor: Float[Array, "d d"]

    def sample(self, key, count):
        noise = jax.random.normal(key, (count, self.mean.size), self.mean.dtype)
        return self.mean[None] + noise @ self.factor.T

    def log_density(self, x):
        white = jsl.solve_triangular(self.factor, (x - self.mean[None]).T, lower=True)
        size = jnp.sum(jnp.log(jnp.diagonal(self.factor)))
        size = size + self.mean.size / 2 * float(np.log(2 * np.pi))
        return -jnp.sum(white**2, axis=0) / 2 - size


class _Uniform(Reference):
    low: Float[Array, " d"]
    high: Float[Array, " d"]

    def sample(self, key, count):
        place = jax.random.uniform(key, (count, self.low.size), self.low.dtype)
        return self.low[None] + place * (self.high - self.low)[None]

    def log_density(self, x):
        size = -jnp.sum(jnp.log(self.high - self.low))
        return jnp.full(x.shape[0], 1, x.dtype) * size


class _Samples(Reference):
    points: Float[Array, "m d"]

    def sample(self, key, count):
        places = jax.random.randint(key, (count,), 0, self.points.shape[0])
        return self.points[places]


def kl_to_density(
    log_density: Callable[[Float[Array, " d"]], Float[Array, ""]],
) -> Functional:
    """The divergence `KL(P | Q)` to an unnormalised density; its flow samples Q.

    The reference is a Gaussian with the particles' moments, a tenth wider.

    Args:
        log_density: Of one point, up to a constant, which the value then carries.

    Returns:
        A `Functional` whose optimal critic is `log(P / G)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import kl_to_density
        >>> kl_to_density(lambda x: -jnp.sum(x**2) / 2).offset
        1.0

    Source:
        Fan et al., 2022 (arXiv 2112.02424), section 3.1.
    """

    def first(density, u, x, reference):
        return u + reference.log_density(x) - jax.vmap(density)(x)

    return Functional(
        Partial(first, Partial(log_density)), Partial(_exp), Partial(_gaussian), 1.0
    )


def kl_to_samples(points: Float[Array, "m d"]) -> Functional:
    """The divergence `KL(P | Q)` to a measure of which there are samples.

    Args:
        points: Samples of Q.

    Returns:
        A `Functional` whose optimal critic is `log(P / Q)`.

    Raises:
        ValueError: If there are no points, or an entry is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import kl_to_samples
        >>> kl_to_samples(jnp.zeros((3, 2))).offset
        1.0

    Source:
        Fan et al., 2022 (arXiv 2112.02424), section 3.1.
    """
    _check_points("kl_to_samples", points)
    return Functional(Partial(_critic), Partial(_exp), _fixed(points), 1.0)


def jensen_shannon(points: Float[Array, "m d"]) -> Functional:
    """The Jensen-Shannon divergence to a measure of which there are samples.

    Args:
        points: Samples of Q.

    Returns:
        A `Functional` with values in [0, log 2]; its optimal critic is `log(P / Q)`.

    Raises:
        ValueError: If there are no points, or an entry is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import jensen_shannon
        >>> round(jensen_shannon(jnp.zeros((3, 2))).offset, 3)
        0.693

    Source:
        Fan et al., 2022 (arXiv 2112.02424), section 3; I. Goodfellow and others, 2014
        (arXiv 1406.2661), theorem 1.
    """
    _check_points("jensen_shannon", points)

    def first(u, x, reference):
        return -jax.nn.softplus(-u) / 2

    def second(u, z, reference):
        return jax.nn.softplus(u) / 2

    offset = float(np.log(2))
    return Functional(Partial(first), Partial(second), _fixed(points), offset)


def porous_medium(power: float = 2.0) -> Functional:
    """The energy `int P^m / (m - 1)`, whose flow is the porous medium equation.

    The reference is uniform on a box half as large again as the particles'.

    Args:
        power: m, above 1.

    Returns:
        A `Functional` whose optimal critic is the inverse of softplus at `P / G`.

    Raises:
        ValueError: If `power` is not above 1.

    Example:
        >>> from varan.transport import porous_medium
        >>> porous_medium(2.0).offset
        0.0

    Source:
        Fan et al., 2022 (arXiv 2112.02424), section 3.2.
    """
    if not power > 1:
        raise ValueError(f"porous_medium: `power` must be above 1 (got {power}).")

    def first(m, u, x, reference):
        density = jnp.exp(reference.log_density(x))
        return m / (m - 1) * (density * jax.nn.softplus(u)) ** (m - 1)

    def second(m, u, z, reference):
        density = jnp.exp(reference.log_density(z))
        return density ** (m - 1) * jax.nn.softplus(u) ** m

    parts = Partial(first, power), Partial(second, power)
    return Functional(*parts, Partial(_box), 0.0)


def _gaussian(particles):
    mean = jnp.mean(particles, axis=0)
    centred = particles - mean[None]
    covariance = centred.T @ centred / particles.shape[0]
    ridge = _RIDGE * jnp.trace(covariance) * jnp.eye(mean.size, dtype=mean.dtype)
    return _Gaussian(mean, _WIDER * jnp.linalg.cholesky(covariance + ridge))


def _box(particles):
    low, high = jnp.min(particles, axis=0), jnp.max(particles, axis=0)
    middle, half = (low + high) / 2, _MARGIN * (high - low) / 2
    return _Uniform(middle - half, middle + half)


def _fixed(points):
    return Partial(lambda points, _: _Samples(points), points)


def _critic(u, x, reference):
    return u


def _exp(u, z, reference):
    return jnp.exp(u)


def _check_points(owner, points):
    check_nonempty(owner, "points", points)
    if not is_traced(points):
        check_finite(owner, "points", points)
