"""The implicit function theorem: derivatives of an answer from its condition alone.

If `F(x*(p), p) = 0`, then `dx* = -(dF/dx)^-1 (dF/dp) dp`, whatever found `x*`. The
rule is written once, as a forward rule whose linear solve transposes: forward,
reverse and higher derivatives, `jit` and `vmap` follow from it.

Source: Blondel et al., 2022, "Efficient and Modular Implicit Differentiation"
(arXiv 2105.15183).
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree


def implicit_root(
    condition: Callable,
    x: PyTree[Array],
    *,
    tags: frozenset[str] = frozenset(),
    unique: bool = True,
    reliable=True,
    linear_solver=None,
) -> PyTree[Array]:
    """Returns `x` unchanged, with the derivative of a root of `condition` attached.

    One Jacobian factorisation (up to 512 unknowns) or one Krylov solve per
    derivative. Nothing is computed unless a derivative is taken.

    Args:
        condition: Function of `x` alone that is zero at `x`. It may close over traced
            arrays; derivatives with respect to everything it closes over are right.
        x: The root, a pytree of floating arrays. Its own derivative is dropped.
        tags: What is known of the condition's Jacobian: a subset of
            `{"symmetric", "positive_semidefinite"}`.
        unique: See `varan.Problem.unique`.
        reliable: A (traced) boolean; where it is false, derivatives are NaN.
        linear_solver: A lineax solver to use instead of the automatic choice.

    Returns:
        A pytree equal to `x`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.core import implicit_root
        >>> def sqrt(c):
        ...     x = jnp.sqrt(jax.lax.stop_gradient(c))
        ...     return implicit_root(lambda x: x * x - c, x)
        >>> round(float(jax.grad(sqrt)(4.0)), 6)
        0.25

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), equations 2 and 3.
    """
    x = jtu.tree_map(jax.lax.stop_gradient, x)
    # What the condition closes over becomes an argument, so that no tracer is hidden
    # from the rule below: a hidden one would give a silent zero gradient.
    closed = eqx.filter_closure_convert(condition, x)
    spec = _Spec(frozenset(tags), unique, linear_solver)
    return _attach(x, closed, jnp.asarray(reliable), spec)


class _Spec(eqx.Module):
    tags: frozenset[str] = eqx.field(static=True)
    unique: bool = eqx.field(static=True)
    linear_solver: object


@eqx.filter_custom_jvp
def _attach(x, closed, reliable, spec):
    return x


@_attach.def_jvp
def _attach_jvp(primals, tangents):
    x, closed, reliable, spec = primals
    _, t_closed, _, _ = tangents
    # Attached again, so that the rule's own dependence on x is differentiated too.
    x = _attach(x, closed, reliable, spec)
    if not jtu.tree_leaves(t_closed):
        return x, jtu.tree_map(lambda _: None, x)
    value, t_condition = eqx.filter_jvp(lambda c: c(x), (closed,), (t_closed,))
    # An entry of the condition that no parameter enters has no tangent at all.
    t_condition = jtu.tree_map(
        lambda v, t: jnp.zeros_like(v) if t is None and v is not None else t,
        value,
        t_condition,
        is_leaf=lambda leaf: leaf is None,
    )
    t_x = _solve_linearised(closed, x, t_condition, reliable, spec)
    return x, jtu.tree_map(jnp.negative, t_x)


def _solve_linearised(condition, x, vector, reliable, spec):
    """Solves `J v = vector`, pytrees like `x`."""
    # Imported here: a solve that nobody differentiates needs no lineax.
    from ._linear import solve_jacobian

    flat, unravel = ravel_pytree(x)
    answer = solve_jacobian(
        lambda v: ravel_pytree(condition(unravel(v)))[0],
        flat,
        ravel_pytree(vector)[0],
        tags=spec.tags,
        unique=spec.unique,
        reliable=reliable,
        linear_solver=spec.linear_solver,
    )
    return unravel(answer)


def root_jvp(condition: Callable, x, params: tuple, tangents: tuple, **settings):
    """Directional derivative of the root of `condition(x, *params)`.

    Args:
        condition: Function of `x` and the parameters, zero at `x`.
        x: The root at `params`.
        params: The parameters, a tuple of pytrees.
        tangents: The direction, a tuple like `params`.
        **settings: `tags`, `unique` and `linear_solver` of `implicit_root`.

    Returns:
        The tangent of `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.core import root_jvp
        >>> float(root_jvp(lambda x, c: x**2 - c, jnp.array(2.0), (4.0,), (1.0,)))
        0.25

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), section 2.1.
    """
    return jax.jvp(
        lambda *p: implicit_root(lambda x: condition(x, *p), x, **settings),
        params,
        tangents,
    )[1]


def root_vjp(condition: Callable, x, params: tuple, cotangent, **settings) -> tuple:
    """Cotangents of the parameters of the root of `condition(x, *params)`.

    Args:
        condition: Function of `x` and the parameters, zero at `x`.
        x: The root at `params`.
        params: The parameters, a tuple of pytrees.
        cotangent: The cotangent of `x`, a pytree like `x`.
        **settings: `tags`, `unique` and `linear_solver` of `implicit_root`.

    Returns:
        A tuple like `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.core import root_vjp
        >>> one, two = jnp.array(1.0), jnp.array(2.0)
        >>> (bar,) = root_vjp(lambda x, c: x**2 - c, two, (4.0,), one)
        >>> float(bar)
        0.25

    Source:
        Blondel et al., 2022 (arXiv 2105.15183), section 2.1.
    """
    _, pullback = jax.vjp(
        lambda *p: implicit_root(lambda x: condition(x, *p), x, **settings), *params
    )
    return pullback(cotangent)
