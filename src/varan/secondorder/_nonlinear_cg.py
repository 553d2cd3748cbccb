"""Nonlinear conjugate gradients: a little memory for a lot of curvature.

The direction is the negative gradient plus a multiple of the last direction, and the
formulae for that multiple are the variants. On a quadratic with exact line searches all
are the linear method. Hager and Zhang's descends whatever the line search does.

Use it where even the ten vectors of L-BFGS are too many; where they are not,
`optax.lbfgs` takes fewer steps. Cost: the line search's evaluations, and a few inner
products.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool

from ..core._checks import check_choice
from ._hager_zhang import scale_by_hager_zhang_linesearch

Formula = Literal[
    "hager-zhang", "polak-ribiere", "fletcher-reeves", "hestenes-stiefel", "dai-yuan"
]
# Of Hager and Zhang, 2005: how negative the multiple may become.
_ETA = 0.01
# Powell's test for a restart, 1977.
_ALIKE = 0.2


class ScaleByNonlinearCGState(NamedTuple):
    """State of `scale_by_nonlinear_cg`.

    Args:
        last_gradient: The gradient of the step before.
        direction: The direction of the step before.
        started: Whether there was one.
    """

    last_gradient: Any
    direction: Any
    started: Bool[Array, ""]


def nonlinear_cg(
    formula: Formula = "hager-zhang",
    linesearch: optax.GradientTransformation
    | optax.GradientTransformationExtraArgs
    | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Nonlinear conjugate gradients with a line search, as an optax transformation.

    Args:
        formula: See `scale_by_nonlinear_cg`.
        linesearch: Scales the direction; by default
            `scale_by_hager_zhang_linesearch(first_trial="previous")`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its `update` takes `value`, `grad`
        and `value_fn`, as that of `optax.lbfgs`.

    Raises:
        ValueError: If `formula` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan import Smooth, solve
        >>> from varan.secondorder import nonlinear_cg
        >>> problem = Smooth(lambda x: jnp.sum(jnp.cosh(x - 1.0)))
        >>> solve(problem, nonlinear_cg(), jnp.zeros(2)).x.round(3)
        Array([1., 1.], dtype=float32)

    Source:
        Hager, Zhang, 2005, "A new conjugate gradient method with guaranteed descent and
        an efficient line search"; 2006, "A survey of nonlinear conjugate gradient
        methods".

    Differences:
        From `optimistix.NonlinearCG`, which has four of the formulae and a backtracking
        search: a search for Wolfe's conditions, without which the formulae promise no
        descent; Hager and Zhang's formula; and the signs of Hestenes and Stiefel's and
        of Dai and Yuan's, which are the opposite there (version 0.1.0).
    """
    if linesearch is None:
        linesearch = scale_by_hager_zhang_linesearch(first_trial="previous")
    return optax.chain(scale_by_nonlinear_cg(formula), linesearch)


def scale_by_nonlinear_cg(
    formula: Formula = "hager-zhang",
) -> optax.GradientTransformation:
    """Turns gradients into conjugate directions of descent, for a line search to scale.

    With the last direction `d`, gradients `g` and `h` (the last), and `y = g - h`, the
    new direction is `-g + b d`:

    | formula | `b` |
    | --- | --- |
    | `"hager-zhang"` | `(y - 2 d y'y / d'y)'g / d'y`, not below their bound |
    | `"polak-ribiere"` | `max(g'y / h'h, 0)` |
    | `"fletcher-reeves"` | `g'g / h'h` |
    | `"hestenes-stiefel"` | `max(g'y / d'y, 0)` |
    | `"dai-yuan"` | `g'g / d'y` |

    Where that does not descend, the direction is `-g`; with `"fletcher-reeves"` and
    `"dai-yuan"` also where `|g'h| >= g'g / 5` (Powell's restart), without which they
    stick to bad directions.

    Args:
        formula: One of the table.

    Returns:
        An `optax.GradientTransformation` whose updates are directions of descent.

    Raises:
        ValueError: If `formula` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.secondorder import scale_by_nonlinear_cg
        >>> method = scale_by_nonlinear_cg("fletcher-reeves")
        >>> state = method.init(jnp.zeros(1))
        >>> first, state = method.update(jnp.ones(1), state)
        >>> second, _ = method.update(jnp.full(1, 6.0), state)
        >>> float(first[0]), float(second[0])
        (-1.0, -42.0)

    Source:
        Fletcher, Reeves, 1964; Polak, Ribière, 1969, with Powell's sign, 1984;
        Hestenes, Stiefel, 1952; Dai, Yuan, 1999; Hager, Zhang, 2005; the restart:
        Powell, 1977.
    """
    check_choice("scale_by_nonlinear_cg", "formula", formula, get_args(Formula))

    def init(params):
        zeros = jtu.tree_map(jnp.zeros_like, params)
        return ScaleByNonlinearCGState(zeros, zeros, jnp.asarray(False))

    def update(updates, state, params=None):
        del params
        factor = _factor(formula, updates, state.last_gradient, state.direction)
        factor = jnp.where(state.started & jnp.isfinite(factor), factor, 0)
        direction = jtu.tree_map(
            lambda g, d: factor.astype(g.dtype) * d - g, updates, state.direction
        )
        descends = _dot(direction, updates) < 0
        direction = jtu.tree_map(
            lambda d, g: jnp.where(descends, d, -g), direction, updates
        )
        started = jnp.ones_like(state.started)
        return direction, ScaleByNonlinearCGState(updates, direction, started)

    return optax.GradientTransformation(init, update)


def _factor(formula, g, h, d):
    """The multiple of the last direction; NaN or infinite where it has none."""
    y = jtu.tree_map(jnp.subtract, g, h)
    if formula == "polak-ribiere":
        return jnp.maximum(_dot(g, y) / _dot(h, h), 0)
    if formula == "fletcher-reeves":
        return _unless_alike(g, h, _dot(g, g) / _dot(h, h))
    if formula == "hestenes-stiefel":
        return jnp.maximum(_dot(g, y) / _dot(d, y), 0)
    if formula == "dai-yuan":
        return _unless_alike(g, h, _dot(g, g) / _dot(d, y))
    along = _dot(d, y)
    factor = (_dot(y, g) - 2 * _dot(d, g) * _dot(y, y) / along) / along
    size = jnp.sqrt(_dot(h, h))
    bound = -1 / (jnp.sqrt(_dot(d, d)) * jnp.minimum(_ETA, size))
    return jnp.maximum(factor, bound)


def _unless_alike(g, h, factor):
    """Zero where gradients in a row are far from orthogonal, so that these formulae
    would keep a bad direction for good."""
    return jnp.where(jnp.abs(_dot(g, h)) >= _ALIKE * _dot(g, g), 0, factor)


def _dot(a, b):
    return jnp.asarray(sum(jtu.tree_leaves(jtu.tree_map(jnp.vdot, a, b))))
