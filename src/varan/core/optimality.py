"""Optimality conditions: what `custom_root`, `implicit_root`, `Root` differentiate.

Each factory takes the functions that define a problem and returns its condition
`F(x, *params)`, zero at a solution. Every function receives the same `*params` and
ignores what it does not need, so that one signature serves all. Conditions that come
from a fixed point, `F(x) = map(x) - x`, also offer the map itself, for
`custom_fixed_point` and `FixedPoint`.

Several conditions often describe one problem; the derivative of its solution is the
same for all of them. Choose by the shape of the linear system that each implies:

- `stationary`: smooth and unconstrained; symmetric, so tag it for half the work;
- `prox_grad`, `proj_grad`: a simple set or penalty; as many unknowns as `x`;
- `mirror`: a set whose Bregman projection is simpler than its Euclidean one;
- `block`: as `prox_grad`, with an operator and a stepsize for each block;
- `kkt`: general constraints, with their multipliers as unknowns; indefinite;
- `conic`: a linear objective over a cone, in the form that conic solvers return;
- `newton`: any condition, preconditioned by its own Jacobian.

At a kink (a bound that is active with zero multiplier, an entry that soft thresholding
just touches) the solution has no derivative; what comes out is one made of an element
of each operator's generalised Jacobian.

Source: Blondel et al., 2022, "Efficient and Modular Implicit Differentiation"
(arXiv 2105.15183), section 2.2 and appendix A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ._certificate import Certificate
from ._checks import check_positive, is_traced
from ._problem import as_function

__all__ = [
    "FixedPointResidual",
    "KKTPoint",
    "block",
    "conic",
    "jacobian_error",
    "kkt",
    "mirror",
    "newton",
    "proj_grad",
    "prox_grad",
    "ridge",
    "stationary",
]

Stepsize = Float[Array, ""] | float


class FixedPointResidual(eqx.Module):
    """The condition `map(x, *params) - x` of a fixed point.

    Args:
        map: Function of `(x, *params)` whose fixed point is the solution; give it to
            `custom_fixed_point` or `FixedPoint` where those are wanted.

    Example:
        >>> from varan.core import optimality
        >>> condition = optimality.FixedPointResidual(lambda x, c: x / 2 + c)
        >>> condition(1.0, 1.0), condition.map(1.0, 1.0)
        (0.5, 1.5)

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equation 3.
    """

    map: Callable

    def __call__(self, x, *params):
        return jtu.tree_map(lambda a, b: a - b, self.map(x, *params), x)


class KKTPoint(NamedTuple):
    """A point and its multipliers: the unknown of `kkt`.

    Args:
        x: The primal point, a pytree.
        equality: Multipliers, a pytree like the value of the equality constraints;
            `None` without them.
        inequality: As `equality`; nonnegative at a solution.
    """

    x: Any
    equality: Any = None
    inequality: Any = None


def stationary(objective: Callable) -> Callable:
    """The gradient of a smooth objective.

    Args:
        objective: Scalar function of `(x, *params)`.

    Returns:
        `F(x, *params)`, like `x`. Its Jacobian is symmetric, and positive semidefinite
        for a convex objective: say so in the `tags` of `custom_root`.

    Example:
        >>> import jax
        >>> from varan import custom_root
        >>> from varan.core import optimality
        >>> F = optimality.stationary(lambda x, c: 0.5 * (x - c) ** 2 + 0.5 * x**2)
        >>> solver = custom_root(F)(lambda start, c: c / 2)
        >>> float(jax.grad(solver, argnums=1)(None, 4.0))
        0.5

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equation 4.
    """
    return jax.grad(_function("stationary", "objective", objective))


def kkt(
    objective: Callable,
    equality: Callable | None = None,
    inequality: Callable | None = None,
) -> Callable:
    """The Karush-Kuhn-Tucker conditions of `min f(x), h(x) = 0, g(x) <= 0`.

    Stationarity of the Lagrangian, `h(x) = 0`, and complementarity in the form
    `min(multiplier, -g(x)) = 0`. One gradient of the Lagrangian an evaluation.

    Args:
        objective: Scalar function of `(x, *params)`.
        equality: Function `h` of `(x, *params)`, any pytree.
        inequality: Function `g` of `(x, *params)`, any pytree.

    Returns:
        `F(point, *params)` of a `KKTPoint`, shaped like it. Its Jacobian is not
        definite. It is regular where the active constraints' gradients are
        independent, the second-order sufficient condition holds, and no active
        inequality has a zero multiplier.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.core import optimality, root_jvp
        >>> F = optimality.kkt(lambda x, b: (x - b) ** 2, inequality=lambda x, b: -x)
        >>> point = optimality.KKTPoint(jnp.array(2.0), inequality=jnp.array(0.0))
        >>> float(root_jvp(F, point, (2.0,), (1.0,)).x)
        1.0

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equation 6.

    Differences:
        Complementarity is `min(multiplier, -g)` rather than their product: the product
        also vanishes at infeasible points and at negative multipliers, so that its
        residual would certify nothing. The derivative is the same.
    """
    objective = _function("kkt", "objective", objective)
    h = _function("kkt", "equality", equality or _nothing)
    g = _function("kkt", "inequality", inequality or _nothing)

    def condition(point, *params):
        x, nu, lam = point
        _check_multipliers("equality", nu, equality, x, params)
        _check_multipliers("inequality", lam, inequality, x, params)

        def lagrangian(x):
            value = objective(x, *params)
            return value + _dot(nu, h(x, *params)) + _dot(lam, g(x, *params))

        return KKTPoint(
            jax.grad(lagrangian)(x),
            h(x, *params),
            jtu.tree_map(lambda m, v: jnp.minimum(m, -v), lam, g(x, *params)),
        )

    return condition


def prox_grad(
    objective: Callable, prox: Callable, stepsize: Stepsize = 1.0
) -> FixedPointResidual:
    """The proximal-gradient fixed point of `min f(x) + h(x)`.

    `prox(x - stepsize * grad f(x), stepsize) - x`. Any positive stepsize gives the
    same solutions and the same derivative; near the reciprocal of the gradient's
    Lipschitz constant the linear system is best conditioned.

    Args:
        objective: The smooth part, a scalar function of `(x, *params)`.
        prox: Function of `(v, stepsize, *params)`: the proximal operator of `h`.
        stepsize: Positive, in units of x per unit of gradient.

    Returns:
        A `FixedPointResidual`.

    Raises:
        ValueError: If `stepsize` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan import custom_root
        >>> from varan.core import optimality
        >>> from varan.operators import prox_l1
        >>> F = optimality.prox_grad(
        ...     lambda w, y, lam: 0.5 * jnp.sum((w - y) ** 2),
        ...     lambda v, stepsize, y, lam: prox_l1(v, lam, stepsize),
        ... )
        >>> lasso = custom_root(F)(lambda start, y, lam: prox_l1(y, lam))
        >>> y = jnp.array([3.0, 0.2])
        >>> [float(d) for d in jax.jacobian(lasso, argnums=2)(None, y, 1.0)]
        [-1.0, 0.0]

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equation 7.
    """
    objective = _function("prox_grad", "objective", objective)
    prox = _function("prox_grad", "prox", prox)
    check_positive("prox_grad", "stepsize", stepsize)

    def step(x, *params):
        return prox(_descend(objective, x, stepsize, params), stepsize, *params)

    return FixedPointResidual(step)


def proj_grad(
    objective: Callable, projection: Callable, stepsize: Stepsize = 1.0
) -> FixedPointResidual:
    """The projected-gradient fixed point of `min f(x), x in C`.

    `prox_grad` with the projection on a convex set `C` as the operator.

    Args:
        objective: Scalar function of `(x, *params)`.
        projection: Function of `(v, *params)`: the Euclidean projection on `C`.
        stepsize: As for `prox_grad`.

    Returns:
        A `FixedPointResidual`.

    Raises:
        ValueError: If `stepsize` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.core import optimality
        >>> F = optimality.proj_grad(
        ...     lambda x, c: jnp.sum((x - c) ** 2), lambda v, c: jnp.clip(v, 0.0, 1.0)
        ... )
        >>> [float(r) for r in F(jnp.array([1.0, 0.5]), jnp.array([2.0, 0.5]))]
        [0.0, 0.0]

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equation 9.
    """
    projection = _function("proj_grad", "projection", projection)
    return prox_grad(objective, lambda v, _, *params: projection(v, *params), stepsize)


def mirror(
    objective: Callable,
    projection: Callable,
    mirror_map: Callable,
    stepsize: Stepsize = 1.0,
) -> FixedPointResidual:
    """The mirror-descent fixed point of `min f(x), x in C`.

    `projection(mirror_map(x) - stepsize * grad f(x)) - x`. On the simplex with the
    entropy the pair is `jnp.log` and `jax.nn.softmax`.

    Args:
        objective: Scalar function of `(x, *params)`.
        projection: Function of `(v, *params)`: from dual coordinates to the Bregman
            projection on `C`.
        mirror_map: Function of `x`: the gradient of the potential, into dual
            coordinates. It must be finite at the solution: where entries may be zero,
            floor them, as in `jnp.log(jnp.maximum(x, 1e-30))`.
        stepsize: As for `prox_grad`; any positive one gives the same derivative.

    Returns:
        A `FixedPointResidual`.

    Raises:
        ValueError: If `stepsize` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.core import optimality
        >>> F = optimality.mirror(
        ...     lambda x, c: x @ (jnp.log(x) - c),
        ...     lambda v, c: jax.nn.softmax(v),
        ...     jnp.log,
        ... )
        >>> c = jnp.array([0.0, 1.0, 2.0])
        >>> bool(jnp.allclose(F(jax.nn.softmax(c), c), 0.0, atol=1e-6))
        True

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equation 13.
    """
    objective = _function("mirror", "objective", objective)
    projection = _function("mirror", "projection", projection)
    mirror_map = _function("mirror", "mirror_map", mirror_map)
    check_positive("mirror", "stepsize", stepsize)

    def step(x, *params):
        gradient = jax.grad(objective)(x, *params)
        return projection(_move(mirror_map(x), gradient, stepsize), *params)

    return FixedPointResidual(step)


def block(
    objective: Callable,
    proxes: Sequence[Callable],
    stepsizes: Sequence[Stepsize] | Stepsize = 1.0,
) -> FixedPointResidual:
    """The block proximal-gradient fixed point of `min f(x) + sum_j h_j(x_j)`.

    `prox_j(x_j - stepsize_j * grad_j f(x), stepsize_j) - x_j` for all blocks at once.
    It is the condition for any sweep over the blocks, cyclic or random, exact or by
    gradient steps: those share its fixed points.

    Args:
        objective: The smooth part, a scalar function of `(x, *params)`, where `x` is
            a tuple or list of blocks, each a pytree.
        proxes: For each block a function of `(v, stepsize, *params)`.
        stepsizes: Positive; one for all blocks or one for each.

    Returns:
        A `FixedPointResidual`.

    Raises:
        ValueError: If a stepsize is not positive, or the numbers of blocks, proxes and
            stepsizes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.core import optimality
        >>> from varan.operators import prox_l1, project_nonnegative
        >>> F = optimality.block(
        ...     lambda x, c: jnp.sum((x[0] - c) ** 2) + jnp.sum((x[1] - x[0]) ** 2),
        ...     [lambda v, s, c: prox_l1(v, 1.0, s), lambda v, s, c: v.clip(0.0)],
        ... )
        >>> u, v = F((jnp.array([0.75]), jnp.array([0.75])), jnp.array([1.25]))
        >>> float(u[0]), float(v[0])
        (0.0, 0.0)

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equation 15.
    """
    objective = _function("block", "objective", objective)
    proxes = tuple(_function("block", "proxes", prox) for prox in proxes)
    if not isinstance(stepsizes, Sequence):
        stepsizes = (stepsizes,) * len(proxes)
    for stepsize in stepsizes:
        check_positive("block", "stepsizes", stepsize)
    _check_count("stepsizes", len(stepsizes), len(proxes))

    def step(x, *params):
        _check_count("blocks of x", len(x), len(proxes))
        gradients = jax.grad(objective)(x, *params)
        return type(x)(
            prox(_move(x_j, gradient, stepsize), stepsize, *params)
            for x_j, gradient, prox, stepsize in zip(
                x, gradients, proxes, stepsizes, strict=True
            )
        )

    return FixedPointResidual(step)


def newton(condition: Callable, damping: Stepsize = 1.0) -> FixedPointResidual:
    """The fixed point of Newton's method for `condition(x, *params) = 0`.

    `x - damping * J^-1 condition(x)`. At a root its own Jacobian in `x` is
    `(1 - damping) I`, so that the implied linear system is a multiple of the identity
    and a Krylov method needs one step; the price is one solve with `J` an evaluation.

    Args:
        condition: Function of `(x, *params)` with as many entries as `x`.
        damping: Positive; any gives the same derivative.

    Returns:
        A `FixedPointResidual`.

    Raises:
        ValueError: If `damping` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.core import optimality, root_jvp
        >>> F = optimality.newton(lambda x, c: x**2 - c)
        >>> float(root_jvp(F, jnp.array(2.0), (4.0,), (1.0,)))
        0.25

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equation 14.
    """
    condition = _function("newton", "condition", condition)
    check_positive("newton", "damping", damping)

    def step(x, *params):
        # Imported here, as in core: lineax is for those who differentiate.
        from ._linear import solve_jacobian

        flat, unravel = ravel_pytree(x)

        def residual(v):
            return ravel_pytree(condition(unravel(v), *params))[0]

        direction = solve_jacobian(residual, flat, residual(flat))
        return _move(x, unravel(direction), damping)

    return FixedPointResidual(step)


def conic(project_dual: Callable) -> Callable:
    """The residual map of the cone program `min c'x, A x + s = b, s in K`.

    The unknown is `(x, z)`: the primal point, and `z = y - s` with the dual point
    `y = P(z)` and the slack `s = P(z) - z`, where `P` projects on the dual cone `K*`
    (Moreau). What is left is `A' P(z) + c = 0` and `A x + P(z) - z = b`; membership in
    the cones and complementarity hold by construction, and with them a zero gap.

    Args:
        project_dual: Function of `z`: the projection on `K*`. For inequalities
            `A x <= b` that is `project_nonnegative`, for equalities the identity, for
            the second-order cone its own projection; for a product of cones, each on
            its part.

    Returns:
        `F((x, z), A, b, c)`, a pair like the unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.core import optimality
        >>> from varan.operators import project_nonnegative
        >>> F = optimality.conic(project_nonnegative)
        >>> A, b, c = jnp.array([[-1.0], [1.0]]), jnp.array([-1.0, 3.0]), jnp.ones(1)
        >>> x, z = jnp.ones(1), jnp.array([1.0, -2.0])  # s = (0, 2), y = (1, 0)
        >>> [r.tolist() for r in F((x, z), A, b, c)]
        [[0.0], [0.0, 0.0]]

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), appendix A; Busseti, Moursi, Boyd,
        2019 (arXiv 1811.02157).

    Differences:
        The homogeneous variable of the self-dual embedding is fixed at one: its ray of
        solutions would make the Jacobian singular.
    """
    project_dual = _function("conic", "project_dual", project_dual)

    def condition(point, A, b, c):
        x, z = point
        y = project_dual(z)
        return A.T @ y + c, A @ x + y - z - b

    return condition


def ridge(condition: Callable, weight: Stepsize) -> Callable:
    """Adds `weight * I` to a condition's Jacobian and nothing to its value.

    For a singular or badly conditioned linear system: the derivative becomes that of
    the proximally regularised problem, biased by O(weight) and finite. Where the
    solution is a set by nature, `unique=False` gives the exact derivative of what does
    not depend on the choice instead; prefer it.

    Args:
        condition: Function of `(x, *params)` with the structure of `x`.
        weight: Positive, in units of the Jacobian; of the Jacobian's sign (a
            `FixedPointResidual` has the opposite one: wrap its negative).

    Returns:
        `F(x, *params)` with the values of `condition`. First derivatives only.

    Raises:
        ValueError: If `weight` is not positive.

    Example:
        >>> import jax
        >>> from varan.core import optimality
        >>> F = optimality.ridge(lambda x, c: 0.0 * x - c, 0.5)
        >>> float(F(3.0, 1.0)), float(jax.grad(F)(3.0, 1.0))
        (-1.0, 0.5)

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), section 2.1.
    """
    condition = _function("ridge", "condition", condition)
    check_positive("ridge", "weight", weight)

    def regularised(x, *params):
        anchored = jtu.tree_map(lambda v: v - jax.lax.stop_gradient(v), x)
        return _move(condition(x, *params), anchored, -1.0 * weight)

    return regularised


def jacobian_error(
    distance: Float[Array, ""] | float,
    *,
    alpha: float,
    beta: float,
    gamma: float = 0.0,
    cross_norm: float = 0.0,
) -> Certificate:
    """How far the implicit Jacobian at an inexact answer is from the true one.

    With `A` and `B` the condition's Jacobians in `x` and in the parameters, the error
    in operator norm is at most
    `(beta / alpha + gamma * cross_norm / alpha^2) * distance`. So the derivative is as
    accurate as the answer, whatever the solver.

    Args:
        distance: A bound of `|x - x*|`, for instance the value of
            `ImplicitFunction.certificate(..., strong_convexity=alpha)`.
        alpha: Positive lower bound of the smallest singular value of `A` near `x*`.
        beta: Lipschitz constant of `B` in `x`.
        gamma: Lipschitz constant of `A` in `x`; zero for a quadratic.
        cross_norm: Upper bound of `|B|` at the solution; needed where `gamma > 0`.

    Returns:
        A `Certificate` of kind "Jacobian error", a proof if the constants are bounds.

    Raises:
        ValueError: If `alpha` is not positive, another constant is negative, or
            `cross_norm` is missing.

    Example:
        >>> from varan.core import optimality
        >>> round(float(optimality.jacobian_error(0.1, alpha=2.0, beta=1.0).value), 3)
        0.05

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), theorem 1.
    """
    check_positive("jacobian_error", "alpha", alpha)
    for name, value in (("beta", beta), ("gamma", gamma), ("cross_norm", cross_norm)):
        if not is_traced(value) and not value >= 0:
            raise ValueError(
                f"jacobian_error: `{name}` must be nonnegative (got {value})."
            )
    if not is_traced(gamma) and gamma > 0 and cross_norm == 0:
        raise ValueError(
            "jacobian_error: `cross_norm` must bound |B| where `gamma` is positive "
            f"(got gamma = {gamma}, cross_norm = 0)."
        )
    factor = beta / alpha + gamma * cross_norm / alpha**2
    return Certificate(
        "Jacobian error",
        factor * distance,
        proof=True,
        statement="|J - J*| <= value in operator norm, by theorem 1",
        details={"factor": jnp.asarray(factor), "distance": jnp.asarray(distance)},
    )


def _function(owner, argument, function):
    as_function(owner, argument, function)  # the shared check that it is callable
    return function


def _nothing(x, *params):
    return None


def _descend(objective, x, stepsize, params):
    return _move(x, jax.grad(objective)(x, *params), stepsize)


def _move(x: PyTree, direction: PyTree, stepsize) -> PyTree:
    """`x - stepsize * direction`, leaf by leaf in the leaf's dtype."""
    return jtu.tree_map(
        lambda v, d: v - jnp.asarray(stepsize, jnp.result_type(v)) * d, x, direction
    )


def _dot(multipliers, values):
    products = jtu.tree_map(lambda m, v: jnp.sum(m * v), multipliers, values)
    return sum(jtu.tree_leaves(products))


def _check_multipliers(name, multipliers, constraint, x, params):
    wanted = None if constraint is None else jax.eval_shape(constraint, x, *params)
    if _shapes(wanted) != _shapes(multipliers):
        raise ValueError(
            f"kkt: the multipliers `{name}` must be shaped like the constraint's value "
            f"(got {_shapes(multipliers)[0]} for {_shapes(wanted)[0]}). Build the "
            "unknown as KKTPoint(x, equality, inequality)."
        )


def _shapes(tree):
    return [jnp.shape(leaf) for leaf in jtu.tree_leaves(tree)], jtu.tree_structure(tree)


def _check_count(what, got, wanted):
    if got != wanted:
        raise ValueError(
            f"block: the number of {what} must be that of the proxes, {wanted} "
            f"(got {got})."
        )
