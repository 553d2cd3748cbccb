"""The transformer with a known constant: its bound against attained steepness."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.lipschitz import (
    LipschitzTransformer,
    lipschitz_bound,
    rms_cap,
    spectral_cap,
)

TIME, WIDTH, WORDS = 3, 8, 5


@jax.jit
def make(seed):
    return LipschitzTransformer(
        WORDS, blocks=2, heads=2, width=WIDTH, expansion=2, key=jax.random.key(seed)
    )


@pytest.fixture(scope="module")
def model():
    return make(0)


@pytest.fixture(scope="module")
def apply():
    """Logits of four sequences."""
    return jax.jit(lambda model, tokens: jax.vmap(model)(tokens))


def rms(x):
    return jnp.sqrt(jnp.mean(x**2, -1))


def rough(seed):
    """A model whose matrices are random, of random sizes, and a radius."""
    draw = np.random.default_rng(seed)
    model = jax.tree.map(
        lambda leaf: jnp.asarray(
            np.exp(draw.uniform(-2, 1))
            * draw.normal(size=leaf.shape)
            / leaf.shape[-1] ** 0.5
        ),
        make(0),
    )
    return model, float(np.exp(draw.uniform(-1, 1)))


@jax.jit
def steepest(model, radius, key):
    """The largest attained steepness at a point on the sphere of that radius.

    For an output direction u the best step of each token is along `J' u`; a few rounds
    of that, from every output token.
    """
    x = jax.random.normal(key, (TIME, WIDTH))
    x = radius * x / rms(x)[:, None]
    jacobian = jax.jacobian(model.logits)(x)

    def at(rows):  # (words, time, width), of one output token
        def one(_, u):
            steps = jnp.einsum("v,vtw->tw", u, rows)
            steps = steps / jnp.maximum(rms(steps), 1e-300)[:, None]
            return jnp.einsum("vtw,tw->v", rows, steps)

        return rms(jax.lax.fori_loop(0, 20, one, jnp.ones(WORDS)))

    return jnp.max(jax.vmap(at)(jacobian))


class TestBound:
    def test_never_below_what_is_attained(self, model):
        """Random matrices and radii; at unit norms too, where it is not vacuous."""
        shares = []
        for seed in range(25):
            rand, radius = rough(seed)
            bound = float(lipschitz_bound(rand, radius=radius).value)
            found = float(steepest(rand, radius, jax.random.key(seed)))
            assert found <= bound * (1 + 1e-9), (seed, found, bound)
            shares.append(found / bound)
        assert max(shares) > 0.2
        found = steepest(model, 1.0, jax.random.key(0))
        assert 0.3 < found <= lipschitz_bound(model).value

    def test_distant_points_obey_it(self, model):
        pair = jax.random.normal(jax.random.key(1), (2, 40, TIME, WIDTH))
        pair = pair / rms(pair)[..., None]
        out = jax.jit(jax.vmap(jax.vmap(model.logits)))(pair)
        gap_out = jnp.max(rms(out[0] - out[1]), -1)
        gap_in = jnp.max(rms(pair[0] - pair[1]), -1)
        assert np.all(gap_out <= lipschitz_bound(model, radius=1.0).value * gap_in)

    def test_unit_norms_give_what_caps_promise(self, model):
        certificate = lipschitz_bound(model, radius=1.0)
        np.testing.assert_allclose(certificate.value, model.capped_bound(1.0))
        assert certificate.proof and certificate.value < 1
        # Tokens shrink: attention's output has a third of their size.
        assert certificate.details["last_radius"] < 1
        assert model.capped_bound(1.5) > 1.5 * model.capped_bound(1.0)

    def test_a_head_counts_by_its_own_matrix(self, model):
        """One head's values tripled: more than its share of the whole matrix's norm."""
        value = model.value.at[:, 0].multiply(3.0)
        tripled = eqx.tree_at(lambda m: m.value, model, value)
        bound = lipschitz_bound(tripled).value
        assert bound >= float(steepest(tripled, 1.0, jax.random.key(2)))
        assert lipschitz_bound(model).value < bound

    def test_a_bound_that_overflows_keeps_its_logarithm(self, model):
        parts = lambda m: (m.up, m.head)  # noqa: E731
        huge = eqx.tree_at(parts, model, (1e50 * model.up, 1e300 * model.head))
        certificate = lipschitz_bound(huge)
        assert np.isinf(certificate.value)
        # A quarter of the perceptrons' 1e50, twice, the tokens they enlarge in the
        # second block's scores, and the head's 1e300.
        assert 490 < certificate.details["log10"] < 500

    def test_float32_rounds_up(self, model, float32):
        single = jax.tree.map(lambda x: x.astype(jnp.float32), model)
        bound = lipschitz_bound(single, radius=1.0)
        assert bound.value.dtype == jnp.float32
        exact = np.float64(model.capped_bound(1.0))
        # The weights are rounded, so the two differ by some eps.
        assert abs(np.float64(bound.value) - exact) < 1e-5


class TestPerceptrons:
    def test_linear_maps_are_exact(self):
        keys = jax.random.split(jax.random.key(0), 2)
        one = eqx.nn.Linear(3, 4, key=keys[0])
        norm = np.linalg.norm(one.weight, 2) * np.sqrt(3 / 4)
        np.testing.assert_allclose(lipschitz_bound(one).value, norm, rtol=1e-10)
        chain = eqx.nn.Sequential([one, eqx.nn.Lambda(jnp.tanh)])
        np.testing.assert_allclose(lipschitz_bound(chain).value, norm, rtol=1e-10)
        zero = eqx.tree_at(lambda layer: layer.weight, one, jnp.zeros((4, 3)))
        assert lipschitz_bound(zero).value == 0

    @pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.gelu])
    def test_mlp_is_never_steeper(self, activation):
        net = eqx.filter_jit(eqx.nn.MLP)(
            3, 2, 6, 2, activation=activation, key=jax.random.key(1)
        )
        x = 2 * jax.random.normal(jax.random.key(2), (50, 3))
        slopes = np.linalg.norm(jax.jit(jax.vmap(jax.jacobian(net)))(x), 2, axis=(1, 2))
        bound = lipschitz_bound(net).value
        assert slopes.max() * np.sqrt(3 / 2) <= bound

    def test_gelu_s_slope(self):
        """JAX's default is the tanh form; its slope is below the table's."""
        x = jnp.linspace(-5, 5, 20_001)
        slopes = jax.jit(jax.vmap(jax.grad(jax.nn.gelu)))(x)
        assert 1.128 < jnp.max(slopes) < 1.13


def test_tokens_see_no_later_ones_and_places_matter(model, apply):
    tokens = jnp.array([[1, 2, 3], [1, 2, 4], [2, 1, 3]])
    one, other_end, swapped = apply(model, tokens)
    np.testing.assert_allclose(one[:2], other_end[:2])
    assert not np.allclose(one[2], other_end[2])
    # By rotation alone: the last token sees the same ones before it.
    assert not np.allclose(one[2], swapped[2])


def test_training_grows_the_bound_unless_it_is_capped(model):
    tokens = jax.random.randint(jax.random.key(0), (6, TIME + 1), 0, WORDS)

    def loss(model):
        logits = jax.vmap(model)(tokens[:, :-1])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(each)

    parts = jax.tree.map(lambda _: "matrix", model)
    parts = eqx.tree_at(lambda m: m.embedding, parts, "table")

    @jax.jit
    def train(w_max):
        adam = optax.adam(0.03)
        optimiser = optax.partition(
            {
                "matrix": optax.chain(adam, spectral_cap(w_max, "svd")),
                "table": optax.chain(adam, rms_cap(1.0)),
            },
            # A tree of labels that is callable would be called.
            lambda _: parts,
        )

        def one(carry, _):
            model, state = carry
            value, slope = jax.value_and_grad(loss)(model)
            change, state = optimiser.update(slope, state, model)
            return (optax.apply_updates(model, change), state), value

        (trained, _), losses = jax.lax.scan(
            one, (model, optimiser.init(model)), length=20
        )
        return trained, losses

    with jax.numpy_dtype_promotion("standard"):
        free, _ = train(1e6)
        kept, losses = train(1.2)
    assert losses[-1] < losses[0]
    limit = model.capped_bound(1.2)
    assert lipschitz_bound(kept).value <= limit * (1 + 1e-9)
    assert lipschitz_bound(free).value > 2 * limit


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: LipschitzTransformer(5, heads=2, width=6, key=jax.random.key(0)),
            ValueError,
            "`width` a multiple of twice `heads`",
        ),
        (
            lambda m: lipschitz_bound(eqx.nn.Sequential([eqx.nn.LayerNorm(3)])),
            TypeError,
            "got LayerNorm.*no finite Lipschitz constant at 0: leave it out",
        ),
        (lambda m: lipschitz_bound(jnp.tanh), TypeError, "must consist of linear"),
        (
            lambda m: lipschitz_bound(eqx.nn.Lambda(jnp.exp)),
            TypeError,
            "activations must be relu",
        ),
        (
            lambda m: lipschitz_bound(eqx.tree_at(lambda t: t.up, m, m.up * jnp.nan)),
            ValueError,
            "`model` must be finite",
        ),
        (
            lambda m: lipschitz_bound(m, radius=-1.0),
            ValueError,
            "`radius` must not be negative",
        ),
        (
            lambda m: lipschitz_bound(
                eqx.nn.Linear(2, 2, key=jax.random.key(0)), radius=1.0
            ),
            ValueError,
            "`radius` is for transformers only",
        ),
        (
            lambda m: jax.jit(lambda t: lipschitz_bound(t).value)(m),
            TypeError,
            "outside `jit`",
        ),
    ],
)
def test_bad_input_is_named(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)
