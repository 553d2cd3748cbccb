"""The shared benchmark of the topic sharpness: data, budgets, pairing, divergence."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from varan.claims.sharpness import _benchmark as bench
from varan.claims.sharpness import sam_race
from varan.claims.sharpness._arms import ARMS

SGD, EARLY = ARMS["sgd"], ARMS["sgd-early"]


@pytest.fixture(scope="module", autouse=True)
def as_experiments_run():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def noisy():
    return bench.column("noisy", 0, train=400)


@pytest.fixture(scope="module")
def run(noisy):
    return bench.run_arm(SGD, noisy, 0, gradients=90, setting=(0.1, 0.0))


def test_the_noise_is_symmetric_and_the_seeds(noisy):
    clean, other = bench.column("clean", 0), bench.column("noisy", 1)
    assert clean.train[0].shape == (4000, 40) and clean.test[0].shape == (10_000, 40)
    np.testing.assert_allclose(clean.train[0].mean(0), 0, atol=1e-5)
    # A uniform class is another one with probability 0.9; five deviations are 0.04.
    changed = other.train[1] != clean.train[1]
    assert abs(changed.mean() - 0.36) < 0.04
    assert np.ptp(np.bincount(other.train[1][changed], minlength=10)) < 80
    assert not np.array_equal(other.train[1][:400], noisy.train[1])
    np.testing.assert_array_equal(other.test[1], clean.test[1])


def test_held_out_points_are_training_points_as_noisy_as_the_rest():
    whole, held = bench.column("noisy", 1), bench.column("noisy", 1, held_out=500)
    for part in (0, 1):
        both = np.concatenate([held.test[part], held.train[part]])
        np.testing.assert_array_equal(both, whole.train[part])
    with pytest.raises(ValueError, match="held_out < train"):
        bench.column("noisy", 0, train=100, held_out=100)


def test_training_learns_and_counts(run, noisy):
    assert run.status == "finished" and run.steps == run.gradients == 90
    assert run.curve.shape == (2, 60) and run.curve[0, -1] == 90
    assert run.curve[1, -1] < run.curve[1, 0] - 0.1
    assert run.train_error < 0.85 and run.points == 100 * run.test_error
    loss = bench.TRAINING_LOSS(run.params, noisy.train)
    np.testing.assert_allclose(run.train_loss, loss, rtol=1e-5)


def test_seeds_decide_and_other_values_compile_nothing(run, noisy):
    compiled = bench._train._cache_size()
    again = bench.run_arm(SGD, noisy, 0, steps=90, setting=(0.1, 0.0))
    np.testing.assert_array_equal(again.curve, run.curve)
    other = bench.run_arm(SGD, noisy, 1, gradients=60, setting=(0.3, 0.0))
    assert other.steps == 60 and other.curve[1, 0] != run.curve[1, 0]
    short = bench.run_arm(SGD, noisy, 0, gradients=7, setting=(0.1, 0.0))
    assert short.curve.shape == (2, 7) and np.isfinite(short.curve).all()
    assert bench._train._cache_size() == compiled


def test_a_diverging_run_stops_with_a_status_and_its_curve(noisy):
    run = bench.run_arm(SGD, noisy, 0, gradients=90, setting=(1e30, 0.0))
    assert run.status == "diverged" and run.steps < 10 and run.test_error == 0.9
    assert run.curve.shape[1] <= run.steps and run.curve[1, -1] == np.inf
    assert run.test_nll == run.train_loss == np.inf
    assert bench.flatness(run, noisy, only=("sharpness",)) == {"sharpness": np.inf}
    assert bench.loss_curve(run).y[-1] == np.inf


def test_the_same_share_of_any_budget_is_early_stopping():
    assert [EARLY.share(p) for p in EARLY.grid] == list(EARLY.grid)
    assert SGD.share(0.0) == 1


def test_untuned_arms_are_refused(noisy):
    other = replace(SGD, grid=(1.0,))
    with pytest.raises(ValueError, match=r"'sgd' must .* one of another protocol"):
        bench.run_arm(other, noisy, 0, gradients=10)
    with pytest.raises(ValueError, match="got none"):
        bench.tuned(replace(SGD, name="nobody"), "clean")
    with pytest.raises(ValueError, match="either `gradients` or `steps`"):
        bench.run_arm(SGD, noisy, 0, setting=(0.1, 0.0))


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_costs_what_it_says(name):
    arm, model = ARMS[name], bench.MLPNet(4, 3, (5,), key=jax.random.key(0))
    x, y = np.ones((6, 4)), np.arange(6) % 3

    @jax.jit
    def spent():
        optimiser = arm.make(lambda step: 0.1, jax.numpy.asarray(arm.grid[0]))
        loss = lambda m: arm.loss(bench.logits_fn(m, x), y, arm.grid[0])  # noqa: E731
        state = arm.update(loss, model, optimiser.init(model), optimiser)[1]
        return bench.optax.tree.get(state, "grad_evals", arm.cost)

    assert spent() == arm.cost


def test_the_race_of_sam_measures_training():
    settings = {"sizes": [[8, 64]], "gradients": 120, "tolerance": 1.0}
    heat = next(sam_race.heats(settings))
    answer = heat.contestants[0].make()()
    untrained = heat.error([0 * leaf for leaf in answer])
    assert untrained == pytest.approx(np.log(10), 1e-5)
    assert heat.tolerance < heat.error(answer) < untrained - 0.1
