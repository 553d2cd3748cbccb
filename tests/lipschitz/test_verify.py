"""Verification: verdicts against dense grids, and counterexamples that are real."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz import UnsafeCase, robustness_property, verify


@pytest.fixture(scope="module")
def net():
    return eqx.nn.MLP(2, 3, 8, 2, key=jax.random.key(3))


@pytest.fixture(scope="module")
def grid_outputs(net):
    """Outputs on a fine grid of [-1, 1]^2."""
    axis = jnp.linspace(-1, 1, 201)
    points = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    return np.asarray(jax.jit(jax.vmap(net))(points))


def case(A, b, side=1.0):
    A, b = np.atleast_2d(np.asarray(A, float)), np.atleast_1d(np.asarray(b, float))
    box = side * np.ones(2)
    return UnsafeCase(-box, box, A, b, np.zeros(len(b), bool))


@pytest.mark.parametrize("margin", [0.02, 0.2])
def test_output_that_is_never_reached(net, grid_outputs, margin):
    """Unsafe below the smallest value of a logit: it holds, with that distance."""
    smallest = grid_outputs[:, 0].min()
    found = verify(net, [case([1.0, 0, 0], smallest - margin)])
    assert found.status == "holds"
    assert found.certificate.proof
    assert 0 < found.certificate.value <= margin + 1e-6


def test_output_that_is_reached(net, grid_outputs):
    threshold = np.quantile(grid_outputs[:, 0], 1e-3)
    found = verify(net, [case([1.0, 0, 0], threshold)])
    assert found.status == "violated"
    assert np.all(np.abs(found.counterexample) <= 1)
    y = net(jnp.asarray(found.counterexample))
    np.testing.assert_allclose(y, found.output, rtol=1e-9)
    assert y[0] <= threshold
    np.testing.assert_allclose(found.certificate.value, y[0] - threshold, atol=1e-12)


def test_conjunction_needs_all_rows(net, grid_outputs):
    """Each row alone is reached, both together are not."""
    low, high = np.quantile(grid_outputs[:, 0], [0.3, 0.7])
    both = case([[1.0, 0, 0], [-1.0, 0, 0]], [low, -high])
    assert verify(net, [both]).status == "holds"


def test_first_violated_case_decides(net, grid_outputs):
    safe = case([1.0, 0, 0], grid_outputs[:, 0].min() - 1)
    unsafe = case([1.0, 0, 0], grid_outputs[:, 0].max() + 1)
    assert verify(net, [safe, unsafe]).status == "violated"


def test_out_of_time_is_unknown(net, grid_outputs):
    tight = case([1.0, 0, 0], grid_outputs[:, 0].min() - 0.02)
    found = verify(net, [tight], timeout=1e-6)
    assert found.status == "unknown"
    assert not found.certificate.proof and found.certificate.value == -np.inf


def test_robustness_is_that_of_the_grid():
    """Another class leads on a corner: far from the middle, in reach of eps 1."""
    net = eqx.nn.MLP(2, 3, 8, 2, key=jax.random.key(6))
    corners = jnp.array([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    label = int(jnp.argmax(net(jnp.zeros(2))))
    assert {label} < set(np.argmax(jax.vmap(net)(corners), 1).tolist())
    near = jnp.argmax(jax.vmap(net)(0.05 * corners), 1)
    assert np.all(near == label)
    verdicts = [
        verify(net, robustness_property(jnp.zeros(2), epsilon, label, 3)).status
        for epsilon in (0.05, 1.0)
    ]
    assert verdicts == ["holds", "violated"]


def test_no_condition_on_outputs_is_violated_at_once(net):
    assert verify(net, [case(np.zeros((0, 3)), np.zeros(0))]).status == "violated"


def test_single_precision_setting_changes_nothing(net, grid_outputs):
    """Bounds are in float64 also where JAX is in float32."""
    smallest = float(grid_outputs[:, 0].min())
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        small = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if eqx.is_array(leaf) else leaf, net
        )
        found = verify(small, [case([1.0, 0, 0], smallest - 0.02)])
    assert found.status == "holds"


class TestBadInput:
    def test_no_cases(self, net):
        with pytest.raises(ValueError, match="`cases` must not be empty"):
            verify(net, [])

    def test_other_sizes(self, net):
        with pytest.raises(ValueError, match="has 3 outputs, the property \\[2\\]"):
            verify(net, [case([1.0, 0], 0)])
        with pytest.raises(ValueError, match="has 3 inputs, the property \\[2\\]"):
            verify(lambda x: x, [case([1.0, 0, 0], 0)], (3,))

    def test_no_time(self, net):
        with pytest.raises(ValueError, match="`timeout` must be positive"):
            verify(net, [case([1.0, 0, 0], 0)], timeout=0)

    @pytest.mark.parametrize(
        "lower, upper",
        [
            ([1.0, 1.0], [0.0, 0.0]),
            ([jnp.nan, 0.0], [1.0, 1.0]),
            ([-jnp.inf] * 2, [1.0] * 2),
        ],
    )
    def test_boxes_that_are_none(self, net, lower, upper):
        sides = np.array(lower), np.array(upper)
        case = UnsafeCase(*sides, np.ones((1, 3)), np.zeros(1), np.zeros(1, bool))
        with pytest.raises(ValueError, match="finite and `lower` at most"):
            verify(net, [case])

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((jnp.zeros(2), -1.0, 0, 3), "`epsilon` must not be negative"),
            ((jnp.zeros(2), 0.1, 3, 3), "`label` must be one of"),
            ((jnp.full(2, jnp.nan), 0.1, 0, 3), "`x` must be finite"),
        ],
    )
    def test_robustness(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            robustness_property(*arguments)

    def test_centre_outside_clip(self):
        with pytest.raises(ValueError, match="must lie in `clip`"):
            robustness_property(jnp.full(2, 3.0), 0.1, 0, 3, clip=(0.0, 1.0))

    def test_nan_weights_prove_nothing(self, net):
        broken = eqx.tree_at(lambda m: m.layers[0].bias, net, jnp.full(8, jnp.nan))
        assert (
            verify(broken, [case([1.0, 0, 0], -9.0)], timeout=0.5).status == "unknown"
        )
