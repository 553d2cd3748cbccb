"""Low-rank certificates: never above the truth, the full relaxation's value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz import Ball, Box, exact_bounds, layer_bounds, lowrank_sdp
from varan.lipschitz._lowrank_sdp import _constraints, _solve, _start
from varan.lipschitz._relu_program import (
    ranges,
    relu_layers,
    relu_program,
    slack_matrix,
)

CENTRE = jnp.array([0.3, -0.2, 0.5, 0.1])


def random_net(seed):
    rng = np.random.default_rng(seed)
    sizes = (4, 6, 6, 3)
    shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
    weights = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[1] / 2)) for s in shapes]
    return weights, [jnp.asarray(0.3 * rng.normal(size=len(w))) for w in weights]


def values(net, x):
    for weight, bias in zip(*net, strict=True):
        last = x @ weight.T + bias[None]
        x = np.maximum(last, 0)
    return np.asarray(last)


def samples(region, count=4000):
    rng = np.random.default_rng(1)
    if isinstance(region, Ball):
        x = rng.normal(size=(count, 4))
        x *= rng.uniform(size=(count, 1)) ** 0.25 / np.linalg.norm(x, axis=1)[:, None]
        return np.asarray(region.centre) + float(region.radius) * x
    lower, upper = np.asarray(region.lower), np.asarray(region.upper)
    return lower + (upper - lower) * rng.uniform(size=(count, 4))


@pytest.fixture(scope="module")
def nets():
    return [random_net(seed) for seed in range(6)]


@pytest.mark.parametrize("region", [Ball(CENTRE, 0.6), Box.linf(CENTRE, 0.3)])
def test_between_the_relaxation_and_an_attack(nets, region):
    for net in nets[:3]:
        found = lowrank_sdp(net, region, max_rank=3, tol=1e-5)
        assert found.kind == "proof" and np.all(found.residual <= 1e-5)
        sampled = values(net, samples(region)).min(0)
        assert np.all(found.lower <= np.minimum(sampled, found.upper) + 1e-12)
        # Solved: the proof reaches the low-rank value, up to the violation left.
        np.testing.assert_allclose(found.lower, found.relaxed, atol=2e-3)
        np.testing.assert_array_less(found.lower, found.relaxed + 1e-3)
        reached = np.diag(values(net, np.asarray(found.witness)))
        np.testing.assert_allclose(found.upper, reached, rtol=1e-9, atol=1e-12)
        if isinstance(region, Ball):
            away = np.linalg.norm(found.witness - region.centre[None], axis=1)
            assert np.all(away <= float(region.radius) * (1 + 1e-12))


def test_below_the_exact_minimum_over_a_box(nets):
    box = Box.linf(CENTRE, 0.3)
    exact = exact_bounds(nets[0], box).lower
    found = lowrank_sdp(nets[0], box, max_rank=2, tol=1e-5)
    assert np.all(found.lower <= exact + 1e-7) and np.all(exact <= found.upper + 1e-7)


def test_one_neuron_in_closed_form():
    """The least of 2 max(w x + b, 0) over a ball: the relaxation is exact."""
    w = jnp.array([[3.0, 4.0]])
    for bias, want in ((2.0, 2.0), (-1.0, 0.0)):
        net = ([w, jnp.array([[2.0]])], [jnp.array([bias]), jnp.zeros(1)])
        found = lowrank_sdp(net, Ball(jnp.zeros(2), 0.2))
        np.testing.assert_allclose(found.lower, 2 * want * (bias > 1) / 2, atol=1e-5)


def test_the_full_relaxation_has_the_same_minimum(nets):
    """By a general solver, on the lifted matrix."""
    cvxpy = pytest.importorskip("cvxpy")
    region = Ball(CENTRE, 0.6)
    (w1, w2, w3), (b1, b2, b3) = jax.tree.map(np.asarray, nets[0])
    whole = cvxpy.Variable((17, 17), PSD=True)
    x, first, second = slice(1, 5), slice(5, 11), slice(11, 17)
    constraints = [whole[0, 0] == 1, cvxpy.trace(whole[x, x]) <= 1]
    b1, w1 = b1 + w1 @ np.asarray(CENTRE), 0.6 * w1
    spans = ranges(relu_layers("test", nets[0], region)[0][:-1], region)
    layers = ((w1, b1, x, first), (w2, b2, first, second))
    for (w, b, old, new), (_, high) in zip(layers, spans, strict=True):
        z = whole[0, new]
        product = cvxpy.diag(whole[new, old] @ w.T) + cvxpy.multiply(b, z)
        constraints += [z >= 0, z >= w @ whole[0, old] + b]
        constraints.append(cvxpy.diag(whole[new, new]) == product)
        # Never active, by the ranges that ours knows: left out of both.
        constraints.append(cvxpy.diag(whole[new, new])[np.flatnonzero(high <= 0)] == 0)
    program = cvxpy.Problem(cvxpy.Minimize(w3[0] @ whole[0, second]), constraints)
    program.solve(solver="CLARABEL")
    found = lowrank_sdp(nets[0], region, rows=jnp.eye(3)[:1], max_rank=3, tol=1e-5)
    np.testing.assert_allclose(found.lower[0], program.value + b3[0], atol=1e-3)


def test_the_slack_is_a_bound_at_any_multipliers(nets):
    """At inputs of the region the form of any multipliers is at most the objective."""
    rng = np.random.default_rng(2)
    for region in (Ball(CENTRE, 0.6), Box.linf(CENTRE, 0.3)):
        layers, _ = relu_layers("test", nets[1], region)
        c = rng.normal(size=6)
        spans = ranges(layers[:-1], region)
        scaled = relu_program(layers[:-1], c, 0.0, spans, region)
        program = scaled.program
        unit = (samples(region, 200) - np.asarray(CENTRE)) / (
            0.6 if isinstance(region, Ball) else 0.3
        )
        points = [unit]
        for weight, bias in zip(program.weights, program.biases, strict=True):
            points.append(np.maximum(points[-1] @ weight.T + bias, 0))
        lifted = np.concatenate([np.ones((200, 1)), *points], 1)
        assert np.all(lifted[:, 1:] ** 2 @ np.ones(16) <= scaled.squares.sum())
        below, zero = _constraints(program, jnp.asarray(lifted[0, 1:, None]))
        assert np.max(below) <= 1e-12 and np.max(np.abs(zero)) <= 1e-12
        for _ in range(5):
            bound = rng.exponential(size=len(below))
            activity = rng.normal(size=len(zero))
            matrix = slack_matrix(program, bound, activity)
            np.testing.assert_array_equal(matrix, matrix.T)
            form = np.einsum("bi,ij,bj->b", lifted, matrix, lifted)
            assert np.all(form <= points[-1] @ program.c + 1e-9)


def test_ranges_hold(nets):
    for net in nets:
        for region in (Ball(CENTRE, 0.6), Box.linf(CENTRE, 0.3)):
            x = samples(region)
            boxes = layer_bounds(net, region)
            for weight, bias, box in zip(*net, boxes, strict=True):
                argument = np.asarray(x @ weight.T + bias[None])
                low, high = np.asarray(box.lower), np.asarray(box.upper)
                assert np.all(low <= argument) and np.all(argument <= high)
                x = np.maximum(argument, 0)
            # Of the first layer's the extremes are exact, and approached.
            low, high = (np.asarray(side) for side in (boxes[0].lower, boxes[0].upper))
            first = samples(region) @ np.asarray(net[0][0]).T + np.asarray(net[1][0])
            assert np.all(np.ptp(first, axis=0) >= 0.7 * (high - low))


def test_stationary_and_complementary_at_the_end(nets):
    """S(y) annihilates the lifted point, so <S, X> = 0."""
    region = Ball(CENTRE, 0.6)
    layers, _ = relu_layers("test", nets[0], region)
    c, offset = layers[-1][0][0], layers[-1][1][0]
    spans = ranges(layers[:-1], region)
    scaled = relu_program(layers[:-1], c, offset, spans, region)
    program = scaled.program
    factor, bound, activity, residual = _solve(program, _start(program, 2), 1e-5)
    matrix = slack_matrix(program, np.asarray(bound), np.asarray(activity))
    lifted = np.concatenate([np.eye(2)[:1], factor])
    value = float(program.c @ np.asarray(factor)[-6:, 0])
    matrix[0, 0] -= value
    assert residual <= 1e-5
    assert np.max(np.abs((matrix @ lifted)[1:])) <= 1e-3
    assert abs(np.sum(lifted * (matrix @ lifted))) <= 1e-2


def test_smaller_regions_are_easier(nets):
    radii = (0.0, 0.1, 0.3, 0.6)
    found = [lowrank_sdp(nets[2], Ball(CENTRE, r), max_rank=3, tol=1e-5) for r in radii]
    lower = np.stack([one.lower for one in found])
    assert np.all(np.diff(lower, axis=0) <= 2e-3)
    at = values(nets[2], np.asarray(CENTRE)[None])[0]
    np.testing.assert_allclose(lower[0], at, atol=2e-3)


def test_columns_are_added_where_they_help(nets):
    region = Ball(CENTRE, 0.6)
    flat = [lowrank_sdp(n, region, rank=1, max_rank=1, tol=1e-5) for n in nets[:4]]
    stairs = [lowrank_sdp(n, region, max_rank=3, tol=1e-5) for n in nets[:4]]
    worst = [np.max(one.relaxed - one.lower) for one in flat]
    assert max(worst) > 1e-2  # a local attack alone proves little
    for one, more in zip(flat, stairs, strict=True):
        assert np.all(more.lower >= one.lower - 1e-3)
        assert np.all(one.rank == 1) and np.all((more.rank >= 2) & (more.rank <= 3))


def test_reads_a_model_and_combinations(nets):
    region = Ball(CENTRE, 0.6)
    leads = jnp.array([[1.0, -1.0, 0.0]])
    direct = lowrank_sdp(nets[3], region, rows=leads, max_rank=3, tol=1e-5)

    def model(x):
        for weight, bias in list(zip(*nets[3], strict=True))[:-1]:
            x = jax.nn.relu(weight @ x + bias)
        return leads @ (nets[3][0][-1] @ x + nets[3][1][-1])

    read = lowrank_sdp(model, region, max_rank=3, tol=1e-5)
    np.testing.assert_allclose(read.lower, direct.lower, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": jnp.tanh}, "every activation must be a ReLU"),
        ({"model": lambda x: x}, "every activation must be a ReLU"),
        ({"model": lambda x: x + jax.nn.relu(2 * x)}, "must be one chain"),
        ({"rank": 3, "max_rank": 2}, "`max_rank` must be at least `rank`"),
        ({"tol": -1.0}, "`tol` must be positive"),
        ({"rows": jnp.ones((1, 9))}, "one column for every output"),
    ],
)
def test_bad_input(nets, arguments, message):
    with pytest.raises(ValueError, match=message):
        lowrank_sdp(**{"model": nets[0], "region": Ball(CENTRE, 0.1), **arguments})


def test_unbounded_box_is_refused(nets):
    with pytest.raises(ValueError, match="must be finite"):
        lowrank_sdp(nets[0], Box(CENTRE, CENTRE + jnp.inf))
