"""Teleportation: never downhill, never off the level set, and what it reports."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.sharpness import (
    DataDependentGL,
    EllipsoidRotation,
    GradNorm,
    OrbitCurvature,
    PerturbedLoss,
    RescaleReLU,
    curvature,
    teleport,
    with_teleport,
)

A = jnp.diag(jnp.array([1.0, 10.0]))
ROTATION = EllipsoidRotation(A)
W = jnp.array([3.0, 0.2])


def quadratic(w, batch):
    return w @ A @ w / 2


def grad_fn(w, i):
    return A @ w


def leaky(z):
    return jnp.where(z > 0, z, z / 10)


class Layer(NamedTuple):
    weight: Any
    bias: None = None


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def mean_square(params, batch):
    x, y = batch
    return jnp.mean((leaky(x @ params[0].weight.T) @ params[1].weight.T - y) ** 2)


NET = [Layer(draw(0, 8, 3) / 2), Layer(draw(1, 2, 8) / 3)]
BATCH = (draw(2, 20, 3), draw(3, 20, 2))


def move_quadratic(w, lr=0.1, cap=None, steps=60):
    return teleport(quadratic, w, None, ROTATION, lr=lr, cap=cap, steps=steps)


def test_a_quadratic_is_left_along_newtons_direction():
    w, report = move_quadratic(W)
    # The steepest point of the level set: on the eigenvector of the largest curvature.
    assert abs(float(w[0])) < 1e-7
    g = A @ w
    after = w - (g @ g) / (g @ A @ g) * g
    assert float(jnp.linalg.norm(after)) < 1e-8
    assert abs(float(report.loss_after - report.loss_before)) < 1e-12
    assert float(report.after) == pytest.approx(10 * 2 * float(report.loss_before))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.floats(-3, 3), st.floats(0.1, 2), st.sampled_from([1e-3, 1.0, 1e4]))
def test_the_objective_never_falls_whatever_the_stepsize(first, second, lr):
    w = jnp.array([first, second])
    moved, report = move_quadratic(w, jnp.asarray(lr), steps=4)
    assert report.after >= report.before * (1 - 1e-13)
    assert report.certificate.met
    assert abs(float(quadratic(moved, None) - quadratic(w, None))) < 1e-11


def test_evaluations_are_counted():
    _, report = move_quadratic(W, 1e-3, steps=7)
    # No halving at so small a stepsize: a start, then 2 for the slope and 1 for the
    # trial of each step.
    assert (int(report.steps), int(report.evaluations)) == (7, 1 + 7 * 3)
    calls = []

    class Counted(GradNorm):
        def __call__(self, loss_fn, params, batch):
            jax.debug.callback(lambda: calls.append(1))
            return super().__call__(loss_fn, params, batch)

    near = jnp.array([0.3, 1.0])  # half a radian is too far from here
    _, report = teleport(quadratic, near, None, ROTATION, Counted(), lr=5.0, steps=3)
    jax.effects_barrier()
    # Each round's derivative passes through the objective once.
    assert len(calls) == int(report.evaluations) - int(report.steps)
    assert int(report.evaluations) > 1 + 3 * 3  # there were halvings


@pytest.fixture(scope="module")
def to_steep():
    @jax.jit
    def run(params, batch, lr, tol):
        action = DataDependentGL(leaky, list)
        return teleport(mean_square, params, batch, action, lr=lr, tol=tol, steps=3)

    return lambda batch, lr, tol: run(NET, batch, jnp.asarray(lr), jnp.asarray(tol))


def test_the_gradient_grows_and_the_loss_stays_within_the_tolerance(to_steep):
    # Eight units fit no twenty samples: only the check keeps the loss.
    for tol, growth in ((1e-2, 1.1), (1e-4, 1.0)):
        moved, report = to_steep(BATCH, 1.0, tol)
        assert float(report.after) > growth * float(report.before)
        defect = abs(float(mean_square(moved, BATCH) - mean_square(NET, BATCH)))
        assert report.certificate.met and defect <= tol * max(1, report.loss_before)
        assert float(report.certificate.value) == pytest.approx(defect, abs=1e-12)


def test_rank_deficient_activations_are_flagged_and_nothing_moves(to_steep):
    flat = (jnp.tile(BATCH[0][:1], (20, 1)), BATCH[1])
    moved, report = to_steep(flat, 1e-2, 1e-3)
    assert bool(report.degenerate) and int(report.steps) == 0
    jtu.tree_map(np.testing.assert_array_equal, moved, NET)


def test_no_step_is_longer_than_half_a_unit_of_the_group():
    moved, report = move_quadratic(W, 1e6, steps=1)
    circle = [np.sqrt(np.diag(A)) * np.asarray(w) for w in (W, moved)]
    angles = [np.arctan2(z[1], z[0]) for z in circle]
    assert int(report.steps) == 1 and 0.1 < angles[1] - angles[0] <= 0.5


def test_a_cap_below_the_objective_moves_nothing_and_says_so():
    moved, report = move_quadratic(W, cap=1.0)
    assert bool(report.capped) and int(report.steps) == 0
    np.testing.assert_array_equal(moved, W)
    _, report = move_quadratic(W, cap=50.0)
    assert bool(report.capped) and float(report.after) >= 50.0
    assert not move_quadratic(W)[1].capped


def test_sharpness_falls_along_the_orbit_and_outputs_stay():
    objective = PerturbedLoss((0.3,), 4, key=jax.random.key(3))
    action = RescaleReLU(leaky, list)
    uneven = action.act(NET, [jnp.linspace(-2.0, 2, 8)], None)
    moved, report = teleport(
        mean_square, uneven, BATCH, action, objective, lr=30.0, maximise=False, steps=5
    )
    loss = mean_square(NET, BATCH)
    assert float(report.after - loss) < 0.9 * float(report.before - loss)
    again = objective(mean_square, moved, BATCH)
    assert float(report.after) == pytest.approx(float(again))
    assert abs(float(mean_square(moved, BATCH) - mean_square(NET, BATCH))) < 1e-12


def test_curvature_of_a_circle_is_one_over_its_radius():
    # All orbits of rotations of a circle's level set are that circle.
    psi = OrbitCurvature(EllipsoidRotation(jnp.eye(2)), 2, key=jax.random.key(0))

    @jax.jit
    def of(radius):
        def circle(t):
            return {"x": radius * jnp.cos(t**2), "y": radius * jnp.sin(t**2)}

        line = curvature(lambda t: jnp.stack([t, 2 * t]))
        return curvature(circle, 0.7), psi(None, jnp.stack([0.0, radius]), None), line

    for radius in (0.5, 3.0):
        np.testing.assert_allclose(of(radius), [1 / radius, 1 / radius, 0], atol=1e-9)


def test_orbit_curvature_agrees_with_three_points_of_the_curve():
    action, direction = DataDependentGL(leaky, list), [draw(7, 8, 8) / 5]

    @jax.jit
    def three_points():
        def curve(t):
            return action.act(NET, action.curve(direction, t), BATCH)

        points = [curve(t) for t in jnp.array([-1e-3, 0.0, 1e-3])]
        return points, curvature(curve)

    points, found = three_points()
    at = [
        np.concatenate([np.ravel(leaf) for leaf in jtu.tree_leaves(p)]) for p in points
    ]
    a, b, c = (np.linalg.norm(at[i] - at[j]) for i, j in ((1, 0), (2, 1), (2, 0)))
    half = (a + b + c) / 2
    # Heron's formula; of three nearby points it loses half the digits.
    area = np.sqrt(max(half * (half - a) * (half - b) * (half - c), 0))
    assert float(found) == pytest.approx(4 * area / (a * b * c), rel=1e-3)


@pytest.fixture(scope="module")
def momentum_run():
    @jax.jit
    def run(w, reset, when):
        base = optax.sgd(0.01, momentum=0.9)
        method = with_teleport(
            base, ROTATION, at_steps=when, steps=60, lr=0.1, reset=reset
        )

        def one(carry, _):
            w, state = carry
            update, state = method.update(
                A @ w, state, w, grad_fn=grad_fn, loss_fn_batch=(quadratic, None)
            )
            return (w + update, state), w

        return jax.lax.scan(one, (w, method.init(w)), None, length=4)

    return lambda w, reset, *when: run(w, reset, jnp.array(when))


def test_the_optimiser_is_its_base_where_it_does_not_teleport(momentum_run):
    (end, state), path = momentum_run(W, True, -1)
    w, momentum = np.asarray(W), np.zeros(2)
    for seen in [*np.asarray(path)[1:], np.asarray(end)]:
        momentum = np.asarray(A) @ w + 0.9 * momentum
        w = w - 0.01 * momentum
        np.testing.assert_allclose(seen, w, rtol=1e-14)
    assert (int(state.evaluations), int(state.teleports), int(state.step)) == (0, 0, 4)


@pytest.mark.parametrize("reset", [False, True])
def test_a_teleporting_step_moves_and_then_steps_from_there(reset, momentum_run):
    (_, state), path = momentum_run(W, reset, 1)
    assert int(state.teleports) == 1
    there, report = move_quadratic(path[1])
    momentum = jnp.zeros(2) if reset else 0.9 * (A @ W)
    np.testing.assert_allclose(
        path[2], there - 0.01 * (A @ there + momentum), atol=1e-12
    )
    assert int(state.evaluations) == int(report.evaluations) + 1


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="`lr` must not be negative"):
        move_quadratic(W, lr=-1.0)
    with pytest.raises(ValueError, match="`steps` must be at least 0"):
        move_quadratic(W, steps=-1)
    with pytest.raises(ValueError, match="`loss at the start` must be finite"):
        move_quadratic(jnp.array([jnp.nan, 1.0]))
    with pytest.raises(ValueError, match="as wide as the next"):
        teleport(quadratic, W, None, RescaleReLU())
    with pytest.raises(ValueError, match="give one of `at_steps` and `every`"):
        with_teleport(optax.sgd(0.1), ROTATION)
    with pytest.raises(ValueError, match="`update` needs `params`, `grad_fn`"):
        method = with_teleport(optax.sgd(0.1), ROTATION, every=2)
        method.update(W, method.init(W), W)
    with pytest.raises(ValueError, match="`lengths` must be positive"):
        PerturbedLoss((0.0,), key=jax.random.key(0))
    with pytest.raises(ValueError, match="`directions` must be at least 1"):
        PerturbedLoss((1.0,), 0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="`curves` must be at least 1"):
        OrbitCurvature(ROTATION, 0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="must move at `t`"):
        curvature(lambda t: ROTATION.act(W, ROTATION.curve(jnp.zeros((2, 2)), t), None))


def test_a_start_that_is_not_finite_comes_back_under_jit(to_steep):
    moved, report = to_steep((BATCH[0], jnp.full_like(BATCH[1], jnp.nan)), 1.0, 1e-3)
    assert int(report.steps) == 0 and not report.certificate.met
    jtu.tree_map(np.testing.assert_array_equal, moved, NET)
