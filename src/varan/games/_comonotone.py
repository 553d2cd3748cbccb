"""Negative comonotonicity: which steps converge beyond monotone operators, how fast.

`F` is `rho`-negatively comonotone when
`<F(u) - F(v), u - v> >= -rho ||F(u) - F(v)||^2`: its inverse is monotone up to `rho`
times the identity. Three methods keep their `1 / N` rates then, each with its own
interval of steps:

    proximal point       a > 2 rho, any rho
    extragradient        2 rho < a < 1 / L and b <= a - 2 rho, best iterate;
                         4 rho <= a = b <= 1 / (2 L), last iterate
    optimistic gradient  4 rho <= a <= 1 / (3.1 L), last iterate

For `rho >= 1 / (2 L)` no pair of steps works for extragradient on all such operators.
The rates follow from potentials that never increase; so they bound a run whose `L` and
`rho` are known, and a potential that grows shows that they are not what was promised.

Source: E. Gorbunov, A. Taylor, S. Horvath and G. Gidel (2023), Convergence of Proximal
Point and Extragradient-Based Methods Beyond Monotonicity: the Case of Negative
Comonotonicity, ICML 2023, arXiv 2210.13831.
"""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..core._certificate import Certificate
from ..core._checks import check_choice, check_nonnegative, check_positive
from ..core._trees import tree_square

Method = Literal["proximal_point", "extragradient", "optimistic_gradient"]
_METHODS = ("proximal_point", "extragradient", "optimistic_gradient")


def comonotone_steps(
    lipschitz: float,
    rho: float,
    method: Method = "extragradient",
    *,
    guarantee: Literal["best", "last"] = "last",
) -> tuple[float, float]:
    """The interval of legal steps for a `rho`-negatively comonotone operator.

    Args:
        lipschitz: `L`, positive.
        rho: `rho`, non-negative; zero is a monotone operator.
        method: `"proximal_point"`, `"extragradient"` or `"optimistic_gradient"`.
        guarantee: `"last"`: one step size, the last iterate's residual falls. `"best"`:
            the least residual so far does; for `"extragradient"` with the interval of
            `stepsize`, and `update_stepsize` at most `stepsize - 2 rho`.

    Returns:
        The lowest and the highest step. Of proximal point and of `"best"` the ends are
        excluded, of `"last"` they belong to it.

    Raises:
        ValueError: If no step is legal; the message says why.

    Example:
        >>> from varan.games import comonotone_steps
        >>> comonotone_steps(1.0, 0.1)
        (0.4, 0.5)
        >>> comonotone_steps(1.0, 0.4, guarantee="best")
        (0.8, 1.0)

    Source:
        Gorbunov, Taylor, Horvath and Gidel, 2023 (arXiv 2210.13831), the
        theorems on the three methods.
    """
    check_positive("comonotone_steps", "lipschitz", lipschitz)
    check_nonnegative("comonotone_steps", "rho", rho)
    check_choice("comonotone_steps", "method", method, _METHODS)
    check_choice("comonotone_steps", "guarantee", guarantee, ("best", "last"))
    if method == "proximal_point":
        return 2 * rho, math.inf
    if rho >= 1 / (2 * lipschitz):
        raise ValueError(
            "comonotone_steps: `rho` must be below 1 / (2 L) "
            f"(got {rho} with 1 / (2 L) = {1 / (2 * lipschitz)}). For every choice of "
            "steps some operator with these constants makes extragradient and "
            "optimistic gradient fail. Use ProximalPoint."
        )
    if guarantee == "best" and method == "extragradient":
        return 2 * rho, 1 / lipschitz
    if guarantee == "best":
        raise ValueError(
            "comonotone_steps: `guarantee` must be 'last' for optimistic gradient with "
            "one step size (got 'best')."
        )
    highest = 1 / (2 * lipschitz if method == "extragradient" else 3.1 * lipschitz)
    if 4 * rho > highest:
        raise ValueError(
            f"comonotone_steps: `rho` must be at most {highest / 4:.4g} for the last "
            f"iterate of {method} (got {rho}). Use guarantee='best' with two step "
            "sizes, or ProximalPoint."
        )
    return 4 * rho, highest


def comonotone_bound(
    method: Method,
    steps: int | Int[Array, ...],
    distance: float | Float[Array, ""],
    *,
    stepsize: float | Float[Array, ""],
    rho: float | Float[Array, ""],
    lipschitz: float | Float[Array, ""] = 1.0,
) -> Certificate:
    """A bound of `||F||^2` at the last iterate, beforehand and for every step.

    Args:
        method: See `comonotone_steps`; extragradient with one step size, optimistic
            gradient at the point that moves, not at the look-ahead that
            `OptimisticGradient` reports.
        steps: `N`, at least 1.
        distance: `||z_0 - z*||`, or an upper bound of it.
        stepsize: The step that was taken, inside of `comonotone_steps`.
        rho: The promised `rho`.
        lipschitz: The promised `L`; proximal point needs none.

    Returns:
        A certificate, proved where the promises hold; NaN where the step is outside of
        its interval.

    Raises:
        ValueError: If `method` is unknown.

    Example:
        >>> from varan.games import comonotone_bound
        >>> bound = comonotone_bound("proximal_point", 10, 2.0, stepsize=1.0, rho=0.1)
        >>> round(float(bound.value), 3)
        0.5

    Source:
        Gorbunov, Taylor, Horvath and Gidel, 2023 (arXiv 2210.13831), the
        theorems on the last iterate.
    """
    check_choice("comonotone_bound", "method", method, _METHODS)
    distance = jnp.asarray(distance, jnp.result_type(float))
    a, rho, L = (jnp.asarray(v, distance.dtype) for v in (stepsize, rho, lipschitz))
    count = jnp.asarray(steps).astype(distance.dtype)
    if method == "proximal_point":
        value = distance**2 / (a * (a - 2 * rho) * count)
        legal = a > 2 * rho
    else:
        first = _first(method, a, rho, L)
        value = distance**2 * first / _weight(method, count, a, rho, L)
        highest = 1 / (2 * L if method == "extragradient" else 3.1 * L)
        slack = 1 + 10 * float(jnp.finfo(distance.dtype).eps)
        legal = (a * slack >= 4 * rho) & (a <= highest * slack)
    return Certificate(
        "squared residual",
        jnp.where(legal, value, jnp.nan),
        proof=True,
        statement="||F||^2 at the last iterate is at most value for every operator "
        "with these constants",
    )


def comonotone_potential(
    method: Method,
    count: int | Int[Array, ""],
    displacement: PyTree[Array],
    force: PyTree[Array],
    *,
    stepsize: float | Float[Array, ""],
    rho: float | Float[Array, ""],
    lipschitz: float | Float[Array, ""],
    mismatch: PyTree[Array] | None = None,
) -> Float[Array, ""]:
    """The potential that never increases along a run whose promises hold.

    `||x - x*||^2` plus a weight, growing with `count`, times `||F(x)||^2` (for
    optimistic gradient plus `||mismatch||^2`).

    Args:
        method: `"extragradient"` or `"optimistic_gradient"`.
        count: `k`, the number of steps so far.
        displacement: `x_k - x*`.
        force: `F(x_k)`.
        stepsize: The step, inside of `comonotone_steps`.
        rho: The promised `rho`.
        lipschitz: The promised `L`.
        mismatch: `F(x_k) - F(half_{k-1})`, for optimistic gradient.

    Returns:
        A scalar.

    Raises:
        ValueError: If `method` is neither of the two.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import comonotone_potential
        >>> constants = {"stepsize": 0.5, "rho": 0.0, "lipschitz": 1.0}
        >>> one, two = jnp.ones(1), 2 * jnp.ones(1)
        >>> float(comonotone_potential("extragradient", 8, one, two, **constants))
        7.0

    Source:
        Gorbunov, Taylor, Horvath and Gidel, 2023 (arXiv 2210.13831), the
        proofs for the last iterate.
    """
    check_choice("comonotone_potential", "method", method, _METHODS[1:])
    square = tree_square(displacement)
    a, rho, L = (jnp.asarray(v, square.dtype) for v in (stepsize, rho, lipschitz))
    k = jnp.asarray(count).astype(square.dtype)
    residual = tree_square(force)
    if mismatch is not None:
        residual = residual + tree_square(mismatch)
    return square + _weight(method, k, a, rho, L) * residual


def _first(method, a, rho, L):
    """The potential where it begins, for a distance of one, by the promised `L`."""
    if method == "extragradient":
        return 1 + L**2 * _weight(method, jnp.zeros_like(a), a, rho, L)
    # After the first move `x_1 = x_0 - a F(x_0)`, with `half_0 = x_0`.
    moved = (1 + a * L) ** 2
    mismatch = (a * L**2) ** 2
    return moved + _weight(method, jnp.ones_like(a), a, rho, L) * (
        L**2 * moved + mismatch
    )


def _weight(method, k, a, rho, L):
    """What `||F||^2` is multiplied with in the potential after `k` steps."""
    if method == "extragradient":
        return k * a**2 * (1 - 5 * rho / (2 * a) - L**2 * a**2) + 40 * a * rho
    return k * a * (a - 3 * rho) / (2 + 6 * L**2 * a**2) + 400 * a**2
