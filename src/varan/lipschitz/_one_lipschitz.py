"""1-Lipschitz layers (l2) that need no factorisation: SLL, AOL, spectral normalisation.

Three ways to keep a weight inside its constant while it is trained freely. Dividing by
the largest singular value shrinks all the others with it; rescaling each column by a
sum of products (AOL) is cheaper and leaves nearly orthogonal weights nearly alone; SLL
uses the same sums in a residual layer, whose identity keeps gradients alive. Chains of
them are 1-Lipschitz; `c` times one is c-Lipschitz.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import check_choice
from ._ldlt import check_slopes
from ._norms import spectral_norm_bound, unit_scaling


class SLL(eqx.Module):
    """A residual layer `x - 2 W diag(t)^{-1} s(W' x + b)`, 1-Lipschitz.

    `t_i = sum_j |W'W|_ij q_j / q_i` with free positive q; `diag(t) - W'W` is then
    semidefinite. A boundary case of the matrix inequality behind `LDLTBlock`: one
    hidden layer, the identity as skip. Costs `size width^2` operations once a batch.

    Args:
        size: Entries of the input and of the output.
        width: Hidden units.
        activation: Acts entry by entry, with slopes in [0, 1].
        key: Random key of the weight.

    Raises:
        ValueError: A size below 1, or an activation seen to leave its slopes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import SLL
        >>> layer = SLL(3, 8, key=jax.random.key(0))
        >>> slope = jax.jacobian(layer)(jnp.ones(3))
        >>> bool(jnp.linalg.norm(slope, 2) <= 1 + 1e-6)
        True

    Source:
        Araujo, Havens, Delattre, Allauzen and Hu, 2023, "A Unified Algebraic
        Perspective on Lipschitz Neural Networks", arXiv:2303.03169, theorem 3.
    """

    weight: Float[Array, "size width"]
    log_q: Float[Array, " width"]
    bias: Float[Array, " width"]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        width: int,
        *,
        activation: Callable[[Array], Array] = jax.nn.relu,
        key: PRNGKeyArray,
    ):
        check_sizes("SLL", size=size, width=width)
        check_slopes("SLL", activation, (0.0, 1.0))
        self.weight = _normal(key, (size, width))
        self.log_q = jnp.zeros(width)
        self.bias = jnp.zeros(width)
        self.activation = activation

    def __call__(self, x: Float[Array, " size"]) -> Float[Array, " size"]:
        """The output for one input."""
        hidden = self.activation(self.weight.T @ x + self.bias)
        # W / t is (W / s) / (t / s^2) / s: only the last factor has the weight's scale.
        (down, _), unit, sums = self._scaled()
        return x - 2 * unit @ (hidden * down / sums)

    def sums(self) -> Float[Array, " width"]:
        """The diagonal t, widened by the rounding of its sums."""
        (_, up), _, sums = self._scaled()
        # An underflow must not leave the diagonal below `W'W`.
        return jnp.maximum(sums * up * up, _tiny(self.weight))

    def _scaled(self):
        """`1 / s` and s, the weight `W / s` of size one, and its diagonal `t / s^2`."""
        scaling = unit_scaling(self.weight)
        unit = self.weight * scaling[0]
        return scaling, unit, _dominating_diagonal(unit, jnp.exp(self.log_q))


class AOL(eqx.Module):
    """A linear layer `W diag(t)^{-1/2} x + b` of norm at most 1, `t = |W'W| 1`.

    Almost orthogonal: weights with orthogonal columns are only normalised. Costs
    `out_size in_size^2` operations once a batch.

    Args:
        in_size: Entries of the input.
        out_size: Entries of the output.
        key: Random key of the weight.

    Raises:
        ValueError: A size below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import AOL
        >>> layer = AOL(4, 3, key=jax.random.key(0))
        >>> bool(jnp.linalg.norm(layer.matrix(), 2) <= 1)
        True

    Source:
        Prach and Lampert, 2022, "Almost-Orthogonal Layers for Efficient
        General-Purpose Lipschitz Networks", arXiv:2208.03160, theorem 1.
    """

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]

    def __init__(self, in_size: int, out_size: int, *, key: PRNGKeyArray):
        check_sizes("AOL", in_size=in_size, out_size=out_size)
        self.weight = _normal(key, (out_size, in_size))
        self.bias = jnp.zeros(out_size)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        """The output for one input."""
        return self.matrix() @ x + self.bias

    def matrix(self) -> Float[Array, "out in"]:
        """The weight that is applied."""
        # A common factor of the weight cancels.
        unit = self.weight * unit_scaling(self.weight)[0]
        sums = _dominating_diagonal(unit, jnp.ones_like(unit[0]))
        return unit / jnp.sqrt(sums)[None]


class SpectralNormLinear(eqx.Module):
    """A linear layer `W x / |W|_2 + b`, with a bound of the norm in its place.

    Costs one bound of the norm once a batch.

    Args:
        in_size: Entries of the input.
        out_size: Entries of the output.
        method: Of `spectral_norm_bound`: `"svd"` is exact, `"gram"` many times faster
            and up to a few per cent above, by which the layer stays below 1.
        key: Random key of the weight.

    Raises:
        ValueError: A size below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import SpectralNormLinear
        >>> layer = SpectralNormLinear(4, 3, key=jax.random.key(0))
        >>> round(float(jnp.linalg.norm(layer.matrix(), 2)), 3)
        1.0

    Source:
        Miyato, Kataoka, Koyama and Yoshida, 2018, "Spectral Normalization for
        Generative Adversarial Networks", arXiv:1802.05957.

    Differences: The authors' power iteration gives a lower bound of the norm, so that
        their layer may exceed 1; `spectral_norm_bound` is never below it.
    """

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]
    method: Literal["svd", "gram"] = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        method: Literal["svd", "gram"] = "svd",
        key: PRNGKeyArray,
    ):
        check_sizes("SpectralNormLinear", in_size=in_size, out_size=out_size)
        check_choice("SpectralNormLinear", "method", method, ("svd", "gram"))
        self.weight = _normal(key, (out_size, in_size))
        self.bias = jnp.zeros(out_size)
        self.method = method

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        """The output for one input."""
        return self.matrix() @ x + self.bias

    def matrix(self) -> Float[Array, "out in"]:
        """The weight that is applied."""
        # A common factor of the weight cancels.
        unit = self.weight * unit_scaling(self.weight)[0]
        bound = spectral_norm_bound(unit, method=self.method)
        # Zero weights have norm zero and stay zero.
        return unit / (jnp.maximum(bound, _tiny(unit)) * _slack(unit))


def _dominating_diagonal(weight, q):
    """`t_i >= sum_j |W'W|_ij q_j / q_i`, so that `diag(t) - W'W` is semidefinite."""
    size = jnp.abs(weight)
    # Products of nearly orthogonal columns cancel: their rounding is measured by the
    # columns' absolute values.
    cancelled = _slack(weight) - 1
    rows = jnp.abs(weight.T @ weight) @ q + cancelled * (size.T @ (size @ q))
    # What products that underflow lose; a column of zeros has this sum alone.
    height, width = weight.shape
    lost = (height * jnp.sum(q) + width) * _tiny(weight)
    return (rows + lost) / q * _slack(weight)


def _slack(weight):
    """One, and the relative rounding of sums as long as a weight's sides."""
    eps = jnp.asarray(jnp.finfo(weight.dtype).eps, weight.dtype)
    return 1 + 2 * sum(weight.shape) * eps


def _tiny(weight):
    return jnp.asarray(jnp.finfo(weight.dtype).smallest_normal, weight.dtype)


def _normal(key, shape):
    """Rows of expected length 1."""
    return jax.random.normal(key, shape) / shape[1] ** 0.5


def check_sizes(owner: str, **sizes: int) -> None:
    """Refuses sizes below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{owner}: `{name}` must be at least 1 (got {size}).")
