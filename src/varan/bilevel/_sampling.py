"""Minibatches: how a stochastic solver sees a problem that averages over data."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree


class Minibatch(eqx.Module):
    """Draws rows of a problem's parameters, for `BilevelProblem(..., sample=...)`.

    Rows are drawn uniformly with replacement and independently for each parameter, so
    that a level that averages over rows has gradients that are right on average.

    Args:
        sizes: For each parameter of the problem the rows to draw, or `None` for a
            parameter that is not data. A parameter may be a pytree of arrays with one
            leading axis, whose rows are drawn together.

    Raises:
        ValueError: if a size is not positive, or their number is not that of the
            parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.bilevel import Minibatch
        >>> data, penalty = (jnp.ones((10, 3)), jnp.arange(10.0)), 0.1
        >>> batch, same = Minibatch((4, None))(jax.random.key(0), data, penalty)
        >>> batch[0].shape, batch[1].shape, same
        ((4, 3), (4,), 0.1)
    """

    sizes: tuple[int | None, ...] = eqx.field(static=True)

    def __check_init__(self):
        if any(size is not None and size < 1 for size in self.sizes):
            raise ValueError(f"Minibatch: `sizes` must be positive (got {self.sizes}).")

    def __call__(self, key: PRNGKeyArray, *params: PyTree) -> tuple[PyTree, ...]:
        if len(params) != len(self.sizes):
            raise ValueError(
                f"Minibatch: `sizes` must have one entry for each of the problem's "
                f"{len(params)} parameters (got {len(self.sizes)}). Use None for a "
                "parameter that is not data."
            )
        keys = jax.random.split(key, len(params))
        return tuple(
            data if size is None else _rows(key, data, size)
            for key, data, size in zip(keys, params, self.sizes, strict=True)
        )


def _rows(key, data, size):
    length = np.shape(jtu.tree_leaves(data)[0])[0]
    chosen = jax.random.randint(key, (size,), 0, length)
    return jtu.tree_map(lambda leaf: leaf[chosen], data)
