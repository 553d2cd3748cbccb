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
from functools import partial

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float

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
    reliable: Bool[Array, ""] | bool = True,
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
        reliable: Where false, the answer is NaN (and still zero for zero).
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
        product = partial(jnp.matmul, matrix)
    else:
        _, product = jax.linearize(function, point)
        frozen = jax.lax.stop_gradient(point)
        _, apply = jax.linearize(function, frozen)
        operator = lx.FunctionLinearOperator(
            apply, jax.eval_shape(lambda: point), _marks(symmetric, definite)
        )
        solver = linear_solver or _krylov_solver(definite, unique, point)
    state = stop_gradient(solver.init(operator, options={}))
    wrong = ~jnp.asarray(reliable)
    if unique and dense:
        wrong = wrong | is_singular(operator, solver, state)
    elif unique and linear_solver is None:
        wrong = wrong | _fails_probe(operator, solver, state)
    if dense and definite:
        # Cholesky reads one triangle only: the promise must hold.
        matrix = operator.as_matrix()
        skew = jnp.linalg.norm(matrix - matrix.T)
        wrong = wrong | ~(skew <= _root_eps(point) * jnp.linalg.norm(matrix))

    def answer(operator, state, check_gap, b):
        return _guarded(operator, solver, state, wrong, check_gap, b)

    # What a non-unique problem's right-hand side may be is its own promise in forward
    # mode; in reverse mode it is whatever the loss depends on. A solver that was chosen
    # by the caller is held to its own tolerance.
    iterates = not dense and linear_solver is None

    def forward(_, b):
        return answer(operator, state, unique and iterates, b)

    def backward(_, b):
        transposed, _ = solver.transpose(state, {})
        return answer(operator.T, transposed, not unique or iterates, b)

    return jax.lax.custom_linear_solve(
        product, vector, forward, backward, symmetric=False
    )


def dense_solver(definite: bool, unique: bool) -> lx.AbstractLinearSolver:
    """The factorisation for a dense matrix of this kind."""
    if not unique:
        return lx.SVD()
    return lx.Cholesky() if definite else lx.LU()


def is_singular(operator, solver, state) -> Bool[Array, ""]:
    """Whether the inverse amplifies fixed vectors as only a singular matrix does.

    Rows and columns are scaled to size one first: a matrix that is only badly scaled
    is not singular.
    """
    matrix = jnp.abs(operator.as_matrix())
    rows = _nonzero(jnp.max(matrix, axis=1))
    columns = _nonzero(jnp.max(matrix / rows[:, None], axis=0))
    size = operator.in_size()
    answers = jax.vmap(lambda p: solver.compute(state, p * rows, {})[0] * columns)(
        _probes(size, matrix.dtype)
    )
    growth = jnp.max(jnp.linalg.norm(answers, axis=1))
    growth = growth * jnp.linalg.norm(matrix / rows[:, None] / columns[None, :])
    # A random unit vector has a component of about 1/sqrt(n) along the null vector,
    # and rounding leaves a smallest singular value of about eps |A|.
    eps = float(np.finfo(matrix.dtype).eps)
    return ~(growth < 0.1 / (float(np.sqrt(size)) * eps))


def _fails_probe(operator, solver, state) -> Bool[Array, ""]:
    """Whether a fixed random right-hand side cannot be met: it is outside the range."""
    probe = _probes(operator.in_size(), operator.in_structure().dtype)[0]
    answer = lx.linear_solve(operator, probe, solver, state=state, throw=False)
    gap = jnp.linalg.norm(operator.mv(answer.value) - probe)
    return ~(gap <= 10 * _root_eps(probe))


def _probes(size, dtype):
    probes = np.random.default_rng(0).standard_normal((_PROBES, size))
    probes = probes / np.linalg.norm(probes, axis=1, keepdims=True)
    return jnp.asarray(probes, dtype)


def _nonzero(scales):
    return jnp.where(scales > 0, scales, 1)


def _guarded(operator, solver, state, wrong, check_gap, vector):
    # Of size one, since Krylov methods give up on very small right-hand sides; and
    # zero for zero, so that a lane masked out of a loss stays out of its gradient.
    largest = jnp.max(jnp.abs(vector))
    scaled = vector / _nonzero(largest)
    answer = lx.linear_solve(operator, scaled, solver, state=state, throw=False)
    if not check_gap:
        wrong = wrong | (answer.result == lx.RESULTS.max_steps_reached)
    else:
        gap = jnp.linalg.norm(operator.mv(answer.value) - scaled)
        wrong = wrong | ~(gap <= _root_eps(vector) * jnp.linalg.norm(scaled))
    value = jnp.where(wrong, jnp.nan, largest * answer.value)
    return jnp.where(largest == 0, jnp.zeros_like(value), value)


def _root_eps(array) -> float:
    return float(np.sqrt(np.finfo(array.dtype).eps))


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
