"""The quantising filter: its bits, its training, and the radius that is proved."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.lipschitz import LQVAE
from varan.lipschitz._lq_vae import _loss

INPUTS, LATENTS = 6, 4


@pytest.fixture(scope="module")
def data():
    """Inputs near two opposite corners."""
    sides = jnp.where(jax.random.bernoulli(jax.random.key(0), shape=(64, 1)), 0.7, -0.7)
    noise = jax.random.uniform(jax.random.key(1), (64, INPUTS), minval=-0.2, maxval=0.2)
    return sides + noise


@pytest.fixture(scope="module")
def start():
    return LQVAE.dense(INPUTS, LATENTS, width=8, depth=1, key=jax.random.key(2))


@pytest.fixture(scope="module")
def fitted(start, data):
    return start.fit(
        data, epochs=100, batch_size=32, stepsize=3e-3, key=jax.random.key(3)
    )


@pytest.fixture(scope="module")
def codes(fitted):
    """The bits of a batch of inputs."""
    model = fitted[0]
    return jax.jit(jax.vmap(lambda x: model.code(model.latents(x)[0])))


class TestBits:
    z = jnp.array([-3.0, -0.1, -0.0999, 0.0, 0.0999, 0.1, 3.0])

    def test_hard(self, start):
        assert start.code(self.z).tolist() == [-1, -1, 1, 1, 1, -1, -1]

    def test_soft_goes_to_hard(self, start):
        away = self.z[jnp.array([0, 3, 6])]
        for gain, error in ((500.0, 0.2), (1e8, 1e-5)):
            soft = start.soft_code(away, gain)
            np.testing.assert_allclose(soft, start.code(away), atol=error)
        np.testing.assert_allclose(start.soft_code(jnp.array([0.1])), 0, atol=1e-10)

    def test_small_cell_has_only_minus_one(self, start):
        narrow = LQVAE(start.encoder, start.decoder_c, start.decoder_d, 1e-12)
        z = jax.random.normal(jax.random.key(0), (1000,))
        assert np.all(narrow.code(z) == -1)

    def test_dtype(self, start):
        assert start.code(self.z.astype(jnp.float32)).dtype == jnp.float32


class TestTraining:
    def test_loss_is_the_sum_of_its_parts(self, start, data):
        """Noise off: variances of exp(-200) draw the means themselves."""
        bias = start.encoder.layers[-1].bias
        quiet = eqx.tree_at(
            lambda m: m.encoder.layers[-1],
            start,
            eqx.tree_at(
                lambda layer: (layer.weight, layer.bias),
                start.encoder.layers[-1],
                (
                    start.encoder.layers[-1].weight.at[LATENTS:].set(0),
                    bias.at[LATENTS:].set(-200.0),
                ),
            ),
        )

        def by_hand(x):
            mean, _ = quiet.latents(x)
            slope = jnp.sum(jax.jacobian(lambda v: quiet.latents(v)[0])(x), 0)
            soft = quiet.decoder_c(quiet.soft_code(mean))
            hard = quiet.decoder_d(quiet.code(mean))
            return (
                jnp.mean((mean**2 + 200 - 1) / 2)
                + 10 * jnp.mean((soft - x) ** 2)
                + 10 * jnp.mean((hard - x) ** 2)
                + 10 * (0.1 - jnp.linalg.norm(slope)) ** 2
            )

        total, expected = jax.jit(
            lambda x: (
                _loss(quiet, x, jax.random.key(0)),
                jnp.mean(jax.vmap(by_hand)(x)),
            )
        )(data[:2])
        np.testing.assert_allclose(total, expected, rtol=1e-10)

    def test_hard_bits_do_not_move_the_encoder(self, start, data):
        """Changing the second decoder changes no gradient of the encoder."""
        other = eqx.tree_at(
            lambda m: m.decoder_d.layers[0].weight, start, replace_fn=lambda w: 2 * w
        )

        @eqx.filter_jit
        @eqx.filter_grad
        def slope(encoder, model):
            moved = eqx.tree_at(lambda m: m.encoder, model, encoder)
            return _loss(moved, data, jax.random.key(0))

        first, second = (slope(m.encoder, m).layers[0].weight for m in (start, other))
        np.testing.assert_allclose(first, second, rtol=1e-10)

    def test_learns_to_tell_the_corners(self, fitted, data):
        model, losses = fitted
        assert losses[-1] < 0.5 * losses[0]
        filtered = jax.vmap(model.filter)(data)
        assert np.mean((filtered > 0) == (data > 0)) > 0.9
        assert np.all(np.abs(filtered) <= 1)

    def test_key_draws_latents(self, fitted, data):
        model = fitted[0]
        mean = jnp.full(LATENTS, 0.08)
        draw = jax.jit(jax.vmap(lambda key: model._draw(mean, 0 * mean, key)))
        drawn = draw(jax.random.split(jax.random.key(0), 4000))
        # Half of q = 0.1, times the standard deviation of the latent, here 1.
        np.testing.assert_allclose(np.std(drawn, 0), 0.05, rtol=0.06)
        one, other = (model.filter(data[0], key=jax.random.key(k)) for k in (0, 0))
        assert np.all(one == other) and np.all(np.abs(one) <= 1)


class TestCertificate:
    @pytest.mark.parametrize("norm", ["l2", "linf"])
    def test_code_is_the_same_everywhere_in_the_ball(self, fitted, codes, data, norm):
        model, noise = fitted[0], jax.random.normal(jax.random.key(5), (500, INPUTS))
        length = jnp.linalg.norm(noise, axis=1) if norm == "l2" else 1.0
        ways = noise / jnp.reshape(length, (-1, 1)) if norm == "l2" else jnp.sign(noise)
        radii = []
        for x in data[:6]:
            found = model.certify(x, 0.5, norm=norm)
            assert found.proof
            radius = float(found.value)
            radii.append(radius)
            # Along the gradient of the latent that is nearest to its threshold too.
            slopes = jax.jacobian(lambda v: model.latents(v)[0])(x)
            size = jnp.linalg.norm(slopes, axis=1, keepdims=True)
            steep = slopes / size if norm == "l2" else jnp.sign(slopes)
            tried = x[None] + radius * jnp.concatenate([ways, steep, -steep])
            tried = jnp.clip(tried, -1, 1)
            assert np.all(codes(tried) == codes(x[None]))
        assert max(radii) > 1e-3

    def test_radius_of_a_linear_encoder(self, start):
        """One mean 2 x_0: the nearest threshold is at x_0 = 0.05."""
        linear = LQVAE(
            lambda x: jnp.stack([2 * x[0], 0 * x[0]]), *[start.decoder_c] * 2
        )
        x = jnp.array([0.3, 0.0])
        found = linear.certify(x, 1.0, halvings=20)
        np.testing.assert_allclose(found.value, 0.25, rtol=1e-4)
        assert found.value <= 0.25
        np.testing.assert_allclose(found.details["gap"], 0.5, rtol=1e-4)

    def test_rounding_is_subtracted(self, start):
        """A mean of float32 that is 0.1 away from the threshold, and 1e4 cancel in."""
        encode = lambda x: jnp.stack([x[0] - x[1] + x[2], 0 * x[0]])  # noqa: E731
        model = LQVAE(lambda x: encode(1e4 * x), *[start.decoder_c] * 2)
        exact = jnp.array([0.3, 0.3, 2e-5])
        found = model.certify(exact.astype(jnp.float32), 1.0)
        # Sums of size 1e4 in float32 are wrong by up to 1e-3, three of them.
        assert 0 < found.details["gap"] < 0.1 - 0.001

    def test_at_the_threshold_nothing_is_certified(self, start):
        at = LQVAE(lambda x: jnp.stack([x[0], 0 * x[0]]), *[start.decoder_c] * 2)
        assert at.certify(jnp.array([0.1, 0.0])).value == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: LQVAE(m.encoder, m.decoder_c, m.decoder_d, 0.0), "`q` must be posi"),
        (lambda m: m.filter(jnp.full(INPUTS, 1.5)), r"must lie in \[-1, 1\]"),
        (lambda m: m.filter(jnp.full(INPUTS, jnp.nan)), "`x` must be finite"),
        (lambda m: m.certify(jnp.full(INPUTS, -2.0)), r"must lie in \[-1, 1\]"),
        (lambda m: m.certify(jnp.zeros(INPUTS), 0.0), "`radius_max` must be positive"),
        (lambda m: m.certify(jnp.zeros(INPUTS), norm="l1"), "`norm` must be one of"),
        (
            lambda m: m.fit(jnp.full((4, 6), 2.0), epochs=1, key=jax.random.key(0)),
            r"must lie in \[-1, 1\]",
        ),
        (
            lambda m: m.fit(jnp.zeros((0, 6)), epochs=1, key=jax.random.key(0)),
            "`x` must not be empty",
        ),
    ],
)
def test_bad_input(start, call, message):
    with pytest.raises(ValueError, match=message):
        call(start)


def test_nan_under_jit(start):
    assert np.all(np.isnan(eqx.filter_jit(start.filter)(jnp.full(INPUTS, jnp.nan))))
