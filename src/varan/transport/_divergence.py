"""Entropic transport cost and Sinkhorn divergence of point clouds, as losses.

`W(x, y) = min_P <C, P> + epsilon KL(P | a b')` over the plans between two weighted
clouds, and the debiased `S(x, y) = W(x, y) - W(x, x) / 2 - W(y, y) / 2`, which is not
negative, zero only for equal measures (for costs such as the squared distance), and
convex in each of them.

Both are differentiated by the envelope theorem: the gradient is read off the optimal
plan, no iteration is unrolled and no linear system solved; a second derivative solves
one. Cost: as many sweeps over the (m, n) matrix as the tolerance needs, per problem.

Source: Genevay, Peyré, Cuturi, 2018 (arXiv 1706.00292); Feydy, Séjourné, Vialard,
Amari, Trouvé, Peyré, 2019 (arXiv 1810.08278).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import jax.scipy.special as jsp
from jaxtyping import Array, Float

from ..core import Solver
from ..core._checks import check_choice, check_finite, check_nonempty
from ..core._envelope import envelope
from ._solve import entropic_transport

Cost = Literal["sqeuclidean", "euclidean"] | Callable[[Array, Array], Array]


def cost_matrix(
    x: Float[Array, "m d"], y: Float[Array, "n d"], cost: Cost = "sqeuclidean"
) -> Float[Array, "m n"]:
    """Costs between all pairs of points.

    Args:
        x: Points.
        y: Points of the same dimension.
        cost: `"sqeuclidean"`, `"euclidean"`, or a function of two points, each of
            shape (d,), that returns a scalar.

    Returns:
        The matrix. The distance's derivative is zero where two points coincide.

    Raises:
        ValueError: If a cloud is empty, not two-dimensional or not finite, if the
            dimensions differ, or `cost` is unknown or returns no scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import cost_matrix
        >>> cost_matrix(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]])).tolist()
        [[25.0]]
    """
    _check_clouds("cost_matrix", x, y)
    if callable(cost):
        shape = jax.eval_shape(cost, x[0], y[0]).shape
        if shape:
            raise ValueError(
                "cost_matrix: `cost` must return a scalar for two points (got shape "
                f"{shape}). It is mapped over all pairs."
            )
        return jax.vmap(lambda p: jax.vmap(lambda q: cost(p, q))(y))(x)
    check_choice("cost_matrix", "cost", cost, ("sqeuclidean", "euclidean"))
    square = jnp.sum((x[:, None] - y[None]) ** 2, axis=-1)
    if cost == "sqeuclidean":
        return square
    apart = square > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)


def entropic_cost(
    x: Float[Array, "m d"],
    y: Float[Array, "n d"],
    a: Float[Array, " m"] | None = None,
    b: Float[Array, " n"] | None = None,
    *,
    epsilon: float | Float[Array, ""],
    cost: Cost = "sqeuclidean",
    method: Literal["auto", "sinkhorn", "newton", "sparse-newton"] | Solver = "auto",
    tol: float | None = None,
    max_steps: int = 1000,
) -> Float[Array, ""]:
    """The entropic transport cost of two clouds, `min <C, P> + epsilon KL(P | a b')`.

    Args:
        x: Points of the first measure.
        y: Points of the second.
        a: Positive masses with sum 1; default: equal.
        b: Positive masses with sum 1; default: equal.
        epsilon: Weight of the entropy in units of the cost. Hold it fixed: one that
            depends on the points changes the loss that is descended.
        cost: See `cost_matrix`.
        method: See `entropic_transport`: `"newton"` converges at every epsilon;
            `"sinkhorn"` is faster where epsilon is a few hundredths of the largest
            cost and the tolerance modest, as in training.
        tol: L1 error of the marginals; default: 1e-9 in float64, 1e-4 in float32.
        max_steps: Steps of the solver (of 10 sweeps, for Sinkhorn).

    Returns:
        The value, a scalar: not negative for nonnegative costs, at least the
        unregularised cost and at most `epsilon log(n)` above it. NaN where the run did
        not reach the tolerance. `jit`, `vmap` and derivatives of any order work in
        the points, the masses and epsilon.

    Raises:
        ValueError: As `cost_matrix` and `entropic_transport`.
        TypeError: As `entropic_transport`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.transport import entropic_cost
        >>> x = jnp.array([[0.0], [1.0]])
        >>> round(float(entropic_cost(x, x + 2.0, epsilon=0.1)), 2)
        4.07

    Source:
        Cuturi, 2013 (arXiv 1306.0895); the gradient: Feydy et al., 2019 (arXiv
        1810.08278), proposition 2.
    """
    run = entropic_transport(
        cost_matrix(x, y, cost),
        a,
        b,
        epsilon=epsilon,
        method=method,
        tol=tol,
        max_steps=max_steps,
    )
    return _relative_value(run)


def _relative_value(run):
    """The value with the entropy relative to the product of the masses.

    Derivatives are partial derivatives of the dual at the optimal potentials.
    """
    problem, (f, g) = run.problem, run.potentials
    point = problem.cost, problem.a, problem.b, problem.epsilon
    frozen = jax.lax.stop_gradient(problem)
    value = frozen.dual_value(jax.lax.stop_gradient((f, g)))
    plan = problem.plan((f, g))
    entropy = -jnp.sum(jsp.xlogy(plan, plan))
    # A product, not a choice: the derivatives are NaN as well.
    known = jnp.where(run.converged, 1, jnp.nan).astype(value.dtype)
    value = known * envelope(value, (plan, f, g, -entropy), point)
    a, b, epsilon = problem.a, problem.b, problem.epsilon
    return value - epsilon * (a @ jnp.log(a) + b @ jnp.log(b))


def sinkhorn_divergence(
    x: Float[Array, "m d"],
    y: Float[Array, "n d"],
    a: Float[Array, " m"] | None = None,
    b: Float[Array, " n"] | None = None,
    *,
    epsilon: float | Float[Array, ""],
    cost: Cost = "sqeuclidean",
    method: Literal["auto", "sinkhorn", "newton", "sparse-newton"] | Solver = "auto",
    tol: float | None = None,
    max_steps: int = 1000,
) -> Float[Array, ""]:
    """The debiased entropic cost `W(x, y) - W(x, x) / 2 - W(y, y) / 2`.

    Three entropic problems; a loss between samples that, unlike `entropic_cost`, is
    zero when the samples agree.

    Args:
        x: See `entropic_cost`.
        y: See `entropic_cost`.
        a: See `entropic_cost`.
        b: See `entropic_cost`.
        epsilon: See `entropic_cost`.
        cost: See `entropic_cost`; symmetric.
        method: See `entropic_cost`.
        tol: See `entropic_cost`.
        max_steps: See `entropic_cost`.

    Returns:
        A scalar; NaN where one of the runs did not reach the tolerance. Derivatives
        as those of `entropic_cost`.

    Raises:
        ValueError: As `entropic_cost`.
        TypeError: As `entropic_cost`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.transport import sinkhorn_divergence
        >>> x = jnp.array([[0.0], [1.0]])
        >>> slope = jax.grad(sinkhorn_divergence)(x, x + 2.0, epsilon=0.1)
        >>> round(float(sinkhorn_divergence(x, x + 2.0, epsilon=0.1)), 2)
        4.0
        >>> slope.round(2).tolist()
        [[-2.0], [-2.0]]

    Source:
        Genevay, Peyré, Cuturi, 2018 (arXiv 1706.00292); Feydy et al., 2019 (arXiv
        1810.08278), theorem 1.
    """
    _check_clouds("sinkhorn_divergence", x, y)
    value = partial(
        entropic_cost,
        epsilon=epsilon,
        cost=cost,
        method=method,
        tol=tol,
        max_steps=max_steps,
    )
    return value(x, y, a, b) - (value(x, x, a, a) + value(y, y, b, b)) / 2


def _check_clouds(owner, x, y):
    for name, cloud in (("x", x), ("y", y)):
        check_nonempty(owner, name, cloud)
        check_finite(owner, name, cloud)
    shapes = jnp.shape(x), jnp.shape(y)
    if not (len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][1] == shapes[1][1]):
        raise ValueError(
            f"{owner}: `x` and `y` must have shapes (m, d) and (n, d) (got {shapes[0]} "
            f"and {shapes[1]}). Points on a line are (n, 1)."
        )
