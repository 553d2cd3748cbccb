"""The commonest call: a quadratic program's data in, its solution out."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float

from ..core import Solution, solve
from ..core.optimality import KKTPoint
from ..problems import Quadratic
from ..problems._quadratic import Matrix
from ._equality_qp import EqualityQP
from ._osqp import OSQP


def quadratic_program(
    Q: Matrix,
    c: Float[Array, " n"],
    *,
    A: Matrix | None = None,
    b: Float[Array, " p"] | None = None,
    G: Matrix | None = None,
    h: Float[Array, " q"] | None = None,
    lower: Float[Array, ...] | float | None = None,
    upper: Float[Array, ...] | float | None = None,
    unique: bool = True,
    start: KKTPoint | None = None,
    tol: float | Float[Array, ""] | None = None,
    max_steps: int = 1000,
    differentiate: Literal["implicit", "none"] = "implicit",
) -> Solution:
    """Minimises `x'Qx / 2 + c'x` with `A x = b`, `G x <= h`, `lower <= x <= upper`.

    With equalities alone (or nothing) `EqualityQP` solves it, in all other cases, and
    for operators, `OSQP`; with bounds alone and a well-conditioned `Q`,
    `BoxCoordinateDescent` is faster, in batches by far. Derivatives are right with
    respect to all arrays; batches are made with `jax.vmap`. For repeated solves jit the
    caller: that saves the checks of the data.

    Args:
        Q: Symmetric positive semidefinite, shape (n, n).
        c: Shape (n,).
        A: Equality rows, shape (p, n); with `b`.
        b: Shape (p,).
        G: Inequality rows, shape (q, n); with `h`.
        h: Shape (q,).
        lower: Shape (n,) or (); entries may be -inf.
        upper: Shape (n,) or (); entries may be +inf.
        unique: See `varan.problems.Quadratic`.
        start: A nearby solution's `x`, to start from.
        tol: See `varan.solve`.
        max_steps: See `varan.solve`.
        differentiate: See `varan.solve`.

    Returns:
        A `Solution` whose `x` is a `KKTPoint`: the point is `solution.x.x`.

    Raises:
        TypeError: See `varan.problems.Quadratic`.
        ValueError: See `varan.problems.Quadratic`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.constrained import quadratic_program
        >>> def nearest(point):
        ...     return quadratic_program(jnp.eye(2), -point, lower=0.0).x.x
        >>> point = jnp.array([1.0, -2.0])
        >>> gradient = jax.grad(lambda p: nearest(p).sum())(point)
        >>> nearest(point).round(3).tolist(), abs(gradient).round(3).tolist()
        ([1.0, 0.0], [1.0, 0.0])

    Source:
        See the solvers.
    """
    problem = Quadratic(
        Q, c, A=A, b=b, G=G, h=h, lower=lower, upper=upper, unique=unique
    )
    equalities = G is None and lower is None and upper is None
    solver = EqualityQP() if equalities and not problem.matrix_free else OSQP()
    return solve(
        problem,
        solver,
        problem.start() if start is None else start,
        tol=tol,
        max_steps=max_steps,
        differentiate=differentiate,
    )
