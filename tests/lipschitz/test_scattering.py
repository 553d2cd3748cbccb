"""Scattering networks: energy, non-expansiveness, covariance, bounds, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.lipschitz import (
    FilterBank,
    FrameModule,
    FrameNet,
    admissible,
    frame_bounds,
    normalize_frame,
    random_filters,
    translation_bound,
    wavelet_filters,
    weyl_heisenberg_filters,
)

N, SIDE = 64, 8


def family(name, shape):
    if name in ("meyer", "morlet"):
        return wavelet_filters(shape, 2, kind=name)
    if name == "weyl":
        return weyl_heisenberg_filters(shape, 5)
    return random_filters(shape, 4, width=5, key=jax.random.key(sum(shape)))


FAMILIES = ("meyer", "morlet", "weyl", "random")


def net(name="meyer", nonlinearity="modulus", pool="average", factor=2, shape=(N,)):
    return FrameNet.repeat(
        lambda s: family(name, s),
        shape,
        depth=2,
        nonlinearity=nonlinearity,
        pool=pool,
        factor=factor,
    )


@pytest.fixture(scope="module")
def nets():
    """One network for each nonlinearity and kind of pooling."""
    return {
        kinds: net(*kinds)
        for kinds in (
            ("meyer", "modulus", "average"),
            ("weyl", "relu", "max"),
            ("random", "tanh", "subsample"),
            ("morlet", "shifted_sigmoid", "max"),
        )
    }


def signals(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def norm(features):
    return np.sqrt(sum(np.sum(np.abs(np.asarray(f)) ** 2) for f in features))


class TestFrames:
    @pytest.mark.parametrize("shape", [(N,), (SIDE, SIDE)])
    @pytest.mark.parametrize("name", ["meyer", "weyl"])
    def test_families_are_tight(self, name, shape):
        lower, upper = frame_bounds(family(name, shape))
        np.testing.assert_allclose([lower, upper], 1.0, rtol=1e-12)
        assert lower <= 1 <= upper  # rounded outward

    def test_atoms_but_for_the_output_have_no_mean(self):
        for name in ("meyer", "morlet", "weyl"):
            bank = family(name, (N,))
            np.testing.assert_allclose(bank.atoms[:, 0], 0, atol=1e-15)
            assert bank.output[0] == 1

    def test_bounds_are_those_of_the_operator(self):
        """Extreme eigenvalues of the matrix that stacks all circular convolutions."""
        bank = random_filters((6, 4), 3, width=3, key=jax.random.key(0))
        rows = []
        for response in np.asarray([*bank.atoms, bank.output]):
            taps = np.fft.ifft2(response)
            for shift in np.ndindex(6, 4):
                rows.append(np.roll(taps[::-1, ::-1], shift, (0, 1)).ravel())
        squares = np.linalg.svd(np.array(rows), compute_uv=False) ** 2
        np.testing.assert_allclose(
            frame_bounds(bank), [squares[-1], squares[0]], rtol=1e-9
        )

    @pytest.mark.parametrize("bound", [1.0, 0.25])
    def test_normalised_is_at_most_the_bound_and_close(self, bound):
        for name in FAMILIES:
            upper = frame_bounds(normalize_frame(family(name, (N,)), bound)).upper
            assert bound * (1 - 1e-12) < upper <= bound

    def test_normalised_in_single_precision(self, float32):
        upper = frame_bounds(normalize_frame(family("random", (N,)))).upper
        assert upper.dtype == jnp.float32 and 1 - 1e-4 < upper <= 1

    def test_wavelets_are_an_octave_apart(self):
        """Halving the grid's resolution moves every band down by one scale."""
        bank = wavelet_filters((4 * N,), 3)
        grid = np.fft.fftfreq(4 * N)
        power = np.asarray(bank.atoms[::2]) ** 2
        means = np.sum(power * np.abs(grid), 1) / np.sum(power, 1)
        np.testing.assert_allclose(means[1] / means[2], 2, rtol=0.02)

    def test_two_dimensional_morlet_has_directions(self):
        bank = wavelet_filters((SIDE, SIDE), 1, kind="morlet", orientations=4)
        rows, columns = np.meshgrid(*(np.fft.fftfreq(SIDE),) * 2, indexing="ij")
        first = np.asarray(bank.atoms[0])
        assert np.sum(first * np.abs(rows)) > 2 * np.sum(first * np.abs(columns))


class TestEnergy:
    def test_tight_frame_without_nonlinearity_conserves_energy(self):
        """All that leaves at layers 0 and 1 is the signal's energy, split."""
        bank = wavelet_filters((N,), 2)
        linear = FrameModule(bank, lambda v: v, lipschitz=1.0)
        everything = FilterBank(bank.atoms, jnp.ones(N))
        two = FrameNet([linear, FrameModule(everything)])
        f = signals(0, N)
        np.testing.assert_allclose(norm(two(f)), np.linalg.norm(f), rtol=1e-12)

    def test_modulus_conserves_energy_too(self):
        bank = weyl_heisenberg_filters((N,), 3)
        deep = FrameNet([FrameModule(bank), FrameModule(bank), FrameModule(bank)])
        f = signals(1, N)
        paths = f[None]
        for module in deep.modules:
            paths = module.propagate(paths)
        left = norm([paths])
        np.testing.assert_allclose(
            norm(deep(f)) ** 2 + left**2, np.linalg.norm(f) ** 2, rtol=1e-12
        )

    def test_first_layer_is_circular_convolution(self):
        layer = net(factor=2)
        f = signals(2, N)
        taps = np.fft.ifft(np.asarray(layer.modules[0].filters.atoms[1]))
        convolved = [sum(f[(n - m) % N] * taps[m] for m in range(N)) for n in range(4)]
        means = np.sqrt(2) * np.abs(convolved).reshape(2, 2).mean(1)
        got = layer.modules[0].propagate(f[None])[1, :2]
        np.testing.assert_allclose(got, means, rtol=1e-10)


class TestNonExpansive:
    def test_never_expands(self, nets):
        @settings(max_examples=15, deadline=None, derandomize=True)
        @given(
            seed=st.integers(0, 10**6),
            kind=st.sampled_from(sorted(nets)),
            sparse=st.booleans(),
            size=st.sampled_from([1e-6, 1.0, 30.0]),
        )
        def check(seed, kind, sparse, size):
            f, h = size * signals(seed, 2, N)
            if sparse:  # samples that pooling keeps: there subsampling expands most
                kept = (np.arange(N) % 4 == 0).astype(f.dtype)
                f, h = kept * f, kept * h
            assert nets[kind].distance(f, h) <= np.linalg.norm(f - h) * (1 + 1e-10)

        check()

    def test_all_are_admissible(self, nets):
        for one in nets.values():
            found = admissible(one)
            assert found.met and found.proof and found.value > 0.999

    def test_frame_that_is_too_large_expands(self):
        bank = wavelet_filters((N,), 2)
        large = FrameNet([FrameModule(jax.tree.map(lambda a: 2 * a, bank))])
        found = admissible(large)
        np.testing.assert_allclose(found.value, 4.0, rtol=1e-12)
        assert not found.met
        constant = np.ones(N)
        ratio = large.distance(constant, 0 * constant) / np.linalg.norm(constant)
        np.testing.assert_allclose(ratio, 2.0, rtol=1e-12)

    @pytest.mark.parametrize("pool", ["subsample", "max"])
    def test_pooling_expands_what_lives_on_the_kept_samples(self, pool):
        """Why the constant of both is S^(d/2) on a grid, and is attained."""
        bank = FilterBank(jnp.ones((1, 4, 4)), jnp.zeros((4, 4)))
        layer = FrameModule(bank, pool=pool, factor=2)
        kept = np.zeros((4, 4), complex)
        kept[::2, ::2] = 1
        grown = norm([layer.propagate(kept[None])]) / norm([kept])
        np.testing.assert_allclose(grown, layer.pooling_constant, rtol=1e-12)
        assert layer.pooling_constant == 2.0

    def test_constants_of_nonlinearities(self):
        """Each is attained by some pair, and exceeded by none."""
        bank = FilterBank(jnp.ones((1, 2)), jnp.zeros(2))
        points = 0.01 * signals(3, 2, 400)
        for name, constant in (
            ("modulus", 1.0),
            ("relu", 1.0),
            ("tanh", 1.0),
            ("shifted_sigmoid", 0.25),
        ):
            layer = FrameModule(bank, name)
            assert layer.nonlinearity_constant == constant
            bent = np.asarray(layer._bent(jnp.asarray(points)))
            ratios = np.abs(bent[0] - bent[1]) / np.abs(points[0] - points[1])
            assert 0.99 * constant < np.max(ratios) <= constant * (1 + 1e-9)


class TestTranslation:
    def test_features_move_with_the_signal(self, nets):
        f = signals(4, N)
        for one in nets.values():
            still, moved = one(f), one(np.roll(f, 8))
            for layer in range(3):
                shifted = np.roll(still[layer], 8 // 2**layer, 1)
                np.testing.assert_allclose(moved[layer], shifted, atol=1e-12)

    def test_bound_is_never_below(self, nets):
        for seed in range(3):
            f = signals(seed, N)
            for one in nets.values():
                still = one(f)
                for shift in (4, -8, 20):
                    moved = one(np.roll(f, shift))
                    for layer in range(3):
                        found = norm([moved[layer] - still[layer]])
                        bound = translation_bound(one, shift, layer)
                        assert bound.proof
                        assert found <= bound.value * np.linalg.norm(f)

    def test_bound_is_nearly_attained(self):
        """By a slow wave at the input, where |1 - e^(iw)| is close to |w|."""
        one = net()
        decay = np.abs(one.modules[0].filters.output * np.fft.fftfreq(N))
        wave = np.exp(2j * np.pi * np.argmax(decay) * np.arange(N) / N)
        found = norm([one(np.roll(wave, 1))[0] - one(wave)[0]])
        bound = float(translation_bound(one, 1, 0).value * np.linalg.norm(wave))
        assert 0.9 * bound < found <= bound

    def test_two_dimensions(self):
        one = net("morlet", shape=(SIDE, SIDE), factor=2)
        f = signals(5, SIDE, SIDE)
        still, moved = one(f), one(np.roll(f, (4, -4), (0, 1)))
        for layer in range(3):
            bound = translation_bound(one, (4, -4), layer)
            found = norm([moved[layer] - still[layer]])
            assert found <= bound.value * np.linalg.norm(f)
        np.testing.assert_allclose(
            moved[2], np.roll(still[2], (1, -1), (1, 2)), atol=1e-12
        )


def test_derivative_in_signal_and_filters():
    one = net("random", "tanh", "subsample")
    f, direction = jnp.asarray(np.random.default_rng(6).normal(size=(2, N)))

    def total(scale, signal):
        modules = jax.tree.map(lambda a: scale.astype(a.dtype) * a, one)
        return sum(jnp.sum(jnp.abs(layer) ** 2) for layer in modules(signal))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    by_scale, by_signal = gradient(jnp.array(1.0), f)
    value, step = jax.jit(total), 1e-5
    ahead = value(jnp.array(1.0), f + step * direction)
    behind = value(jnp.array(1.0), f - step * direction)
    np.testing.assert_allclose(
        by_signal @ direction, (ahead - behind) / 2 / step, rtol=1e-7
    )
    ahead, behind = value(jnp.array(1 + step), f), value(jnp.array(1 - step), f)
    np.testing.assert_allclose(by_scale, (ahead - behind) / 2 / step, rtol=1e-7)


def test_dtype_follows_the_signal():
    one = net()
    for dtype, wanted in ((jnp.float32, jnp.complex64), (jnp.float64, jnp.complex128)):
        assert {f.dtype for f in one(jnp.ones(N, dtype))} == {jnp.dtype(wanted)}
    assert one(np.ones(N, int))[0].dtype == np.complex128


def test_own_nonlinearity_is_an_estimate_and_compiles_once():
    traces = []

    def soft(v):
        traces.append(v.shape)
        return v / (1 + jnp.abs(v)).astype(v.dtype)

    one = FrameNet.repeat(
        lambda s: family("meyer", s), (N,), depth=1, nonlinearity=soft, lipschitz=1.0
    )
    assert admissible(one).met and not admissible(one).proof
    f, h = signals(7, 2, N)
    one(f)
    traced = len(traces)
    smaller = jax.tree.map(lambda a: a / 2, one)
    assert norm(smaller(h)) < norm(one(h)) and len(traces) == traced
    together = jax.vmap(one)(jnp.asarray([f, h]))
    for layer, alone in zip(together, one(h), strict=True):
        np.testing.assert_allclose(layer[1], alone, atol=1e-12)
    assert not translation_bound(one, 1, 1).proof


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: FrameModule(b, factor=3), "`factor` must divide every side"),
        (lambda b: FrameModule(b, "elu"), "`nonlinearity` must be one of"),
        (lambda b: FrameModule(b, pool="mean"), "`pool` must be one of"),
        (lambda b: FrameModule(b, jnp.cos, lipschitz=1.0), "must map 0 to 0"),
        (lambda b: FrameModule(b, jnp.sin), "`lipschitz` must be given"),
        (lambda b: FrameModule(b, "relu", lipschitz=1.0), "Leave it out"),
        (lambda b: FrameNet([]), "`modules` must not be empty"),
        (lambda b: FrameNet([FrameModule(b, factor=2)] * 2), r"on the grid \(8,\)"),
        (lambda b: FrameNet([FrameModule(b)])(np.ones(8)), "must have shape"),
        (lambda b: FrameNet([FrameModule(b)])(np.full(16, np.nan)), "finite"),
        (lambda b: normalize_frame(b, 0.0), "`bound` must be positive"),
        (lambda b: normalize_frame(FilterBank(0 * b.atoms, 0 * b.output)), "all be"),
        (lambda b: FilterBank(b.atoms[0], b.output), r"\(atoms, \*grid\)"),
        (lambda b: FilterBank(b.atoms[:0], b.output), "must not be empty"),
        (lambda b: FilterBank(b.atoms, b.output.at[0].set(jnp.inf)), "finite"),
        (lambda b: wavelet_filters((4, 4, 4), 1), "one or two positive lengths"),
        (lambda b: wavelet_filters((16,), 0), "`scales` must be at least 1"),
        (lambda b: wavelet_filters((16,), 1, orientations=3), "2 in one dimension"),
        (lambda b: weyl_heisenberg_filters((16,), 1), "at least 2"),
        (lambda b: random_filters((16,), 0, key=jax.random.key(0)), "at least 1"),
        (lambda b: translation_bound(pooled(b), 1, 1), "multiple of 2 for each"),
        (lambda b: translation_bound(pooled(b), 2, 2), "`layer` must be 0 to 1"),
        (
            lambda b: translation_bound(
                FrameNet([FrameModule(b, factor=2, pool="max")]), 1, 0
            ),
            "must be admissible",
        ),
        (lambda b: FrameNet.repeat(lambda s: b, (16,), depth=-1), "at least 0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make(wavelet_filters((16,), 2))


def pooled(bank):
    return FrameNet(
        [FrameModule(bank, factor=2), FrameModule(wavelet_filters((8,), 2))]
    )
