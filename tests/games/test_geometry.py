"""Moves against general minimisers; supports, comparisons and divergences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from varan.games import EntropySimplex, EuclideanBall, EuclideanBox, EuclideanSpace

BALL = EuclideanBall(0.8, jnp.array([0.1, -0.2, 0.3]))
BOX = EuclideanBox(jnp.array([-1.0, -0.2, 0.0]), jnp.array([0.3, 1.0, 2.0]))
SIMPLEX = EntropySimplex(3)
GEOMETRIES = [EuclideanSpace(), BALL, BOX, SIMPLEX]
INSIDE = jnp.array([0.2, 0.3, 0.5])
GRADIENT = jnp.array([1.5, -0.7, 0.4])


def _constraints(geometry):
    if isinstance(geometry, EuclideanBall):
        distance = geometry.radius**2
        return {
            "constraints": {
                "type": "ineq",
                "fun": lambda x: distance - np.sum((x - geometry.center) ** 2),
            }
        }
    if isinstance(geometry, EuclideanBox):
        return {"bounds": list(zip(geometry.lower, geometry.upper, strict=True))}
    if isinstance(geometry, EntropySimplex):
        total = {"type": "eq", "fun": lambda x: np.sum(x) - 1}
        return {"constraints": total, "bounds": [(1e-9, 1)] * 3}
    return {}


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("stepsize", [0.1, 1.3])
def test_a_move_minimises_its_objective(geometry, stepsize):
    def objective(x):
        return float(stepsize * GRADIENT @ x + geometry.divergence(x, INSIDE))

    reference = minimize(
        lambda x: objective(jnp.asarray(x)),
        np.asarray(INSIDE),
        method="SLSQP",
        options={"ftol": 1e-14},
        **_constraints(geometry),
    )
    moved = geometry.move(INSIDE, GRADIENT, stepsize)
    # SLSQP differentiates numerically: about the square root of eps in the point.
    np.testing.assert_allclose(moved, reference.x, atol=1e-5)
    assert bool(geometry.contains(moved))
    # It may also end outside the set by its tolerance, and below the minimum by as
    # much: what is compared with is its answer drawn back to a point well inside.
    drawn = INSIDE + (1 - 1e-6) * (jnp.asarray(reference.x) - INSIDE)
    assert objective(moved) <= objective(drawn) + 1e-12


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: type(g).__name__)
def test_comparison_is_the_difference_of_divergences(geometry):
    before = geometry.move(INSIDE, GRADIENT, 0.1)
    after = geometry.move(INSIDE, GRADIENT, -0.3)
    w, c = geometry.comparison(before, after)
    expected = geometry.divergence(INSIDE, before) - geometry.divergence(INSIDE, after)
    np.testing.assert_allclose(w @ INSIDE + c, expected, atol=1e-14)


@pytest.mark.parametrize("geometry", [BALL, BOX, SIMPLEX])
def test_support_is_the_maximum(geometry):
    points = jax.random.normal(jax.random.key(0), (4000, 3)) * 3
    inside = jax.vmap(lambda p: geometry.move(INSIDE, p, 1.0))(points)
    values = inside @ GRADIENT
    support = geometry.support(GRADIENT)
    assert jnp.all(values <= support + 1e-12)
    # 4000 random points come within a tenth of the best.
    assert jnp.max(values) >= support - 0.1 * jnp.abs(support)


@pytest.mark.parametrize("geometry", [BALL, BOX])
def test_diameter_bounds_the_divergence(geometry):
    points = jax.random.normal(jax.random.key(1), (200, 3)) * 3
    inside = jax.vmap(geometry.project)(points)
    gaps = jax.vmap(lambda x: jax.vmap(lambda y: geometry.divergence(x, y))(inside))
    largest = jnp.max(gaps(inside))
    bound = geometry.diameter() ** 2 / 2
    assert 0.5 * bound < largest <= bound * (1 + 1e-12)


def test_entropy_survives_underflow():
    x = SIMPLEX.move(jnp.array([1.0, 0.0, 0.0]), jnp.array([1e5, 0.0, 0.0]), 1.0)
    np.testing.assert_allclose(x, [0.0, 0.5, 0.5], atol=1e-12)
    assert bool(jnp.isfinite(SIMPLEX.divergence(x, jnp.array([1.0, 0.0, 0.0]))))


def test_pytrees():
    ball = EuclideanBall(1.0)
    point = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    moved = ball.move(jax.tree.map(jnp.zeros_like, point), point, -1.0)
    np.testing.assert_allclose(moved["a"], [0.6])
    np.testing.assert_allclose(moved["b"], [[0.8]])
    np.testing.assert_allclose(ball.support(point), 5.0)


def test_bad_input():
    with pytest.raises(ValueError, match="EuclideanBall: `radius` must be positive"):
        EuclideanBall(0.0)
    with pytest.raises(ValueError, match="lower <= upper"):
        EuclideanBox(jnp.ones(2), jnp.zeros(2))
    with pytest.raises(ValueError, match="must be finite"):
        EuclideanBox(jnp.zeros(1), jnp.array([jnp.inf]))
    with pytest.raises(ValueError, match="`size` must be at least 2"):
        EntropySimplex(1)
