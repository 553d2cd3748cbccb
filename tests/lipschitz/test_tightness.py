"""Propagation tightness and exact ranges: closed forms, invariants, brute force."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from varan.lipschitz import (
    Box,
    exact_bounds,
    expected_tightness,
    local_lipschitz,
    propagation_tightness,
)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def linear(*weights):
    def net(x):
        for weight in weights:
            x = weight @ x
        return x

    return net


@pytest.fixture(scope="module")
def net():
    return eqx.nn.MLP(3, 4, 6, 2, key=jax.random.key(0))


X = jnp.array([0.3, -0.2, 0.5])


class TestLinear:
    def test_closed_form(self):
        """|W3 W2 W1| eps over |W3| |W2| |W1| eps, the clipped radius entry by entry."""
        weights = [normal(k, 5, n) for k, n in enumerate((3, 5, 5))]
        found = propagation_tightness(
            linear(*weights), X, 0.4, mode="dln", clip=(-0.5, 0.6)
        )
        box = Box.linf(X, 0.4, clip=(-0.5, 0.6))
        product = jnp.abs(weights[2] @ weights[1] @ weights[0]) @ box.radius
        layers = jnp.abs(weights[2]) @ (
            jnp.abs(weights[1]) @ (jnp.abs(weights[0]) @ box.radius)
        )
        np.testing.assert_allclose(found, product / layers, rtol=1e-12)

    def test_rows_are_merged_into_the_last_layer(self):
        first, last, rows = normal(0, 5, 3), normal(1, 4, 5), normal(2, 2, 4)
        found = propagation_tightness(linear(first, last), X, 0.1, rows=rows)
        merged = propagation_tightness(linear(first, rows @ last), X, 0.1)
        np.testing.assert_allclose(found, merged, rtol=1e-12)

    def test_one_layer_is_tight(self):
        np.testing.assert_allclose(
            propagation_tightness(linear(normal(0, 4, 3)), X, 0.1), 1.0, rtol=1e-12
        )

    def test_paths_of_one_sign_are_tight(self):
        weights = [jnp.abs(normal(k, 3, 3)) for k in range(3)]
        flip = [jnp.diag(jnp.sign(normal(9 + k, 3))) for k in range(2)]
        tight = propagation_tightness(linear(*weights), X, 0.1)
        np.testing.assert_allclose(tight, 1.0, rtol=1e-12)
        turned = linear(
            flip[0] @ weights[0], flip[1] @ weights[1] @ flip[0], weights[2] @ flip[1]
        )
        np.testing.assert_allclose(
            propagation_tightness(turned, X, 0.1), 1.0, rtol=1e-12
        )

    def test_random_networks_follow_the_law(self):
        widths = (40, 40, 40, 40)

        @jax.jit
        @jax.vmap
        def one(key):
            weights = [jax.random.normal(k, (40, 40)) for k in jax.random.split(key, 3)]
            return propagation_tightness(linear(*weights), jnp.zeros(40), 1.0)

        ratios = one(jax.random.split(jax.random.key(0), 40))
        assert abs(jnp.mean(ratios) / expected_tightness(widths) - 1) < 0.05

    def test_output_that_does_not_move(self):
        assert propagation_tightness(linear(jnp.zeros((1, 3))), X, 0.1)[0] == 1


class TestNetwork:
    def test_between_zero_and_one(self, net):
        for mode in ("dln", "local", "true"):
            found = propagation_tightness(net, X, 0.3, mode=mode)
            assert np.all((found > 0) & (found <= 1 + 1e-6))

    def test_small_ball_is_the_pattern_s(self, net):
        """Inside one linear region local and true tightness are the same."""
        exact = propagation_tightness(net, X, 1e-4, mode="true")
        local = propagation_tightness(net, X, 1e-4, mode="local")
        np.testing.assert_allclose(exact, local, rtol=1e-3)

    def test_epsilon_does_not_matter_but_for_true(self, net):
        small, large = (propagation_tightness(net, X, e) for e in (0.01, 1.0))
        np.testing.assert_allclose(small, large, rtol=1e-9)

    def test_derivative_in_the_weights(self, net):
        def total(bias):
            moved = eqx.tree_at(lambda m: m.layers[1].weight, net, bias)
            return jnp.sum(propagation_tightness(moved, X, 0.1))

        weight = net.layers[1].weight
        ahead = 1e-6 * normal(3, *weight.shape)
        slope = jnp.sum(jax.grad(total)(weight) * ahead)
        difference = (total(weight + ahead) - total(weight - ahead)) / 2
        np.testing.assert_allclose(slope, difference, rtol=1e-4)


class TestExactBounds:
    def test_contains_and_touches_samples(self, net):
        box = Box.linf(X, 0.5)
        found = exact_bounds(net, box)
        share = jax.random.uniform(jax.random.key(1), (20_000, 3))
        points = box.lower[None] + (box.upper - box.lower)[None] * share
        # The extremes of a piecewise-linear function are approached, corners first.
        sides = [jnp.array(s) for s in zip(box.lower, box.upper, strict=True)]
        corners = jnp.stack(jnp.meshgrid(*sides), -1).reshape(-1, 3)
        values = jax.jit(jax.vmap(net))(jnp.concatenate([points, corners]))
        low, high = jnp.min(values, 0), jnp.max(values, 0)
        assert np.all(found.lower <= low + 1e-7) and np.all(found.upper >= high - 1e-7)
        width = found.upper - found.lower
        assert np.all(low - found.lower < 0.1 * width)
        assert np.all(found.upper - high < 0.1 * width)

    def test_leaky_absolute_and_residual(self):
        weight = normal(4, 3, 3)
        net = lambda x: x + jnp.abs(jax.nn.leaky_relu(weight @ x, 0.2)) @ weight  # noqa: E731
        box = Box.linf(X, 0.5)
        found = exact_bounds(net, box, rows=jnp.ones((1, 3)))
        share = jax.random.uniform(jax.random.key(1), (5000, 3))
        points = box.lower[None] + (box.upper - box.lower)[None] * share
        values = jnp.sum(jax.vmap(net)(points), 1)
        assert found.lower[0] <= values.min() and found.upper[0] >= values.max()
        assert found.upper[0] - values.max() < 0.3 * (values.max() - values.min())

    def test_never_wider_than_propagated_bounds(self, net):
        box = Box.linf(X, 0.5)
        exact, lipschitz = exact_bounds(net, box), local_lipschitz(net, box, samples=0)
        reach = jnp.max(exact.upper - exact.lower)
        assert reach <= lipschitz.bound * 2 * 0.5 * (1 + 1e-6)

    def test_what_is_not_solved_is_infinite(self, monkeypatch):
        """Out of time, or an error that remains without presolving."""
        solve, asked, statuses = scipy.optimize.milp, [], {True: 4, False: 0}

        def failing(*args, options, **rest):
            asked.append(options["presolve"])
            found = solve(*args, options=options, **rest)
            found.status = statuses[options["presolve"]]
            return found

        net, box = lambda x: jax.nn.relu(x) @ jnp.ones(3), Box.linf(X, 0.5)
        exact = exact_bounds(net, box)
        monkeypatch.setattr(scipy.optimize, "milp", failing)
        np.testing.assert_allclose(exact_bounds(net, box).upper, exact.upper)
        assert asked == [True, False] * 2
        for changed in ({False: 4}, {True: 1, False: 0}):
            statuses.update(changed)
            found = exact_bounds(net, box)
            assert np.all(np.isneginf(found.lower)) and np.all(np.isposinf(found.upper))
        assert np.all(np.isnan(propagation_tightness(net, X, 0.5, mode="true")))

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize(
        "hidden, low, high",
        [
            (lambda x: jax.nn.relu(x * 1e-8) * 1e8, 0.0, 1.0),
            (lambda x: jax.nn.relu(jax.nn.relu(x * 1e8) - 5e7) * 1e-8, 0.0, 0.5),
            (lambda x: jnp.abs(jax.nn.relu(x * 1e-12) * 1e24) * -1e-12, -1.0, 0.0),
            (lambda x: jax.nn.leaky_relu(x * 1e-9, 0.5) * 1e9, -0.5, 1.0),
        ],
    )
    def test_scales_inside_do_not_matter(self, hidden, low, high, dtype):
        found = exact_bounds(hidden, Box(-jnp.ones(1, dtype), jnp.ones(1, dtype)))
        np.testing.assert_allclose(found.lower, low, atol=2e-6)
        np.testing.assert_allclose(found.upper, high, atol=2e-6)

    def test_units_of_inputs_and_neurons_do_not_matter(self, net):
        box, units = Box.linf(X, 0.5), jnp.array([1e9, 1.0, 1e-9])
        weights, biases = (
            [getattr(layer, name) for layer in net.layers]
            for name in ("weight", "bias")
        )
        scales = (1e-9, 1e12, 1.0)

        def moved(x):
            x, before = x / units, 1.0
            for w, b, scale in zip(weights, biases, scales, strict=True):
                x = (w @ x) * (scale / before) + b * scale
                x = x if scale == 1 else jax.nn.relu(x)
                before = scale
            return x

        one = exact_bounds(net, box)
        other = exact_bounds(moved, Box(box.lower * units, box.upper * units))
        np.testing.assert_allclose(one.lower, other.lower, atol=2e-6)
        np.testing.assert_allclose(one.upper, other.upper, atol=2e-6)

    def test_narrow_ranges_far_from_zero(self):
        """Neurons of fixed sign and large values, whose difference is small."""

        def far(x):
            large = jax.nn.relu(x + 1e7)
            return jax.nn.relu(large - 1e7) - 2 * jax.nn.relu(1e7 - large)

        found = exact_bounds(far, Box(-jnp.ones(1), jnp.ones(1)))
        np.testing.assert_allclose(found.lower, -2, atol=1e-5)
        np.testing.assert_allclose(found.upper, 1, atol=1e-5)

    def test_smooth_activation_is_refused(self):
        with pytest.raises(ValueError, match="convex and piecewise linear"):
            exact_bounds(jnp.tanh, Box.linf(X, 0.1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"epsilon": 0.0}, "`epsilon` must be positive"),
        ({"x": X.at[0].set(jnp.nan)}, "`x` must be finite"),
        ({"mode": "exact"}, "`mode` must be one of"),
        ({"rows": jnp.ones((2, 9))}, "one column for every output"),
    ],
)
def test_bad_input(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        propagation_tightness(**{"model": net, "x": X, "epsilon": 0.1, **arguments})


def test_bad_widths():
    with pytest.raises(ValueError, match="at least two positive"):
        expected_tightness((3,))
