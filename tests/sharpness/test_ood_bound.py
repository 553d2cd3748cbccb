"""The bound under shift: never below the truth, and what it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.sharpness import (
    BallCells,
    GridCells,
    Oscillation,
    kmeans_cells,
    ood_bound,
    oscillation,
    relative_sharpness,
)

LOSSES = jnp.array([0.1, 0.3, 0.2, 0.6, 0.4])
SOURCE = jnp.array([0, 0, 1, 2, 2])
TARGET = jnp.array([0, 1, 1, 2, 2, 2, 2, 3])
EPS = Oscillation(jnp.array([0.1, 0.2, 0.0, 1.0]), proof=True)


def bound(target=TARGET, source=SOURCE, eps=EPS, delta=0.05):
    return ood_bound(LOSSES, source, target, eps, 1.0, delta)


def test_the_maximum_over_masses_is_a_linear_programmes():
    from scipy.optimize import linprog

    target = jnp.tile(TARGET, 20)
    found = bound(target)
    b = np.array([0.3, 0.4, 0.5, 1.0])  # cell means plus oscillation, M where empty
    q = np.bincount(np.asarray(target), minlength=4) / target.size
    r = np.sqrt((2 * 4 * np.log(2) + 2 * np.log(1 / 0.05)) / target.size)
    # u = q + up - down, up and down not negative, sums equal, together at most r.
    solved = linprog(
        -np.concatenate([b, -b]),
        A_ub=np.concatenate([np.ones((1, 8)), np.hstack([-np.eye(4), np.eye(4)])]),
        b_ub=np.concatenate([[r], q]),
        A_eq=np.concatenate([np.ones(4), -np.ones(4)])[None],
        b_eq=[0],
    )
    assert float(found.value) == pytest.approx(q @ b - solved.fun)
    assert float(found.deviation) == pytest.approx(r / 2)


def test_under_jit_known_values_may_be_closed_over():
    plain = bound()
    for function, traced in (
        (lambda eps: bound(eps=Oscillation(eps, proof=True)), EPS.value),
        (lambda M: ood_bound(LOSSES, SOURCE, TARGET, EPS, M, jnp.asarray(0.05)), 1.0),
        (lambda target: bound(target), TARGET),
    ):
        np.testing.assert_allclose(jax.jit(function)(traced).value, plain.value)
    M = jnp.asarray(1.0)
    rises = lambda probe: oscillation(  # noqa: E731
        LOSSES, SOURCE, 4, M, probes=(probe, jnp.array([0]))
    )
    found = jax.jit(rises)(jnp.array([0.7]))
    np.testing.assert_allclose(found.value, rises(jnp.array([0.7])).value)
    outside = TARGET + 3
    with pytest.raises(ValueError, match=r"`cells_target` must lie in 0 .. 3"):
        jax.jit(lambda eps: bound(outside, eps=Oscillation(eps, True)))(EPS.value)


def test_the_parts_are_those_of_the_decomposition():
    found = bound()
    p, q = np.array([0.4, 0.2, 0.4, 0]), np.array([1, 2, 4, 1]) / 8
    assert float(found.source_risk) == pytest.approx(0.32)
    assert float(found.robustness) == pytest.approx(q @ np.asarray(EPS.value))
    assert float(found.shift) == pytest.approx(np.sum(np.maximum(q - p, 0)))
    assert float(found.value) <= float(found.decomposed)
    assert found.certificate.proof and "target risk" in str(found.certificate)
    assert not bound(eps=Oscillation(EPS.value, proof=False)).certificate.proof


def test_one_cell_and_no_shift_leave_the_source_risk_and_its_range():
    one = jnp.zeros(5, int)
    found = bound(one, one, Oscillation(jnp.array([0.25]), proof=True))
    assert float(found.value) == pytest.approx(0.32 + 0.25)
    assert float(found.shift) == 0


def test_what_says_nothing_is_not_below_the_range_by_rounding():
    assert sum([1 / 7] * 7) < 1
    target = jnp.arange(7)
    nothing = Oscillation(jnp.ones(7), proof=True)
    assert float(bound(target, SOURCE, nothing).value) == 1.0


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.floats(0.001, 0.2), st.integers(0, 2**31 - 1))
def test_it_is_monotone_and_knows_no_names(delta, seed):
    target = jnp.tile(TARGET, 40)
    value = float(bound(target, delta=delta).value)
    slack = 1e-12
    assert value <= 1 + slack
    assert value <= float(bound(target, delta=delta / 2).value) + slack
    # The same masses from fewer samples.
    assert value <= float(bound(target[:40], delta=delta).value) + slack
    # A cell that nobody visits costs.
    more = Oscillation(jnp.append(EPS.value, 1.0), proof=True)
    assert value <= float(bound(target, eps=more, delta=delta).value) + slack
    names = np.random.default_rng(seed).permutation(4)
    eps = Oscillation(EPS.value[np.argsort(names)], proof=True)
    renamed = bound(jnp.asarray(names)[target], jnp.asarray(names)[SOURCE], eps, delta)
    assert float(renamed.value) == pytest.approx(value)
    assert float(renamed.decomposed) == pytest.approx(
        float(bound(target, delta=delta).decomposed)
    )


def triangle(x):
    """A loss with Lipschitz constant 2 on [0, 1]."""
    return 2 * jnp.abs(x - 0.5)


@pytest.fixture(scope="module")
def shifted():
    """Uniform source, shifted target, and the bound of a few hundred draws."""
    grid = GridCells(jnp.zeros(1), jnp.ones(1), 12)

    @jax.jit
    def one(key):
        for_source, for_target, for_probes = jax.random.split(key, 3)
        x = jax.random.uniform(for_source, (200, 1))
        z = jax.random.beta(for_target, 4.0, 2.0, (400, 1))
        probes = jax.random.uniform(for_probes, (50, 1))
        cells, losses = grid.assign(x), triangle(x[:, 0])
        proved = oscillation(
            losses, cells, grid.count, 1.0, lipschitz=2.0, reach=grid.reach(x)
        )
        sampled = oscillation(
            losses,
            cells,
            grid.count,
            1.0,
            probes=(triangle(probes[:, 0]), grid.assign(probes)),
        )
        target = grid.assign(z)
        values = [
            ood_bound(losses, cells, target, eps, 1.0, 0.05).value
            for eps in (proved, sampled)
        ]
        return *values, proved.value, sampled.value, losses, cells

    return jax.vmap(one)(jax.random.split(jax.random.key(0), 200))


def test_the_bound_covers_the_target_risk_and_says_something(shifted):
    z = jax.random.beta(jax.random.key(9), 4.0, 2.0, (200_000,))
    risk = float(jnp.mean(triangle(z)))
    # At most 5 % may fail; the deviation term is cautious, so that none does.
    assert np.mean(np.asarray(shifted[0]) >= risk) >= 0.95
    assert np.median(np.asarray(shifted[0])) < 0.8
    assert np.all(np.asarray(shifted[1]) <= np.asarray(shifted[0]) + 1e-12)


def test_proved_oscillation_is_above_the_truth_and_sampled_below(shifted):
    _, _, proved, sampled, losses, cells = (np.asarray(part) for part in shifted)
    edges = np.linspace(0, 1, 13)
    # The triangle's largest value in each of the twelve cells.
    top = np.maximum(2 * np.abs(edges[:-1] - 0.5), 2 * np.abs(edges[1:] - 0.5))
    for draw in range(5):
        seen = [np.flatnonzero(cells[draw] == cell) for cell in range(12)]
        mean = np.array([losses[draw][rows].mean() for rows in seen])
        truth = top - mean
        assert np.all(proved[draw][:12] >= truth - 1e-12)
        assert np.all(sampled[draw][:12] <= truth + 1e-12)
        assert proved[draw][12] == 1  # nothing is known outside


def test_balls_and_boxes_reach_every_point_of_their_cell():
    points = jnp.asarray(np.random.default_rng(0).standard_normal((300, 2)))

    def both(cells, points):
        return cells.assign(points), cells.reach(points)

    balls = kmeans_cells(jax.random.key(1), points, 7)
    boxes = GridCells(jnp.array([-2.0, -1.5]), jnp.array([1.0, 2.0]), 3)
    for cells, outside in ((balls, 0), (boxes, 1)):
        ids, reach = (np.asarray(part) for part in jax.jit(both)(cells, points))
        assert ids.min() == 0 and ids.max() == cells.count - 2 + outside
        apart = np.linalg.norm(np.asarray(points)[:, None] - np.asarray(points), axis=2)
        same = ids[:, None] == ids
        assert np.all(np.where(same, apart, 0) <= reach[:, None] + 1e-12)
        assert np.all(np.isinf(reach) == (ids == cells.count - 1))
    # Lloyd's algorithm has stopped: each center is the mean of its points.
    ids = np.asarray(jax.jit(both)(balls, points)[0])
    means = [np.asarray(points)[ids == cell].mean(0) for cell in range(7)]
    np.testing.assert_allclose(balls.centers, means, atol=1e-12)


def features_loss(params, batch):
    x, y = batch
    return jnp.mean((jax.nn.relu(x @ params["T"].T) @ params["a"] - y) ** 2)


def test_relative_sharpness_of_random_features_and_its_invariance():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "T": jax.random.normal(keys[0], (5, 3)),
        "a": jax.random.normal(keys[1], (5,)),
    }
    batch = (jax.random.normal(keys[2], (20, 3)), jax.random.normal(keys[3], (20,)))

    def kappa(params):
        return relative_sharpness(
            features_loss, params, batch, lambda p: p["a"], key=keys[0]
        )

    found = kappa(params)
    phi = np.maximum(np.asarray(batch[0]) @ np.asarray(params["T"]).T, 0)
    closed = np.sum(np.asarray(params["a"]) ** 2) * 2 * np.mean(np.sum(phi**2, 1))
    assert found.kind == "exact"
    assert float(found.value) == pytest.approx(closed)
    rescaled = kappa({"T": 3 * params["T"], "a": params["a"] / 3})
    assert float(rescaled.value) == pytest.approx(closed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ood_bound(2 * LOSSES, SOURCE, TARGET, EPS, 1.0, 0.05),
            r"`losses_source` must lie in \[0, 1.0\] \(got 0.2 to 1.2\)",
        ),
        (lambda: bound(TARGET + 1), r"`cells_target` must lie in 0 .. 3"),
        (lambda: bound(source=SOURCE - 1), "cells of `losses_source`` must lie in"),
        (lambda: bound(delta=0.0), r"`delta` must lie in \(0, 1\)"),
        (lambda: bound(TARGET[:0]), "`cells_target` must not be empty"),
        (lambda: bound(source=SOURCE[:3]), "`losses_source` must have shape"),
        (lambda: oscillation(LOSSES, SOURCE, 3, 1.0), "give either `lipschitz`"),
        (
            lambda: oscillation(LOSSES, SOURCE, 3, 0.0, lipschitz=1.0, reach=LOSSES),
            "`M` must be positive",
        ),
        (lambda: kmeans_cells(jax.random.key(0), jnp.ones((3, 2)), 4), "1 .. 3"),
        (lambda: GridCells(jnp.zeros(2), jnp.zeros(2), 2), "`high` must be above"),
        (lambda: GridCells(jnp.zeros(2), jnp.ones(2), 0), "`bins` must be at least 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_points_on_a_ball_are_inside():
    cells = BallCells(jnp.zeros((1, 2)), jnp.ones(1))
    assert cells.assign(jnp.array([[1.0, 0], [1.1, 0]])).tolist() == [0, 1]
