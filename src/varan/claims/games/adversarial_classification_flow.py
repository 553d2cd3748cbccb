"""The flow from the Bayes classifier follows the best classifier against an adversary.

The claim: for an adversary that moves points by small distances, the boundaries that
the flow carries from the Bayes classifier are global minimisers of the adversarial risk
on the line, and in the plane where the flow stays smooth; and the least risk is one
minus the cost of a transport problem, halved, whatever the classes' shares. Parts:

- line: the two Gaussians against the root of the first-order condition and a search,
  and random classes with class 1 between two halves of class 0 against a search over up
  to four boundaries; carried on over large distances the same flows are expected to be
  local minima that a constant classifier beats;
- transport: unbalanced discrete samples: the linear programme, the matching and
  enumeration of all classifiers;
- plane: rotational Gaussians with the exact radius; their risk against the transport
  bound of the distances to the origin (a plan along rays is a plan in the plane, so its
  matched mass is a lower bound there); and random samples in the plane, whose bound is
  lower, as it fits the sample.

Given up: images; dimensions above two. Refuted by: a classifier better than the flow's
at a small distance, or a risk below the bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, product
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm

from varan.claims import Curve, Measurements
from varan.games import (
    LineClassifier,
    PlaneClassifier,
    adversarial_duality_gap,
    adversarial_flow_1d,
    adversarial_ot_lower_bound,
    adversarial_risk_1d,
    bayes_classifier_1d,
    levelset_flow,
)


def experiment(scale: Mapping[str, Any], seed: int) -> Measurements:
    """Measures the parts of the scale for one seed."""
    numbers: dict[str, float] = {}
    curves: list[Curve] = []
    notes: list[str] = []
    parts = {"line": _line, "transport": _transport, "plane": _plane}
    for name in scale["parts"]:
        rng = np.random.default_rng([seed, len(name)])
        parts[name](scale, rng, numbers, curves, notes)
    return Measurements(numbers, curves, notes)


class _Normal(eqx.Module):
    """A normal class on the line; new values compile nothing."""

    mean: jax.Array
    sd: jax.Array

    def __call__(self, x):
        return norm.pdf(x, self.mean, self.sd)

    def cdf(self, x):
        return ndtr((x - self.mean) / self.sd)

    def quantiles(self, count):
        return self.mean + self.sd * ndtri((jnp.arange(count) + 0.5) / count)


def _normal(mean, sd):
    return _Normal(jnp.asarray(mean), jnp.asarray(sd))


@eqx.filter_jit
def _risks(class0, class1, share0, boundaries, left, epsilon):
    """Of many classifiers."""

    def one(b):
        return adversarial_risk_1d(
            class0.cdf, class1.cdf, share0, LineClassifier(b, left), epsilon
        )

    return jax.vmap(one)(boundaries)


def _search(class0, class1, share0, epsilon, scale):
    """The least risk of up to so many boundaries: grids, refined around the best."""
    best, epsilon = min(share0, 1 - share0), jnp.asarray(epsilon)
    for count in range(1, scale["boundaries"] + 1):
        grid = np.linspace(-6, 6, scale["grids"][count - 1])
        every = np.array(list(combinations(grid, count)))
        for left in (0, 1):
            risks = np.asarray(
                _risks(class0, class1, jnp.asarray(share0), every, left, epsilon)
            )
            centre, width = every[np.argmin(risks)], grid[1] - grid[0]
            best = min(best, risks.min())
            for _ in range(scale["refinements"]):
                steps = product((-1.0, -0.5, 0.0, 0.5, 1.0), repeat=count)
                near = np.sort(centre + width * np.array(list(steps)), axis=1)
                risks = np.asarray(
                    _risks(class0, class1, jnp.asarray(share0), near, left, epsilon)
                )
                centre, width = near[np.argmin(risks)], width * 0.6
                best = min(best, risks.min())
    return float(best)


def _flow_risk(class0, class1, share0, flow, place):
    found = flow.boundaries[place][None]
    epsilon = flow.epsilons[place]
    share = jnp.asarray(share0)
    return float(_risks(class0, class1, share, found, flow.left, epsilon)[0])


def _root(gap, low, high):
    """Bisection to rounding."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) * gap(low) > 0 else (low, middle)
    return (low + high) / 2


def _line(scale, rng, numbers, curves, notes):
    class0, class1, share0 = _normal(-1.0, 1.0), _normal(1.2, 0.7), 0.6
    bayes = bayes_classifier_1d(class0, class1, share0, (-1.0, 2.0))
    flow = adversarial_flow_1d(class0, class1, share0, bayes, 0.4, points=17)

    def gap(a, e=0.4):
        return float(share0 * class0(a - e) - (1 - share0) * class1(a + e))

    numbers["gaussian_root_error"] = abs(
        float(flow.boundaries[-1, 0]) - _root(gap, -1.0, 1.0)
    )
    least = _search(class0, class1, share0, 0.4, scale)
    risk = _flow_risk(class0, class1, share0, flow, -1)
    numbers["gaussian_search_gap"] = abs(risk - least)
    points = scale["quantiles"]
    few = round(share0 * points)
    x = jnp.concatenate([class0.quantiles(few), class1.quantiles(points - few)])
    bound = adversarial_ot_lower_bound(x[:, None], np.arange(points) >= few, 0.4)
    numbers["line_transport_gap"] = abs(risk - float(bound.value))

    worst, excess = 0.0, []
    for _ in range(scale["mixtures"]):
        class0 = _normal(0.0, rng.uniform(1.8, 2.4))
        class1 = _normal(rng.uniform(-0.5, 0.5), rng.uniform(0.6, 0.9))
        share0 = rng.uniform(0.45, 0.55)
        bayes = bayes_classifier_1d(class0, class1, share0, (-6.0, 6.0))
        small = adversarial_flow_1d(class0, class1, share0, bayes, 0.2, points=3)
        for place in (1, 2):
            e = float(small.epsilons[place])
            found = _flow_risk(class0, class1, share0, small, place)
            least = _search(class0, class1, share0, e, scale)
            worst = max(worst, abs(found - least))
        # To the end of the flow, where a constant classifier is expected to be better.
        flow = adversarial_flow_1d(class0, class1, share0, bayes, 4.0, points=81)
        last = int(np.sum(np.isfinite(flow.boundaries[:, 0]))) - 1
        constant = min(share0, 1 - share0)
        risks = [
            _flow_risk(class0, class1, share0, flow, place) for place in range(last + 1)
        ]
        excess.append(risks[-1] - constant)
        if excess[-1] > 0 and not curves:
            shown = [float(e) for e in flow.epsilons[: last + 1]]
            for values, label in (
                (risks, "flow"),
                ([constant] * (last + 1), "constant classifier"),
            ):
                curves.append(
                    Curve(
                        shown,
                        values,
                        label,
                        "a local minimum that is not global",
                        "the adversary's distance",
                        "adversarial risk",
                    )
                )
    numbers["mixture_search_gap"] = worst
    numbers["excess_at_end"] = min(excess)
    notes.append(
        f"{sum(e > 0 for e in excess)} of {len(excess)} flows end as local minima that "
        f"a constant classifier beats, by up to {max(excess):.3f}"
    )


def _transport(scale, rng, numbers, curves, notes):
    del curves, notes
    from scipy.optimize import linprog

    worst, size = 0.0, 21
    ones = np.kron(np.eye(size), np.ones(size)), np.kron(np.ones(size), np.eye(size))
    for _ in range(scale["samples"]):
        few = int(rng.integers(4, 8))
        y = np.arange(size) < few
        X = rng.standard_normal((size, 2)) + np.where(y[:, None], 0.8, 0.0)
        clash = np.linalg.norm(X[:, None] - X[None], axis=2) <= 2 * 0.4
        clash &= y[:, None] != y[None]
        plan = linprog(
            1.0 - clash.ravel(),
            A_eq=np.concatenate(ones),
            b_eq=np.full(2 * size, 1 / size),
        )
        matching = float(adversarial_ot_lower_bound(X, y, 0.4).value)
        # Which points of class 1 are classified right whatever the adversary does; the
        # other class then loses those in conflict with them.
        enumerated = min(
            few - sum(kept) + np.sum(np.any(clash[:few][np.array(kept) == 1], axis=0))
            for kept in product((0, 1), repeat=few)
        )
        least = enumerated / size
        worst = max(worst, abs(matching - least), abs((1 - plan.fun) / 2 - least))
    numbers["identity_error"] = worst


WIDE, NARROW = 2.0, 1.0


def _rotational(sd):
    def density(x):
        return jnp.exp(-jnp.sum(x**2) / (2 * sd**2)) / (2 * jnp.pi * sd**2)

    return density


def _radius(share0, epsilon):
    """Where densities of the distance to the origin satisfy the condition."""

    def gap(r):
        low, high = r - epsilon, r + epsilon
        inner = share0 * low * np.exp(-(low**2) / (2 * NARROW**2)) / NARROW**2
        outer = (1 - share0) * high * np.exp(-(high**2) / (2 * WIDE**2)) / WIDE**2
        return outer - inner

    return _root(gap, 0.8, 4.0)


def _radial_risk(share0, radius, epsilon):
    outside = np.exp(-((radius - epsilon) ** 2) / (2 * NARROW**2))
    inside = 1 - np.exp(-((radius + epsilon) ** 2) / (2 * WIDE**2))
    return share0 * outside + (1 - share0) * inside


def _rayleigh(sd, count):
    return sd * np.sqrt(-2 * np.log1p(-(np.arange(count) + 0.5) / count))


def _plane(scale, rng, numbers, curves, notes):
    share0, epsilon = 0.5, 0.3
    angle = np.arange(scale["points"]) * 2 * np.pi / scale["points"]
    circle = jnp.asarray(1.8 * np.stack([np.cos(angle), np.sin(angle)], axis=1)[None])
    flow = levelset_flow(
        _rotational(NARROW), _rotational(WIDE), share0, circle, epsilon, times=7
    )
    exact = np.array([_radius(share0, float(e)) for e in flow.epsilons])
    radii = np.linalg.norm(np.asarray(flow.curves[:, 0]), axis=2)
    numbers["radius_error"] = float(np.max(np.abs(radii - exact[:, None])))
    risk = _radial_risk(share0, float(np.mean(radii[-1])), epsilon)

    count = scale["quantiles"]
    few = round(share0 * count)
    distances = np.concatenate([_rayleigh(NARROW, few), _rayleigh(WIDE, count - few)])
    bound = adversarial_ot_lower_bound(
        distances[:, None], np.arange(count) >= few, epsilon
    )
    numbers["plane_transport_gap"] = abs(risk - float(bound.value))

    classifier = PlaneClassifier(flow.curves[-1], flow.outside)
    gaps = []
    for size in scale["sizes"]:
        y = rng.uniform(size=size) >= share0
        X = rng.standard_normal((size, 2)) * np.where(y[:, None], WIDE, NARROW)
        away = classifier.distances(jnp.asarray(X), jnp.asarray(y))
        gaps.append(float(adversarial_duality_gap(X, y, away, epsilon).value))
    numbers["least_sampled_gap"] = min(gaps)
    curves.append(
        Curve(
            list(scale["sizes"]),
            gaps,
            "risk of the flow's classifier minus bound",
            "duality gap on random samples in the plane",
            "points",
            "gap",
            log_x=True,
            marker=True,
        )
    )
    shown = ", ".join(
        f"{g:.4f} at {n}" for g, n in zip(gaps, scale["sizes"], strict=True)
    )
    notes.append(f"duality gaps on samples: {shown} points")
