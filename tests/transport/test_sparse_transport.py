"""Sparse transport: the limit, its two ends, certificates that hold, derivatives."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from scipy.optimize import linear_sum_assignment

from varan import Newton, Status, compare
from varan.operators import project_transport
from varan.transport import (
    SparseTransport,
    route_tokens,
    sparse_ot,
    topk_relu_conjugate,
)

M, N, GAMMA = 6, 4, 0.5
LBFGS = optx.LBFGS(rtol=1e-8, atol=1e-8)


def instance(seed=0, m=M, n=N):
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0.5, 1.5, m), rng.uniform(0.5, 1.5, n)
    cost = rng.uniform(size=(m, n))
    return jnp.asarray(cost), jnp.asarray(a / a.sum()), jnp.asarray(b / b.sum())


def problem(k, form="semidual", seed=0):
    cost, a, b = instance(seed)
    return SparseTransport(cost, a, b, max_nonzeros=k, gamma=GAMMA, form=form)


def potentials(form, seed=0):
    rng = np.random.default_rng(seed)
    alpha, beta = jnp.asarray(rng.normal(size=M)), jnp.asarray(rng.normal(size=N))
    return alpha if form == "semidual" else (alpha, beta)


def columns_by_force(scores, k, total):
    """The best column over all supports: projections on each, compared by value."""
    best = -np.inf
    for support in itertools.combinations(range(scores.size), k):
        kept = np.array(support)
        if total is None:
            entries = np.maximum(scores[kept] / GAMMA, 0)
        else:
            # The projection on the simplex, by sorting.
            falling = np.sort(scores[kept] / GAMMA)[::-1]
            cuts = (np.cumsum(falling) - total) / np.arange(1, k + 1)
            entries = np.maximum(scores[kept] / GAMMA - cuts[falling > cuts][-1], 0)
        value = scores[kept] @ entries - GAMMA / 2 * entries @ entries
        best = max(best, value)
    return best


@pytest.mark.parametrize("form", ["semidual", "dual"])
def test_value_is_the_best_over_all_supports(form):
    p, x = problem(2, form), potentials(form)
    alpha, beta = (x, np.zeros(N)) if form == "semidual" else x
    scores = np.asarray(alpha)[:, None] + np.asarray(beta)[None] - np.asarray(p.cost)
    totals = np.asarray(p.b) if form == "semidual" else [None] * N
    best = sum(columns_by_force(scores[:, j], 2, totals[j]) for j in range(N))
    best -= p.a @ alpha if form == "semidual" else p.a @ alpha + p.b @ beta
    np.testing.assert_allclose(p.value(x), best, rtol=1e-12)
    if form == "dual":
        per_column = [topk_relu_conjugate(jnp.asarray(s), 2, GAMMA) for s in scores.T]
        np.testing.assert_allclose(sum(per_column), best + p.a @ alpha + p.b @ beta)


@pytest.mark.parametrize("form", ["semidual", "dual"])
def test_derivatives_of_the_value_match_finite_differences(form):
    p, x = problem(2, form), potentials(form, 1)
    rng = np.random.default_rng(2)
    flat, unravel = jax.flatten_util.ravel_pytree((x, p))
    value = jax.jit(lambda v: (lambda x, p: p.value(x))(*unravel(v)))
    slope = jax.jit(jax.grad(value))(flat)
    direction = jnp.asarray(rng.normal(size=flat.shape))
    h = 1e-6
    numeric = (value(flat + h * direction) - value(flat - h * direction)) / (2 * h)
    np.testing.assert_allclose(slope @ direction, numeric, rtol=1e-7)
    gradient, _ = unravel(slope)
    for got, want in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(p.condition(x)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_value_is_convex_along_segments_and_blind_to_the_gauge():
    for form in ("semidual", "dual"):
        p = problem(2, form)
        value = eqx.filter_jit(p.value)
        for seed in range(10):
            x, y = potentials(form, seed), potentials(form, seed + 100)
            middle = jax.tree.map(lambda u, v: (u + v) / 2, x, y)
            assert float(value(middle)) <= float(value(x) + value(y)) / 2 + 1e-12
        shifted = x + 3 if form == "semidual" else (x[0] + 3, x[1] - 3)
        np.testing.assert_allclose(value(shifted), value(x), atol=1e-12)


@pytest.fixture(scope="module")
def square():
    rng = np.random.default_rng(3)
    cost = jnp.asarray(rng.uniform(size=(5, 5)))
    return cost, {k: sparse_ot(cost, max_nonzeros=k, gamma=GAMMA) for k in (1, 5)}


def test_one_nonzero_is_the_assignment(square):
    cost, runs = square
    matrix = np.asarray(cost)
    least = matrix[linear_sum_assignment(matrix)].mean() + GAMMA / 10
    np.testing.assert_allclose(runs[1].value, least, atol=1e-8)
    assert float(runs[1].certificate.details["tie_margin"]) > 0


def test_no_limit_is_quadratic_regularisation(square):
    cost, runs = square
    mass = jnp.full(5, 0.2)
    want = project_transport(-cost / GAMMA, mass, mass)
    np.testing.assert_allclose(runs[5].plan, want, atol=1e-6)
    assert np.isinf(runs[5].certificate.details["tie_margin"])


def test_the_certificate_holds_at_any_potentials():
    """Everett: no sparse plan with the same marginals is cheaper; by brute force."""
    cost = instance(4)[0][:3, :2]
    p = SparseTransport(cost, max_nonzeros=2, gamma=GAMMA)
    matrix, grid = np.asarray(p.cost), np.linspace(0, 0.5, 101)
    # With three rows and two columns the plans with given masses have two parameters:
    # all sparse ones are tried on a fine grid.
    first, second = (v.reshape(-1) for v in np.meshgrid(grid, grid))
    left = np.stack([first, second, 0.5 - first - second], axis=1)

    @jax.jit
    def certified(x):
        return p.plan(x), p.certify(x, p.condition(x), 1e-6)

    for seed in range(5):
        x = jnp.asarray(np.random.default_rng(seed).normal(size=3)) * 0.3
        plan, certificate = certified(x)
        own = float(certificate.details["objective"])
        assert int((plan > 0).sum(0).max()) <= 2
        rows = np.asarray(plan.sum(1))
        others = np.stack([left, rows[None] - left], axis=2)
        sparse = ((others > 1e-12).sum(1) <= 2).all(1) & (others >= 0).all((1, 2))
        costs = (matrix * others + GAMMA / 2 * others**2).sum((1, 2))
        assert np.all(costs[sparse] >= own - 1e-12)
        # The bound is below every plan with the masses that were asked for.
        wanted = np.stack([left, 1 / 3 - left], axis=2)
        sparse = ((wanted > 1e-12).sum(1) <= 2).all(1) & (wanted >= 0).all((1, 2))
        costs = (matrix * wanted + GAMMA / 2 * wanted**2).sum((1, 2))
        bound = float(certificate.details["lower_bound"])
        assert np.all(costs[sparse] >= bound - 1e-12)


def test_solvers_agree_and_compare_in_one_table():
    p = problem(3, seed=6)
    solvers = {
        "L-BFGS": LBFGS,
        "Newton": Newton(),
    }
    table = compare(p, solvers, p.start(), tol=1e-8)
    assert all(row["met"] for row in table.rows())
    plans = [p.plan(s.x) for s in table.solutions.values()]
    for plan in plans[1:]:
        np.testing.assert_allclose(plan, plans[0], atol=1e-7)


def test_derivative_of_the_plan_matches_finite_differences():
    cost, a, b = instance(6)
    rng = np.random.default_rng(6)
    weight, direction = (jnp.asarray(rng.normal(size=(M, N))) for _ in range(2))

    def loss(t):
        run = sparse_ot(
            cost + t * direction,
            a,
            b,
            max_nonzeros=3,
            gamma=GAMMA,
            solver=Newton(),
            tol=1e-11,
        )
        return jnp.sum(weight * run.plan)

    both, h = jax.jit(jax.value_and_grad(loss)), 1e-5
    numeric = (both(h)[0] - both(-h)[0]) / (2 * h)
    np.testing.assert_allclose(both(0.0)[1], numeric, rtol=1e-5)


def test_conjugate_of_a_column_has_its_maximiser_as_gradient():
    s = jnp.asarray([0.3, 1.1, -0.2, 0.9, 0.5])
    value, slope = jax.value_and_grad(topk_relu_conjugate)(s, 3, GAMMA)
    np.testing.assert_allclose(slope, np.array([0, 1.1, 0, 0.9, 0.5]) / GAMMA)
    np.testing.assert_allclose(value, s @ slope - GAMMA / 2 * slope @ slope)


def test_a_tie_at_the_optimum_is_reported_not_hidden(square):
    # Equal costs, one nonzero each, unequal masses: every row could take the large
    # column, a mixture is needed, and no sparse plan is one.
    b = jnp.asarray([0.6, 0.1, 0.1, 0.1, 0.1])
    cost = jnp.zeros_like(square[0])
    run = sparse_ot(cost, None, b, max_nonzeros=1, gamma=GAMMA)
    assert int(run.status) in (Status.STEP_LIMIT, Status.STALLED)
    assert not bool(run.certificate.met)
    assert abs(float(run.certificate.details["tie_margin"])) < 1e-6
    assert int((run.plan > 0).sum(0).max()) == 1


def test_routing_keeps_the_capacity_and_serves_everyone(square):
    # One token each: the best assignment, though all prefer the same expert.
    scores = -square[0] + jnp.asarray([3.0, 0.0, 0.0, 0.0, 0.0])[None, :]
    routing = route_tokens(scores, 1, gamma=GAMMA)
    assert routing.tokens.shape == routing.weights.shape == (5, 1)
    np.testing.assert_allclose(routing.weights, 0.2, atol=1e-12)
    tokens, experts = linear_sum_assignment(-np.asarray(scores))
    np.testing.assert_array_equal(routing.tokens[experts, 0], tokens)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cost": np.ones(3)}, ValueError, "`cost` must have shape"),
        ({"cost": np.ones((6, 4), int)}, TypeError, "`cost` must be floating"),
        ({"a": np.full(6, 0.5)}, ValueError, "`a` must sum to 1"),
        ({"max_nonzeros": 0}, ValueError, "`max_nonzeros` must be an integer from 1"),
        ({"max_nonzeros": 7}, ValueError, "`max_nonzeros` must be an integer from 1"),
        ({"max_nonzeros": 1}, ValueError, "`max_nonzeros` must be at least 2"),
        ({"gamma": 0.0}, ValueError, "`gamma` must be positive"),
        ({"gamma": np.ones(2)}, ValueError, "`gamma` must have shape"),
        ({"form": "primal"}, ValueError, "`form` must be one of"),
        ({"tol": -1.0}, ValueError, "`tol` must be positive"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(changes, error, message):
    given = {"cost": np.ones((6, 4)), "max_nonzeros": 2, "gamma": 0.1} | changes
    with pytest.raises(error, match=f"SparseTransport: {message}|sparse_ot: {message}"):
        sparse_ot(**given)
    with pytest.raises(ValueError, match="`nonzeros` must be an integer from 1 to 3"):
        topk_relu_conjugate(jnp.zeros(3), 4, 1.0)
