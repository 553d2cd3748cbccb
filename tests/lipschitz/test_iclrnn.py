"""Input convex Lipschitz recurrent networks: invariants, bounds, refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.lipschitz import ICLRNN, nonnegative_spectral

TIME, INPUTS = 5, 2


def make(seed=0, **settings):
    return compiled_make(jnp.asarray(seed), settings)


@eqx.filter_jit
def compiled_make(seed, settings):
    net = ICLRNN(INPUTS, 2, hidden=6, key=jax.random.key(seed), **settings)
    # Biases that put the kinks among the inputs.
    biases = jax.random.normal(jax.random.key(seed), (2, 6))
    where = lambda n: (*n.biases, n.readout_bias)  # noqa: E731
    return eqx.tree_at(where, net, (*biases, jnp.ones(2)))


@eqx.filter_jit
def project(net):
    return net.project()


def disturb(net, seed):
    """The network with noise on all weights."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + draw.normal(size=leaf.shape), net)


def weights(net):
    return (*net.kernels, *net.recurrents, net.readout)


def norm(matrix):
    return np.linalg.norm(np.asarray(matrix), 2)


@pytest.fixture(scope="module")
def net():
    return make()


@pytest.fixture(scope="module")
def batched():
    return eqx.filter_jit(lambda net, x: jax.vmap(net)(x))


@pytest.fixture(scope="module")
def pairs():
    return 3 * jax.random.normal(jax.random.key(7), (2, 10_000, TIME, INPUTS))


class TestInvariants:
    def test_outputs_are_convex(self, net, batched, pairs):
        """The middle of ten thousand pairs; and not because they are linear."""
        x, y = pairs
        gap = (batched(net, x) + batched(net, y)) / 2 - batched(net, (x + y) / 2)
        assert jnp.min(gap) >= -1e-12 and jnp.max(gap) > 0.1

    def test_free_signs_are_not_convex(self, batched, pairs):
        x, y = pairs
        free = make(convex=False)
        gap = (batched(free, x) + batched(free, y)) / 2 - batched(free, (x + y) / 2)
        assert jnp.min(gap) < -0.01

    def test_outputs_increase_with_the_expanded_input(self, net):
        x = jax.random.normal(jax.random.key(1), (500, TIME, 2 * INPUTS))
        more = x + jax.random.uniform(jax.random.key(2), x.shape)
        expanded = jax.jit(jax.vmap(net.expanded))
        assert jnp.all(expanded(more) >= expanded(x))

    def test_it_can_fall_in_its_input(self, net, batched, pairs):
        x = pairs[0]
        moved = batched(net, x + 0.1) - batched(net, x)
        assert jnp.min(moved) < 0 < jnp.max(moved)

    def test_weights_from_the_start(self, net):
        for matrix in weights(net):
            assert jnp.all(matrix >= 0)
            assert 0.98 < norm(matrix) <= 1

    def test_projection_is_idempotent_and_in_the_right_order(self, net):
        moved = disturb(net, 3)
        once = project(moved)
        again = project(once)
        for new, old, twice in zip(
            weights(once), weights(moved), weights(again), strict=True
        ):
            clipped = np.maximum(old, 0)
            assert 0.98 < norm(new) <= 1
            np.testing.assert_allclose(new, clipped * (norm(new) / norm(clipped)))
            np.testing.assert_allclose(new, twice, rtol=1e-12)
        np.testing.assert_array_equal(once.biases[0], moved.biases[0])

    def test_halves_keep_one_invariant_each(self):
        convex = project(disturb(make(lipschitz=False), 4))
        bounded = project(disturb(make(convex=False), 4))
        for matrix in weights(convex):
            assert jnp.all(matrix >= 0) and norm(matrix) > 1
        for matrix in weights(bounded):
            assert jnp.any(matrix < 0) and 0.9 < norm(matrix) <= 1


class TestCertificate:
    def test_never_below_the_jacobian(self):
        """At random points the norms of the whole Jacobian and of the last output's."""

        @eqx.filter_jit
        def jacobians(net, x):
            jacobian = jax.vmap(jax.jacobian(net))(x)
            columns = jacobian.reshape(len(x), TIME, 2, TIME * INPUTS)
            whole = columns.reshape(len(x), TIME * 2, TIME * INPUTS)
            last = columns[:, -1]
            return whole, last

        x = 3 * jax.random.normal(jax.random.key(5), (100, TIME, INPUTS))
        shares = []
        for settings in ({}, {"convex": False}):
            for seed in range(8):
                net = make(jnp.asarray(seed), **settings)
                every, last = (
                    np.linalg.norm(j, 2, axis=(1, 2)).max() for j in jacobians(net, x)
                )
                certificate = net.certify(TIME)
                assert every <= certificate.value
                assert last <= certificate.details["last"]
                assert certificate.proof
                shares.append(every / certificate.value)
        assert max(shares) > 0.1  # it is no empty promise either

    def test_one_layer_of_unit_norms(self):
        """The triangle of ones has norm 1 / (2 sin(pi / (4 T + 2))), its last row
        sqrt(T)."""
        net = ICLRNN(1, 1, hidden=1, layers=1, convex=False, key=jax.random.key(0))
        ones = jax.tree.map(jnp.ones_like, net)
        certificate = ones.certify(TIME)
        triangle = 1 / (2 * np.sin(np.pi / (4 * TIME + 2)))
        np.testing.assert_allclose(certificate.value, triangle, rtol=1e-12)
        np.testing.assert_allclose(
            certificate.details["last"], np.sqrt(TIME), rtol=1e-12
        )
        assert certificate.value < TIME

    def test_specification_s_constants_are_never_exceeded(self, net):
        """Two layers: at most T each, and sqrt(2) for reading both signs."""
        certificate = net.certify(TIME)
        assert certificate.value <= np.sqrt(2) * TIME**2 * (1 + 1e-12)
        assert "convex" in certificate.statement
        assert "convex" not in make(convex=False).certify(TIME).statement

    def test_a_single_step_is_one_product(self):
        net = make(convex=False)
        product = norm(net.readout) * norm(net.kernels[0]) * norm(net.kernels[1])
        np.testing.assert_allclose(net.certify(1).value, product, rtol=1e-10)

    def test_unbounded_weights_are_infinite_not_wrong(self):
        net = make(lipschitz=False)
        huge = eqx.tree_at(lambda n: n.recurrents[0], net, 1e200 * net.recurrents[1])
        assert np.isinf(huge.certify(TIME).value)

    def test_float32_rounds_up(self, net, float32):
        single = jax.tree.map(lambda w: w.astype(jnp.float32), net)
        certificate = single.certify(TIME)
        assert certificate.value.dtype == jnp.float32
        constant = 2 * np.sqrt(2) * TIME**2
        assert 0 < certificate.value < constant


def test_training_keeps_the_invariants(net):
    """By the optax transformation; the loss falls."""
    x = jax.random.normal(jax.random.key(8), (16, TIME, INPUTS))
    targets = jnp.abs(jnp.cumsum(x, 1))
    chain = optax.chain(optax.adam(0.01), nonnegative_spectral())

    def loss(net):
        return jnp.mean((jax.vmap(net)(x) - targets) ** 2)

    @jax.jit
    def train(net):
        def one(carry, _):
            net, state = carry
            value, slope = jax.value_and_grad(loss)(net)
            change, state = chain.update(slope, state, net)
            return (optax.apply_updates(net, change), state), value

        return jax.lax.scan(one, (net, chain.init(net)), length=40)

    with jax.numpy_dtype_promotion("standard"):
        (trained, _), losses = train(net)
    assert losses[-1] < 0.8 * losses[0]
    for matrix in weights(trained):
        # `old + (new - old)` rounds, but never below zero.
        assert jnp.all(matrix >= 0) and norm(matrix) <= 1 + 1e-12
    assert trained.certify(TIME).value < np.sqrt(2) * TIME**2


def test_zero_matrices_stay_and_other_norms_are_met():
    last = nonnegative_spectral(0.5)
    tree = [jnp.zeros((2, 3)), 4 * jnp.eye(2), jnp.full(3, -1.0)]
    still = jax.tree.map(jnp.zeros_like, tree)
    change, _ = jax.jit(last.update)(still, last.init(tree), tree)
    zero, half, vector = (t + c for t, c in zip(tree, change, strict=True))
    assert not np.any(zero)
    np.testing.assert_allclose(half, 0.5 * jnp.eye(2), rtol=1e-10)
    np.testing.assert_array_equal(vector, tree[2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda n: make(activation="tanh"),
            ValueError,
            "`activation` must be convex and nondecreasing.*got 'tanh'",
        ),
        (
            lambda n: ICLRNN(0, 1, key=jax.random.key(0)),
            ValueError,
            "must be at least 1",
        ),
        (lambda n: n.certify(0), ValueError, "`horizon` must be at least 1"),
        (
            lambda n: eqx.tree_at(lambda m: m.readout, n, -n.readout).certify(3),
            ValueError,
            "must not be negative .*Call `project`",
        ),
        (
            lambda n: eqx.tree_at(lambda m: m.readout, n, jnp.nan * n.readout).certify(
                3
            ),
            ValueError,
            "`weights` must be finite",
        ),
        (
            lambda n: jax.jit(lambda m: m.certify(3).value)(n),
            TypeError,
            "outside `jit`",
        ),
        (lambda n: nonnegative_spectral(0.0), ValueError, "`norm` must be positive"),
    ],
)
def test_bad_input_is_named(net, call, error, message):
    with pytest.raises(error, match=message):
        call(net)
