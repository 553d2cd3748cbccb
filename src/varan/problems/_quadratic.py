"""Convex quadratic programs, with their multipliers as unknowns.

`min x'Qx / 2 + c'x` subject to `A x = b`, `G x <= h`, `lower <= x <= upper`. The
unknown is a `KKTPoint(x, equality, inequality)`; the bounds need no unknowns, since
stationarity over a box is `clip(g, x - upper, x - lower) = 0` for the Lagrangian's
gradient `g`. One evaluation of the condition costs one product with each of `Q`, `A`,
`A'`, `G`, `G'`.

The derivative of the solution is that of its active constraints. A constraint that is
active with a zero multiplier (to half the digits) could be counted or not, with
another derivative each: it takes part in none, so that the linear system is singular
and the derivative NaN, as for every solution that is not unique.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..core import Certificate, Problem
from ..core._checks import check_finite, check_nonempty, check_positive, is_traced
from ..core.optimality import KKTPoint

Matrix = Any  # an array, or a lineax operator


class Quadratic(Problem):
    """A convex quadratic program.

    `min_x x'Qx / 2 + c'x` subject to `A x = b`, `G x <= h`, `lower <= x <= upper`.
    `solve` it from `problem.start()` with a solver of `varan.constrained`, or call
    `varan.constrained.quadratic_program`.

    Its certificate: `f(x) - min f <= value` by weak duality, the Lagrangian's minimum
    over the box bounded from below by convexity, and no constraint missed by more. For
    that each coordinate needs two finite bounds, or `curvature`; where it has neither,
    only a gradient of exactly zero proves anything, and the value is infinite. Without
    bounds and curvature the certificate is the residual. Its details say further how
    far a run that ended `INFEASIBLE` or `UNBOUNDED` has proved it:

    - `farkas_margin`, `farkas_violation`: for the multipliers scaled to size one (and
      negative `inequality` ones at zero), every feasible point has
      `margin <= violation * ||x||_1`. So none exists where `margin > 0 = violation`;
      else none nearer to zero than `margin / violation`.
    - `ray_margin`, `ray_violation`: for `x` scaled to size one, how steeply the
      objective falls along it, and by how much it misses a direction without
      curvature that never leaves the feasible set, at most.

    Args:
        Q: Symmetric positive semidefinite, shape (n, n): an array, or a lineax operator
            for matrix-free solvers. Concrete arrays are checked for symmetry and for
            negative diagonal entries; definiteness is otherwise the caller's promise.
            Derivatives are with respect to its symmetric part.
        c: Shape (n,).
        A: Equality rows, shape (p, n), an array or a lineax operator; with `b`.
        b: Shape (p,).
        G: Inequality rows, shape (q, n), an array or a lineax operator; with `h`.
        h: Shape (q,).
        lower: Shape (n,) or (); entries may be -inf.
        upper: Shape (n,) or (); entries may be +inf.
        curvature: A promise: positive, at most the smallest eigenvalue of `Q`; for the
            certificate alone.
        unique: `False` where the solution or its multipliers are a set for all nearby
            data (dependent rows, a singular `Q`); see `varan.Problem`.

    Raises:
        TypeError: If the arrays are not floating, or not of one dtype.
        ValueError: If shapes do not fit, an array is empty or not finite, `Q` is not
            symmetric or has a negative diagonal entry, bounds cross, or `curvature` is
            not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import solve
        >>> from varan.constrained import OSQP
        >>> from varan.problems import Quadratic
        >>> problem = Quadratic(
        ...     jnp.eye(2), -jnp.array([2.0, 1.0]), A=jnp.ones((1, 2)), b=jnp.ones(1),
        ...     lower=0.0,
        ... )
        >>> solve(problem, OSQP(), problem.start()).x.x.round(3).tolist()
        [1.0, 0.0]

    Source:
        Boyd, Vandenberghe, 2004, "Convex Optimization", sections 5.2 and 5.8; the
        proofs of infeasibility: Banjac, Goulart, Stellato, Boyd, 2019,
        "Infeasibility detection in the alternating direction method of multipliers
        for convex optimization".
    """

    Q: Matrix
    c: Float[Array, " n"]
    A: Matrix | None
    b: Float[Array, " p"] | None
    G: Matrix | None
    h: Float[Array, " q"] | None
    lower: Float[Array, " n"] | None
    upper: Float[Array, " n"] | None
    curvature: Float[Array, ""] | None
    _unique: bool = eqx.field(static=True)

    def __init__(
        self,
        Q: Matrix,
        c: Float[Array, " n"],
        *,
        A: Matrix | None = None,
        b: Float[Array, " p"] | None = None,
        G: Matrix | None = None,
        h: Float[Array, " q"] | None = None,
        lower: Float[Array, ...] | float | None = None,
        upper: Float[Array, ...] | float | None = None,
        curvature: Float[Array, ""] | float | None = None,
        unique: bool = True,
    ):
        self.c = c = _vector("c", c, None)
        n = c.size
        self.Q = _symmetric(_matrix("Q", Q, (n, n), c.dtype))
        self.A, self.b = _rows("A", "b", A, b, n, c.dtype)
        self.G, self.h = _rows("G", "h", G, h, n, c.dtype)
        self.lower = _bound("lower", lower, n, c.dtype)
        self.upper = _bound("upper", upper, n, c.dtype)
        _check_crossing(self.lower, self.upper)
        if curvature is not None:
            check_positive("Quadratic", "curvature", curvature)
            curvature = jnp.asarray(curvature, c.dtype)
        self.curvature = curvature
        self._unique = unique

    def start(self, x: Float[Array, " n"] | None = None) -> KKTPoint:
        """A first unknown: `x` (by default zero) moved into the box, no multipliers."""
        x = jnp.zeros_like(self.c) if x is None else jnp.asarray(x, self.c.dtype)
        if x.shape != self.c.shape:
            raise ValueError(
                f"Quadratic.start: `x` must have shape {self.c.shape} (got {x.shape})."
            )
        return KKTPoint(
            jnp.clip(x, *self.box),
            None if self.b is None else jnp.zeros_like(self.b),
            None if self.h is None else jnp.zeros_like(self.h),
        )

    @property
    def box(self) -> tuple[Array, Array]:
        """The bounds, infinite where there are none."""
        lower = jnp.full_like(self.c, -jnp.inf) if self.lower is None else self.lower
        upper = jnp.full_like(self.c, jnp.inf) if self.upper is None else self.upper
        return lower, upper

    @property
    def matrix_free(self) -> bool:
        """Whether one of the matrices is an operator."""
        return any(_is_operator(M) for M in (self.Q, self.A, self.G))

    def objective(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        """The objective at `x`, feasible or not."""
        return x @ (apply(self.Q, x) / 2 + self.c)

    def condition(self, x):
        self._check_point(x)
        image, gap, slack, pull = self._products(x)
        gradient = image + self.c + pull
        lower, upper = self.box
        tiny = float(np.sqrt(np.finfo(self.c.dtype).eps))
        steep = tiny * _largest(image, self.c, x.inequality)
        near = tiny * _largest(x.x, _finite(lower), _finite(upper), self.h)
        # What the data alone do at x: all that a tie lets act (see `_tie`).
        still = jax.tree.map(jax.lax.stop_gradient, x)
        image, _, distance, pull = self._products(still)
        first = _stationarity(gradient, x.x, lower, upper)
        tied = _is_bound_tied(gradient, x.x, lower, upper, steep, near)
        at_lower = still.x - lower < upper - still.x
        to_bound = still.x - jnp.where(at_lower, lower, upper)
        first = _tie(tied, first, image + self.c + pull + to_bound)
        if self.h is None:
            return KKTPoint(first, gap, None)
        last = jnp.where(x.inequality < slack, x.inequality, slack)
        tied = (jnp.abs(x.inequality) <= steep) & (jnp.abs(slack) <= near)
        return KKTPoint(first, gap, _tie(tied, last, distance))

    def certify(self, x, condition, tol):
        x = KKTPoint(*x)
        if x.inequality is not None:
            x = x._replace(inequality=jnp.maximum(x.inequality, 0))
        image, gap, slack, pull = self._products(x)
        lower, upper = self.box
        gradient = image + self.c + pull
        missed = _largest(
            jnp.maximum(lower - x.x, 0),
            jnp.maximum(x.x - upper, 0),
            gap,
            None if self.h is None else jnp.maximum(-slack, 0),
        )
        # f(x) - min L, where f(x) - L(x) is what the multipliers make of the slacks.
        product = _dot(x.inequality, slack) - _dot(x.equality, gap)
        suboptimality = product + self._above_minimum(gradient, x.x)
        value = x.x @ (image / 2 + self.c)
        right = _dot(x.equality, self.b) + _dot(x.inequality, self.h)
        farkas = farkas_numbers(x[1:], pull, right, lower, upper)
        moves: list[Any] = [(x.x, lower, upper)]
        if self.b is not None:
            moves.append((gap + self.b, self.b, self.b))
        if self.h is not None:
            moves.append((self.h - slack, jnp.full_like(self.h, -jnp.inf), self.h))
        ray = ray_numbers(x.x, image, -(self.c @ x.x), moves)
        details = {
            "objective": value,
            "dual_bound": value - suboptimality,
            "infeasibility": missed,
            "stationarity": _largest(condition[0]),
            "complementarity": _largest(condition[2], x.x[:0]),
            "farkas_margin": farkas[0],
            "farkas_violation": farkas[1],
            "ray_margin": ray[0],
            "ray_violation": ray[1],
        }
        if self.curvature is None and (self.lower is None or self.upper is None):
            return Certificate(
                "residual",
                self.residual(condition),
                tol=tol,
                proof=True,
                statement=(
                    "value is the norm of the optimality condition at x; a bound of "
                    "f(x) - min f needs finite bounds or `curvature`"
                ),
                details=details,
            )
        return Certificate(
            "duality gap",
            jnp.maximum(suboptimality, missed),
            tol=tol,
            proof=True,
            statement="f(x) - min f <= value, and x misses no constraint by more",
            details=details,
        )

    @property
    def unique(self):
        return self._unique

    def _products(self, point) -> tuple[Array, Any, Any, Array]:
        """`Q x`, `A x - b`, `h - G x`, and `A' equality + G' inequality`."""
        x, nu, lam = point
        gap = None if self.b is None else apply(self.A, x) - self.b
        slack = None if self.h is None else self.h - apply(self.G, x)
        pull = jnp.zeros_like(x)
        if self.A is not None:
            pull = pull + apply_transpose(self.A, nu)
        if self.G is not None:
            pull = pull + apply_transpose(self.G, lam)
        return apply(self.Q, x), gap, slack, pull

    def _above_minimum(self, gradient, x):
        """At least `L(x)` less the Lagrangian's minimum over the box."""
        lower, upper = self.box
        if self.curvature is None:
            move = jnp.where(gradient > 0, lower - x, upper - x)
            falls = gradient * jnp.where(gradient == 0, 0, move)
        else:
            move = jnp.clip(-gradient / self.curvature, lower - x, upper - x)
            falls = gradient * move + self.curvature * move**2 / 2
        return -jnp.sum(falls)

    def _check_point(self, point):
        shapes = [None if v is None else jnp.shape(v) for v in point]
        wanted = [None if v is None else v.shape for v in (self.c, self.b, self.h)]
        if shapes != wanted:
            raise ValueError(
                f"Quadratic: the unknown must be a KKTPoint of shapes {wanted} (got "
                f"{shapes}). Begin with `problem.start()`."
            )


def apply(matrix: Matrix, vector: Array) -> Array:
    """The product of an array or a lineax operator with a vector."""
    return matrix.mv(vector) if _is_operator(matrix) else matrix @ vector


def apply_transpose(matrix: Matrix, vector: Array) -> Array:
    """The product of its transpose with a vector."""
    return matrix.T.mv(vector) if _is_operator(matrix) else vector @ matrix


def row_count(matrix: Matrix) -> int:
    """The rows of an array or a lineax operator."""
    return matrix.out_size() if _is_operator(matrix) else matrix.shape[0]


def farkas_numbers(multipliers, pull, right, lower, upper):
    """Margin and violation of multipliers as a proof that no point is feasible.

    Every feasible `x` in the box has `pull'x <= right`. The margin is by how much the
    box refuses that, coordinates without the bound that it takes left out; the
    violation is the largest entry of `pull` left out. Bounds that cross are a proof of
    their own.

    Args:
        multipliers: Arrays, or `None`; nonnegative those of inequalities.
        pull: The rows' combination with these weights.
        right: The right sides' combination.
        lower, upper: The box.
    """
    bound = jnp.where(pull > 0, lower, upper)
    open_ = jnp.isinf(bound)
    size = _nonzero(_largest(*multipliers, pull[:0]))
    margin = (jnp.sum(jnp.where(open_, 0, pull * _finite(bound))) - right) / size
    violation = _largest(jnp.where(open_, pull, 0)) / size
    crossing = jnp.max(lower - upper)
    return (
        jnp.where(crossing > 0, crossing, margin),
        jnp.where(crossing > 0, 0, violation),
    )


def ray_numbers(ray, image, fall, moves):
    """Margin and violation of a direction as a proof that the objective is unbounded.

    Args:
        ray: The direction.
        image: `Q ray`.
        fall: `-c'ray`.
        moves: Triples of what moves along the ray, and its lower and upper bounds.
    """
    size = _nonzero(_largest(ray))
    wrong = [
        jnp.where(jnp.isfinite(upper), jnp.maximum(move, 0), 0)
        + jnp.where(jnp.isfinite(lower), jnp.maximum(-move, 0), 0)
        for move, lower, upper in moves
    ]
    return fall / size, _largest(image, *wrong) / size


def _stationarity(gradient, x, lower, upper):
    """`x - clip(x - gradient, lower, upper)`, exact where there are no bounds."""
    below, above = x - lower, x - upper
    value = jnp.where(gradient < above, above, gradient)
    value = jnp.where(gradient > below, below, value)
    return jnp.where(lower == upper, (below + above) / 2, value)


def _is_bound_tied(gradient, x, lower, upper, steep, near):
    """Whether a bound is active with a gradient of zero."""
    at_bound = (jnp.abs(x - lower) <= near) | (jnp.abs(x - upper) <= near)
    return (lower != upper) & at_bound & (jnp.abs(gradient) <= steep)


def _tie(tied, value, moves):
    """`value`, of which at a tie only the data move, as `moves` does.

    The unknown does not act there, so that the Jacobian's row is zero and the matrix
    singular, while the data do: the derivative is then NaN, and not zero.
    """
    return jnp.where(tied, jax.lax.stop_gradient(value - moves) + moves, value)


def _largest(*arrays):
    """The largest absolute entry; zero where there is none."""
    given = [jnp.max(jnp.abs(v), initial=0) for v in arrays if v is not None]
    return jax.lax.stop_gradient(jnp.max(jnp.stack(given)))


def _finite(array):
    return jnp.where(jnp.isfinite(array), array, 0)


def _nonzero(size):
    return jnp.where(size > 0, size, 1)


def _dot(multiplier, values):
    return 0 if multiplier is None else multiplier @ values


def _is_operator(matrix) -> bool:
    return hasattr(matrix, "mv")  # lineax is imported by whoever made it


def _vector(name, value, size):
    value = jnp.asarray(value)
    _check_floating(name, value.dtype)
    if value.ndim != 1 or (size is not None and value.size != size):
        wanted = "(n,)" if size is None else f"({size},)"
        raise ValueError(
            f"Quadratic: `{name}` must have shape {wanted} (got {value.shape})."
        )
    check_nonempty("Quadratic", name, value)
    check_finite("Quadratic", name, value)
    return value


def _matrix(name, value, shape, dtype):
    if _is_operator(value):
        got = (value.out_size(), value.in_size())
        found = value.out_structure().dtype
    else:
        value = jnp.asarray(value)
        got, found = value.shape, value.dtype
    _check_floating(name, found)
    if len(got) != 2 or any(
        s not in (None, g) for s, g in zip(shape, got, strict=True)
    ):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"Quadratic: `{name}` must have shape ({wanted}) (got {got}).")
    if found != dtype:
        raise TypeError(
            f"Quadratic: `{name}` must have the dtype of `c`, {dtype} (got {found}). "
            "Convert one of them."
        )
    if not _is_operator(value):
        check_nonempty("Quadratic", name, value)
        check_finite("Quadratic", name, value)
    return value


def _symmetric(Q):
    if _is_operator(Q):
        return Q
    if not is_traced(Q):
        array = np.asarray(Q)
        skew, size = np.max(np.abs(array - array.T)), np.max(np.abs(array))
        if skew > np.sqrt(np.finfo(array.dtype).eps) * size:
            raise ValueError(
                f"Quadratic: `Q` must be symmetric (got entries that differ by "
                f"{skew:.3g}). Pass (Q + Q.T) / 2."
            )
        if np.min(np.diagonal(array)) < 0:
            raise ValueError(
                "Quadratic: `Q` must be positive semidefinite (got a diagonal entry "
                f"{np.min(np.diagonal(array)):.3g})."
            )
    return (Q + Q.T) / 2


def _rows(name, side, matrix, right, n, dtype):
    if (matrix is None) != (right is None):
        raise ValueError(
            f"Quadratic: `{name}` and `{side}` must come together. Pass both or "
            "neither."
        )
    if matrix is None:
        return None, None
    matrix = _matrix(name, matrix, (None, n), dtype)
    rows = row_count(matrix)
    right = _vector(side, right, rows)
    if right.dtype != dtype:
        raise TypeError(
            f"Quadratic: `{side}` must have the dtype of `c`, {dtype} (got "
            f"{right.dtype}). Convert one of them."
        )
    return matrix, right


def _bound(name, value, n, dtype):
    if value is None:
        return None
    value = jnp.asarray(value, dtype)
    if value.shape not in ((), (n,)):
        raise ValueError(
            f"Quadratic: `{name}` must have shape ({n},) or () (got {value.shape})."
        )
    if not is_traced(value):
        array = np.asarray(value)
        wrong = np.inf if name == "lower" else -np.inf
        if np.any(np.isnan(array) | (array == wrong)):
            raise ValueError(
                f"Quadratic: `{name}` must not hold NaN or {wrong} (got "
                f"{np.sum(np.isnan(array) | (array == wrong))} such entries)."
            )
    return jnp.broadcast_to(value, (n,))


def _check_crossing(lower, upper):
    if lower is None or upper is None or is_traced(lower) or is_traced(upper):
        return
    crossing = np.asarray(lower) > np.asarray(upper)
    if np.any(crossing):
        raise ValueError(
            f"Quadratic: `lower` must not exceed `upper` (got {np.sum(crossing)} "
            "entries that do)."
        )


def _check_floating(name, dtype):
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"Quadratic: `{name}` must be floating (got {dtype}). Convert it, for "
            "instance with jnp.asarray(value, float)."
        )
