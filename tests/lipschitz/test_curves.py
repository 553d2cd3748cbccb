"""Lines and slopes enclose their curves, for many intervals at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz._curves import PiecewiseLinear, known_curves

SMOOTH = {
    "tanh": 0,
    "sigmoid": 1,
    "silu": 2,
    "gelu erf": 3,
    "gelu": 4,
}
KEY = jax.random.key(1)
# A line `slope * z + offset` and the reference derivative round by some tens of units
# in the last place each; bounds carry their own outward slack on top.
ROUNDING = 128 * float(jnp.finfo(jnp.float64).eps)


def intervals():
    ends = jax.random.normal(KEY, (2, 400)) * jnp.array([3.0, 3.0])[:, None]
    l, u = jnp.min(ends, 0), jnp.max(ends, 0)
    wide = jnp.where(jnp.arange(400) % 4 == 0, l + 1e-3, u)
    return l, jnp.where(jnp.arange(400) == 1, l, wide)


def points(l, u):
    share = jnp.linspace(0.0, 1.0, 201)[:, None]
    return l[None] * (1 - share) + u[None] * share


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_lines_and_slopes_enclose(name):
    _, curve = known_curves()[SMOOTH[name]]
    l, u = intervals()
    z = points(l, u)
    slope = jax.vmap(jax.vmap(jax.grad(curve.function)))(z)
    dl, du = curve.slope_range(l, u)
    assert bool(jnp.all((dl[None] <= slope) & (slope <= du[None])))
    for lines, value in (
        (curve.lines(l, u), curve(z)),
        (curve.slope_lines(l, u), slope),
    ):
        low = lines.lower_slope[None] * z + lines.lower_offset[None]
        high = lines.upper_slope[None] * z + lines.upper_offset[None]
        assert float(jnp.max(low - value)) <= ROUNDING
        assert float(jnp.max(value - high)) <= ROUNDING
        # Support lines of the envelope at the midpoint: they touch the curve.
        assert float(jnp.max(jnp.min(value - low, 0))) <= 1e-3
        assert float(jnp.max(jnp.min(high - value, 0))) <= 1e-3


@pytest.mark.parametrize("name", SMOOTH)
def test_turns_bends_and_limits_are_those_of_the_function(name):
    _, curve = known_curves()[SMOOTH[name]]
    second = jax.vmap(jax.grad(jax.grad(curve.function)))
    third = jax.vmap(jax.grad(jax.grad(jax.grad(curve.function))))
    np.testing.assert_allclose(second(jnp.array(curve.turns)), 0, atol=1e-12)
    np.testing.assert_allclose(third(jnp.array(curve.bends)), 0, atol=1e-12)
    z = jnp.linspace(-12.0, 12.0, 24001)
    for derivative, places in ((second, curve.turns), (third, curve.bends)):
        value = np.asarray(derivative(z))
        value = value[np.abs(value) > 1e-14]
        assert np.sum(np.diff(np.sign(value)) != 0) == len(places)
    slope = jax.vmap(jax.grad(curve.function))(z)
    assert curve.limits[0] <= float(jnp.min(slope))
    assert float(jnp.max(slope)) <= curve.limits[1]
    free = curve.slope_range(jnp.array([-jnp.inf]), jnp.array([jnp.inf]))
    assert [float(v[0]) for v in free] == list(curve.limits)


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (0.1, 1.0), (-1.0, 1.0), (1.0, 0.2)])
def test_piecewise_linear_lines_and_slopes_enclose(slopes):
    curve = PiecewiseLinear(*slopes)
    l, u = intervals()
    z = points(l, u)
    for free in (None, jnp.full_like(l, 0.3)):
        lines = curve.lines(l, u, free)
        low = lines.lower_slope[None] * z + lines.lower_offset[None]
        high = lines.upper_slope[None] * z + lines.upper_offset[None]
        assert float(jnp.max(low - curve(z))) <= ROUNDING
        assert float(jnp.max(curve(z) - high)) <= ROUNDING
    dl, du = curve.slope_range(l, u)
    slope = jnp.where(z > 0, slopes[1], slopes[0])
    assert bool(jnp.all((dl[None] <= slope) & (slope <= du[None])))


def test_a_bound_that_touches_zero_is_not_stable():
    # The Clarke derivative of ReLU at 0 is all of [0, 1].
    curve = PiecewiseLinear(0.0, 1.0)
    for l, u in ((0.0, 1.0), (-1.0, 0.0), (0.0, 0.0)):
        assert curve.slope_range(jnp.array([l]), jnp.array([u])) == (0.0, 1.0)
