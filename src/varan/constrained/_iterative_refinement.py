"""Linear systems solved in low precision, refined in high.

A factorisation in float32 is half the memory traffic and twice the speed of one in
float64, and every correction `x + F^-1 (b - A x)` with the residual in high precision
gains the digits that the low precision has to spare. Worth it for large systems whose
condition number is well below the reciprocal of the low precision's rounding unit
(1e7 for float32); beyond that it does not converge, and says so.

Cost: the inner solver's, and for each refinement a product with `A` and an inner solve.

Source: Wilkinson, 1963, "Rounding Errors in Algebraic Processes"; Carson, Higham, 2018,
"Accelerating the solution of linear systems by iterative refinement in three
precisions".
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree

from ..core._checks import check_positive


class IterativeRefinement(lx.AbstractLinearSolver):
    """A lineax solver that makes a low-precision solver exact.

    For square systems; use it in `lineax.linear_solve`, and wherever varan takes a
    lineax solver.

    Args:
        inner: The lineax solver that works in low precision.
        dtype: The low precision.
        max_refinements: Corrections at most.

    Raises:
        ValueError: If `max_refinements` is not positive, or the operator not square.

    Example:
        >>> import jax.numpy as jnp, lineax as lx
        >>> from varan.constrained import IterativeRefinement
        >>> operator = lx.MatrixLinearOperator(jnp.array([[2.0, 1.0], [1.0, 3.0]]))
        >>> x = lx.linear_solve(operator, jnp.array([3.0, 4.0]), IterativeRefinement())
        >>> x.value.round(3).tolist()
        [1.0, 1.0]

    Source:
        Carson, Higham, 2018, "Accelerating the solution of linear systems by iterative
        refinement in three precisions", algorithm 1.1.

    Differences:
        The matrix is scaled to size one, the residual at each correction, so that the
        low precision neither overflows nor vanishes.
    """

    inner: lx.AbstractLinearSolver = lx.LU()
    dtype: Any = eqx.field(static=True, default=jnp.float32)
    max_refinements: int = eqx.field(static=True, default=20)

    def __check_init__(self):
        check_positive("IterativeRefinement", "max_refinements", self.max_refinements)

    def init(self, operator, options):
        if operator.in_size() != operator.out_size():
            raise ValueError(
                "IterativeRefinement: `operator` must be square (got shape "
                f"({operator.out_size()}, {operator.in_size()})). Use lineax.QR or "
                "lineax.SVD."
            )
        matrix = operator.as_matrix()
        scale = jnp.max(jnp.abs(matrix))
        scale = jnp.where(scale > 0, scale, 1)
        low = lx.MatrixLinearOperator(
            (matrix / scale).astype(self.dtype), operator_tags(operator)
        )
        return operator, scale, self.inner.init(low, options)

    def compute(self, state, vector, options):
        operator, scale, low = state
        right, _ = ravel_pytree(vector)
        zero = jax.tree_util.tree_map(
            lambda s: jnp.zeros(s.shape, s.dtype), operator.in_structure()
        )
        flat, unravel = ravel_pytree(zero)
        goal = _norm(right) * float(np.finfo(right.dtype).eps)

        def correct(carry):
            x, best, error, count = carry
            gap = right - ravel_pytree(operator.mv(unravel(x)))[0]
            size = jnp.max(jnp.abs(gap))
            size = jnp.where(size > 0, size, 1)
            move = self.inner.compute(low, (gap / size).astype(self.dtype), options)[0]
            x = x + move.astype(x.dtype) * (size / scale)
            gap = right - ravel_pytree(operator.mv(unravel(x)))[0]
            new = _norm(gap)
            better = new < error
            # A correction that does not halve the error: the precision is reached, or
            # never will be.
            done = ~(new < error / 2) | (new <= goal)
            best = jnp.where(better, x, best)
            return (
                x,
                best,
                jnp.where(better, new, error),
                jnp.where(done, -1, count + 1),
            )

        def proceed(carry):
            *_, count = carry
            return (count >= 0) & (count < self.max_refinements)

        start = flat, flat, _norm(right), jnp.zeros((), jnp.int32)
        _, best, error, _ = jax.lax.while_loop(proceed, correct, start)
        # Half the digits at least, or it is no answer.
        fine = error <= float(np.sqrt(np.finfo(right.dtype).eps)) * _norm(right)
        result = lx.RESULTS.where(
            fine, lx.RESULTS.successful, lx.RESULTS.max_steps_reached
        )
        return unravel(best), result, {"residual": error}

    def transpose(self, state, options):
        operator, scale, low = state
        low, inner_options = self.inner.transpose(low, options)
        return (operator.T, scale, low), inner_options

    def conj(self, state, options):
        operator, scale, low = state
        low, inner_options = self.inner.conj(low, options)
        return (lx.conj(operator), scale, low), inner_options

    def assume_full_rank(self):
        return True


def operator_tags(operator) -> frozenset[object]:
    """What lineax knows of an operator, for its copy in another precision."""
    known = {
        lx.symmetric_tag: lx.is_symmetric,
        lx.positive_semidefinite_tag: lx.is_positive_semidefinite,
        lx.lower_triangular_tag: lx.is_lower_triangular,
        lx.upper_triangular_tag: lx.is_upper_triangular,
    }
    return frozenset(tag for tag, holds in known.items() if holds(operator))


def _norm(vector):
    return jnp.linalg.norm(vector)
