"""Fusedmax: sparse probabilities that are constant over neighbouring entries.

Maximises `<p, scores> - ||p||^2 / 2 - weight * sum |p_{i+1} - p_i|` over the simplex:
attention on contiguous segments of an ordered input. The maximiser is sparsemax of the
denoised scores, since sparsemax shifts and cuts all entries alike and so keeps blocks.

Cost: O(n), for one exact total-variation denoising and one sparsemax.

Source: V. Niculae and M. Blondel, A Regularized Framework for Sparse and Structured
Neural Attention, NeurIPS 2017, arXiv 1705.07704.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..core._checks import check_nonnegative
from ..core._envelope import tree_inner
from ..operators import prox_tv1d
from ._entmax import check_scores, sparsemax
from ._regularisers import Regulariser, on_simplex


def fusedmax(
    scores: Float[Array, " n"], weight: Float[Array, ""] | float = 0.1
) -> Float[Array, " n"]:
    """Sparse probabilities that fuse neighbours.

    Args:
        scores: A vector, its order that of the input; use `vmap` for batches.
        weight: How much a difference of neighbours costs, nonnegative; zero is
            sparsemax. Differentiated if it is an array.

    Returns:
        Probabilities. NaN for scores of NaN.

    Raises:
        ValueError: if `scores` is not a non-empty vector or `weight` is negative.
        TypeError: if `scores` is not floating.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.fenchel_young import fusedmax
        >>> p = fusedmax(jnp.array([0.9, 1.1, 0.0, -1.0]), 0.25)
        >>> [round(float(v), 3) for v in p]
        [0.5, 0.5, 0.0, 0.0]

    Source: Niculae and Blondel (2017), arXiv 1705.07704, proposition 2.
    """
    return sparsemax(prox_tv1d(check_scores("fusedmax", scores), weight))


class Fused(Regulariser):
    """Half the square norm and total variation on the simplex: fusedmax and its loss.

    Args:
        weight: As for `fusedmax`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.fenchel_young import Fused, fusedmax
        >>> scores, y = jnp.array([0.9, 0.8, 0.0]), jnp.array([0.5, 0.5, 0.0])
        >>> gradient = jax.grad(Fused(0.2).loss)(scores, y)
        >>> bool(jnp.allclose(gradient, fusedmax(scores, 0.2) - y, atol=1e-6))
        True

    Source: Niculae and Blondel (2017), arXiv 1705.07704; as a loss: M. Blondel,
        A. F. T. Martins and V. Niculae (2020), arXiv 1901.02324.
    """

    weight: Float[Array, ""] | float = 0.1

    def __check_init__(self):
        check_nonnegative("Fused", "weight", self.weight)

    @property
    def bounds(self) -> bool:
        """The conjugate is the objective at fusedmax, which rounding can only lower."""
        return False

    @property
    def modulus(self) -> float:
        """One: that of half the square norm."""
        return 1.0

    def value(self, p: Float[Array, " n"]) -> Float[Array, ""]:
        """Half the square norm and the weighted variation; `inf` off the simplex.

        Args:
            p: Probabilities.
        """
        return on_simplex(p, self._cost(p))

    def _cost(self, p):
        weight = jnp.asarray(self.weight, p.dtype)
        return jnp.sum(p * p) / 2 + weight * jnp.sum(jnp.abs(jnp.diff(p)))

    def predict(self, scores: Float[Array, " n"]) -> Float[Array, " n"]:
        """`fusedmax(scores, weight)`.

        Args:
            scores: A vector.
        """
        return fusedmax(scores, self.weight)

    def centre(self, scores: Float[Array, " n"]) -> Float[Array, " n"]:
        """Less their maximum: a common shift changes no loss on the simplex.

        Args:
            scores: A vector.
        """
        scores = check_scores("Fused", scores)
        return scores - jnp.max(scores)

    def conjugate(self, scores: Float[Array, " n"]) -> Float[Array, ""]:
        """The objective at fusedmax.

        Args:
            scores: A vector.
        """
        p = self.predict(scores)
        return tree_inner(scores, p) - self._cost(p)
