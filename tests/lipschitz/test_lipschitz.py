"""Certified bounds against the truth: the chain of bounds, and the invariants.

    sampled <= exact <= branch and bound <= ours
            <= RecurJac <= strict RecurJac <= intervals <= product of norms

is a theorem, so one instance out of order is a bug.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.lipschitz import (
    BaB,
    Box,
    bounds,
    certified_radius,
    exact_bounds,
    exact_lipschitz,
    jacobian_bounds,
    jvp_bounds,
    local_lipschitz,
    monotone,
)

# 16 roundings of the largest terms, and far below any looseness worth finding.
ROUNDING = 1e-9
METHODS = ("crown", "recurjac", "recurjac_strict", "ibp", "naive")


def network(seed, sizes=(3, 5, 5, 2), gain=2.0, dtype=float):
    """Weights and biases of a random network."""
    keys = jax.random.split(jax.random.key(seed), 2 * len(sizes))
    pairs = list(itertools.pairwise(sizes))
    weights = [
        gain * jax.random.normal(k, (n, m), dtype) / m**0.5
        for k, (m, n) in zip(keys, pairs, strict=False)
    ]
    biases = [
        0.3 * jax.random.normal(k, (n,), dtype)
        for k, (_, n) in zip(keys[len(sizes) :], pairs, strict=False)
    ]
    return weights, biases


def apply(model, x, activation=jax.nn.relu):
    weights, biases = model
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        x = activation(w @ x + b)
    return weights[-1] @ x + biases[-1]


def norm_at(model, x, activation=jax.nn.relu):
    jac = jax.jacrev(lambda x: apply(model, x, activation))(x)
    return jnp.max(jnp.sum(jnp.abs(jac), 1))


def random_box(seed, size=3):
    key = jax.random.key(seed + 1000)
    epsilon = 10.0 ** jax.random.uniform(key, (), minval=-2.0, maxval=0.0)
    return Box.linf(jax.random.normal(key, (size,)), epsilon)


@jax.jit
def sampled(model, box):
    x = jax.random.uniform(jax.random.key(0), (500, 3))
    x = box.lower[None] + x * (box.upper - box.lower)[None]
    return jnp.max(jax.vmap(lambda x: norm_at(model, x))(x))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_bounds_are_in_the_order_of_the_theorem(seed):
    model, box = network(seed), random_box(seed)
    exact = exact_lipschitz(model, box)
    assert exact.complete
    rule = BaB(batch=8, max_domains=100, reforward=True)
    branched = local_lipschitz(model, box, forward="crown", bab=rule, samples=16)
    ours = {
        m: local_lipschitz(model, box, forward="crown", method=m, samples=0)
        for m in METHODS
    }
    chain = [float(sampled(model, box)), exact.value, float(branched.bound)]
    chain += [float(ours[m].bound) for m in METHODS]
    for low, high in itertools.pairwise(chain):
        assert low <= high * (1 + ROUNDING), chain
    assert float(branched.attained) <= exact.value * (1 + ROUNDING)
    for row, true in enumerate(exact.per_row):
        assert true <= float(branched.per_row[row]) * (1 + ROUNDING)
    norms = ours["crown"].certificate
    assert norms.proof and ours["crown"].kind == "proof"
    assert float(ours["crown"].gap) >= -ROUNDING


@pytest.mark.parametrize("forward", ["ibp", "crown", "alpha"])
def test_every_forward_method_is_sound(forward):
    @jax.jit
    def check(seed):
        model, box = network(seed), random_box(seed)
        out = bounds(model, box, method=forward)
        entries = jacobian_bounds(model, box, forward=forward)
        share = jax.random.uniform(jax.random.key(7), (300, 3))
        x = box.lower[None] + share * (box.upper - box.lower)[None]
        value = jax.vmap(lambda x: apply(model, x))(x)
        jac = jax.vmap(jax.jacrev(lambda x: apply(model, x)))(x)
        # The values at the points are rounded themselves.
        slack = 1e-13
        inside = (out.lower[None] <= value + slack) & (value <= out.upper[None] + slack)
        above, below = (
            entries.lower[None] <= jac + slack,
            jac <= entries.upper[None] + slack,
        )
        return jnp.all(inside) & jnp.all(above & below), out

    widths = []
    for seed in range(20):
        sound, out = check(seed)
        assert bool(sound), seed
        widths.append(jnp.sum(out.upper - out.lower))
    if forward != "ibp":
        crude = jax.jit(lambda s: bounds(network(s), random_box(s), method="ibp"))
        for seed, width in enumerate(widths):
            looser = crude(seed)
            assert width <= jnp.sum(looser.upper - looser.lower) * (1 + ROUNDING)


def test_float32_bounds_cover_the_float64_truth():
    @jax.jit
    def narrow(model, box):
        found = local_lipschitz(model, box, forward="crown", samples=0)
        return found.bound, bounds(model, box)

    for seed in range(20):
        model, box = network(seed), random_box(seed)
        single = jax.tree.map(lambda a: a.astype(jnp.float32), (model, box))
        # The truth of the very weights that were certified.
        model, box = jax.tree.map(lambda a: a.astype(jnp.float64), single)
        bound, out = narrow(*single)
        assert bound.dtype == jnp.float32
        assert float(sampled(model, box)) <= float(bound)
        value = apply(model, box.lower)
        assert bool(jnp.all(out.lower.astype(float) <= value))


def test_a_point_gives_the_norm_of_its_jacobian():
    for seed in range(3):
        model, x = network(seed), random_box(seed).centre
        found = local_lipschitz(model, Box.linf(x, 0.0), samples=0)
        np.testing.assert_allclose(found.bound, norm_at(model, x), rtol=1e-12)


def test_a_linear_network_is_exact():
    w = jax.random.normal(jax.random.key(0), (2, 3))
    found = local_lipschitz(lambda x: w @ x, Box.linf(jnp.zeros(3), 1.0))
    np.testing.assert_allclose(found.bound, jnp.abs(w).sum(1).max(), rtol=1e-12)
    np.testing.assert_allclose(found.jac_lower, w, rtol=1e-12)
    everywhere = Box(jnp.full(3, -jnp.inf), jnp.full(3, jnp.inf))
    found = local_lipschitz(lambda x: w @ x, everywhere)
    np.testing.assert_allclose(found.bound, jnp.abs(w).sum(1).max(), rtol=1e-12)
    assert "all inputs" in found.certificate.statement


def test_one_hidden_layer_gives_exact_entries_over_free_states():
    model, box = network(3, (3, 6, 2)), random_box(11)
    (w1, w2), (b1, _) = model
    reach = jnp.abs(w1) @ box.radius
    z = w1 @ box.centre + b1
    low, high = (z - reach > 0).astype(float), (z + reach >= 0).astype(float)
    entries = w2[:, :, None] * w1[None]
    corners = jnp.stack([entries * low[None, :, None], entries * high[None, :, None]])
    found = jacobian_bounds(model, box)
    np.testing.assert_allclose(found.lower, corners.min(0).sum(1), atol=1e-12)
    np.testing.assert_allclose(found.upper, corners.max(0).sum(1), atol=1e-12)


def test_a_global_bound_covers_every_local_one():
    model = network(5)
    everywhere = Box(jnp.full(3, -jnp.inf), jnp.full(3, jnp.inf))
    for method in ("crown", "ibp"):
        found = local_lipschitz(model, everywhere, method=method)
        for seed in range(4):
            assert exact_lipschitz(model, random_box(seed)).value <= found.bound
    assert "infinite" in str(found)


def test_nested_boxes_have_nested_bounds_with_interval_ranges():
    model, box = network(8), random_box(8)
    outer = Box(box.lower - 0.1, box.upper + 0.2)
    inner, outer = (
        local_lipschitz(model, b, forward="ibp", samples=0).bound for b in (box, outer)
    )
    assert inner <= outer * (1 + ROUNDING)


def test_renaming_and_rescaling_neurons_changes_nothing():
    (w, b), box = network(9), random_box(9)
    order = jnp.array([3, 0, 4, 1, 2])
    moved = (
        [2.0 * w[0][order], w[1][:, order] / 2.0, w[2]],
        [2.0 * b[0][order], b[1], b[2]],
    )
    first, second = (
        local_lipschitz(m, box, forward="crown", samples=0).bound
        for m in ((w, b), moved)
    )
    np.testing.assert_allclose(first, second, rtol=1e-10)


def test_branches_never_loosen_and_end_at_the_sign_patterns():
    # One hidden layer: with every unstable neuron split, the bound is the largest
    # norm over all sign patterns of the unstable neurons.
    model, box = network(12, (3, 5, 2)), Box.linf(jnp.zeros(3), 1.0)
    (w1, w2), (b1, _) = model
    z, reach = w1 @ box.centre + b1, jnp.abs(w1) @ box.radius
    patterns = np.stack(np.meshgrid(*[[0.0, 1.0]] * 5), -1).reshape(-1, 5)
    fixed = np.where(z - reach > 0, 1.0, np.where(z + reach < 0, 0.0, np.nan))
    fits = np.all(np.isnan(fixed)[None] | (patterns == fixed[None]), 1)
    jac = np.einsum("ij,pj,jk->pik", w2, patterns[fits], w1)
    largest = np.abs(jac).sum(2).max()
    last = np.inf
    for count in (2, 8, 300):
        rule = BaB(batch=4, max_domains=count)
        found = local_lipschitz(model, box, bab=rule, samples=0)
        assert float(found.bound) <= last * (1 + ROUNDING)
        last = float(found.bound)
    attained = local_lipschitz(model, box, bab=rule, samples=0).attained
    assert max(largest, float(attained)) * (1 - ROUNDING) <= last
    np.testing.assert_allclose(last, largest, rtol=1e-9)


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.gelu])
def test_smooth_bounds_are_sound_and_the_linear_ones_tighter(activation):
    def both(seed):
        model, box = network(seed, (3, 4, 2)), random_box(seed)
        call = lambda x: apply(model, x, activation)  # noqa: E731
        linear, interval = (
            local_lipschitz(call, box, forward="crown", smooth=s, samples=64)
            for s in ("linear", "interval")
        )
        return linear, interval

    both = eqx.filter_jit(both)
    tighter = 0
    for seed in range(12):
        linear, interval = both(seed)
        assert linear.attained <= linear.bound * (1 + ROUNDING)
        assert linear.bound <= interval.bound * (1 + ROUNDING)
        tighter += int(linear.bound < 0.999 * interval.bound)
    assert tighter > 0


def test_derivatives_in_the_weights_are_those_of_differences():
    model, box = network(21), random_box(21)

    @jax.jit
    def bound(model):
        return local_lipschitz(model, box, forward="crown", samples=0).bound

    slope = jax.grad(bound)(model)
    direction = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(5), a.shape), model
    )
    step = 1e-6

    def moved(sign):
        return jax.tree.map(lambda a, d: a + sign * step * d, model, direction)

    ahead, behind = bound(moved(1.0)), bound(moved(-1.0))
    dot = sum(
        jax.tree.leaves(jax.tree.map(lambda a, d: jnp.sum(a * d), slope, direction))
    )
    # Central differences: third derivatives times step^2, and rounding over step.
    np.testing.assert_allclose(dot, (ahead - behind) / (2 * step), rtol=1e-5)


def test_boxes_map_over_lanes_and_values_compile_nothing():
    model = network(2)
    traces = []

    @jax.jit
    def run(lower, upper):
        traces.append(1)
        box = Box(lower, upper)
        return local_lipschitz(model, box, forward="crown", samples=0).bound

    boxes = [random_box(seed) for seed in range(3)]
    each = jnp.stack([run(b.lower, b.upper) for b in boxes])
    lanes = jax.vmap(run)(
        jnp.stack([b.lower for b in boxes]), jnp.stack([b.upper for b in boxes])
    )
    np.testing.assert_allclose(lanes, each, rtol=1e-12)
    assert len(traces) <= 2  # once alone, at most once more for the lanes
    crossed = run(boxes[0].upper, boxes[0].lower)
    assert bool(jnp.isnan(crossed))
    assert bool(jnp.isnan(run(boxes[0].lower, jnp.full(3, jnp.inf))))


def test_a_convolutional_residual_network_is_covered():
    keys = jax.random.split(jax.random.key(3), 3)
    conv = eqx.nn.Conv2d(1, 1, 3, padding=1, key=keys[0])
    pool, out = eqx.nn.MaxPool2d(2, 2), eqx.nn.Linear(4, 2, key=keys[2])

    def model(x):
        return out(pool(x + conv(jax.nn.relu(conv(x)))).ravel())

    x = jax.random.normal(keys[1], (1, 4, 4))
    box = Box.linf(x, 0.1)
    found = local_lipschitz(model, box, forward="crown", samples=64)
    assert found.jac_lower.shape == (2, 1, 4, 4)
    points = x[None] + 0.1 * jax.random.uniform(
        keys[0], (100, *x.shape), minval=-1.0, maxval=1.0
    )
    jac = jax.vmap(jax.jacrev(model))(points)
    slack = 1e-13  # the Jacobians at the points are rounded themselves
    assert bool(jnp.all(found.jac_lower[None] <= jac + slack))
    assert bool(jnp.all(jac <= found.jac_upper[None] + slack))
    assert found.attained <= found.bound
    crude = local_lipschitz(model, box, method="ibp", forward="crown", samples=0)
    assert found.bound <= crude.bound * (1 + ROUNDING)


def test_spectral_bound_covers_the_spectral_norm():
    model, box = network(4), random_box(4)
    found = local_lipschitz(model, box, norm="l2", forward="crown", samples=64)
    assert found.attained <= found.bound
    entries = jnp.maximum(jnp.abs(found.jac_lower), jnp.abs(found.jac_upper))
    assert found.bound <= jnp.sqrt(jnp.sum(entries**2)) * (1 + ROUNDING)


def test_rows_combine_outputs():
    model, box = network(6), random_box(6)
    difference = jnp.array([[1.0, -1.0]])
    found = local_lipschitz(model, box, rows=difference, forward="crown", samples=0)
    truth = exact_lipschitz(model, box, rows=difference)
    each = local_lipschitz(model, box, forward="crown", samples=0)
    assert truth.value <= float(found.bound) * (1 + ROUNDING)
    assert float(found.bound) <= float(jnp.sum(each.per_row)) * (1 + ROUNDING)


def test_directional_bounds_keep_cancellation():
    model, box = network(7), random_box(7)
    v = jnp.array([1.0, -1.0, 0.5])
    found = jvp_bounds(model, box, v, forward="crown")
    entries = jacobian_bounds(model, box, forward="crown")
    crude = jnp.sum(jnp.maximum(entries.lower * v[None], entries.upper * v[None]), 1)
    assert bool(jnp.all(found.upper <= crude * (1 + ROUNDING) + ROUNDING))
    x = (
        box.lower[None]
        + jax.random.uniform(jax.random.key(1), (200, 3))
        * (box.upper - box.lower)[None]
    )
    along = jax.vmap(lambda x: jax.jvp(lambda x: apply(model, x), (x,), (v,))[1])(x)
    assert bool(jnp.all((found.lower[None] <= along) & (along <= found.upper[None])))


def test_monotone_features_are_proved_and_others_are_not():
    w = jnp.array([[1.0, -2.0], [0.5, 1.0], [2.0, -0.1]])
    model = ([w, jnp.array([[1.0, -0.2, 1.0]])], [jnp.zeros(3), jnp.zeros(1)])
    box = Box.linf(jnp.zeros(2), 1.0)
    assert int(monotone(model, box, 1).direction[0]) == -1
    first = monotone(model, box, 0)
    assert int(first.direction[0]) == 0 and float(first.certificate.value) < 0
    rising = ([jnp.abs(w), jnp.ones((1, 3))], [jnp.zeros(3), jnp.zeros(1)])
    assert int(monotone(rising, box, 0).direction[0]) == 1


def test_no_point_of_a_certified_ball_changes_class():
    model = network(13)
    x = random_box(13).centre
    label = int(jnp.argmax(apply(model, x)))
    found = certified_radius(model, x, label, 1.0)
    assert found.proof and float(found.value) > 0
    points = x[None] + found.value * jax.random.uniform(
        jax.random.key(2), (2000, 3), minval=-1.0, maxval=1.0
    )
    labels = jnp.argmax(jax.vmap(lambda x: apply(model, x))(points), 1)
    assert bool(jnp.all(labels == label))
    assert float(certified_radius(model, x, 1 - label, 1.0).value) == 0
    both = jax.vmap(lambda y: certified_radius(model, x, y, 1.0).value)
    np.testing.assert_allclose(
        both(jnp.array([label, 1 - label, 7])), [found.value, 0, np.nan], rtol=1e-12
    )


def test_a_tie_hidden_by_rounding_is_no_lead():
    """One tenth three times is more than three tenths in float64, not in truth."""

    def model(x):
        return jnp.stack([x[0] + x[0] + x[0], jnp.asarray(0.3, x.dtype)])

    x = jnp.array([0.1])
    assert model(x)[0] > model(x)[1]
    assert float(certified_radius(model, x, 0, 1.0).value) == 0


def test_the_oracle_counts_cells_and_stops_at_its_budget():
    def model(x):
        return jnp.maximum(x[:1], 0) + 2 * jnp.maximum(-x[1:], 0)

    box = Box.linf(jnp.zeros(2), 1.0)
    found = exact_lipschitz(model, box)
    assert (found.value, found.cells, found.complete) == (3.0, 4, True)
    cut = exact_lipschitz(network(0), Box.linf(jnp.zeros(3), 3.0), max_programs=3)
    assert not cut.complete
    with pytest.raises(ValueError, match="piecewise linear"):
        exact_lipschitz(jnp.tanh, box)


def test_exact_values_where_the_output_is_an_activation():
    weight = jnp.array([[1.0, -2.0], [3.0, 0.5]])

    def model(x):
        return jax.nn.relu(weight @ x)

    box = Box.linf(jnp.zeros(2), 1.0)
    np.testing.assert_allclose(exact_lipschitz(model, box).per_row, [3.0, 3.5])
    reached = exact_bounds(model, box)
    np.testing.assert_allclose(reached.lower, [0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(reached.upper, [3.0, 3.5], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_cancels_is_rounded_outward(dtype):
    """Two large neurons that nearly undo each other: what is left is below rounding."""
    first = jnp.array([[3.0, 1.0], [3.0, 1.0 + 2.0**-20]], dtype)
    last = 1000.0 * jnp.array([[1.0, -1.0 - 2.0**-20]], dtype)
    bias = jnp.full(2, 7.3, dtype)
    model = ([first, last], [bias, jnp.zeros(1, dtype)])
    box = Box.linf(jnp.full(2, 0.1, dtype), 0.01)
    exact = np.asarray(last, float) @ np.asarray(first, float)
    found = jacobian_bounds(model, box)
    assert np.all(np.asarray(found.lower, float) <= exact)
    assert np.all(exact <= np.asarray(found.upper, float))
    out = bounds(model, box)
    sides = (np.asarray(side, float) for side in (box.lower, box.upper))
    for corner in itertools.product(*zip(*sides, strict=True)):
        hidden = np.asarray(first, float) @ corner + np.asarray(bias, float)
        value = np.asarray(last, float) @ hidden
        assert np.asarray(out.lower, float) <= value <= np.asarray(out.upper, float)


@pytest.mark.parametrize("dtype, size", [("float32", 1e-25), ("float64", 1e-170)])
def test_small_numbers_do_not_vanish(dtype, size):
    """Products of two of them would underflow: chords and offsets avoid them."""
    size = jnp.asarray(size, dtype)
    box = Box(jnp.full(2, -1, dtype), jnp.ones(2, dtype))
    out = bounds(lambda x: jax.nn.relu(x * size) / size, box)
    assert bool(jnp.all(out.upper >= 1)) and bool(jnp.all(out.lower <= 0))
    found = local_lipschitz(lambda x: size * jnp.abs(x[:1] + x[1:]), box)
    assert float(found.attained) == pytest.approx(2 * float(size), rel=1e-5)
    assert found.bound >= found.attained
    entries = jacobian_bounds(lambda x: size * jnp.abs(jax.nn.relu(x) - 0.5), box)
    assert float(entries.upper[0, 0]) >= float(size)


def test_entries_gathered_from_outside_are_constants():
    def model(x):
        return jax.nn.relu(x).at[jnp.array([0, 5])].get(mode="fill", fill_value=7.0)

    box = Box.linf(jnp.zeros(2), 1.0)
    for method in ("ibp", "crown"):
        out = bounds(model, box, method=method)
        np.testing.assert_allclose(out.lower, [0.0, 7.0], atol=1e-12)
        np.testing.assert_allclose(out.upper, [1.0, 7.0], atol=1e-12)
    moved = local_lipschitz(lambda x: jnp.abs(model(x)[1:] - 7.0 + x[:1]), box)
    assert float(moved.bound) == pytest.approx(1.0)


def test_what_the_output_does_not_need_is_not_read():
    box = Box.linf(jnp.zeros(2), 1.0)
    out = bounds(lambda x: (jnp.argmax(x), jax.nn.relu(x))[1], box)
    np.testing.assert_allclose(out.upper, 1.0)


def test_a_radius_about_a_point_outside_of_the_data_is_no_proof():
    """The bound would be of a box that the point is not in."""

    def model(x):
        return jnp.stack([jax.nn.relu(75 * (x[0] - 1.05)) - 1, 0 * x[0]])

    certify = jax.jit(
        lambda x: certified_radius(model, x, 0, 1.0, clip=(0.0, 1.0)).value
    )
    assert jnp.isnan(certify(jnp.array([1.2])))


def test_nothing_is_attained_on_a_kink():
    """AD's choice there is no derivative of this function, which is zero."""

    def zero(x):
        return x - jax.nn.relu(x) + jax.nn.relu(-x)

    for box, samples in (
        (Box.linf(jnp.zeros(1), 1.0), 0),
        (Box.linf(jnp.zeros(1), 0.0), 8),
    ):
        assert float(local_lipschitz(zero, box, samples=samples).attained) == 0.0
    # Ties that no input moves do not count: both sides of a maximum are constant.
    flat = local_lipschitz(
        lambda x: x + jnp.maximum(jax.nn.relu(x - 9), jax.nn.relu(x - 8)),
        Box.linf(jnp.ones(1), 0.1),
    )
    assert float(flat.attained) == 1.0


BOX = Box.linf(jnp.zeros(3), 0.1)


def broken(model):
    """A network with a weight that is NaN."""
    weights, biases = model
    return [weights[0].at[0, 0].set(jnp.nan), *weights[1:]], biases


INFINITE = Box(jnp.zeros(3), jnp.full(3, jnp.inf))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: local_lipschitz(m, BOX, norm="l1"), "`norm` must be one of"),
        (lambda m: local_lipschitz(m, BOX, method="best"), "`method` must be one of"),
        (lambda m: local_lipschitz(m, BOX, forward="best"), "`forward`"),
        (lambda m: local_lipschitz(m, BOX, smooth="best"), "`smooth`"),
        (lambda m: local_lipschitz(m, BOX, norm="l2", method="naive"), "neither"),
        (lambda m: local_lipschitz(m, BOX, method="ibp", bab=BaB()), "needs method"),
        (lambda m: local_lipschitz(m, BOX, samples=-1), "`samples`"),
        (lambda m: local_lipschitz(m, BOX, rows="all"), "`rows` must be one of"),
        (lambda m: jacobian_bounds(m, BOX, rows=jnp.ones((1, 5))), "column for every"),
        (lambda m: jacobian_bounds(m, BOX, rows=jnp.ones(2)), "`rows` must have shape"),
        (lambda m: jacobian_bounds(m, BOX, method="naive"), "`method`"),
        (lambda m: bounds(m, BOX, method="best"), "`method`"),
        (lambda m: bounds(m, INFINITE), "must be finite"),
        (lambda m: jvp_bounds(m, BOX, jnp.ones(2)), "`direction` must have shape"),
        (lambda m: jvp_bounds(m, BOX, jnp.full(3, jnp.nan)), "`direction`"),
        (lambda m: monotone(m, BOX, 3), "`feature` must index"),
        (lambda m: certified_radius(m, jnp.zeros(3), 2, 1.0), "`label`"),
        (lambda m: certified_radius(m, jnp.zeros(3), 0, -1.0), "`epsilon_max`"),
        (lambda m: certified_radius(m, jnp.full(3, jnp.nan), 0, 1.0), "`x`"),
        (lambda m: certified_radius(m, jnp.zeros(3), 0.0, 1.0), "`label`"),
        (lambda m: certified_radius(m, jnp.zeros(3), 0, 1.0, halvings=0), "`halvings`"),
        (lambda m: certified_radius(m, jnp.ones(3), 0, 1.0, clip=(0, 0.5)), "`clip`"),
        (lambda m: exact_lipschitz(m, INFINITE), "must be finite"),
        (lambda m: bounds(broken(m), BOX), "is NaN"),
        (lambda m: local_lipschitz(broken(m), BOX), "is NaN"),
        (lambda m: jacobian_bounds(broken(m), BOX), "is NaN"),
        (lambda m: monotone(broken(m), BOX, 0), "is NaN"),
        (lambda m: certified_radius(broken(m), jnp.zeros(3), 0, 1.0), "is NaN"),
        (lambda m: local_lipschitz(m, Box([], [])), "must not be empty"),
        (lambda m: BaB(time=0.0), "`time` must be positive"),
        (lambda m: BaB(heuristic="best"), "`heuristic`"),
    ],
)
def test_bad_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call(network(0))
