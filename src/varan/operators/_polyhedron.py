"""Projection on a polyhedron `{x : A x = b, G x <= h}` by ADMM.

Splits `min ||x - point||^2 / 2` from the bounds on `z = M x`, `M` the rows of `A` and
`G` at unit length, and alternates: a linear system that never changes (one eigenvalue
decomposition of `M M'`, whatever the penalty), a clip, a multiplier step. The penalty
adapts every ten steps to the ratio of the two residuals, and the next projection of a
nearby point starts from the last multipliers.

One step costs O(m n + m^2) for m rows; preparing costs O(m^2 (m + n)). Without
inequalities the same decomposition projects in one step.

Source: S. Boyd et al., Distributed Optimization and Statistical Learning via the
Alternating Direction Method of Multipliers (2011), section 5.2; the penalty rule
follows B. Stellato et al., OSQP (2020), section 5.2.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..core._checks import check_finite, check_positive, check_shape, is_traced
from ..core._implicit import implicit_root

# Equality rows know their side: a stiffer penalty on them saves steps (OSQP's choice).
_EQUALITY_WEIGHT = 30.0
_RELAXATION = 1.6
_BLOCK = 10


class PolyhedronProjection(eqx.Module):
    """The outcome of a projection on a polyhedron.

    Args:
        x: The projection, as far as `residual` says.
        multipliers: One number a row (`A` first, then `G`, nonnegative there) with
            `x = point - [A; G]' multipliers` at the exact projection. Pass it as the
            next call's `warm`.
        residual: The larger of the distance by which `x` misses a single row's set
            at most and `||x - point + [A; G]' multipliers||`, relative to
            `1 + ||point||`; zero exactly at the projection.
        steps: ADMM steps taken.
        converged: Whether `residual <= tol`.
    """

    x: Float[Array, " n"]
    multipliers: Float[Array, " m"]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Array


class Polyhedron(eqx.Module):
    """The set `{x : A x = b, G x <= h}`, prepared for many projections.

    Args:
        A: Equality rows, shape (p, n); `None` for none. Dependent rows are fine.
        b: Their right sides, shape (p,).
        G: Inequality rows, shape (q, n); `None` for none.
        h: Their right sides, shape (q,).

    Raises:
        ValueError: if there are no rows, a row is zero, shapes do not fit, or data
            are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import Polyhedron
        >>> plane, sign = jnp.ones((1, 3)), -jnp.eye(3)
        >>> triangle = Polyhedron(plane, jnp.ones(1), sign, jnp.zeros(3))
        >>> result = triangle.project(jnp.array([1.5, 1.0, -3.0]), tol=1e-5)
        >>> bool(jnp.allclose(result.x, jnp.array([0.75, 0.25, 0.0]), atol=1e-3))
        True

    Source: Boyd et al. (2011), section 5.2.
    """

    matrix: Float[Array, "m n"]
    lower: Float[Array, " m"]
    upper: Float[Array, " m"]
    equalities: int = eqx.field(static=True)
    _scale: Float[Array, " m"]
    _vectors: Float[Array, "m m"]
    _values: Float[Array, " m"]

    def __init__(self, A=None, b=None, G=None, h=None):
        matrices, lowers, uppers = [], [], []
        for name, side, M, v in (("A", "b", A, b), ("G", "h", G, h)):
            if (M is None) != (v is None):
                raise ValueError(
                    f"Polyhedron: `{name}` and `{side}` must come together. Pass both "
                    "or neither."
                )
            if M is None:
                continue
            M, v = jnp.asarray(M), jnp.asarray(v)
            check_shape("Polyhedron", name, M, (None, None))
            check_shape("Polyhedron", side, v, (M.shape[0],))
            check_finite("Polyhedron", name, M)
            check_finite("Polyhedron", side, v)
            matrices.append(M)
            lowers.append(v if name == "A" else jnp.full_like(v, -jnp.inf))
            uppers.append(v)
        if not matrices or sum(M.shape[0] for M in matrices) == 0:
            raise ValueError("Polyhedron: at least one row is needed (got none).")
        if len({M.shape[1] for M in matrices}) > 1:
            raise ValueError(
                "Polyhedron: `A` and `G` must have as many columns as each other (got "
                f"{matrices[0].shape[1]} and {matrices[1].shape[1]})."
            )
        self.matrix = jnp.concatenate(matrices)
        self.lower = jnp.concatenate(lowers)
        self.upper = jnp.concatenate(uppers)
        norms = jnp.linalg.norm(self.matrix, axis=1)
        if not is_traced(norms) and not bool(jnp.all(norms > 0)):
            raise ValueError("Polyhedron: no row of `A` or `G` may be zero.")
        self.equalities = 0 if A is None else matrices[0].shape[0]
        equality = jnp.arange(norms.size) < self.equalities
        weights = jnp.where(equality, _EQUALITY_WEIGHT, 1.0).astype(norms.dtype)
        self._scale = weights / norms
        rows = self._scale[:, None] * self.matrix
        values, self._vectors = jnp.linalg.eigh(rows @ rows.T)
        self._values = jnp.maximum(values, 0)

    def project(
        self,
        point: Float[Array, " n"],
        warm: Float[Array, " m"] | None = None,
        *,
        tol: Float[Array, ""] | float | None = None,
        max_steps: int = 2000,
    ) -> PolyhedronProjection:
        """The nearest point of the set.

        Args:
            point: A vector.
            warm: Multipliers of a nearby projection.
            tol: Stop at this relative residual; by default the square root of the
                dtype's rounding unit.
            max_steps: At most so many steps, rounded up to tens.

        Returns:
            A `PolyhedronProjection`; `converged` is `False` when `max_steps` came
            first or the set is empty, and derivatives are then NaN. Derivatives are
            those of the active rows, whatever the number of steps.

        Raises:
            ValueError: if the shapes do not fit or `tol` is not positive.
        """
        m, n = self.matrix.shape
        check_shape("Polyhedron.project", "point", point, (n,))
        if tol is None:
            tol = float(jnp.finfo(point.dtype).eps) ** 0.5
        check_positive("Polyhedron.project", "tol", tol)
        if warm is None:
            warm = jnp.zeros(m, point.dtype)
        check_shape("Polyhedron.project", "warm", warm, (m,))
        stopped = jax.lax.stop_gradient((self, point, warm, tol))
        direct = self.equalities == m
        run = _solve_directly if direct else _iterate
        x, multipliers, residual, steps = run(*stopped, max_steps)
        active = (jnp.arange(m) < self.equalities) | (multipliers > 0)

        def condition(pair):
            x, y = pair
            gap = self.matrix @ x - self.upper
            pull = x - point + self.matrix.T @ y
            return jnp.concatenate([pull, jnp.where(active, gap, y)])

        # Dependent active rows leave `x` unique and the multipliers not.
        x, multipliers = implicit_root(
            condition, (x, multipliers), unique=False, reliable=residual <= tol
        )
        return PolyhedronProjection(x, multipliers, residual, steps, residual <= tol)


def _solve_directly(polyhedron, point, warm, tol, max_steps):
    """Without inequalities the projection is one solve with the decomposition."""
    del warm, tol, max_steps
    scale, vectors = polyhedron._scale, polyhedron._vectors
    values = polyhedron._values
    rows, right = scale[:, None] * polyhedron.matrix, scale * polyhedron.upper
    # Dependent rows leave eigenvalues that are zero up to rounding.
    floor = 10 * values.size * jnp.finfo(values.dtype).eps * jnp.max(values)
    inverse = jnp.where(values > floor, 1 / jnp.where(values > floor, values, 1), 0)

    def multipliers(x):
        return vectors @ (inverse * (vectors.T @ (rows @ x - right)))

    y = multipliers(point)
    # Once more, against the rounding of the first: the set is met to eps.
    y = y + multipliers(point - rows.T @ y)
    x = point - rows.T @ y
    gap = jnp.abs(rows @ x - right) / jnp.linalg.norm(rows, axis=1)
    residual = jnp.max(gap) / (1 + jnp.linalg.norm(point))
    return x, scale * y, residual, jnp.zeros((), jnp.int32)


def _iterate(polyhedron, point, warm, tol, max_steps):
    """ADMM from the multipliers `warm`; returns x, multipliers, residual, steps."""
    scale, vectors = polyhedron._scale, polyhedron._vectors
    rows = scale[:, None] * polyhedron.matrix
    lower, upper = scale * polyhedron.lower, scale * polyhedron.upper
    lengths = jnp.linalg.norm(rows, axis=1)
    size = 1 + jnp.linalg.norm(point)

    def solve(right, rho):
        # (I + rho M'M)^-1 through the m x m decomposition (Woodbury).
        inner = (vectors.T @ (rows @ right)) / (1 / rho + polyhedron._values)
        return right - rows.T @ (vectors @ inner)

    def step(carry, _):
        x, z, y, rho = carry
        x = solve(point - rows.T @ y + rho * (rows.T @ z), rho)
        relaxed = _RELAXATION * (rows @ x) + (1 - _RELAXATION) * z
        z = jnp.clip(relaxed + y / rho, lower, upper)
        return (x, z, y + rho * (relaxed - z), rho), None

    def block(carry):
        x, z, y, rho, _, steps = carry
        (x, z, y, rho), _ = jax.lax.scan(step, (x, z, y, rho), None, length=_BLOCK)
        # The distance to z bounds the distance to each row's set, and tends to zero
        # only together with complementarity.
        primal = jnp.max(jnp.abs(rows @ x - z) / lengths)
        dual = jnp.linalg.norm(x - point + rows.T @ y)
        residual = jnp.maximum(primal, dual) / size
        return x, z, y, _balance(rho, primal, dual), residual, steps + _BLOCK

    def go(carry):
        *_, residual, steps = carry
        return (steps < max_steps) & (residual > tol)

    y = warm / scale
    x = point - rows.T @ y
    z = jnp.clip(rows @ x, lower, upper)
    rho, first = jnp.ones((), point.dtype), jnp.full((), jnp.inf, point.dtype)
    carry = (x, z, y, rho, first, jnp.zeros((), jnp.int32))
    x, _, y, _, residual, steps = jax.lax.while_loop(go, block, carry)
    return x, scale * y, residual, steps


def _balance(rho, primal, dual):
    """A larger penalty where the rows lag, a smaller one where the optimality does."""
    tiny = jnp.finfo(rho.dtype).tiny
    change = jnp.clip(jnp.sqrt((primal + tiny) / (dual + tiny)), 0.2, 5.0)
    # Small corrections only disturb the iteration.
    change = jnp.where((change > 2) | (change < 0.5), change, 1)
    return jnp.clip(rho * change, 1e-6, 1e6)


def project_polyhedron(
    point: Float[Array, " n"],
    A: Float[Array, "p n"] | None = None,
    b: Float[Array, " p"] | None = None,
    G: Float[Array, "q n"] | None = None,
    h: Float[Array, " q"] | None = None,
    *,
    tol: Float[Array, ""] | float | None = None,
    max_steps: int = 2000,
) -> PolyhedronProjection:
    """Projects once on `{x : A x = b, G x <= h}`; see `Polyhedron` for many times.

    Args:
        point: A vector.
        A: Equality rows; `None` for none.
        b: Their right sides.
        G: Inequality rows; `None` for none.
        h: Their right sides.
        tol: Stop at this relative residual; by default the square root of the
            dtype's rounding unit.
        max_steps: At most so many steps, rounded up to tens.

    Returns:
        A `PolyhedronProjection`.

    Raises:
        ValueError: as `Polyhedron` and `Polyhedron.project`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.operators import project_polyhedron
        >>> point = jnp.array([2.0, 3.0])
        >>> corner = project_polyhedron(point, G=jnp.eye(2), h=jnp.ones(2))
        >>> bool(jnp.allclose(corner.x, 1.0, atol=1e-3))
        True

    Source: Boyd et al. (2011), section 5.2.
    """
    return Polyhedron(A, b, G, h).project(point, tol=tol, max_steps=max_steps)
