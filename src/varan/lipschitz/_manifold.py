"""Functions with the least Lipschitz constant on a manifold that fit their data.

Among the models whose mean loss is at most `eps`, find the one whose largest gradient
along the manifold is least:

    min over f of max over x of |grad f(x)|^2   subject to   mean loss(f) <= eps

Its dual has a multiplier `lam` for the loss and, for the maximum, a probability `mu`
over the points of a cloud:

    lam (mean_i loss_i - eps) + sum_n mu_n |grad f(x_n)|^2

The model descends, the multipliers ascend: `mu` gathers where the gradient is largest,
so that this is a Laplacian penalty whose weights follow the worst points. With `mu`
held uniform it is the ordinary Laplacian penalty, which bounds the mean instead of the
maximum. Unlabelled points enter through `mu` alone.

Source: J. Cerviño, L. F. O. Chamon, B. D. Haeffele, R. Vidal and A. Ribeiro, 2023,
arXiv:2210.00301.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree
from scipy.sparse.csgraph import connected_components

from ..core import Certificate
from ..core._checks import (
    check_choice,
    check_finite,
    check_nonempty,
    check_nonnegative,
    check_positive,
    check_shape,
)
from ..operators import project_simplex

_ADAM = optax.adam(1e-3)
# Of the largest weight: below it two points are no neighbours.
_NEGLIGIBLE = 1e-6
# The bandwidth reaches to this many neighbours.
_REACH = 10
# How far above `eps` the mean loss of an attained constraint may lie.
_SLACK = 0.05


class ManifoldSolution(eqx.Module):
    """A smooth model and the multipliers that made it so.

    Args:
        model: The trained model.
        lam: The loss constraint's multiplier.
        mu: The probability over the cloud's points, labelled ones first.
        rho: The largest gradient at the points: an estimate of the model's Lipschitz
            constant on the manifold.
        gradients: The gradient's length at each point.
        loss: The mean loss on the labelled points.
        trace: `loss`, `rho` (of the points looked at) and `lam` at every step.
        attained: Whether the mean loss is at most 5 % above `eps`.
        diverging: Whether `eps` looks out of reach: it was missed in the whole last
            quarter while `lam` grew. Also true where the model became NaN.
        certificate: `rho` as an estimate, with `primal_residual` (mean loss less
            `eps`), `slackness` (`sum mu_n (rho^2 - gradient_n^2)`) and `duality_gap`,
            relative to `rho^2`, from the multipliers' averages over the last half.
    """

    model: PyTree
    lam: Float[Array, ""]
    mu: Float[Array, " points"]
    rho: Float[Array, ""]
    gradients: Float[Array, " points"]
    loss: Float[Array, ""]
    trace: dict[str, Float[Array, " steps"]]
    attained: Bool[Array, ""]
    diverging: Bool[Array, ""]
    certificate: Certificate


def laplacian_weights(
    X: Float[Array, "points inputs"], t: float | Float[Array, ""], d: int
) -> Float[Array, "points points"]:
    """Heat kernel weights between points of a manifold.

    `exp(-|x - y|^2 / (4 t)) / (N t (4 pi t)^(d/2))`: with them
    `sum_m w_nm (f(x_n) - f(x_m))^2` tends to `2 density |grad f(x_n)|^2` as the points
    become many and `t` small.

    Args:
        X: The points.
        t: The bandwidth, positive, in squared units of the inputs.
        d: The manifold's dimension, at least 1.

    Returns:
        A symmetric matrix.

    Raises:
        ValueError: No points, points that are not finite, a bandwidth that is not
            positive, or a dimension below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lipschitz import laplacian_weights
        >>> weights = laplacian_weights(jnp.array([[0.0], [1.0]]), 0.25, 1)
        >>> round(float(weights[0, 1] / weights[0, 0]), 3)
        0.368

    Source: M. Belkin and P. Niyogi, 2008, "Towards a theoretical foundation for
        Laplacian-based manifold methods", Journal of Computer and System Sciences 74.
    """
    owner = "laplacian_weights"
    check_shape(owner, "X", X, (None, None))
    check_nonempty(owner, "X", X)
    check_finite(owner, "X", X)
    check_positive(owner, "t", t)
    if d < 1:
        raise ValueError(f"{owner}: `d` must be at least 1 (got {d}).")
    X = jnp.asarray(X)
    t = jnp.asarray(t, X.dtype)
    normal = X.shape[0] * t * (4 * math.pi * t) ** (d / 2)
    return _kernel(_distances(X), t) / normal


def manifold_lipschitz(
    loss: Callable[[Array, Array], Float[Array, ""]],
    model: Callable[[Array], Array],
    data: tuple[Float[Array, "labelled inputs"], Array],
    *,
    unlabeled: Float[Array, "unlabelled inputs"] | None = None,
    eps: float | Float[Array, ""],
    gradient: Literal["heat", "knn", "ambient"] = "heat",
    t: float | None = None,
    neighbours: int = 8,
    distances: Float[Array, "points points"] | None = None,
    dual: Literal["projected", "exponentiated"] = "projected",
    dual_lr: tuple[float, float] = (1e-2, 1e-2),
    primal: optax.GradientTransformation = _ADAM,
    primal_steps: int = 1,
    steps: int = 2000,
    batch_size: int | None = None,
    key: PRNGKeyArray | None = None,
) -> ManifoldSolution:
    """Trains a model to be as smooth as its loss constraint lets it.

    A step costs a gradient of the model at all points (or at a batch of them) and, for
    heat weights, a pass over the pairs.

    Args:
        loss: Of one prediction and its label, a scalar.
        model: An Equinox module from one input to a vector of outputs.
        data: Labelled points and their labels.
        unlabeled: Further points of the manifold.
        eps: What the mean loss may be, not negative.
        gradient: `"heat"`: `sum_m c w_nm |f(x_n) - f(x_m)|^2` with the weights of
            `laplacian_weights` and `c` half the manifold's volume as the points'
            mean density tells it, so that a uniform cloud's gradients come in their own
            units; `"knn"`: the largest slope to the nearest neighbours; `"ambient"`:
            the Frobenius norm of the Jacobian in all inputs.
        t: The heat kernel's bandwidth, positive; a quarter of the squared median
            distance to the tenth neighbour if left out.
        neighbours: For `"knn"`, at least 1.
        distances: Between all points, labelled first, along the manifold (infinite
            where there is no way); Euclidean if left out.
        dual: How `mu` ascends: gradient steps projected on the simplex, or
            multiplicative ones.
        dual_lr: Rates of `lam` and `mu`, not negative. A rate of 0 for `mu` keeps it
            uniform: the Laplacian penalty of fixed weights.
        primal: The model's optimiser. Keep one object for several calls: each new one
            compiles anew.
        primal_steps: Steps of the model for one of the multipliers.
        steps: Steps of the multipliers.
        batch_size: Random points a step; all if left out.
        key: Random key, needed with `batch_size`.

    Returns:
        A `ManifoldSolution`. Read its `attained` and `diverging`.

    Raises:
        ValueError: Shapes that do not fit, numbers that are not finite, a negative
            `eps`, settings out of range, points so equal that the bandwidth is zero, or
            neighbours that leave a part of the cloud without any labelled point: there
            the model would be free.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, optax
        >>> from varan.lipschitz import manifold_lipschitz
        >>> line = eqx.nn.Linear(1, 1, key=jax.random.key(0))
        >>> data = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [1.0]])
        >>> found = manifold_lipschitz(
        ...     lambda f, y: jnp.sum((f - y) ** 2), line, data, eps=0.01,
        ...     gradient="ambient", dual_lr=(1.0, 0.1), primal=optax.sgd(0.01))
        >>> round(float(found.rho), 1)  # a line of slope 1 would fit exactly
        0.8

    Source:
        J. Cerviño, L. F. O. Chamon, B. D. Haeffele, R. Vidal and A. Ribeiro, 2023,
        "Learning Globally Smooth Functions on Manifolds", ICML, arXiv:2210.00301.

    Differences:
        The multipliers ascend by the values that the model's last gradient was taken
        at. Step sizes and bandwidth are ours. Several outputs count by the sum of their
        squared gradients, which bounds the largest slope from above.
    """
    owner = "manifold_lipschitz"
    points, x, y = _checked(owner, data, unlabeled)
    check_nonnegative(owner, "eps", eps)
    check_nonnegative(owner, "dual_lr", dual_lr)
    check_choice(owner, "gradient", gradient, ("heat", "knn", "ambient"))
    check_choice(owner, "dual", dual, ("projected", "exponentiated"))
    numbers = {"steps": steps, "primal_steps": primal_steps, "neighbours": neighbours}
    size = len(points) if batch_size is None else batch_size
    for name, number in numbers.items() | {("batch_size", size)}:
        if number < 1:
            raise ValueError(f"{owner}: `{name}` must be at least 1 (got {number}).")
    if batch_size is not None and (key is None or size > len(points)):
        raise ValueError(
            f"{owner}: `batch_size` needs a `key` and at most the cloud's "
            f"{len(points)} points (got {batch_size})."
        )
    slopes = _slopes(owner, gradient, points, distances, t, neighbours, len(x))
    rates = jnp.asarray(dual_lr[0], points.dtype), jnp.asarray(dual_lr[1], points.dtype)
    cloud = _Cloud(points, x, y, slopes, jnp.asarray(eps, points.dtype), rates)
    key = jax.random.key(0) if key is None else key
    loop = steps, primal_steps, None if batch_size is None else size
    end = _train(loss, model, cloud, primal, dual == "exponentiated", loop, key)
    return _solution(*end, cloud, steps)


class _Cloud(NamedTuple):
    points: Array
    x: Array
    y: Array
    slopes: Any
    eps: Array
    rates: tuple[Array, Array]


class _Heat(eqx.Module):
    """Squared gradients by the heat kernel's weights."""

    weights: Array

    def squares(self, model, points, chosen):
        weights = self.weights
        if chosen is not None:
            points, weights = points[chosen], weights[chosen][:, chosen]
        values = jax.vmap(model)(points)
        # Centred, as the squares below cancel; two products instead of all pairs.
        values = values - jnp.mean(values, 0, keepdims=True)
        lengths = jnp.sum(values**2, 1)
        own = jnp.sum(weights, 1) * lengths + weights @ lengths
        total = own - 2 * jnp.sum(values * (weights @ values), 1)
        # A batch sees a share of the neighbours.
        return jnp.maximum(total, 0) * (len(self.weights) / len(points))


class _Nearest(eqx.Module):
    """Squares of the largest slope to a neighbour."""

    index: Array
    distances: Array

    def squares(self, model, points, chosen):
        here = jnp.arange(len(points)) if chosen is None else chosen
        values = jax.vmap(model)(points[here])
        others = jax.vmap(jax.vmap(model))(points[self.index[here]])
        rise = jnp.sum((others - values[:, None]) ** 2, 2)
        return jnp.max(rise / self.distances[here] ** 2, 1)


class _Ambient(eqx.Module):
    """Squared Frobenius norms of the Jacobian in all inputs."""

    def squares(self, model, points, chosen):
        points = points if chosen is None else points[chosen]
        return jnp.sum(jax.vmap(jax.jacrev(model))(points) ** 2, (1, 2))


@eqx.filter_jit
def _train(loss, model, cloud, primal, multiplicative, loop, key):
    steps, inner, size = loop
    points, count = cloud.points, len(cloud.points)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def measure(params, chosen):
        model = eqx.combine(params, static)
        losses = jax.vmap(loss)(jax.vmap(model)(cloud.x), cloud.y)
        return jnp.mean(losses), cloud.slopes.squares(model, points, chosen)

    def lagrangian(params, lam, mu, chosen):
        mean, squares = measure(params, chosen)
        some = mu if chosen is None else mu[chosen]
        smooth = count / len(some) * jnp.sum(some * squares)
        return lam * (mean - cloud.eps) + smooth, (mean, squares)

    def step(carry, key):
        params, state, lam, mu, sums, place = carry
        chosen = None
        if size is not None:
            chosen = jax.random.choice(key, count, (size,), replace=False)

        def descend(pair, _):
            params, state = pair
            slope, seen = jax.grad(lagrangian, has_aux=True)(params, lam, mu, chosen)
            updates, state = primal.update(slope, state, params)
            return (optax.apply_updates(params, updates), state), seen

        (params, state), seen = jax.lax.scan(descend, (params, state), None, inner)
        mean, squares = seen[0][-1], seen[1][-1]
        lam = jnp.maximum(lam + cloud.rates[0] * (mean - cloud.eps), 0)
        mu = _ascend(mu, chosen, cloud.rates[1] * squares, multiplicative)
        # Averages of the multipliers over the last half.
        late = (2 * place >= steps).astype(lam.dtype)
        sums = jtu.tree_map(lambda s, v: s + late * v, sums, (lam, mu))
        record = {"loss": mean, "rho": jnp.sqrt(jnp.max(squares)), "lam": lam}
        return (params, state, lam, mu, sums, place + 1), record

    lam = jnp.ones((), points.dtype)
    mu = jnp.full(count, 1 / count, points.dtype)
    sums = (jnp.zeros_like(lam), jnp.zeros_like(mu))
    start = (params, primal.init(params), lam, mu, sums, jnp.asarray(0))
    end, trace = jax.lax.scan(step, start, jax.random.split(key, steps))
    params, _, lam, mu, sums, _ = end
    late = steps - (steps + 1) // 2
    mean, squares = measure(params, None)
    averages = jtu.tree_map(lambda s: s / late if late else s, sums)
    return eqx.combine(params, static), lam, mu, averages, mean, squares, trace


def _ascend(mu, chosen, rise, multiplicative):
    """The next probabilities: projected, or multiplied and normalised."""
    if chosen is not None:
        rise = jnp.zeros_like(mu).at[chosen].set(rise)
    if not multiplicative:
        return project_simplex(mu + rise)
    logs = jnp.log(jnp.maximum(mu, float(jnp.finfo(mu.dtype).tiny)))
    return jax.nn.softmax(logs + rise)


def _solution(model, lam, mu, averages, mean, squares, trace, cloud, steps):
    """What the run's end says, put together."""
    top, residual = jnp.max(squares), mean - cloud.eps
    bound = jnp.sum(averages[1] * squares) + averages[0] * residual
    floor = jnp.maximum(top, float(jnp.finfo(top.dtype).tiny))
    last = slice(3 * steps // 4, None)
    # Said so that NaN, of a model that diverged, counts as both.
    missed = ~jnp.any(trace["loss"][last] <= cloud.eps * (1 + _SLACK))
    grown = ~(trace["lam"][-1] <= trace["lam"][3 * steps // 4])
    rho = jnp.sqrt(top)
    certificate = Certificate(
        "Lipschitz constant on the cloud",
        rho,
        proof=False,
        statement="value is the largest gradient along the manifold at the points, as "
        "their neighbours tell it",
        details={
            "primal_residual": residual,
            "slackness": jnp.sum(mu * (top - squares)),
            "duality_gap": (top - bound) / floor,
        },
    )
    return ManifoldSolution(
        model,
        lam,
        mu,
        rho,
        jnp.sqrt(squares),
        mean,
        trace,
        residual <= _SLACK * cloud.eps,
        missed & grown,
        certificate,
    )


def _checked(owner, data, unlabeled):
    """All points and the labelled ones with their labels."""
    x, y = (jnp.asarray(part) for part in data)
    check_shape(owner, "data", x, (None, None))
    check_nonempty(owner, "data", x)
    check_finite(owner, "data", x)
    check_finite(owner, "data", y)
    if not y.ndim or len(y) != len(x):
        raise ValueError(
            f"{owner}: `data` must hold as many labels as points (got {np.shape(y)} "
            f"for {len(x)})."
        )
    if unlabeled is None:
        return x, x, y
    check_shape(owner, "unlabeled", unlabeled, (None, x.shape[1]))
    check_finite(owner, "unlabeled", unlabeled)
    return jnp.concatenate([x, jnp.asarray(unlabeled, x.dtype)]), x, y


def _slopes(owner, gradient, points, distances, t, neighbours, labelled):
    """The estimate of gradients, its neighbourhoods checked."""
    if gradient == "ambient":
        return _Ambient()
    if distances is None:
        distances = _distances(points)
    check_shape(owner, "distances", distances, (len(points), len(points)))
    table = np.asarray(distances, np.float64)
    if np.isnan(table).any() or (table < 0).any():
        raise ValueError(f"{owner}: `distances` must not be NaN or negative.")
    apart = table + np.diag(np.full(len(table), np.inf))
    order = np.argsort(apart, 1, kind="stable")
    if gradient == "knn":
        index = order[:, : min(neighbours, len(points) - 1)]
        nearest = np.take_along_axis(apart, index, 1)
        if (nearest == 0).any():
            raise ValueError(
                f"{owner}: points must differ for `gradient='knn'` (some are doubled). "
                "Remove the doubles."
            )
        edges = np.zeros(table.shape, bool)
        np.put_along_axis(edges, index, np.isfinite(nearest), 1)
        _check_connected(owner, edges, labelled)
        reach = jnp.asarray(nearest, points.dtype)
        return _Nearest(jnp.asarray(index), reach)
    if t is None:
        far = np.sort(apart, 1)[:, min(_REACH, len(points) - 1) - 1]
        t = float(np.median(far)) ** 2 / 4
    if not t > 0:
        raise ValueError(
            f"{owner}: the bandwidth `t` must be positive (got {t}). Give one if many "
            "points are equal."
        )
    kernel = np.asarray(_kernel(jnp.asarray(table), t))
    beside = kernel - np.diag(np.diag(kernel))
    _check_connected(owner, beside > _NEGLIGIBLE, labelled)
    density = max(float(np.mean(np.sum(beside, 1))), float(np.finfo(float).tiny))
    return _Heat(jnp.asarray(kernel / (2 * t * density), points.dtype))


def _check_connected(owner, edges, labelled):
    """Refuses a part of the neighbours' graph without any labelled point."""
    _, part = connected_components(edges, directed=False)
    alone = set(part) - set(part[:labelled])
    if alone:
        raise ValueError(
            f"{owner}: every connected part of the neighbour graph must hold a "
            f"labelled point ({len(alone)} parts hold none). Take a larger `t` or more "
            "`neighbours`, or leave these points out."
        )


def _distances(points):
    return jnp.sqrt(jnp.sum((points[:, None] - points[None]) ** 2, 2))


def _kernel(distances, t):
    return jnp.exp(-(distances**2) / (4 * t))
