"""Invariants of entropic transport: answers, derivatives, certificates, errors."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from varan import Smooth, Status, solve
from varan.transport import (
    EntropicTransport,
    SemiDualNewton,
    Sinkhorn,
    SparseNewton,
    entropic_transport,
    round_to_polytope,
    sinkhorn,
    sinkhorn_newton_sparse,
)

M, N = 6, 8
EPSILON = 0.05
SOLVERS = {
    "scaling": Sinkhorn(),
    "log": Sinkhorn("log"),
    "relaxed": Sinkhorn(relaxation="adaptive"),
    "newton": SemiDualNewton(),
    "cholesky": SemiDualNewton("cholesky"),
    "gradients": SemiDualNewton("gradients"),
    "sparse": SparseNewton(5, 4),
    "mass": SparseNewton(5, "mass"),
}


def instance(seed=0, m=M, n=N, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    a, b = rng.uniform(0.5, 1.5, m), rng.uniform(0.5, 1.5, n)
    cost = shift + scale * rng.uniform(size=(m, n))
    return jnp.asarray(cost), jnp.asarray(a / a.sum()), jnp.asarray(b / b.sum())


def reference(cost, a, b, epsilon, sweeps=3_000):
    """Log-domain Sinkhorn in numpy, to the end."""
    from scipy.special import logsumexp

    cost, a, b = map(np.asarray, (cost, a, b))
    g = np.zeros_like(b)
    for _ in range(sweeps):
        f = epsilon * (np.log(a) - logsumexp((g - cost) / epsilon, axis=1))
        g = epsilon * (np.log(b) - logsumexp((f[:, None] - cost) / epsilon, axis=0))
    return np.exp((f[:, None] + g - cost) / epsilon)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_agree_with_a_reference(name):
    cost, a, b = instance()
    problem = EntropicTransport(cost, a, b, EPSILON)
    run = solve(problem, SOLVERS[name], problem.start(), tol=1e-11, max_steps=4000)
    assert bool(run.converged)
    plan = problem.plan(run.x)
    np.testing.assert_allclose(plan, reference(cost, a, b, EPSILON), atol=1e-9)
    f, g = run.x
    assert abs(float(a @ f - b @ g)) < 1e-12
    assert float(jnp.min(plan)) >= 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [("newton", (9, 4)), ("sparse", (9, 4)), ("relaxed", (5, 1)), ("newton", (1, 5))],
)
def test_rectangular_shapes(name, shape):
    cost, a, b = instance(3, *shape)
    problem = EntropicTransport(cost, a, b, 0.05)
    run = solve(problem, SOLVERS[name], problem.start(), tol=1e-10, max_steps=4000)
    assert bool(run.converged)
    plan = problem.plan(run.x)
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-10)
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-10)


@pytest.mark.parametrize("method", ["sinkhorn", "newton", "sparse-newton"])
def test_shift_scale_and_permutation_move_the_answer_likewise(method):
    cost, a, b = instance(1)
    solved = jax.jit(
        lambda c, a, b, e: (
            entropic_transport(c, a, b, epsilon=e, method=method, tol=1e-11).plan
        )
    )
    plan = solved(cost, a, b, 0.03)
    np.testing.assert_allclose(solved(cost - 100.0, a, b, 0.03), plan, atol=1e-9)
    np.testing.assert_allclose(solved(1e3 * cost, a, b, 30.0), plan, atol=1e-9)
    order = np.random.default_rng(0).permutation(M)
    np.testing.assert_allclose(
        solved(cost[order], a[order], b, 0.03), plan[order], atol=1e-9
    )


@pytest.mark.parametrize("name", ["scaling", "log", "newton", "sparse"])
def test_started_at_the_solution_it_stops_at_once(name):
    cost, a, b = instance(2)
    problem = EntropicTransport(cost, a, b, 0.05)
    x = entropic_transport(cost, a, b, epsilon=0.05, tol=1e-12).potentials
    run = solve(problem, SOLVERS[name], x, tol=1e-10)
    assert int(run.steps) == 0
    assert bool(run.converged)


def test_far_start_and_tiny_epsilon_do_not_underflow():
    cost, a, b = instance(4)
    problem = EntropicTransport(cost, a, b, 1e-5)
    far = (100.0 * jnp.ones(M), jnp.linspace(-50.0, 50.0, N))
    for name in ("scaling", "relaxed", "newton", "sparse"):
        run = solve(problem, SOLVERS[name], far, tol=1e-9, max_steps=50)
        assert int(run.status) != Status.DIVERGED
        assert np.all(np.isfinite(run.x[0]))
    run = solve(problem, SemiDualNewton(), far, tol=1e-9)
    assert bool(run.converged)


def test_potentials_that_drift_are_absorbed():
    # Costs that differ by 4000 epsilon between rows: the corrections must move.
    cost, a, b = instance(5)
    cost = cost + 40.0 * jnp.arange(float(M))[:, None] * jnp.linspace(0, 1, N)[None, :]
    problem = EntropicTransport(cost, a, b, 0.05)
    want = entropic_transport(cost, a, b, epsilon=0.05, method="newton").plan
    run = solve(problem, Sinkhorn(), problem.start(), tol=1e-9, max_steps=20_000)
    assert bool(run.converged)
    np.testing.assert_allclose(problem.plan(run.x), want, atol=1e-6)


def test_log_and_scaling_domain_make_the_same_iterates():
    cost, a, b = instance(6)
    problem = EntropicTransport(cost, a, b, 0.05)
    runs = [
        solve(problem, Sinkhorn(mode, 1.0, 1), problem.start(), tol=1e-9)
        for mode in ("scaling", "log")
    ]
    k = int(runs[0].steps)
    assert k == int(runs[1].steps)
    np.testing.assert_allclose(
        runs[0].trace.residual[: k + 1], runs[1].trace.residual[: k + 1], rtol=1e-6
    )


def test_float32_follows_the_input():
    with jax.enable_x64(False):
        cost, a, b = (jnp.asarray(v, jnp.float32) for v in instance())
        for method in ("sinkhorn", "newton", "sparse-newton"):
            run = entropic_transport(cost, a, b, epsilon=0.05, method=method)
            assert bool(run.converged)
            assert run.plan.dtype == jnp.float32


# --- derivatives -------------------------------------------------------------------


def plan_loss(cost, a, b, epsilon, weight):
    a, b = a / a.sum(), b / b.sum()
    run = entropic_transport(cost, a, b, epsilon=epsilon, tol=1e-12)
    return jnp.sum(weight * run.plan), run.value


@pytest.fixture(scope="module")
def derivative_case():
    cost, a, b = instance(7)
    rng = np.random.default_rng(8)
    weight = jnp.asarray(rng.normal(size=(M, N)))
    args = (cost, a, b, jnp.asarray(0.08))
    direction = tuple(jnp.asarray(rng.normal(size=np.shape(v))) * 0.1 for v in args)
    return args, direction, weight


@pytest.fixture(scope="module")
def derivatives(derivative_case):
    _, _, weight = derivative_case

    def losses(*args):
        return jnp.stack(plan_loss(*args, weight))

    return (
        jax.jit(losses),
        jax.jit(lambda args, step: jax.jvp(losses, args, step)[1]),
        jax.jit(jax.jacrev(losses, argnums=(0, 1, 2, 3))),
    )


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_derivatives_match_finite_differences(derivative_case, derivatives, which):
    args, direction, _ = derivative_case
    losses, forward, reverse = derivatives
    step = tuple(
        d if i == which else jnp.zeros_like(d) for i, d in enumerate(direction)
    )

    def along(t):
        return losses(*(v + t * d for v, d in zip(args, step, strict=True)))

    h = 1e-3
    # Fourth order: its error, h^4, is far below the tolerance.
    numeric = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    np.testing.assert_allclose(forward(args, step), numeric, rtol=1e-6, atol=1e-9)
    pulled = jnp.tensordot(
        reverse(*args)[which], direction[which], axes=direction[which].ndim
    )
    np.testing.assert_allclose(pulled, numeric, rtol=1e-6, atol=1e-9)


def test_value_gradient_in_the_cost_is_the_plan(derivative_case, derivatives):
    (cost, a, b, epsilon), _, _ = derivative_case
    run = entropic_transport(cost, a, b, epsilon=epsilon, tol=1e-12)
    gradient = derivatives[2](cost, a, b, epsilon)[0][1]
    np.testing.assert_allclose(gradient, run.plan, atol=1e-10)


def test_second_derivative_matches_finite_differences(derivative_case):
    args, direction, weight = derivative_case
    cost, a, b, epsilon = args

    def slope(t):
        loss = lambda c: plan_loss(c, a, b, epsilon, weight)[1]  # noqa: E731
        gradient = jax.grad(loss)(cost + t * direction[0])
        return jnp.sum(gradient * direction[0])

    h, compiled = 1e-4, jax.jit(slope)
    numeric = (compiled(h) - compiled(-h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(slope))(0.0), numeric, rtol=1e-5)


def test_core_derivative_unrolled_and_schur_agree(derivative_case):
    (cost, a, b, epsilon), _, weight = derivative_case

    def by_core(c, how, solver):
        problem = EntropicTransport(c, a, b, epsilon)
        run = solve(
            problem, solver, problem.start(), tol=1e-12, max_steps=60, differentiate=how
        )
        return jnp.sum(weight * problem.plan(run.x))

    schur = jax.grad(lambda c: plan_loss(c, a, b, epsilon, weight)[0])(cost)
    implicit = jax.grad(lambda c: by_core(c, "implicit", SemiDualNewton()))(cost)
    unrolled = jax.grad(lambda c: by_core(c, "unroll", Sinkhorn("log")))(cost)
    np.testing.assert_allclose(implicit, schur, atol=1e-9)
    np.testing.assert_allclose(unrolled, schur, atol=1e-8)


def test_potentials_differentiate_in_their_gauge(derivative_case):
    (cost, a, b, epsilon), direction, _ = derivative_case
    tilt = direction[1] - direction[1].mean()

    def potentials(t):
        run = entropic_transport(cost, a + t * tilt, b, epsilon=epsilon, tol=1e-13)
        return run.potentials

    h = 1e-5
    tangent = jax.jvp(potentials, (0.0,), (1.0,))[1]
    for got, up, down in zip(tangent, potentials(h), potentials(-h), strict=True):
        np.testing.assert_allclose(got, (up - down) / (2 * h), atol=1e-6)


def test_derivative_of_a_run_that_did_not_converge_is_nan():
    cost, a, b = instance()
    gradient = jax.grad(
        lambda c: sinkhorn(c, a, b, epsilon=1e-3, max_sweeps=10).plan[0, 0]
    )(cost)
    assert np.all(np.isnan(gradient))


def test_vmap_lanes_have_their_own_status():
    cost, a, b = instance(9)
    epsilons = jnp.asarray([0.1, 1e-4])
    run = jax.vmap(
        lambda e: sinkhorn(cost, a, b, epsilon=e, tol=1e-10, max_sweeps=200)
    )(epsilons)
    assert run.status.tolist() == [Status.CONVERGED, Status.STEP_LIMIT]
    newton = jax.vmap(lambda e: entropic_transport(cost, a, b, epsilon=e).plan)
    single = entropic_transport(cost, a, b, epsilon=1e-4, method="newton").plan
    np.testing.assert_allclose(newton(epsilons)[1], single, atol=1e-9)


# --- certificates ------------------------------------------------------------------


@pytest.fixture(scope="module")
def certified():
    def run(cost, a, b, epsilon, f, g):
        problem = EntropicTransport(cost, a, b, epsilon)
        certificate = problem.certify((f, g), problem.condition((f, g)), 1e-9)
        rounded = round_to_polytope(problem.plan((f, g)), a, b)
        return certificate, rounded, problem.primal_value(rounded)

    return jax.jit(run)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([1e-3, 0.03, 0.5]))
def test_certificate_bounds_the_truth_at_any_potentials(certified, seed, epsilon):
    cost, a, b = instance(seed)
    rng = np.random.default_rng(seed)
    f, g = (jnp.asarray(rng.normal(size=k) * epsilon) for k in (M, N))
    g = g + jnp.min(cost - f[:, None], axis=0)
    certificate, rounded, primal = certified(cost, a, b, epsilon, f, g)
    np.testing.assert_allclose(rounded.sum(1), a, atol=1e-12)
    np.testing.assert_allclose(rounded.sum(0), b, atol=1e-12)
    assert float(rounded.min()) >= 0
    details = {k: float(v) for k, v in certificate.details.items()}
    best = float(entropic_transport(cost, a, b, epsilon=epsilon, method="newton").value)
    slack = 1e-9
    assert details["dual_value"] <= best + slack
    assert float(primal) - best <= details["duality_gap"] + slack
    least = transport_cost(cost, a, b)
    assert np.isclose(details["rounded_cost"], float(jnp.sum(cost * rounded)))
    assert details["rounded_cost"] - least <= details["cost_gap"] + slack


def transport_cost(cost, a, b):
    cost, a, b = map(np.asarray, (cost, a, b))
    m, n = cost.shape
    rows = np.kron(np.eye(m), np.ones(n))
    columns = np.kron(np.ones(m), np.eye(n))
    return linprog(
        cost.reshape(-1), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a, b])
    ).fun


def test_small_epsilon_reaches_the_assignment():
    cost, _, _ = instance(11, 7, 7)
    i, j = linear_sum_assignment(np.asarray(cost))
    least = float(np.asarray(cost)[i, j].sum() / 7)
    run = entropic_transport(cost, epsilon=1e-4, tol=1e-8)
    assert bool(run.converged)
    gap = float(run.certificate.details["cost_gap"])
    cost_of_plan = float(run.certificate.details["rounded_cost"])
    assert 0 <= cost_of_plan - least <= gap + 1e-12
    assert gap <= 1e-4 * np.log(49) + 1e-7


def test_tight_certificate_at_the_solution():
    cost, a, b = instance(12)
    run = entropic_transport(cost, a, b, epsilon=0.05, tol=1e-11)
    assert bool(run.certificate.met)
    assert run.certificate.proof
    assert float(run.certificate.details["duality_gap"]) < 1e-10
    np.testing.assert_allclose(run.rounded_plan, run.plan, atol=1e-10)


def test_rounding_is_near():
    rng = np.random.default_rng(0)
    _, a, b = instance()
    plan = jnp.asarray(rng.uniform(size=(M, N)) * 2 / (M * N))
    rounded = round_to_polytope(plan, a, b)
    error = jnp.sum(jnp.abs(plan.sum(1) - a)) + jnp.sum(jnp.abs(plan.sum(0) - b))
    assert float(jnp.sum(jnp.abs(rounded - plan))) <= 2 * float(error)


def test_what_potentials_cannot_resolve_is_reported():
    cost, a, b = instance(13)
    run = entropic_transport(
        cost, a, b, epsilon=1e-9, method="newton", tol=1e-13, max_steps=300
    )
    # Potentials over epsilon reach 1e9: float64 holds the plan to about 1e-7 only.
    assert float(run.certificate.value) > 1e-13
    assert not bool(run.certificate.met)


# --- bad input ---------------------------------------------------------------------

GOOD = np.ones((2, 3)), np.full(2, 0.5), np.full(3, 1 / 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cost": np.ones(3)}, ValueError, "`cost` must have shape"),
        ({"cost": np.ones((0, 3))}, ValueError, "`cost` must not be empty"),
        ({"cost": np.full((2, 3), np.nan)}, ValueError, "`cost` must be finite"),
        ({"cost": np.full((2, 3), np.inf)}, ValueError, "`cost` must be finite"),
        ({"cost": np.ones((2, 3), int)}, TypeError, "`cost` must be floating"),
        ({"a": np.full(3, 1 / 3)}, ValueError, r"`a` must have shape \(2,\)"),
        ({"a": np.array([1.5, -0.5])}, ValueError, "`a` must be positive"),
        ({"a": np.array([1.0, 0.0])}, ValueError, "`a` must be positive"),
        ({"a": np.array([np.nan, 1.0])}, ValueError, "`a` must be finite"),
        ({"b": np.full(3, 0.5)}, ValueError, "`b` must sum to 1"),
        ({"epsilon": 0.0}, ValueError, "`epsilon` must be positive"),
        ({"epsilon": -1.0}, ValueError, "`epsilon` must be positive"),
        ({"epsilon": None}, TypeError, "`epsilon` must be given"),
        ({"epsilon": np.ones(2)}, ValueError, "`epsilon` must be a scalar"),
        ({"tol": 0.0}, ValueError, "`tol` must be positive"),
    ],
)
@pytest.mark.parametrize("call", [entropic_transport, sinkhorn, sinkhorn_newton_sparse])
def test_bad_input_is_refused_in_one_sentence(call, changes, error, message):
    given = dict(zip(("cost", "a", "b"), GOOD, strict=True)) | {"epsilon": 0.1}
    with pytest.raises(error, match=message):
        call(**(given | changes))


def test_bad_settings_are_refused():
    cost, a, b = GOOD
    with pytest.raises(ValueError, match="`method` must be one of"):
        entropic_transport(cost, a, b, epsilon=0.1, method="fast")
    with pytest.raises(ValueError, match=r"`relaxation` must be a number in \(0, 2\)"):
        Sinkhorn(relaxation=2.0)
    with pytest.raises(ValueError, match="`mode` must be one of"):
        Sinkhorn("fast")
    with pytest.raises(ValueError, match="`sweeps` must be a positive"):
        Sinkhorn(sweeps=0)
    with pytest.raises(ValueError, match="`warmup` must be an integer"):
        SparseNewton(-1)
    with pytest.raises(ValueError, match="`keep_per_row` must be a positive"):
        SparseNewton(20, 0)
    with pytest.raises(ValueError, match="`linear` must be one of"):
        SemiDualNewton("lu")


def test_float32_refuses_a_tolerance_it_cannot_reach():
    cost = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="`tol` must be at least 1e-06 in float32"):
        entropic_transport(cost, epsilon=0.1, tol=1e-8)


def test_a_geometry_is_taken():
    cost, a, b = instance()
    geometry = types.SimpleNamespace(cost_matrix=cost, epsilon=0.05)
    got = entropic_transport(geometry, a, b).plan
    want = entropic_transport(cost, a, b, epsilon=0.05).plan
    np.testing.assert_allclose(got, want, atol=1e-12)
    other = entropic_transport(geometry, a, b, epsilon=0.5).plan
    assert not np.allclose(other, want)


def test_new_values_do_not_compile_again():
    cost, a, b = instance()
    entropic_transport(cost, a, b, epsilon=1e-4)
    with jax.log_compiles(False), jax.check_tracer_leaks(False):
        from varan.transport._solve import _solve

        before = _solve._cached._cache_size()
        entropic_transport(cost + 0.1, b=b, epsilon=2e-4)
        assert _solve._cached._cache_size() == before


def test_traced_values_out_of_range_are_nan_and_never_converge():
    cost, a, b = instance()

    @jax.jit
    def run(epsilon, a):
        end = entropic_transport(cost, a, b, epsilon=epsilon)
        return end.converged, end.cost, end.value, end.rounded_plan

    for epsilon, mass in ((-0.1, a), (0.1, 4 * a), (0.1, a.at[0].set(-a[0]))):
        converged, *numbers = run(epsilon, mass)
        assert not bool(converged)
        assert all(bool(jnp.all(jnp.isnan(v))) for v in numbers)
    assert bool(run(0.1, a)[0])


def test_clouds_in_place_of_a_cost_and_other_problems_are_named():
    x, y = jnp.ones((3, 2)), jnp.zeros((4, 2))
    with pytest.raises(ValueError, match=r"make a cost by cost_matrix\(x, y\)"):
        entropic_transport(x, y, epsilon=0.1)
    plain = Smooth(lambda z: jnp.sum(z**2))
    for solver in (Sinkhorn(), SemiDualNewton(), SparseNewton()):
        with pytest.raises(TypeError, match="`problem` must be an EntropicTransport"):
            solver.init(plain, jnp.ones(2))


def test_a_solution_shows_its_numbers():
    cost, a, b = instance()
    end = entropic_transport(cost, a, b, epsilon=0.1)
    text = str(end)
    assert text.startswith("TransportSolution: converged")
    assert f"{float(end.cost):.3g}" in text and "duality_gap" in text
    shown = []
    jax.jit(lambda c: shown.append(str(entropic_transport(c, epsilon=0.1))))(cost)
    assert shown == ["TransportSolution(traced or batched)"]


def test_rounding_refuses_what_has_no_answer():
    half = jnp.full(2, 0.5)
    plan = jnp.array([[0.5, 0.1], [0.0, 0.5]])
    for bad, message in (
        ((plan, jnp.ones(3) / 3, half), "`a` must have shape"),
        ((plan, jnp.ones(2), half), "have one total"),
        ((plan, jnp.array([1.5, -0.5]), half), "must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            round_to_polytope(*bad)
    rounded = jax.jit(round_to_polytope)
    assert bool(jnp.all(jnp.isnan(rounded(plan, jnp.ones(2), half))))
    assert bool(jnp.any(jnp.isnan(rounded(-plan, half, half))))
