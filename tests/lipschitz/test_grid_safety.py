"""Safety by a grid: never a proof against a dense scan, bounds on the right side."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz import grid_safety

CENTRE = np.array([0.1, -0.2])


@pytest.fixture(scope="module")
def net():
    return eqx.nn.MLP(2, 3, 8, 2, key=jax.random.key(7))


def scan(net, x, radius, label, side=101):
    """The smallest lead of a class on a dense grid of the ball."""
    line = np.linspace(-radius, radius, side)
    points = x + np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    logits = np.asarray(jax.jit(jax.vmap(net))(jnp.asarray(points)))
    return np.min(logits[:, [label]] - np.delete(logits, label, 1))


def test_agrees_with_a_scan(net):
    """A proof has no lost point, a counterexample is one, the bound lies below."""
    label, kinds = int(np.argmax(net(jnp.asarray(CENTRE)))), set()
    for radius in (0.05, 0.2, 0.5, 1.0, 2.0):
        found = grid_safety(net, jnp.asarray(CENTRE), radius)
        least = scan(net, CENTRE, radius, label)
        kinds.add(found.kind)
        assert found.certificate.proof
        assert found.certificate.value <= min(least, found.margin)
        assert found.kind != "proof" or least > 0
        if found.kind == "counterexample":
            assert int(np.argmax(net(found.point))) != label
            assert np.max(np.abs(np.asarray(found.point) - CENTRE)) <= radius
    assert kinds == {"proof", "counterexample"}


def test_more_points_tighten_the_bound(net):
    """Until the budget decides, each halving raises the bound of the smallest lead."""
    bounds = []
    for budget in (1, 30, 3000, 100_000):
        found = grid_safety(net, jnp.asarray(CENTRE), 0.2, 60.0, max_points=budget)
        assert found.evaluations <= budget
        bounds.append(float(found.certificate.value))
    assert bounds == sorted(bounds) and bounds[0] < 0 < bounds[-1]


def test_constant_of_zero_needs_the_centre_alone():
    constant = lambda x: jnp.stack([1 + 0 * x[0], 0 * x[1]])  # noqa: E731
    found = grid_safety(constant, jnp.asarray(CENTRE), 5.0, 0.0)
    assert (found.kind, found.evaluations) == ("proof", 1)
    assert not found.certificate.proof  # the constant was taken on trust
    assert "given the Lipschitz constants" in found.certificate.statement
    assert grid_safety(constant, jnp.asarray(CENTRE), 5.0).certificate.proof


def test_needs_the_lead_s_constant_not_the_logits():
    """Two logits of constant 1 each, whose difference has constant 2."""
    net = lambda x: jnp.stack([1 + x[0], -x[0]])  # noqa: E731
    x = jnp.zeros(2)
    assert grid_safety(net, x, 0.7).kind == "counterexample"
    assert grid_safety(net, x, 0.45, 2.0).kind == "proof"


def test_one_constant_for_each_other_class(net):
    x = jnp.asarray(CENTRE)
    known = grid_safety(net, x, 0.1).certificate.details["lipschitz"]
    one, each = (grid_safety(net, x, 0.1, h) for h in (float(known.max()), known))
    assert one.kind == each.kind == "proof" and each.evaluations <= one.evaluations


def test_label_clip_and_unknown(net):
    x = jnp.asarray(CENTRE)
    label = int(np.argmax(net(x)))
    other = grid_safety(net, x, 0.1, label=(label + 1) % 3)
    assert other.kind == "counterexample" and other.evaluations == 1
    wide = grid_safety(net, x, 2.0, clip=(-0.25, 0.15))
    assert wide.kind == "proof" and "entries in [-0.25, 0.15]" in str(wide.certificate)
    assert grid_safety(net, x, 0.3, 1e6, max_points=50).kind == "unknown"


def test_rounding_is_on_the_safe_side(float32):
    """A lead below single precision's resolution is not proved."""
    net = lambda x: jnp.stack([1e6 + 0 * x[0] + 0.0625, 1e6 + 0 * x[1]])  # noqa: E731
    found = grid_safety(net, jnp.zeros(2, jnp.float32), 0.1, 0.0, max_points=100)
    assert found.margin == 0.0625 and found.kind == "unknown"
    assert found.certificate.value.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0.0}, "`radius` must be positive"),
        ({"x": jnp.array([0.0, jnp.nan])}, "`x` must be finite"),
        ({"lipschitz": -1.0}, "`lipschitz` must not be negative"),
        ({"lipschitz": jnp.ones(3)}, "one for each of the 2 other classes"),
        ({"label": 3}, "`label` must be one of at least two classes"),
        ({"model": lambda x: x / 0 * 0, "lipschitz": 1.0, "label": 0}, "got NaN"),
    ],
)
def test_bad_input(net, arguments, message):
    given = {"model": net, "x": jnp.asarray(CENTRE), "radius": 0.1, **arguments}
    with pytest.raises(ValueError, match=message):
        grid_safety(**given)
