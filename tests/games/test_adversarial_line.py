"""Adversarial classification on the line: risks by quadrature, flows by brute force."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import brentq, minimize

from varan.games import (
    LineClassifier,
    adversarial_flow_1d,
    adversarial_risk_1d,
    bayes_classifier_1d,
)

SHARE = 0.6


class Normal(eqx.Module):
    """Mean and width are data: flows share one compilation."""

    mean: jax.Array
    sd: jax.Array

    def __call__(self, x):
        return norm.pdf(x, self.mean, self.sd)


def normal(mean, sd):
    return Normal(np.asarray(mean), np.asarray(sd))


rho0, rho1 = normal(-1.0, 1.0), normal(1.2, 0.7)


def wide_cdf(x):
    return norm.cdf(x, 0.0, 2.0)


def narrow_cdf(x):
    return norm.cdf(x, 0.3, 0.8)


def wide(x):
    return norm.pdf(x, 0.0, 2.0)


def narrow(x):
    return norm.pdf(x, 0.3, 0.8)


@jax.jit
def risk(boundaries, epsilon):
    return adversarial_risk_1d(
        wide_cdf, narrow_cdf, 0.5, LineClassifier(boundaries), epsilon
    )


def test_the_risk_is_the_integral():
    boundaries, epsilon = np.array([-2.0, -1.0, 0.0, 0.3]), 0.25

    def label(x):
        return np.searchsorted(boundaries, x) % 2

    def reaches(x, wanted):
        edges = [x - epsilon, x + epsilon, *boundaries[abs(boundaries - x) < epsilon]]
        return any(label(e + d) == wanted for e in edges for d in (-1e-9, 1e-9))

    def density(x):
        wrong = stats.norm.pdf(x, 0.0, 2.0) * reaches(x, 1)
        return 0.5 * (wrong + stats.norm.pdf(x, 0.3, 0.8) * reaches(x, 0))

    cuts = np.sort([b + s * epsilon for b in boundaries for s in (-1, 1)])
    true = quad(density, -12, 12, points=cuts, limit=60, epsabs=1e-7)[0]
    found = risk(jnp.asarray(boundaries), epsilon)
    np.testing.assert_allclose(found, true, atol=1e-6)
    # The two labels exchanged are the complement without an adversary.
    other = LineClassifier(jnp.asarray(boundaries), 1)
    exchanged = adversarial_risk_1d(wide_cdf, narrow_cdf, 0.5, other, 0.0)
    np.testing.assert_allclose(risk(jnp.asarray(boundaries), 0.0) + exchanged, 1.0)


def test_the_flow_solves_the_first_order_condition():
    bayes = bayes_classifier_1d(rho0, rho1, SHARE, (-1.0, 2.0))
    flow = adversarial_flow_1d(rho0, rho1, SHARE, bayes, 0.4, points=5)
    assert flow.reached == 0.4 and flow.certificate.value < 1e-9

    def gap(a, e):
        return float(SHARE * rho0(a - e) - (1 - SHARE) * rho1(a + e))

    for e, a in zip(flow.epsilons, flow.boundaries[:, 0], strict=True):
        root = brentq(gap, -1, 1, args=(float(e),), xtol=1e-14)
        np.testing.assert_allclose(a, root, atol=1e-9)
    np.testing.assert_allclose(flow.boundaries[-1, 0], 0.2480813441896, atol=1e-9)


def test_a_mirrored_problem_moves_in_mirror():
    bayes = bayes_classifier_1d(rho0, rho1, SHARE, (-1.0, 2.0))
    mirrored = LineClassifier(-bayes.boundaries, 1)
    flows = [
        adversarial_flow_1d(*densities, SHARE, start, 0.4, points=5)
        for densities, start in (
            ((rho0, rho1), bayes),
            ((normal(1.0, 1.0), normal(-1.2, 0.7)), mirrored),
        )
    ]
    np.testing.assert_allclose(flows[0].boundaries, -flows[1].boundaries, atol=1e-9)


def test_two_boundaries_are_minimal():
    bayes = bayes_classifier_1d(wide, narrow, 0.5, (-6.0, 6.0))
    assert bayes.left == 0 and bayes.boundaries.shape == (2,)
    flow = adversarial_flow_1d(wide, narrow, 0.5, bayes, 0.5, points=6)
    assert flow.reached == 0.5
    rng = np.random.default_rng(0)
    for i in (2, 4):
        e = float(flow.epsilons[i])
        least = risk(flow.boundaries[i], e)
        found = min(
            minimize(
                lambda b, e=e: float(risk(jnp.sort(jnp.asarray(b)), e)),
                rng.uniform(-4, 4, 2),
                method="Nelder-Mead",
                options={"maxiter": 80},
            ).fun
            for _ in range(4)
        )
        assert least <= found + 1e-12
        np.testing.assert_allclose(least, found, atol=1e-4)


def test_a_flow_may_end_as_a_local_minimum_only():
    # With the heavier class 0 the interval of class 1 grows beyond what it is worth.
    bayes = bayes_classifier_1d(wide, narrow, 0.55, (-6.0, 6.0))
    flow = adversarial_flow_1d(wide, narrow, 0.55, bayes, 2.5, points=6)
    assert flow.reached == 2.5

    def risk_at(place, epsilon):
        found = LineClassifier(flow.boundaries[place])
        return adversarial_risk_1d(wide_cdf, narrow_cdf, 0.55, found, epsilon)

    assert risk_at(0, 0.0) < 0.45 - 0.1
    assert risk_at(-1, 2.5) > 0.45 + 0.01
    shifted = LineClassifier(flow.boundaries[-1] + jnp.array([0.1, -0.1]))
    nearby = adversarial_risk_1d(wide_cdf, narrow_cdf, 0.55, shifted, 2.5)
    assert nearby > risk_at(-1, 2.5)


def humps(x):
    return (norm.pdf(x, -1.2, 0.4) + norm.pdf(x, 1.2, 0.4)) / 2


def test_the_flow_ends_where_boundaries_meet():
    bayes = bayes_classifier_1d(wide, humps, 0.5, (-6.0, 6.0))
    assert bayes.left == 0 and bayes.boundaries.shape == (4,)
    # The two outer neighbourhoods of class 1 grow until nothing is left between them.
    flow = adversarial_flow_1d(wide, humps, 0.5, bayes, 2.0, points=41)
    assert 0 < flow.reached < 2
    after = flow.epsilons > flow.reached
    assert jnp.all(jnp.isnan(flow.boundaries[after]))
    last = flow.boundaries[~after][-1]
    gap = jnp.min(jnp.diff(last)) - 2 * flow.reached
    assert 0 < gap < 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bayes_classifier_1d(rho0, rho1, 1.0, (0, 1)), "`share0` must be"),
        (lambda: bayes_classifier_1d(rho0, rho1, 0.5, (1, 0)), "`interval` must be"),
        (
            lambda: adversarial_flow_1d(
                rho0, rho1, 0.5, LineClassifier(jnp.zeros(0)), 0.1
            ),
            "must have a boundary",
        ),
        (
            lambda: adversarial_flow_1d(
                rho0, rho1, 0.5, LineClassifier(jnp.zeros(1)), -0.1
            ),
            "`epsilon_max` must be positive",
        ),
        (
            lambda: adversarial_risk_1d(
                wide_cdf, narrow_cdf, 0.5, LineClassifier(jnp.zeros(2)), 0.1
            ),
            "`boundaries` must increase",
        ),
        (
            lambda: adversarial_risk_1d(
                wide_cdf, narrow_cdf, 0.5, LineClassifier(jnp.zeros(1)), -0.1
            ),
            "`epsilon` must not be negative",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_densities_and_boundaries_that_are_none_are_refused():
    with pytest.raises(ValueError, match="densities must be finite on `interval`"):
        bayes_classifier_1d(lambda x: jnp.nan * x, norm.pdf, SHARE, (-1.0, 2.0))
    with pytest.raises(ValueError, match="`boundaries` must be increasing"):
        LineClassifier(jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="`boundaries` must have shape"):
        LineClassifier(jnp.array(1.0))
    ended = LineClassifier(jnp.array([jnp.nan, jnp.nan]))
    labels = jnp.array([0, 1], jnp.int32)
    assert bool(jnp.all(jnp.isnan(ended.distances(jnp.zeros(2), labels))))
