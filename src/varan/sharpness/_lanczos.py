"""Lanczos: a symmetric operator, seen from one vector, as a tridiagonal matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

# Rows that are orthogonalised against together: the basis is filled from the top, and
# what is still empty is not read.
_ROWS = 16


class Krylov(NamedTuple):
    """An orthonormal basis Q, row by row, and the tridiagonal T = Q H Q'.

    Rows beyond `steps` are zero. Where the space became invariant T falls into blocks,
    and the next row is random; `ended` says that there was nothing left.
    """

    basis: Float[Array, "rows n"]
    diagonal: Float[Array, " m"]
    off: Float[Array, " m"]
    steps: Int[Array, ""]
    ended: Bool[Array, ""]
    noise: Float[Array, " n"]
    selected: Float[Array, " n"]

    def ritz(self) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
        """Eigenvalues of T, ascending, and its eigenvectors as columns.

        Steps that were not done give values below all others, without weight in the
        basis.
        """
        m = self.diagonal.shape[0]
        done = jnp.arange(m, dtype=jnp.int32) < self.steps
        # After the last step there is no coupling either.
        off = jnp.where(done[1:], self.off[:-1], 0)
        width = jnp.max(jnp.abs(self.diagonal)) + 2 * jnp.max(jnp.abs(self.off))
        diagonal = jnp.where(done, self.diagonal, -2 * width - 1)
        return jnp.linalg.eigh(
            jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)
        )


def begin(key: PRNGKeyArray, selected: Float[Array, " n"], steps: int) -> Krylov:
    """The space of one random vector; at most `steps` steps follow."""
    shape = (2, selected.size)
    start, noise = jax.random.normal(key, shape, selected.dtype) * selected[None, :]
    rows = _ROWS * (steps // _ROWS + 1)
    basis = jnp.zeros((rows, selected.size), selected.dtype)
    basis = basis.at[0].set(start / jnp.linalg.norm(start))
    zeros = jnp.zeros(steps, selected.dtype)
    count = jnp.zeros((), jnp.int32)
    return Krylov(basis, zeros, zeros, count, jnp.asarray(False), noise, selected)


def restart(
    space: Krylov,
    rows: Float[Array, "k n"],
    values: Float[Array, " k"],
    start: Float[Array, " n"],
) -> Krylov:
    """The space of Ritz vectors, kept as if they were exact, and of a new start."""
    k = rows.shape[0]
    basis = jnp.zeros_like(space.basis).at[:k].set(rows)
    fresh, exhausted = _fresh(basis, k - 1, start)
    zeros = jnp.zeros_like(space.diagonal)
    return Krylov(
        basis.at[k].set(fresh),
        zeros.at[:k].set(values),
        zeros,
        jnp.full_like(space.steps, k),
        exhausted,
        space.noise,
        space.selected,
    )


def advance(
    product: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    space: Krylov,
    reorth: bool = True,
) -> Krylov:
    """One step: one product, and with `reorth` 2 j n multiplications in step j."""
    basis, diagonal, off, j, ended, noise, selected = space
    here = basis[j]
    image = product(here)
    alpha = jnp.vdot(here, image)
    # In the first step row -1 is still zero.
    image = image - alpha * here - off[j - 1] * basis[j - 1]
    if reorth:
        # The recurrence above was the first pass; twice is enough (Kahan, Parlett).
        image = _orthogonal(basis, j, image)
    beta = jnp.linalg.norm(image)
    scale = jnp.max(jnp.abs(diagonal.at[j].set(alpha))) + jnp.max(off)
    split = beta <= 1e2 * np.finfo(here.dtype).eps * scale
    following, exhausted = jax.lax.cond(
        split,
        lambda: _fresh(basis, j, selected * jnp.roll(noise, j)),
        lambda: (image / beta, jnp.asarray(False)),
    )

    # Entry by entry: choosing between two whole bases would copy them.
    def put(array, index, value):
        return array.at[index].set(jnp.where(ended, array[index], value))

    return Krylov(
        put(basis, j + 1, following),
        put(diagonal, j, alpha),
        put(off, j, jnp.where(split, 0, beta)),
        j + jnp.where(ended, 0, 1).astype(j.dtype),
        ended | exhausted,
        noise,
        selected,
    )


def _orthogonal(basis, j, vector):
    """The vector without its parts along rows 0 to j."""

    def off(block, vector):
        rows = jax.lax.dynamic_slice_in_dim(basis, _ROWS * block, _ROWS)
        return vector - (rows @ vector) @ rows

    return jax.lax.fori_loop(0, j // _ROWS + 1, off, vector)


def _fresh(basis, j, vector):
    """The unit vector that is orthogonal to the basis, and whether there is none."""
    length = jnp.linalg.norm(vector)
    for _ in range(2):
        vector = _orthogonal(basis, j, vector)
    rest = jnp.linalg.norm(vector)
    exhausted = rest <= math.sqrt(np.finfo(vector.dtype).eps) * length
    return jnp.where(exhausted, 0, vector / jnp.where(exhausted, 1, rest)), exhausted
