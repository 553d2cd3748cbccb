"""Adversarial classification in the plane: exact radii, first variations by Green."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm
from scipy.optimize import brentq

from varan.games import (
    PlaneClassifier,
    adversarial_duality_gap,
    adversarial_ot_lower_bound,
    levelset_flow,
)
from varan.games._adversarial_densities import warn_unless_normalised

ANGLE = np.arange(47) * 2 * np.pi / 47
CIRCLE = np.stack([np.cos(ANGLE), np.sin(ANGLE)], 1)[None]
WIDTHS0, WIDTHS1 = (0.9, 1.1), (2.2, 1.8)


class Gaussian(eqx.Module):
    """Widths are data: all flows share one compilation."""

    widths: jax.Array

    def __call__(self, x):
        return jnp.prod(norm.pdf(x, 0.0, self.widths))


def gaussian(widths):
    return Gaussian(np.asarray(widths))


CLASSES = gaussian(WIDTHS0), gaussian(WIDTHS1)


@pytest.fixture(scope="module")
def ellipses():
    return levelset_flow(*CLASSES, 0.4, 1.5 * CIRCLE, 0.4, times=3)


def radius(r0, r1, epsilon):
    """Where the densities of the distance to the origin satisfy the condition."""

    def gap(r):
        return (r + epsilon) * r1(r + epsilon) - (r - epsilon) * r0(r - epsilon)

    return brentq(gap, 1.0, 3.0, xtol=1e-14)


def test_circles_have_the_exact_radius():
    # Class 1 inside, the circle clockwise: the normal points inwards.
    wide, narrow = gaussian((2.0, 2.0)), gaussian((1.0, 1.0))
    flow = levelset_flow(wide, narrow, 0.6, 1.5 * CIRCLE[:, ::-1], 0.4, times=3)
    assert flow.outside == 0 and flow.reached == 0.4
    for eps, curve in zip(flow.epsilons, flow.curves, strict=True):
        exact = radius(
            lambda r: 0.4 * np.exp(-(r**2) / 2),
            lambda r: 0.6 * np.exp(-(r**2) / 8) / 4,
            float(eps),
        )
        np.testing.assert_allclose(np.linalg.norm(curve[0], axis=1), exact, 1e-9)


def perimeter(points):
    """The derivative by the angle, by Fourier's transform: not what the flow uses."""
    waves = jnp.asarray(1j * np.fft.fftfreq(len(points), 1 / len(points)))
    return jnp.real(
        jnp.fft.ifft(
            waves[:, None] * jnp.fft.fft(points.astype(complex), axis=0), axis=0
        )
    )


def mass(points, widths):
    """A Gaussian's mass inside a curve: the integral of one distribution function."""
    dy = perimeter(points)[:, 1]
    inside = norm.cdf(points[:, 0], 0.0, widths[0]) * norm.pdf(
        points[:, 1], 0.0, widths[1]
    )
    return jnp.sum(inside * dy) * 2 * jnp.pi / len(points)


@jax.jit
@jax.value_and_grad
def risk(weights, curve, epsilon):
    """Class 1 outside; the curve is moved along its normals by a few waves."""

    def outward(points):
        tangent = perimeter(points)
        tangent = tangent / jnp.linalg.norm(tangent, axis=1)[:, None]
        return jnp.stack([tangent[:, 1], -tangent[:, 0]], 1)

    waves = jnp.cos(np.arange(len(weights))[:, None] * ANGLE[None, :])
    moved = curve + (weights @ waves)[:, None] * outward(curve)
    normal = outward(moved)
    wrong0 = 1 - mass(moved - epsilon * normal, WIDTHS0)
    return 0.4 * wrong0 + 0.6 * mass(moved + epsilon * normal, WIDTHS1)


def test_ellipses_are_stationary_points_of_the_risk(ellipses):
    assert ellipses.reached == 0.4 and ellipses.outside == 1
    assert ellipses.certificate.value < 1e-4 and not ellipses.certificate.proof
    at_rest = jnp.zeros(5)
    bayes, end = ellipses.curves[0, 0], ellipses.curves[-1, 0]
    least, slope = risk(at_rest, end, 0.4)
    np.testing.assert_allclose(slope, 0.0, atol=2e-6)
    assert risk(at_rest, bayes, 0.4)[0] > least + 1e-4
    for wave in range(5):
        moved = at_rest.at[wave].set(0.05)
        assert risk(moved, end, 0.4)[0] > least
        assert risk(-moved, end, 0.4)[0] > least


def test_the_gap_on_a_sample_is_risk_minus_bound(ellipses):
    rng = np.random.default_rng(0)
    y = (rng.uniform(size=300) < 0.6).astype(int)
    X = rng.standard_normal((300, 2)) * np.where(
        y[:, None] == 1, np.array([WIDTHS1]), np.array([WIDTHS0])
    )
    classifier = PlaneClassifier(ellipses.curves[-1], ellipses.outside)
    distances = classifier.distances(jnp.asarray(X), jnp.asarray(y))
    gap = adversarial_duality_gap(X, y, distances, 0.4)
    bound = adversarial_ot_lower_bound(X, y, 0.4).value
    np.testing.assert_allclose(gap.details["risk"] - gap.value, bound)
    assert 0 <= gap.value < gap.details["risk"]
    # Pushing every point straight over the polygon is what the risk counts.
    corners = np.asarray(ellipses.curves[-1, 0])
    sides = np.linspace(0, 1, 40)[:, None, None]
    dense = (corners + sides * (np.roll(corners, -1, 0) - corners)).reshape(-1, 2)
    near = np.linalg.norm(X[:, None] - dense[None], axis=2).min(1)
    inside = np.linalg.norm(X, axis=1) < np.linalg.norm(dense, axis=1).min()
    outside = np.linalg.norm(X, axis=1) > np.linalg.norm(dense, axis=1).max()
    clear = inside | outside
    np.testing.assert_array_equal(
        classifier.label(jnp.asarray(X))[clear], outside[clear].astype(int)
    )
    right = clear & (outside == y)
    np.testing.assert_allclose(distances[right], near[right], atol=1e-3)
    assert np.all(distances[clear & (outside != y)] == 0)


def test_the_flow_ends_where_a_parallel_curve_folds(ellipses):
    # The disc of class 0 cannot have a radius below epsilon.
    flow = levelset_flow(*CLASSES, 0.4, 1.5 * CIRCLE, 4.0, times=3)
    np.testing.assert_allclose(flow.curves[0], ellipses.curves[0], atol=1e-9)
    assert flow.reached < 4 and jnp.all(jnp.isnan(flow.curves[-1]))


def test_a_density_that_is_not_normalised_is_named():
    line, plane = np.array([-1.0, 0.5]), 1.5 * CIRCLE[0]
    for density, near in ((norm.pdf, line), (CLASSES[0], plane)):
        # Warnings are errors here: this one has none.
        warn_unless_normalised("f", "rho", density, near)
        with pytest.warns(UserWarning, match=r"f: `rho` integrates to about 2 "):
            warn_unless_normalised("f", "rho", lambda x, d=density: 2 * d(x), near)


@pytest.mark.parametrize(
    ("curves", "share", "message"),
    [
        (CIRCLE[0], 0.4, "`curves` must have shape"),
        (CIRCLE[:, :4], 0.4, "at least 5 points"),
        (CIRCLE, 1.4, "`share0` must be"),
        (np.full((1, 9, 2), np.nan), 0.4, "`curves` must be finite"),
        # Class 1 is the likelier everywhere: there is no level set.
        (CIRCLE, 0.01, "must lie near the level set"),
    ],
)
def test_bad_input_is_named(curves, share, message):
    with pytest.raises(ValueError, match=message):
        levelset_flow(*CLASSES, share, curves, 0.4, times=3)


def test_negative_distances_are_named():
    with pytest.raises(ValueError, match="`distances` must not be negative"):
        adversarial_duality_gap(
            np.zeros((2, 1)), np.array([0, 1]), np.array([1, -1]), 1
        )
