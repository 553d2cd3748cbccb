"""Caps on spectral norms: what they keep, what they leave alone, what they refuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan import Smooth
from varan.lipschitz import rms_cap, rms_muon, spectral_cap, spectral_weight_decay
from varan.testing import Case, contract

KINDS = ("soft", "hard", "svd", "normalize", "hammer")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


SIZE = 12  # one shape for all: each kind is compiled once


@partial(jax.jit, static_argnames="kind")
def after(weight, step, w_max, kind):
    """The weights after a capped step."""
    cap = spectral_cap(w_max, kind)
    return weight + cap.update(step, cap.init(weight), weight)[0]


def of_values(values, steps, w_max, kind):
    """What becomes of singular values: two diagonal matrices in one stack."""
    weight, step = (
        jnp.stack([jnp.diag(jnp.full(SIZE, v, float))] * 2) for v in (values, steps)
    )
    capped = after(weight, step, w_max, kind)
    now = jnp.diagonal(capped[1])
    # Diagonal matrices stay so: the vectors are kept.
    np.testing.assert_allclose(capped[0], jnp.diag(now), atol=1e-12)
    return now


def values(matrix):
    return np.linalg.svd(np.asarray(matrix), compute_uv=False)


class TestCap:
    @pytest.mark.parametrize("kind", KINDS[:-1])
    def test_norm_stays_below_the_cap_whatever_the_step(self, kind):
        """Of each matrix of a stack; steps many times longer than the cap."""
        shape = (2, SIZE, SIZE)
        for seed, size in enumerate((1e-3, 0.3, 3.0, 1e4)):
            weight, step = normal(seed, *shape), size * normal(seed + 9, *shape)
            for w_max in (0.01, 0.8):
                largest = values(after(weight, step, w_max, kind))[:, 0]
                assert np.all(largest <= w_max * (1 + 1e-12)), (size, largest)

    def test_the_norm_is_that_of_root_mean_squares(self):
        """Four rows and nine columns: a spectral norm of 2/3 is an RMS norm of one."""
        wide = after(normal(0, 4, 9), jnp.zeros((4, 9)), 1.0, "svd")
        np.testing.assert_allclose(values(wide)[0], 2 / 3)

    def test_soft_cap_sends_the_reach_to_the_cap(self):
        """From the cap a step along the leading vector ends at the cap.

        The norm bounds' excess of some percent of the step lowers it a bit.
        """
        for length in (1e-3, 0.05, 0.2):
            first = jnp.zeros(SIZE).at[0].set(1.0)
            got = of_values(first, length * first, 1.0, "soft")[0]
            assert 1 - 0.12 * length <= got <= 1 + 1e-12

    def test_soft_cap_is_increasing(self):
        before = jnp.linspace(0.02, 0.98, SIZE)
        for length in (0.01, 0.25, 2.0):
            now = of_values(before, length, 1.0, "soft")
            # After a very long step the largest values all stand at the cap.
            assert np.all(np.diff(now) > (0 if length < 1 else -1e-12))
            assert np.all(now <= before + length)

    def test_soft_cap_hardly_moves_small_values(self):
        """The relative shrinkage is of fourth order in the value."""
        before = jnp.full(SIZE, 0.01).at[0].set(0.9)
        now = of_values(before, 0.1 * before, 1.0, "soft")
        np.testing.assert_allclose(now[1:], 1.1 * before[1:], rtol=1e-3)

    def test_svd_is_the_minimum_and_idempotent(self):
        before = jnp.linspace(0.05, 3.0, SIZE)
        once = of_values(before, 0.0, 1.0, "svd")
        np.testing.assert_allclose(once, np.minimum(before, 1), rtol=1e-12)
        np.testing.assert_allclose(of_values(once, 0.0, 1.0, "svd"), once, rtol=1e-12)

    def test_hard_cap_is_the_minimum_to_five_percent(self):
        before = jnp.linspace(0.05, 3.0, SIZE)
        now = of_values(before, 0.0, 1.0, "hard")
        np.testing.assert_allclose(now, np.minimum(before, 1), rtol=0.06)

    def test_normalise_leaves_small_matrices_alone(self):
        before = jnp.linspace(0.05, 3.0, SIZE)
        same = of_values(before, 0.0, 100.0, "normalize")
        np.testing.assert_allclose(same, before, rtol=1e-15)
        ratio = of_values(before, 0.0, 0.5, "normalize") / before
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-10)

    def test_hammer_sets_the_largest_value_alone(self):
        before = jnp.linspace(0.5, 2.0, SIZE).at[3].set(9.0)
        now = of_values(before, 0.0, 1.0, "hammer")
        np.testing.assert_allclose(now, before.at[3].set(1), atol=1e-10)

    def test_zero_stays_zero_and_vectors_pass(self):
        for kind in KINDS:
            assert not np.any(of_values(0.0, 0.0, 1.0, kind))
        tree = {"weight": jnp.zeros((SIZE, SIZE)), "bias": normal(2, 3)}
        step = {"weight": tree["weight"], "bias": 100 * tree["bias"]}
        cap = spectral_cap(1.0, "svd")
        change, _ = jax.jit(cap.update)(step, cap.init(tree), tree)
        np.testing.assert_array_equal(change["bias"], 100 * tree["bias"])

    def test_infinite_steps_end_and_show(self):
        weight = normal(3, 2, SIZE, SIZE)
        for bad in (jnp.inf, jnp.nan):
            step = jnp.zeros_like(weight).at[0, 0, 0].set(bad)
            assert not np.all(np.isfinite(after(weight, step, 0.8, "soft")))


class TestCompanions:
    def test_spectral_weight_decay_shrinks_the_largest_value(self):
        matrix = jnp.diag(jnp.array([4.0, 1.0, 0.5]))
        decay = spectral_weight_decay(0.25)
        change, _ = jax.jit(decay.update)(0 * matrix, decay.init(matrix), matrix)
        np.testing.assert_allclose(
            jnp.diag(matrix + change), jnp.array([3.0, 1.0, 0.5]), atol=1e-8
        )

    def test_rows_stay_within_the_radius(self):
        table, cap = 3 * normal(0, 20, 6), rms_cap(1.5)
        change, _ = jax.jit(cap.update)(table, cap.init(table), table)
        capped = np.asarray(table + change)
        sizes = np.sqrt(np.mean(capped**2, 1))
        assert np.all(sizes <= 1.5 * (1 + 1e-12))
        lengths = np.linalg.norm(capped, axis=1) * np.linalg.norm(table, axis=1)
        np.testing.assert_allclose(np.sum(capped * np.asarray(table), 1), lengths)

    def test_muon_steps_have_the_learning_rate_s_norm(self):
        """Within the accuracy of six Newton-Schulz steps."""
        muon, weight = rms_muon(0.1), jnp.zeros((2, 3, 7))
        with jax.numpy_dtype_promotion("standard"):
            step, _ = jax.jit(muon.update)(
                normal(1, *weight.shape), muon.init(weight), weight
            )
        norms = values(step) * np.sqrt(7 / 3)
        np.testing.assert_allclose(norms, 0.1, rtol=0.15)

    def test_capped_training_stays_capped(self):
        """Adam's steps are far longer than the cap."""
        target = 5 * normal(4, 3, 3)
        chain = optax.chain(optax.adamw(0.5), spectral_cap(1.0, "normalize"))

        @jax.jit
        def train(weight):
            def one(carry, _):
                weight, state = carry
                change, state = chain.update(weight - target, state, weight)
                weight = optax.apply_updates(weight, change)
                return (weight, state), jnp.linalg.norm(weight, 2)

            return jax.lax.scan(one, (weight, chain.init(weight)), length=30)[1]

        with jax.numpy_dtype_promotion("standard"):
            norms = train(jnp.eye(3))
        assert np.all(norms <= 1 + 1e-12) and norms[-1] > 0.8


def distance(weight, target):
    return jnp.sum((weight - target) ** 2) / 2


CASES = [
    Case(
        lambda: optax.chain(optax.sgd(0.1), spectral_cap(1.0, "svd")),
        # Quarters: the accumulator of `optax.MultiSteps` is of float32.
        [Smooth(distance, jnp.round(4 * normal(seed, 3, 3)) / 4) for seed in (0, 1)],
        2 * jnp.eye(3),
        kind="optimiser",
        max_steps=20,
        xfail={"pytrees": "a matrix is more than its entries"},
    )
]
test_contract = contract(CASES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectral_cap(0.0), "`w_max` must be positive"),
        (lambda: spectral_cap(-1.0), "`w_max` must be positive"),
        (lambda: spectral_cap(1.0, "polar"), "`kind` must be one of 'soft', 'hard'"),
        (lambda: spectral_weight_decay(-0.1), "`rate` must not be negative"),
        (lambda: rms_cap(0.0), "`radius` must be positive"),
        (
            lambda: spectral_cap().update(jnp.eye(2), optax.EmptyState()),
            "spectral_cap: `update` must be given the parameters",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
