"""Linear solves for derivatives: lineax inside, NaN instead of a plausible number.

A Jacobian of at most `DENSE_SIZE` rows is materialised and factorised once; a larger
one is only applied. In both cases a system that has no reliable answer gives NaN:

- a unique solution's Jacobian that proves singular (its inverse, tried on two fixed
  vectors, amplifies them as only a numerically singular matrix does);
- a non-unique solution's system whose right-hand side lies outside the range. In
  reverse mode the right-hand side is the cotangent, so a loss that depends on *which*
  solution is taken gives NaN, and one that does not is differentiated rightly;
- an iterative solve that does not reach its tolerance.

lineax's own differentiation rule raises in those cases, which under `vmap` would lose
the healthy lanes with the failing one; so the rule here is that of
`jax.lax.custom_linear_solve`, with lineax as its solver.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float

from ._trees import stop_gradient

# Above this many unknowns a dense Jacobian costs more (n evaluations of the condition
# and n^3 / 3 flops) than Krylov iterations do.
DENSE_SIZE = 512
# Fixed vectors for the singularity probe; two, since one alone may be nearly
# orthogonal to the null vector.
_PROBES = 2


def solve_jacobian(
    function: Callable,
    point: Float[Array, " n"],
    vector: Float[Array, " n"],
    *,
    tags: frozenset[str] = frozenset(),
    unique: bool = True,
    linear_solver: lx.AbstractLinearSolver | None = None,
) -> Float[Array, " n"]:
    """Solves `J v = vector` for the Jacobian `J` of `function` at `point`.

    Linear in `vector` for JAX, so it transposes and differentiates to any order.

    Args:
        function: Maps an (n,) vector to an (n,) vector.
        point: Where to linearise.
        vector: The right-hand side.
        tags: A subset of `{"symmetric", "positive_semidefinite"}`.
        unique: Whether a singular system has no answer (`True`) or the minimum-norm
            answer is meant (`False`).
        linear_solver: Used instead of the automatic choice.
    """
    dense = point.size <= DENSE_SIZE and linear_solver is None
    definite = "positive_semidefinite" in tags
    symmetric = definite or "symmetric" in tags
    if dense:
        matrix = jax.jacfwd(function)(point)
        operator = lx.MatrixLinearOperator(
            jax.lax.stop_gradient(matrix), _marks(symmetric, definite)
        )
        solver = dense_solver(definite, unique)
        product = matrix.__matmul__
    else:
        _, product = jax.linearize(function, point)
        frozen = jax.lax.stop_gradient(point)
        _, apply = jax.linearize(function, frozen)
        operator = lx.FunctionLinearOperator(
            apply, jax.eval_shape(lambda: point), _marks(symmetric, definite)
        )
        solver = linear_solver or _krylov_solver(definite, unique, point)
    state = stop_gradient(solver.init(operator, options={}))
    check = (
        _dense_check(operator, solver, state, unique)
        if dense
        else _krylov_check(unique)
    )

    def forward(_, b):
        return _guarded(operator, solver, state, check, b)

    def backward(_, b):
        transposed, _ = solver.transpose(state, {})
        return _guarded(operator.T, solver, transposed, check, b)

    return jax.lax.custom_linear_solve(
        product, vector, forward, None if symmetric else backward, symmetric=symmetric
    )


def dense_solver(definite: bool, unique: bool) -> lx.AbstractLinearSolver:
    """The factorisation for a dense matrix of this kind."""
    if not unique:
        return lx.SVD()
    return lx.Cholesky() if definite else lx.LU()


def is_singular(operator, solver, state) -> Array:
    """Whether the inverse amplifies fixed vectors as only a singular matrix does."""
    size, dtype = operator.in_size(), operator.as_matrix().dtype
    probes = np.random.default_rng(0).standard_normal((_PROBES, size))
    probes = jnp.asarray(probes / np.linalg.norm(probes, axis=1, keepdims=True), dtype)
    answers = jax.vmap(lambda p: solver.compute(state, p, {})[0])(probes)
    growth = jnp.max(jnp.linalg.norm(answers, axis=1))
    growth = growth * jnp.linalg.norm(operator.as_matrix())
    # A random unit vector has a component of about 1/sqrt(n) along the null vector,
    # and rounding leaves a smallest singular value of about eps |A|.
    return ~(growth < float(0.1 / (np.sqrt(size) * np.finfo(dtype).eps)))


def _guarded(operator, solver, state, check, vector):
    # Of norm one, since Krylov methods give up on very small right-hand sides.
    norm = jnp.linalg.norm(vector)
    scaled = vector / jnp.where(norm > 0, norm, 1)
    answer = lx.linear_solve(operator, scaled, solver, state=state, throw=False)
    wrong = check(operator, answer, scaled)
    return jnp.where(wrong, jnp.nan, norm * answer.value)


def _dense_check(operator, solver, state, unique):
    if not unique:
        return lambda operator, answer, vector: _gap_exceeds(
            0.5, operator, answer, vector
        )
    singular = is_singular(operator, solver, state)
    return lambda operator, answer, vector: singular


def _krylov_check(unique):
    def check(operator, answer, vector):
        # lineax also reports a failure where rounding alone keeps it from its
        # tolerance: the true residual decides. A least-squares method succeeds on an
        # inconsistent system too, which a non-unique problem must not hide.
        suspect = jnp.asarray(not unique) | (answer.result != lx.RESULTS.successful)
        return suspect & _gap_exceeds(0.6, operator, answer, vector)

    return check


def _gap_exceeds(power, operator, answer, vector):
    """Whether `|A v - b| > eps**power |b|`, or is NaN."""
    gap = jnp.linalg.norm(operator.mv(answer.value) - vector)
    slack = float(np.finfo(vector.dtype).eps) ** power
    return ~(gap <= slack * jnp.linalg.norm(vector))


def _krylov_solver(definite, unique, point) -> lx.AbstractLinearSolver:
    eps = float(np.finfo(point.dtype).eps)
    # Tight, since a derivative's error is the system's; not at eps, where Krylov
    # residuals stagnate.
    rtol, atol = eps**0.75, float(np.finfo(point.dtype).tiny)
    limit = 10 * point.size
    if not unique:
        return lx.LSMR(rtol, atol, max_steps=limit)
    if definite:
        return lx.CG(rtol, atol, max_steps=limit)
    return lx.GMRES(rtol, atol, max_steps=limit, restart=50)


def _marks(symmetric: bool, definite: bool) -> frozenset[object]:
    marks = set()
    if symmetric:
        marks.add(lx.symmetric_tag)
    if definite:
        marks.add(lx.positive_semidefinite_tag)
    return frozenset(marks)
