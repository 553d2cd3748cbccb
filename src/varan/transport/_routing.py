"""Routing tokens to experts under a hard capacity, as sparse transport.

A router scores every token for every expert. Sending each token to its best expert
overloads some; here the plan of `SparseTransport` decides, so that no expert gets more
tokens than its capacity and the load is balanced.

Source: Liu, Puigcerver, Blondel, 2023 (arXiv 2209.15466), section 5.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core._checks import check_shape
from ._solve import TransportSolution
from ._sparse_transport import sparse_ot


class Routing(eqx.Module):
    """Which tokens an expert processes, and with what weight.

    Args:
        tokens: Tokens of each expert, heaviest first.
        weights: Their masses; zero marks a free place of the expert. All masses sum
            to 1, and every expert has the same share.
        solution: The run, with its plan and certificate.
    """

    tokens: Int[Array, "experts capacity"]
    weights: Float[Array, "experts capacity"]
    solution: TransportSolution


def route_tokens(
    scores: Float[Array, "tokens experts"],
    capacity: int,
    *,
    gamma: float | Float[Array, ""],
    tol: float | None = None,
    max_steps: int = 2000,
) -> Routing:
    """Assigns tokens to experts that take at most `capacity` tokens each.

    Args:
        scores: Affinities; larger is better.
        capacity: Most tokens of an expert, at least tokens / experts.
        gamma: See `SparseTransport`: the larger, the more a token's weight is spread.
        tol: See `sparse_ot`.
        max_steps: See `sparse_ot`.

    Returns:
        A `Routing`. The capacity holds whatever the run's status; how evenly tokens
        are served is what its certificate measures.

    Raises:
        ValueError: As `sparse_ot`, for `-scores` as cost and `capacity` as
            `max_nonzeros`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import route_tokens
        >>> scores = jnp.array([[1.0, 0.0], [0.9, 0.3], [0.8, 0.1], [0.7, 0.6]])
        >>> sorted(route_tokens(scores, 2, gamma=0.5).tokens[1].tolist())
        [1, 3]

    Source:
        Liu, Puigcerver, Blondel, 2023 (arXiv 2209.15466), section 5.
    """
    check_shape("route_tokens", "scores", scores, (None, None))
    solution = sparse_ot(
        -scores, max_nonzeros=capacity, gamma=gamma, tol=tol, max_steps=max_steps
    )
    weights, tokens = jax.lax.top_k(jnp.transpose(solution.plan), capacity)
    return Routing(tokens, weights, solution)
