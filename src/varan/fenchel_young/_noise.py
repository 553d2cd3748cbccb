"""Noise with a density: what perturbed functions are smoothed with.

A noise draws independent entries `z` of density `p` and knows `log p` up to a constant;
its derivative, the score, is all that a perturbed function needs to be differentiated.
Any object with these two methods serves, of whatever class.
"""

from __future__ import annotations

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray


class Noise(eqx.Module):
    """A noise with independent entries and a density that is positive everywhere.

    A density with a bounded support breaks the estimates of derivatives: moving the
    point then moves the support, which the score does not see.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.fenchel_young import Noise
        >>> class Logistic(Noise):
        ...     def sample(self, key, shape, dtype):
        ...         return jax.random.logistic(key, shape, dtype)
        ...     def log_prob(self, z):
        ...         return -z - 2 * jax.nn.softplus(-z)
        >>> Logistic().sample(jax.random.key(0), (2,), jnp.float32).shape
        (2,)
    """

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype) -> Array:
        """Independent entries."""

    @abc.abstractmethod
    def log_prob(self, z: Array) -> Array:
        """The log-density of each entry, up to a constant, twice differentiable."""


class Normal(Noise):
    """Standard normal noise: mean 0, variance 1.

    Example:
        >>> import jax
        >>> from varan.fenchel_young import Normal
        >>> float(jax.grad(Normal().log_prob)(2.0))  # the score
        -2.0
    """

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype) -> Array:
        """Independent entries."""
        return jax.random.normal(key, shape, dtype)

    def log_prob(self, z: Array) -> Array:
        """The log-density of each entry, up to a constant."""
        return -z * z / 2


class Gumbel(Noise):
    """Standard Gumbel noise: mean 0.5772 (Euler's constant), variance pi^2 / 6.

    The maximiser of Gumbel-perturbed scores over the corners of the simplex has the
    softmax of the scores as its mean, and the maximum their log-sum-exp plus the mean
    of the noise.

    Example:
        >>> import jax
        >>> from varan.fenchel_young import Gumbel
        >>> float(jax.grad(Gumbel().log_prob)(0.0))  # the score
        0.0
    """

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...], dtype) -> Array:
        """Independent entries."""
        return jax.random.gumbel(key, shape, dtype)

    def log_prob(self, z: Array) -> Array:
        """The log-density of each entry, up to a constant."""
        return -z - jnp.exp(-z)
