"""Local Lipschitz constants of networks by bound propagation on the Clarke Jacobian.

`L = sup over x in a box of ||J(x)||` bounds how far a network's output moves for any
two inputs of the box. The Jacobian's chain rule is bounded like a network of its own
(`_jacobian.py`), after the ranges of all activations have been bounded (`_forward.py`).
Use it for certificates of robustness, monotonicity and stability of a trained network;
for a whole-space constant of a deep network the bound is as loose as products of norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ..core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_shape,
    is_traced,
)
from ._branch import BaB, branch_and_bound
from ._forward import (
    FORWARD_METHODS,
    ForwardMethod,
    check_box,
    poison,
    preactivations,
    refuse_nan,
)
from ._graph import BoundGraph, as_callable
from ._jacobian import (
    JACOBIAN_METHODS,
    JacobianMethod,
    State,
    cotangent_bounds,
    directional_bounds,
    product_of_norms,
    state_of,
)
from ._result import LipschitzResult, certify_bound
from ._sets import Box

Method = Literal["crown", "recurjac", "recurjac_strict", "ibp", "naive"]
Rows = Literal["each"] | Float[Array, "rows out"]
_SMOOTH = ("linear", "interval")


def local_lipschitz(
    model: Callable[[Array], Array],
    box: Box,
    *,
    rows: Rows = "each",
    norm: Literal["linf", "l2"] = "linf",
    method: Method = "crown",
    forward: ForwardMethod = "alpha",
    bab: BaB | None = None,
    smooth: Literal["linear", "interval"] = "linear",
    samples: int = 256,
    key: PRNGKeyArray | None = None,
) -> LipschitzResult:
    """A proved upper bound of a network's Lipschitz constant over a box.

    The largest `||C J(x)||` over the box and over the Clarke Jacobians there, bounded
    by linear relaxation of the Jacobian's chain rule. With `n` layers of width `w` the
    bound costs about `n^2` products of w-by-w matrices a row; branch and bound then
    splits the unstable neurons that matter most and can only improve it.

    Args:
        model: An `equinox.Module` in inference mode or a JAX callable of one input
            without batch axis, or a pair `(weights, biases)` of a ReLU network.
        box: The inputs. Infinite sides are allowed: then the bound is for all inputs
            and says so. The computation runs in the box's dtype; take float64 for
            certificates that matter.
        rows: `"each"` output, or a matrix `C` of shape (rows, outputs) such as the
            differences of logits.
        norm: `"linf"`: the operator norm from l_inf to l_inf, the largest l1 norm of
            a row. `"l2"`: the spectral norm of the entrywise largest Jacobian.
        method: `"crown"` (the paper's), and its weaker relatives `"recurjac"` and
            `"recurjac_strict"` (constant bounds where a cotangent has both signs),
            `"ibp"` (intervals after every layer), `"naive"` (product of norms).
        forward: How the activations' ranges are bounded: `"alpha"`, `"crown"`,
            `"ibp"`; `"crown"` is many times faster than `"alpha"`.
        bab: Branch and bound over unstable ReLUs, with its budget; `None` for none.
            Only for `norm="linf"`, `method="crown"` and outside jit.
        smooth: For smooth activations, whether the derivative follows its state
            (`"linear"`) or ranges freely over its interval (`"interval"`).
        samples: Points tried for `attained`, then as many again climbing from the
            best one; 0 for the centre alone.
        key: Where those points come from; a fixed one by default.

    Returns:
        The bound with its certificate, the bounds of rows and entries, and the
        largest value attained at a point. Differentiable almost everywhere in the
        model's weights and the box, so `bound` serves as a penalty in training.

    Raises:
        ValueError: an unknown choice, `rows` of the wrong shape, a combination that
            does not exist.
        UnsupportedPrimitive: an operation of the model without a rule.
        Under jit a box that is NaN, crossed or infinite makes every number NaN.

    Example:
        >>> import jax, jax.numpy as jnp, equinox as eqx
        >>> from varan.lipschitz import Box, local_lipschitz
        >>> net = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(1))
        >>> found = local_lipschitz(net, Box.linf(jnp.zeros(4), 0.05), forward="crown")
        >>> bool(found.attained <= found.bound), found.kind
        (True, 'proof')

    Source:
        Shi, Wang, Zhang, Kolter, Hsieh (2022), arXiv:2210.07394, sections 3 and 4.

    Differences:
        Smooth activations by McCormick's inequalities on lines of the derivative.
        Branches of all rows share one queue, worst first, instead of dividing the
        time among the rows; the norm `"l2"` is an addition. Every bound is widened by
        4 units of rounding of the sizes of all terms that went into it.
    """
    owner = "local_lipschitz"
    check_choice(owner, "norm", norm, ("linf", "l2"))
    check_choice(owner, "method", method, (*JACOBIAN_METHODS, "naive"))
    check_choice(owner, "forward", forward, FORWARD_METHODS)
    check_choice(owner, "smooth", smooth, _SMOOTH)
    if norm == "l2" and (method == "naive" or bab is not None):
        raise ValueError(
            f'{owner}: norm="l2" has neither method="naive" nor branch and bound. '
            'Use norm="linf", or another method without `bab`.'
        )
    if bab is not None and (method != "crown" or is_traced(box.lower)):
        raise ValueError(
            f'{owner}: branch and bound needs method="crown" and a box outside jit.'
        )
    if not isinstance(samples, int) or samples < 0:
        raise ValueError(f"{owner}: `samples` must be an integer >= 0 (got {samples}).")
    check_box(owner, box)
    unbounded = _unbounded(box)
    rows = check_rows(owner, rows, box)
    key = jax.random.key(0) if key is None else key
    attained, at = _attained(model, box, rows, key, norm, samples, unbounded)
    settings = (forward, smooth == "linear", unbounded)
    if bab is not None:
        intervals, matrix = _ranges(model, box, rows, *settings)
        linear = smooth == "linear" and not unbounded
        found = branch_and_bound(
            model, box, matrix, intervals, bab, attained, linear=linear
        )
    elif method == "naive":
        found = _naive(model, box, rows)
    else:
        found = _rows(model, box, rows, method, norm, *settings)
    bound, per_row, lower, upper, domains = found
    refuse_nan(owner, bound, lower, upper)
    return LipschitzResult(
        bound=bound,
        per_row=per_row,
        jac_lower=lower,
        jac_upper=upper,
        attained=attained,
        attained_at=at,
        domains=jnp.asarray(domains),
        certificate=certify_bound(bound, per_row, attained, norm, unbounded),
    )


def jacobian_bounds(
    model: Callable[[Array], Array],
    box: Box,
    *,
    rows: Rows = "each",
    method: JacobianMethod = "crown",
    forward: ForwardMethod = "alpha",
    smooth: Literal["linear", "interval"] = "linear",
) -> Box:
    """Bounds of every entry of the Jacobian over a box.

    Args:
        model: As for `local_lipschitz`.
        box: The inputs; infinite sides are allowed.
        rows: `"each"` output, or combinations of outputs, (rows, outputs).
        method: `"crown"`, `"recurjac"`, `"recurjac_strict"` or `"ibp"`.
        forward: How the activations' ranges are bounded.
        smooth: As for `local_lipschitz`.

    Returns:
        A box of matrices of shape (rows, *input shape) that contains `C J(x)` for
        every `x` in `box` and every element of the Clarke Jacobian, widened by 4 units
        of rounding of the sizes of all terms that went into an entry.

    Raises:
        ValueError: an unknown choice or `rows` of the wrong shape.
        UnsupportedPrimitive: an operation of the model without a rule.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from varan.lipschitz import Box, jacobian_bounds
        >>> found = jacobian_bounds(lambda x: jnp.tanh(x), Box.linf(jnp.zeros(2), 0.5))
        >>> [round(float(v), 3) + 0.0 for v in found.lower[0]]
        [0.786, 0.0]

    Source:
        Shi, Wang, Zhang, Kolter, Hsieh (2022), arXiv:2210.07394, section 3.
    """
    owner = "jacobian_bounds"
    check_choice(owner, "method", method, JACOBIAN_METHODS)
    check_choice(owner, "forward", forward, FORWARD_METHODS)
    check_choice(owner, "smooth", smooth, _SMOOTH)
    rows = check_rows(owner, rows, box)
    settings = (forward, smooth == "linear", _unbounded(box))
    found = _entries(model, box, rows, method, *settings)
    refuse_nan("jacobian_bounds", found.lower, found.upper)
    return found


def jvp_bounds(
    model: Callable[[Array], Array],
    box: Box,
    direction: Float[Array, ...],
    *,
    forward: ForwardMethod = "alpha",
    smooth: Literal["linear", "interval"] = "linear",
) -> Box:
    """Bounds of the directional derivatives `J(x) v` over a box.

    Tighter than summing the bounds of the Jacobian's entries: cancellation among the
    entries of `v` is kept.

    Args:
        model: As for `local_lipschitz`.
        box: The inputs; infinite sides are allowed.
        direction: The vector `v`, of the input's shape.
        forward: How the activations' ranges are bounded.
        smooth: As for `local_lipschitz`.

    Returns:
        A box with one entry for every output (flattened).

    Raises:
        ValueError: a direction of another shape than the input, or not finite.
        UnsupportedPrimitive: an operation of the model without a rule.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import Box, jvp_bounds
        >>> net = lambda x: jnp.tanh(x[:1] - x[1:])
        >>> flat = jvp_bounds(net, Box.linf(jnp.zeros(2), 1.0), jnp.ones(2))
        >>> bool(abs(flat.lower[0]) < 1e-4)
        True

    Source:
        Shi, Wang, Zhang, Kolter, Hsieh (2022), arXiv:2210.07394, section 3.
    """
    check_choice("jvp_bounds", "forward", forward, FORWARD_METHODS)
    check_choice("jvp_bounds", "smooth", smooth, _SMOOTH)
    check_shape("jvp_bounds", "direction", direction, box.lower.shape)
    check_finite("jvp_bounds", "direction", direction)
    direction = jnp.asarray(direction, box.lower.dtype)
    settings = (forward, smooth == "linear", _unbounded(box))
    found = _directional(model, box, direction, *settings)
    refuse_nan("jvp_bounds", found.lower, found.upper)
    return found


def check_rows(owner: str, rows, box: Box) -> Array | None:
    """The combinations of outputs; `None` for each output by itself."""
    if isinstance(rows, str):
        check_choice(owner, "rows", rows, ("each",))
        return None
    check_shape(owner, "rows", rows, (None, None))
    check_nonempty(owner, "rows", rows)
    check_finite(owner, "rows", rows)
    return jnp.asarray(rows, box.lower.dtype)


def as_rows(rows: Array | None, out_shape: tuple[int, ...], dtype) -> Array:
    """The combinations as an array of shape (rows, *output shape)."""
    size = math.prod(out_shape)
    if rows is None:
        rows = jnp.eye(size, dtype=dtype)
    if rows.shape[1] != size:
        raise ValueError(
            "lipschitz: `rows` must have one column for every output "
            f"(got {rows.shape[1]} columns for {size} outputs)."
        )
    return rows.reshape(-1, *out_shape)


def _unbounded(box: Box) -> bool:
    if is_traced(box.lower) or is_traced(box.upper):
        return False
    return not all(np.isfinite(np.asarray(s)).all() for s in (box.lower, box.upper))


def _prepare(model, box: Box, forward: str, linear: bool, unbounded: bool):
    """The graph and the activations' intervals and lines over the box."""
    graph = BoundGraph.from_callable(model, box.lower)
    if not unbounded:
        intervals, lines, *_ = preactivations(graph, box, forward)
        if linear and forward == "ibp":
            lines = {
                k: jax.tree.map(lambda v: v[None], graph.nodes[k].curve.lines(*i))
                for k, i in intervals.items()
            }
        return graph, intervals, lines
    intervals = {
        k: (
            jnp.full(graph.nodes[k].shape, -jnp.inf, graph.dtype),
            jnp.full(graph.nodes[k].shape, jnp.inf, graph.dtype),
        )
        for k in graph.activations
    }
    return graph, intervals, {}


def _gradients(model, box, rows, method, forward, linear, unbounded):
    graph, intervals, lines = _prepare(model, box, forward, linear, unbounded)
    state: State = state_of(
        graph, box, intervals, lines, linear=linear and not unbounded
    )
    shaped = as_rows(rows, graph.nodes[-1].shape, graph.dtype)
    safe = (
        Box(jnp.zeros_like(box.lower), jnp.zeros_like(box.lower)) if unbounded else box
    )
    return jax.vmap(lambda c: cotangent_bounds(graph, safe, state, c, method))(shaped)


def _valid(box: Box, unbounded: bool) -> Array:
    return box.valid & (unbounded | box.bounded)


@eqx.filter_jit
def _ranges(model, box, rows, forward, linear, unbounded):
    """The activations' intervals and the matrix of rows, for branch and bound."""
    graph, intervals, _ = _prepare(model, box, forward, linear, unbounded)
    rows = as_rows(rows, graph.nodes[-1].shape, graph.dtype)
    return intervals, rows.reshape(rows.shape[0], -1)


@eqx.filter_jit
def _rows(model, box, rows, method, norm, forward, linear, unbounded):
    found = _gradients(model, box, rows, method, forward, linear, unbounded)
    lower, upper = found.gradient
    if norm == "linf":
        per_row = found.norm
        bound = jnp.max(per_row)
    else:
        largest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
        largest = largest.reshape(largest.shape[0], -1)
        per_row = jnp.sqrt(jnp.sum(largest**2, 1))
        slack = 1 + 4 * sum(largest.shape) * jnp.finfo(largest.dtype).eps
        bound = jnp.linalg.norm(largest, 2) * slack
    out = poison(_valid(box, unbounded), (bound, per_row, lower, upper))
    return (*out, per_row.shape[0])


@eqx.filter_jit
def _entries(model, box, rows, method, forward, linear, unbounded):
    found = _gradients(model, box, rows, method, forward, linear, unbounded)
    return Box(*poison(_valid(box, unbounded), found.gradient))


@eqx.filter_jit
def _directional(model, box, direction, forward, linear, unbounded):
    graph, intervals, lines = _prepare(model, box, forward, linear, unbounded)
    state = state_of(graph, box, intervals, lines, linear=linear and not unbounded)
    shaped = as_rows(None, graph.nodes[-1].shape, graph.dtype)
    safe = (
        Box(jnp.zeros_like(box.lower), jnp.zeros_like(box.lower)) if unbounded else box
    )
    one = partial(directional_bounds, graph, safe, state)
    found = jax.vmap(lambda c: one(c, direction))(shaped)
    return Box(*poison(_valid(box, unbounded), found))


@eqx.filter_jit
def _naive(model, box, rows):
    graph = BoundGraph.from_callable(model, box.lower)
    product = product_of_norms(graph)
    rows = as_rows(rows, graph.nodes[-1].shape, graph.dtype)
    per_row = jnp.sum(jnp.abs(rows), tuple(range(1, rows.ndim))) * product
    shape = (rows.shape[0], *box.lower.shape)
    entry = jnp.broadcast_to(per_row.reshape(-1, *(1,) * box.lower.ndim), shape)
    valid = ~jnp.any(jnp.isnan(box.lower) | (box.lower > box.upper))
    out = poison(valid, (jnp.max(per_row), per_row, -entry, entry))
    return (*out, rows.shape[0])


@eqx.filter_jit
def _attained(model, box, rows, key, norm, samples, unbounded):
    """The largest norm at a point: uniform samples, then a climb from the best."""
    function = as_callable(model)
    graph = BoundGraph.from_callable(model, box.lower)
    direction = jax.random.normal(jax.random.fold_in(key, 1), box.lower.shape)
    direction = direction.astype(graph.dtype)
    if unbounded:
        # Points of the part of the box within reach of ordinary inputs.
        box = Box(jnp.clip(box.lower, -10, 10), jnp.clip(box.upper, -10, 10))

    def norm_at(x):
        out, pull = jax.vjp(function, x)
        combinations = as_rows(rows, out.shape, out.dtype)
        jac = jax.vmap(lambda c: pull(c)[0])(combinations)
        jac = jac.reshape(jac.shape[0], -1)
        if norm == "linf":
            value = jnp.max(jnp.sum(jnp.abs(jac), 1))
        else:
            value = jnp.linalg.norm(jac, 2)
        return jnp.where(graph.on_kink(x, direction), 0, value)

    if samples == 0:
        x = box.centre
        return lax.stop_gradient((norm_at(x), x))
    rounds = 8
    batch = max(samples // rounds, 1)

    def search(carry, inputs):
        x, value = carry
        key, reach = inputs
        anchor = jnp.where(reach < 1, x, box.centre)
        step = jax.random.uniform(key, (batch, *x.shape), x.dtype, -1, 1)
        points = anchor[None] + reach * step * box.radius[None]
        points = jnp.clip(points, box.lower[None], box.upper[None])
        values = jax.vmap(norm_at)(points)
        best = jnp.argmax(values)
        better = values[best] > value
        point = jnp.where(better, points[best], x)
        return (point, jnp.where(better, values[best], value)), None

    # Rounds of reach 1 look everywhere, the later ones climb in halving steps.
    reaches = [1.0] * rounds + [0.5**k for k in range(1, rounds + 1)]
    inputs = jax.random.split(key, 2 * rounds), jnp.asarray(reaches, box.lower.dtype)
    start = box.centre, jnp.full((), -jnp.inf, box.lower.dtype)
    (x, value), _ = lax.scan(search, start, inputs)
    return lax.stop_gradient((value, x))
