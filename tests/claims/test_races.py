"""What a race counts as solved: right answers, and nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from varan.claims.bilevel import automatic_implicit_diff_race as implicit
from varan.claims.bilevel import maid_race as maid
from varan.claims.games import adversarial_classification_flow_race as adversarial
from varan.claims.lipschitz import local_lipschitz_crown_race as lipschitz
from varan.claims.sharpness import sam_transfer_race as transfer
from varan.claims.transport import sinkhorn_newton_sparse_race as transport
from varan.lab.catalogue import load
from varan.lab.racing import settings_of


def small(number, module, **settings):
    """The first heat of a row's quick race, made smaller."""
    quick = settings_of(load().find(str(number)), quick=True)
    return next(module.heats({**quick, **settings}))


@pytest.fixture(scope="module")
def plans():
    return small(21, transport, sizes=[12], kinds=["clouds"], epsilons=[0.05])


def test_transport_plans(plans):
    answer = plans.contestants[0].make()()
    assert plans.error(answer) <= plans.tolerance
    plan = np.asarray(answer.plan)
    assert plans.error(plan) <= plans.tolerance
    assert plans.error(tuple(answer.potentials)) <= plans.tolerance
    assert plans.error(1.01 * plan) == pytest.approx(0.02, rel=1e-3)


def test_exact_marginals_hide_no_other_problem(plans):
    # Both have the right marginals; one solves a blurred problem, one a sharper one.
    independent = np.full((12, 12), 1 / 144)
    assert plans.error(independent) > 1.0
    sharper = small(21, transport, sizes=[12], kinds=["clouds"], epsilons=[0.04])
    assert plans.error(sharper.contestants[0].make()()) > 1e-3


def test_the_sweeping_contestants_arrive(plans):
    names = [contestant.name for contestant in plans.contestants]
    for name in ("ours, plain Sinkhorn", "over-relaxed (oracle)"):
        solve = plans.contestants[names.index(name)].make()
        assert plans.error(solve()) <= plans.tolerance
    # Below `sweeps_from` they do not run.
    sharp = small(21, transport, sizes=[12], epsilons=[1e-4])
    assert "ours, plain Sinkhorn" not in [entry.name for entry in sharp.contestants]


@pytest.mark.parametrize("problem", ["ridge", "logistic"])
def test_hypergradients(problem):
    heat = small(6, implicit, problems=[problem], sizes=[4])
    ours, cg = (contestant.make()() for contestant in heat.contestants[:2])
    assert heat.error(ours) <= heat.tolerance
    assert heat.error(cg) <= heat.tolerance
    assert heat.error(ours + 1e-6 * jnp.max(jnp.abs(ours))) > heat.tolerance


@pytest.mark.parametrize("task", ["crown", "jacobian", "constant"])
def test_bounds(task):
    heat = small(37, lipschitz, tasks=[task], networks=[[3, 4, 2]])
    low, high = heat.contestants[0].make()()
    assert low.dtype == high.dtype == jnp.float32
    assert heat.error((low, high)) <= heat.tolerance
    # Shaped as the peer shapes it, and looser by a percent.
    low, high = np.asarray(low)[None], np.asarray(high)[None]
    assert heat.error((low, high)) <= heat.tolerance
    assert heat.error((low, high + 0.01 * np.abs(high))) > heat.tolerance


def test_penalties():
    heat = small(312, maid, tasks=[["breast_cancer", 60]])
    adaptive = heat.contestants[0].make()()
    assert heat.error(adaptive) <= heat.tolerance
    assert heat.error(adaptive + 0.03) > heat.tolerance


def test_adversarial_risks():
    heat, larger = (small(74, adversarial, sizes=[n]) for n in (60, 80))
    ours, pot = (contestant.make()() for contestant in heat.contestants)
    assert heat.error(ours) <= heat.tolerance and heat.error(pot) <= heat.tolerance
    assert larger.error(ours) > larger.tolerance


def test_adversarial_examples():
    heat = small(199, transfer, samples=[6], steps=12)
    answer = np.asarray(heat.contestants[0].make()())
    assert heat.error(answer) <= heat.tolerance
    # No attack at all, one of half the radius, and one that leaves the ball.
    instance = heat.contestants[0].make.args[0]
    x = np.asarray(instance.parts()[1])
    assert heat.error(x) == pytest.approx(1.0)
    assert heat.error((x + answer) / 2) > 10 * heat.tolerance
    assert heat.error(x + 1.1 * (answer - x)) > heat.tolerance
