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


@partial(jax.jit, static_argnames="kind")
def after(weight, step, w_max, kind):
    """The weights after a capped step."""
    cap = spectral_cap(w_max, kind)
    return weight + cap.update(step, cap.init(weight), weight)[0]


def values(matrix):
    return np.linalg.svd(np.asarray(matrix), compute_uv=False)


class TestCap:
    @pytest.mark.parametrize("kind", KINDS[:-1])
    def test_norm_stays_below_the_cap_whatever_the_step(self, kind):
        """RMS norms, of stacks too; steps many times longer than the cap."""
        for seed, size in enumerate((1e-3, 0.3, 3.0, 1e4)):
            weight, step = normal(seed, 2, 3, 5), size * normal(seed + 9, 2, 3, 5)
            for w_max in (0.01, 0.8):
                capped = after(weight, step, w_max, kind)
                largest = values(capped)[:, 0] * np.sqrt(5 / 3)
                assert np.all(largest <= w_max * (1 + 1e-12)), (size, largest)

    def test_soft_cap_sends_the_reach_to_the_cap(self):
        """A step along the leading vectors, as long as the reach says: w_max comes out.

        `k = w_max + |step|`; the norm bound's excess of some percent lowers it a bit.
        """
        vector = jnp.ones(25) / 5
        unit = jnp.outer(vector, vector)
        for length in (1e-3, 0.05, 0.2):
            got = values(after(unit, length * unit, 1.0, "soft"))[0]
            assert 1 - 0.12 * length <= got <= 1 + 1e-12

    def test_soft_cap_is_increasing_and_keeps_the_vectors(self):
        before = jnp.linspace(0.02, 0.98, 25)
        for length in (0.01, 0.25, 2.0):
            weight, step = jnp.diag(before), length * jnp.eye(25)
            capped = after(weight, step, 1.0, "soft")
            now = jnp.diag(capped)
            np.testing.assert_allclose(capped, jnp.diag(now), atol=1e-12)
            # After a very long step the largest values all stand at the cap.
            assert np.all(np.diff(now) > (0 if length < 1 else -1e-12))
            assert np.all(now <= before + length)

    def test_soft_cap_hardly_moves_small_values(self):
        """The relative shrinkage is of fourth order in the value."""
        before = jnp.full(25, 0.01).at[0].set(0.9)
        now = jnp.diag(after(jnp.diag(before), 0.1 * jnp.diag(before), 1.0, "soft"))
        np.testing.assert_allclose(now[1:], 1.1 * before[1:], rtol=1e-3)

    def test_svd_is_the_minimum_and_idempotent(self):
        weight = normal(0, 2, 3, 5)
        zero = jnp.zeros_like(weight)
        once = after(weight, zero, 1.0, "svd")
        limit = np.sqrt(3 / 5)
        np.testing.assert_allclose(values(once), np.minimum(values(weight), limit))
        np.testing.assert_allclose(after(once, zero, 1.0, "svd"), once, atol=1e-12)

    def test_hard_cap_is_the_minimum_to_five_percent(self):
        weight = jnp.diag(jnp.linspace(0.05, 3.0, 25))
        now = jnp.diag(after(weight, jnp.zeros_like(weight), 1.0, "hard"))
        np.testing.assert_allclose(now, np.minimum(jnp.diag(weight), 1.0), rtol=0.06)

    def test_normalise_leaves_small_matrices_alone(self):
        weight, zero = normal(1, 25, 25), jnp.zeros((25, 25))
        np.testing.assert_allclose(
            after(weight, zero, 100.0, "normalize"), weight, rtol=1e-15
        )
        shrunk = after(weight, zero, 0.5, "normalize")
        np.testing.assert_allclose(
            shrunk / weight, shrunk[0, 0] / weight[0, 0], rtol=1e-10
        )

    def test_hammer_sets_the_largest_value_alone(self):
        before = jnp.linspace(0.5, 2.0, 25).at[3].set(9.0)
        weight = jnp.diag(before)
        hammered = after(weight, jnp.zeros_like(weight), 1.0, "hammer")
        np.testing.assert_allclose(jnp.diag(hammered), before.at[3].set(1), atol=1e-10)

    def test_zero_stays_zero_and_vectors_pass(self):
        zero, vector = jnp.zeros((25, 25)), normal(2, 3)
        for kind in KINDS:
            if kind != "svd":
                assert not np.any(after(zero, zero, 1.0, kind))
        cap, tree = spectral_cap(1.0, "svd"), {"weight": zero, "bias": vector}
        step = {"weight": zero, "bias": 100 * vector}
        change, _ = cap.update(step, cap.init(tree), tree)
        assert not np.any(change["weight"])
        np.testing.assert_array_equal(change["bias"], 100 * vector)

    def test_infinite_steps_end_and_show(self):
        weight = normal(3, 2, 3, 5)
        for bad in (jnp.inf, jnp.nan):
            step = jnp.zeros_like(weight).at[0, 0, 0].set(bad)
            assert not np.all(np.isfinite(after(weight, step, 0.8, "soft")))


class TestCompanions:
    def test_spectral_weight_decay_shrinks_the_largest_value(self):
        matrix = jnp.diag(jnp.array([4.0, 1.0, 0.5]))
        decay = spectral_weight_decay(0.25)
        change, _ = decay.update(jnp.zeros((3, 3)), decay.init(matrix), matrix)
        np.testing.assert_allclose(
            jnp.diag(matrix + change), jnp.array([3.0, 1.0, 0.5]), atol=1e-8
        )

    def test_rows_stay_within_the_radius(self):
        table, cap = 3 * normal(0, 20, 6), rms_cap(1.5)
        change, _ = cap.update(table, cap.init(table), table)
        capped = table + change
        sizes = jnp.sqrt(jnp.mean(capped**2, 1))
        assert np.all(sizes <= 1.5 * (1 + 1e-12))
        cosine = jnp.sum(capped * table, 1) / (
            jnp.linalg.norm(capped, axis=1) * jnp.linalg.norm(table, axis=1)
        )
        np.testing.assert_allclose(cosine, 1)

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
        chain = optax.chain(optax.adamw(0.5), spectral_cap(1.0))

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
        assert np.all(norms <= 1 + 1e-12) and norms[-1] > 0.9


def distance(weight, target):
    return jnp.sum((weight - target) ** 2) / 2


CASES = [
    Case(
        lambda: optax.chain(optax.sgd(0.1), spectral_cap(1.0)),
        # Quarters: the accumulator of `optax.MultiSteps` is of float32.
        [Smooth(distance, jnp.round(4 * normal(seed, 3, 3)) / 4) for seed in (0, 1)],
        jnp.eye(3) / 2,
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
