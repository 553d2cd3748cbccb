"""The Monge gap, how far a map is from moving points at least cost; fitting with it.

`gap(T) = mean c(x_i, T(x_i)) - W(x, T(x))`, the cost that the map pays minus that of
transporting the points to the same images in the best order. At epsilon = 0 it is not
negative, and zero exactly where `T` is optimal between its input and its output. Added
to any loss that compares `T(x)` with a target sample, it makes a plain network an
optimal transport map, for every cost.

Use it where maps must be optimal for a cost of one's choice; for the squared distance
the gradient of a convex network is an alternative.

Cost: one entropic problem between n points and their images; the gradient is read off
its plan.

Source: Uscidda, Cuturi, 2023 (arXiv 2302.04953).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ..core import Certificate, Solver
from ..core._checks import check_nonempty, check_shape
from ._divergence import Cost, cost_matrix, entropic_cost

Map = Callable[[Float[Array, " d"]], Float[Array, " e"]]
Sampler = Callable[[PRNGKeyArray], Float[Array, "n d"]]


def monge_gap(
    transport_map: Map,
    x: Float[Array, "n d"],
    *,
    epsilon: float | Float[Array, ""],
    cost: Cost = "sqeuclidean",
    method: Literal["auto", "sinkhorn", "newton", "sparse-newton"] | Solver = "newton",
    tol: float | None = None,
    max_steps: int = 1000,
) -> Float[Array, ""]:
    """The entropic Monge gap of a map on a sample.

    Args:
        transport_map: From one point (d,) to one point; an Equinox module, as `jit`
            and `grad` see its parameters.
        x: The sample of the reference measure.
        epsilon: Weight of the entropy in units of the cost. Hold it fixed: one that
            follows the batch's own costs changes with the map.
        cost: See `cost_matrix`.
        method: See `entropic_cost`.
        tol: See `entropic_cost`.
        max_steps: See `entropic_cost`.

    Returns:
        A scalar, positive: `W` is `min <C, P> - epsilon H(P)`, as in the paper, so that
        the value exceeds the exact gap by `epsilon log(n)` to `2 epsilon log(n)`, which
        a map can change but little. With the entropy relative to the masses, as
        `entropic_cost` has it, it would be lower by `2 epsilon log(n)` and could be
        negative. NaN where the entropic problem did not converge.

    Raises:
        ValueError: If `x` is empty or not (n, d), or as `entropic_cost`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import monge_gap
        >>> x = jnp.array([[-1.0], [0.0], [2.0]])
        >>> [round(float(monge_gap(t, x, epsilon=0.1)), 1)
        ...  for t in (lambda p: p + 1, lambda p: -p)]
        [0.1, 6.1]

    Source:
        Uscidda, Cuturi, 2023 (arXiv 2302.04953), definition 3.1 and equation 5.
    """
    check_nonempty("monge_gap", "x", x)
    check_shape("monge_gap", "x", x, (None, None))
    y = _images("monge_gap", transport_map, x)
    relative = entropic_cost(
        x, y, epsilon=epsilon, cost=cost, method=method, tol=tol, max_steps=max_steps
    )
    # The entropies of the two equal masses turn one convention into the other.
    return _paid(x, y, cost) - relative + 2 * epsilon * float(np.log(x.shape[0]))


def exact_monge_gap(
    transport_map: Map, x: Float[Array, "n d"], *, cost: Cost = "sqeuclidean"
) -> Certificate:
    """The Monge gap of a map on a sample without entropy, by an assignment solver.

    Runs outside of `jit`, in time growing like n^3: a second for 1000 points.

    Args:
        transport_map: See `monge_gap`.
        x: See `monge_gap`.
        cost: See `cost_matrix`.

    Returns:
        A certificate whose value is the gap of this sample: not negative, and a proof
        for it. Zero says that no reordering of the images is cheaper.

    Raises:
        ValueError: As `monge_gap`.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.transport import exact_monge_gap
        >>> x = jnp.array([[-1.0], [0.0], [2.0]])
        >>> float(exact_monge_gap(lambda p: -p, x).value)
        6.0

    Source:
        Uscidda, Cuturi, 2023 (arXiv 2302.04953), definition 3.1.
    """
    from scipy.optimize import linear_sum_assignment

    check_nonempty("exact_monge_gap", "x", x)
    check_shape("exact_monge_gap", "x", x, (None, None))
    y = _images("exact_monge_gap", transport_map, x)
    matrix = np.asarray(cost_matrix(x, y, cost))
    paid = np.mean(np.diagonal(matrix))
    least = np.mean(matrix[linear_sum_assignment(matrix)])
    return Certificate(
        "Monge gap",
        jnp.maximum(jnp.asarray(paid - least), 0),
        proof=True,
        statement=(
            "on this sample the map pays value more, in the mean over its points, than "
            "the cheapest way to reach the same images"
        ),
        details={"paid": jnp.asarray(paid), "least": jnp.asarray(least)},
    )


class MapResult(eqx.Module):
    """A fitted map and its way there.

    Args:
        map: The fitted model.
        fitting: The fitting loss of each step.
        regulariser: The regulariser of each step, before it is weighted; zero without
            one.
    """

    map: Map
    fitting: Float[Array, " steps"]
    regulariser: Float[Array, " steps"]


def fit_map(
    key: PRNGKeyArray,
    source: Sampler,
    target: Sampler,
    model: Map,
    *,
    fitting: Callable[[Float[Array, "n d"], Float[Array, "m d"]], Float[Array, ""]],
    regulariser: Callable[[Map, Float[Array, "n d"]], Float[Array, ""]] | None = None,
    weight: float | Float[Array, ""] = 1.0,
    steps: int,
    optimiser: optax.GradientTransformation,
) -> MapResult:
    """Fits a map that carries one measure to another, by stochastic gradients.

    Minimises `fitting(T(x), y) + weight regulariser(T, x)` over fresh batches, in one
    compiled loop. With `sinkhorn_divergence` and `monge_gap` it is the paper's method.
    Give the two as `jax.tree_util.Partial` of functions and arrays, and new values of
    epsilon compile nothing.

    Args:
        key: Random key.
        source: From a key to a batch of the source.
        target: From a key to a batch of the target.
        model: The map at the start, from one point to one point.
        fitting: Compares the images with the target batch.
        regulariser: Of the map on the source batch; default: none.
        weight: Of the regulariser, not negative.
        steps: Optimiser steps.
        optimiser: An optax transformation.

    Returns:
        A `MapResult`. NaN stays visible in it: nothing is caught.

    Raises:
        ValueError: If an image has another shape than its point.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, optax
        >>> from functools import partial
        >>> from varan.transport import fit_map, monge_gap, sinkhorn_divergence
        >>> class Shift(eqx.Module):
        ...     by: jax.Array
        ...     def __call__(self, x):
        ...         return x + self.by
        >>> normal = lambda key: jax.random.normal(key, (32, 1))
        >>> result = fit_map(
        ...     jax.random.key(0), normal, lambda key: normal(key) + 3,
        ...     Shift(jnp.zeros(1)),
        ...     fitting=partial(sinkhorn_divergence, epsilon=0.5),
        ...     regulariser=partial(monge_gap, epsilon=0.5),
        ...     steps=60, optimiser=optax.adam(0.2),
        ... )
        >>> bool(abs(result.map.by[0] - 3) < 0.6)
        True

    Source:
        Uscidda, Cuturi, 2023 (arXiv 2302.04953), section 4.
    """
    weight = jnp.asarray(weight)
    return _fit(
        key, source, target, model, fitting, regulariser, weight, steps, optimiser
    )


@eqx.filter_jit
def _fit(key, source, target, model, fitting, regulariser, weight, steps, optimiser):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x, y):
        current = eqx.combine(params, static)
        fit = fitting(_images("fit_map", current, x), y)
        extra = jnp.zeros_like(fit) if regulariser is None else regulariser(current, x)
        return fit + weight.astype(fit.dtype) * extra, (fit, extra)

    def step(carry, key):
        params, state = carry
        for_source, for_target = jax.random.split(key)
        gradient, parts = jax.grad(loss, has_aux=True)(
            params, source(for_source), target(for_target)
        )
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), parts

    start = params, optimiser.init(params)
    (params, _), (fit, extra) = jax.lax.scan(step, start, jax.random.split(key, steps))
    return MapResult(eqx.combine(params, static), fit, extra)


def _images(owner, transport_map, x):
    y = jax.vmap(transport_map)(x)
    if y.shape != x.shape:
        raise ValueError(
            f"{owner}: the map must take a point to a point (got shape {y.shape[1:]} "
            f"for {x.shape[1:]}). It is mapped over the sample: write it for one point."
        )
    return y


def _paid(x, y, cost):
    """The mean cost from each point to its own image."""
    pair = jax.vmap(lambda p, q: cost_matrix(p[None], q[None], cost)[0, 0])
    return jnp.mean(pair(x, y))
