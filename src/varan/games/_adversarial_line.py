"""Adversarial classification on the line: the risk, and how optimal boundaries move.

Class 1 has density `rho1` and the share `w1 = 1 - w0`, class 0 `rho0` and `w0`. A
classifier is its boundaries; an adversary that moves points by up to `eps` makes both
classes reach `eps` across each of them. Where class 1 lies in the direction `s` of a
boundary `a`, its first-order condition, and the flow that keeps it, are

    w0 rho0(a - s eps) = w1 rho1(a + s eps),
    da/deps = -s (w1 rho1' + w0 rho0') / (w1 rho1' - w0 rho0')

with the derivatives at the same places. From the Bayes classifier at `eps = 0` the flow
follows minimisers of the risk until two boundaries are `2 eps` apart or the condition
of second order, `s (w1 rho1' - w0 rho0') > 0`, fails. For small `eps` they are global.

Source: N. Garcia Trillos and R. Murray (2022), Adversarial Classification: Necessary
conditions and geometric flows, JMLR 23, arXiv 2011.10797.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..core._certificate import Certificate
from ..core._checks import (
    check_finite,
    check_nonnegative,
    check_positive,
    check_shape,
    is_traced,
)
from ._adversarial_densities import check_share, warn_unless_normalised

Density = Callable[[Float[Array, ""]], Float[Array, ""]]


class LineClassifier(eqx.Module):
    """Labels on the line that change at each boundary.

    Args:
        boundaries: Increasing, shape (k,).
        left: The label 0 or 1 to the left of all of them.

    Raises:
        ValueError: If `boundaries` is no vector or not increasing.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.games import LineClassifier
        >>> interval = LineClassifier(jnp.array([-1.0, 1.0]))
        >>> points, labels = jnp.array([-0.5, 3.0]), jnp.array([1, 1])
        >>> [int(v) for v in interval.label(points)]
        [1, 0]
        >>> [float(v) for v in interval.distances(points, labels)]
        [0.5, 0.0]
    """

    boundaries: Float[Array, " k"]
    left: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        check_shape("LineClassifier", "boundaries", self.boundaries, (None,))
        if is_traced(self.boundaries):
            return
        if np.any(np.diff(np.asarray(self.boundaries)) < 0):
            raise ValueError(
                "LineClassifier: `boundaries` must be increasing (got "
                f"{np.asarray(self.boundaries)[:5]}). Sort them."
            )

    def label(self, x: Float[Array, " n"]) -> Int[Array, " n"]:
        """The label of each point."""
        return (jnp.searchsorted(self.boundaries, x) + self.left) % 2

    def distances(
        self, x: Float[Array, " n"], y: Int[Array, " n"] | Bool[Array, " n"]
    ) -> Float[Array, " n"]:
        """How far each point must be moved until it is misclassified; zero if it is."""
        away = jnp.abs(x[:, None] - self.boundaries[None, :])
        nearest = jnp.min(away, axis=1, initial=jnp.inf)
        # A flow that has ended has boundaries that are NaN: those label nothing.
        ended = jnp.any(jnp.isnan(self.boundaries))
        distances = jnp.where(self.label(x) == y, nearest, 0)
        return jnp.where(ended, jnp.nan, distances)


class AdversarialFlow(eqx.Module):
    """Boundaries over the adversary's strength.

    Args:
        epsilons: Shape (points,), from zero.
        boundaries: Shape (points, k); NaN from where the flow ends.
        left: The label to the left of all boundaries.
        reached: The last of `epsilons` at which the flow is valid.
        certificate: The largest violation of the first-order conditions, as a part of
            the densities there: necessary for optimality, no proof of it.
    """

    epsilons: Float[Array, " points"]
    boundaries: Float[Array, "points k"]
    left: int = eqx.field(static=True)
    reached: Float[Array, ""]
    certificate: Certificate


def bayes_classifier_1d(
    density0: Density,
    density1: Density,
    share0: float,
    interval: tuple[float, float],
    points: int = 2048,
) -> LineClassifier:
    """The classifier of least risk without an adversary.

    Changes of sign of `w0 rho0 - w1 rho1` on a grid, then bisection to rounding.

    Args:
        density0: `rho0`, a JAX function of a scalar.
        density1: `rho1`.
        share0: `w0`, in (0, 1).
        interval: Where boundaries are looked for.
        points: Of the grid; closer pairs of boundaries are missed.

    Returns:
        A `LineClassifier`.

    Raises:
        ValueError: If the share or the interval is out of range, or a density is not
            finite there.

    Example:
        >>> from jax.scipy.stats import norm
        >>> from varan.games import bayes_classifier_1d
        >>> rho0, rho1 = (lambda x: norm.pdf(x, -1)), (lambda x: norm.pdf(x, 1))
        >>> found = bayes_classifier_1d(rho0, rho1, 0.5, (-4.0, 4.5))
        >>> abs(round(float(found.boundaries[0]), 3)), found.left
        (0.0, 0)

    Source:
        Bayes' rule.
    """
    check_share("bayes_classifier_1d", share0)
    low, high = interval
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(
            f"bayes_classifier_1d: `interval` must be finite and increasing (got "
            f"{interval})."
        )
    advantage = jax.jit(
        jax.vmap(lambda x: share0 * density0(x) - (1 - share0) * density1(x))
    )
    grid = jnp.linspace(low, high, points)
    values = np.asarray(advantage(grid))
    if not np.all(np.isfinite(values)):
        raise ValueError(
            "bayes_classifier_1d: the densities must be finite on `interval` (got NaN "
            f"or infinity at {np.sum(~np.isfinite(values))} of {points} points)."
        )
    zero_first = values > 0
    change = np.flatnonzero(zero_first[1:] != zero_first[:-1])
    a, b, side = grid[change], grid[change + 1], jnp.asarray(zero_first[change])
    for _ in range(60):
        middle = (a + b) / 2
        same = (advantage(middle) > 0) == side
        a, b = jnp.where(same, middle, a), jnp.where(same, b, middle)
    return LineClassifier((a + b) / 2, 0 if zero_first[0] else 1)


def adversarial_risk_1d(
    cdf0: Density,
    cdf1: Density,
    share0: float,
    classifier: LineClassifier,
    epsilon: float | Float[Array, ""],
) -> Float[Array, ""]:
    """The risk of a classifier on the line against moves of up to `epsilon`, exactly.

    Each class errs on the points within `epsilon` of where the other label is given;
    neighbourhoods that overlap count once.

    Args:
        cdf0: Distribution function of class 0, of an array, 0 and 1 at the infinities.
        cdf1: Of class 1.
        share0: `w0`, in (0, 1).
        classifier: Boundaries in increasing order.
        epsilon: Non-negative.

    Returns:
        A scalar, differentiable in the boundaries where nothing merges.

    Raises:
        ValueError: If a number is out of range or the boundaries do not increase.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.scipy.stats import norm
        >>> from varan.games import LineClassifier, adversarial_risk_1d
        >>> left, right = (lambda x: norm.cdf(x, -1.0)), (lambda x: norm.cdf(x, 1.0))
        >>> middle = LineClassifier(jnp.zeros(1))
        >>> risks = [adversarial_risk_1d(left, right, 0.5, middle, e) for e in (0, 1)]
        >>> [round(float(v), 3) for v in risks]
        [0.159, 0.5]

    Source:
        Garcia Trillos and Murray, 2022 (arXiv 2011.10797), the adversarial risk.
    """
    check_share("adversarial_risk_1d", share0)
    check_nonnegative("adversarial_risk_1d", "epsilon", epsilon)
    _check_boundaries("adversarial_risk_1d", classifier)
    ends, eps = _ends(classifier.boundaries), jnp.asarray(epsilon)
    eps = eps.astype(ends.dtype)
    wrong0 = _mass(cdf0, ends, 1 - classifier.left, eps)
    wrong1 = _mass(cdf1, ends, classifier.left, eps)
    return share0 * wrong0 + (1 - share0) * wrong1


def adversarial_flow_1d(
    density0: Density,
    density1: Density,
    share0: float,
    classifier: LineClassifier,
    epsilon_max: float,
    *,
    points: int = 65,
) -> AdversarialFlow:
    """Moves the boundaries of the Bayes classifier with the adversary's strength.

    One uncoupled differential equation a boundary, by diffrax's adaptive Tsit5; it
    stops where two boundaries are `2 eps` apart or a second-order condition fails.

    Args:
        density0: `rho0`, a twice differentiable JAX function of a scalar, positive at
            the boundaries.
        density1: `rho1`.
        share0: `w0`, in (0, 1).
        classifier: Of `bayes_classifier_1d`; other starts keep the violation of the
            first-order condition that they have.
        epsilon_max: Where the flow ends at the latest, positive.
        points: How many values of `eps` are returned, evenly from zero.

    Returns:
        An `AdversarialFlow`. For `eps` small enough its boundaries are global
        minimisers; beyond, another number of boundaries may be better, which only a
        comparison of risks shows.

    Raises:
        ValueError: If a number is out of range, or there is no boundary. A density that
            does not integrate to one gets a warning.

    Example:
        >>> from jax.scipy.stats import norm
        >>> from varan.games import adversarial_flow_1d, bayes_classifier_1d
        >>> rho0, rho1 = (lambda x: norm.pdf(x, -1)), (lambda x: norm.pdf(x, 1.2, 0.7))
        >>> bayes = bayes_classifier_1d(rho0, rho1, 0.6, (-1.0, 2.0))
        >>> flow = adversarial_flow_1d(rho0, rho1, 0.6, bayes, 0.4)
        >>> [round(float(flow.boundaries[i, 0]), 3) for i in (0, -1)]
        [0.31, 0.248]

    Source:
        Garcia Trillos and Murray, 2022 (arXiv 2011.10797), the flow in one dimension.
    """
    owner = "adversarial_flow_1d"
    check_share(owner, share0)
    check_positive(owner, "epsilon_max", epsilon_max)
    _check_boundaries(owner, classifier)
    if classifier.boundaries.size == 0:
        raise ValueError(f"{owner}: `classifier` must have a boundary (got none).")
    start = classifier.boundaries
    for name, density in (("density0", density0), ("density1", density1)):
        warn_unless_normalised(owner, name, density, start)
    sides = jnp.where(jnp.arange(start.size) % 2 == classifier.left, 1, -1)
    epsilons = jnp.linspace(0, epsilon_max, points, dtype=start.dtype)
    found, violation = _integrate(
        density0,
        density1,
        jnp.asarray(share0, start.dtype),
        start,
        sides.astype(start.dtype),
        epsilons,
    )
    valid = jnp.all(jnp.isfinite(found), axis=1)
    # A later point is not reached by way of an invalid one.
    valid = jnp.cumprod(valid.astype(jnp.int32)) > 0
    return AdversarialFlow(
        epsilons,
        jnp.where(valid[:, None], found, jnp.nan),
        classifier.left,
        jnp.max(jnp.where(valid, epsilons, 0)),
        Certificate(
            "first-order condition",
            jnp.max(jnp.where(valid, violation, 0)),
            proof=False,
            statement="densities weighted by their shares differ by at most value of "
            "their sum across every boundary",
        ),
    )


@eqx.filter_jit
def _integrate(density0, density1, share0, start, sides, epsilons):
    def weighted(a, eps, of):
        low = share0 * jax.vmap(of(density0))(a - sides * eps)
        high = (1 - share0) * jax.vmap(of(density1))(a + sides * eps)
        return low, high

    def velocity(eps, a, args):
        del args
        low, high = weighted(a, eps, jax.grad)
        return -sides * (high + low) / (high - low)

    def margin(a, eps):
        low, high = weighted(a, eps, jax.grad)
        convex = jnp.min(sides * (high - low))
        gap = jnp.min(jnp.diff(a) - 2 * eps, initial=jnp.inf)
        return jnp.minimum(convex, gap)

    def ended(t, y, args, **rest):
        del args, rest
        return margin(y, t) <= 0

    eps = float(np.finfo(start.dtype).eps)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Tsit5(),
        epsilons[0],
        epsilons[-1],
        None,
        start,
        saveat=diffrax.SaveAt(ts=epsilons),
        stepsize_controller=diffrax.PIDController(rtol=eps**0.75, atol=eps**0.75),
        event=diffrax.Event(ended),
        max_steps=4096,
        throw=False,
    )
    path: Any = solution.ys
    good = jax.vmap(margin)(path, epsilons) > 0
    low, high = jax.vmap(lambda a, e: weighted(a, e, lambda f: f))(path, epsilons)
    violation = jnp.max(jnp.abs(high - low) / (high + low), axis=1)
    return jnp.where(good[:, None], path, jnp.nan), violation


def _ends(boundaries):
    edge = jnp.full((1,), jnp.inf, boundaries.dtype)
    return jnp.concatenate([-edge, boundaries, edge])


def _mass(cdf, ends, first, eps):
    """Mass within eps of every other interval, beginning with number `first`."""
    low, high = ends[:-1][first::2] - eps, ends[1:][first::2] + eps
    if low.size == 0:
        return jnp.zeros((), ends.dtype)
    before = jnp.concatenate([ends[:1], high[:-1]])
    return jnp.sum(cdf(high) - cdf(jnp.maximum(low, before)))


def _check_boundaries(owner, classifier):
    if is_traced(classifier.boundaries):
        return
    check_finite(owner, "boundaries", classifier.boundaries)
    if jnp.any(jnp.diff(classifier.boundaries) <= 0):
        raise ValueError(
            f"{owner}: `boundaries` must increase (got {classifier.boundaries})."
        )
    if classifier.left not in (0, 1):
        raise ValueError(f"{owner}: `left` must be 0 or 1 (got {classifier.left}).")
