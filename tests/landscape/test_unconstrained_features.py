"""The unconstrained features model: optimum, certificates, solvers, derivatives."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Newton, Status, solve
from varan.core import implicit_root
from varan.landscape import (
    AlternatingRidge,
    HeadAndFeatures,
    UnconstrainedFeatures,
    collapse_metrics,
    global_optimum,
    proximal_features,
    response_operator,
)

K, D, N = 3, 5, 4
LABELS = np.repeat(np.arange(K), N)
TARGETS = np.eye(K)[LABELS]
KEY = jax.random.key(0)
ANCHOR = jax.random.normal(KEY, (K * N, D)) + 0.3
LAM_W, LAM_H, BETA = 0.08, 0.05, 4.0


@eqx.filter_jit
def solved(anchor, lam_w, lam_h, beta):
    # Rounding leaves beta * eps * |H| / N, some 1e-13 at the largest beta below.
    return proximal_features(anchor, LABELS, lam_w, lam_h, beta, tol=5e-13)


@eqx.filter_jit
def certified(problem, x):
    return problem.certify(x, problem.condition(x), 1e-3), problem.value(x)


@eqx.filter_jit
def reduced_hessian(anchor, lam_w, lam_h, beta, features):
    """N times the Hessian of the objective in H, the last layer eliminated."""
    held = UnconstrainedFeatures(LABELS, lam_w, lam_h, anchor, beta)

    def value(flat):
        features = flat.reshape(anchor.shape)
        return held.value(HeadAndFeatures(held.best_head(features), features))

    return len(LABELS) * jax.hessian(value)(features.ravel())


@pytest.mark.parametrize(("lam_w", "lam_h"), [(0.05, 0.2), (1.4, 0.3), (2.0, 0.7)])
def test_closed_form_optimum(lam_w, lam_h):
    problem = UnconstrainedFeatures(LABELS, lam_w, lam_h)
    c = min(np.sqrt(lam_w * lam_h), 1.0)
    np.testing.assert_allclose(problem.optimal_value(), c - c * c / 2, rtol=1e-13)
    x = global_optimum(problem, D, key=KEY)
    np.testing.assert_allclose(
        problem.value(x), problem.optimal_value(), rtol=1e-13, atol=1e-15
    )
    assert problem.residual(problem.condition(x)) < 1e-14
    means = x.features[::N]
    np.testing.assert_allclose(x.features, means[LABELS], atol=1e-14)
    rho = (1 - c) * np.sqrt(lam_w / lam_h)
    np.testing.assert_allclose(means @ means.T, rho * np.eye(K), atol=1e-13)
    np.testing.assert_allclose(means @ x.head.T, (1 - c) * np.eye(K), atol=1e-13)
    if c < 1:
        np.testing.assert_allclose(x.head, np.sqrt(lam_h / lam_w) * means, atol=1e-13)


def test_optimum_of_any_targets_is_reached_and_never_passed():
    rng = np.random.default_rng(0)
    targets = jnp.asarray(rng.standard_normal((9, K)))
    problem = UnconstrainedFeatures(targets, 0.3, 0.2)
    best = problem.optimal_value()
    x = global_optimum(problem, D, key=KEY)
    np.testing.assert_allclose(problem.value(x), best, rtol=1e-13)
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed))
        other = HeadAndFeatures(
            x.head + 0.1 * jax.random.normal(keys[0], x.head.shape),
            x.features + 0.1 * jax.random.normal(keys[1], x.features.shape),
        )
        assert problem.value(other) > best


def test_alternating_ridge_finds_the_plain_optimum():
    problem = UnconstrainedFeatures(LABELS, 0.3, 0.3)
    start = HeadAndFeatures(problem.best_head(ANCHOR), ANCHOR)
    solution = solve(problem, AlternatingRidge(), start, tol=1e-11)
    assert solution.converged and solution.certificate.met
    assert abs(solution.certificate.value) < 1e-14
    metrics = collapse_metrics(solution.x.features, LABELS)
    assert metrics.nc1_ratio < 1e-12 and metrics.nc2 < 1e-6


def test_zero_is_a_saddle_that_the_certificate_exposes():
    problem = UnconstrainedFeatures(LABELS, 0.3, 0.3)
    origin = HeadAndFeatures(jnp.zeros((K, D)), jnp.zeros((K * N, D)))
    solution = solve(problem, AlternatingRidge(), origin, tol=1e-11)
    assert solution.converged  # stationary, and yet
    assert not solution.certificate.met
    np.testing.assert_allclose(solution.certificate.value, 0.5 - (0.3 - 0.045))


def test_condition_is_the_gradient():
    problem = UnconstrainedFeatures(LABELS, LAM_W, LAM_H, ANCHOR, BETA)
    x = HeadAndFeatures(jax.random.normal(KEY, (K, D)), 2 * ANCHOR)
    gradient = jax.grad(problem.value)(x)
    for ours, theirs in zip(problem.condition(x), gradient, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    best = HeadAndFeatures(problem.best_head(x.features), x.features)
    np.testing.assert_allclose(problem.condition(best).head, 0, atol=1e-14)
    best = HeadAndFeatures(x.head, problem.best_features(x.head))
    np.testing.assert_allclose(problem.condition(best).features, 0, atol=1e-14)


def test_steps_never_raise_the_objective():
    problem = UnconstrainedFeatures(LABELS, LAM_W, LAM_H, ANCHOR, 0.5)
    solver = AlternatingRidge()
    start = HeadAndFeatures(jax.random.normal(KEY, (K, D)), ANCHOR)
    state = solver.init(problem, start)
    values = [problem.value(state.x)]
    for _ in range(10):
        state = solver.step(problem, state)
        values.append(problem.value(state.x))
    assert np.all(np.diff(values) <= 1e-15)


def test_proximal_features_move_towards_collapse():
    before = collapse_metrics(ANCHOR, LABELS).nc1_ratio
    last = 0.0
    for beta in (1.0, 4.0, 30.0, 400.0):
        solution = solved(ANCHOR, LAM_W, LAM_H, beta)
        assert solution.converged
        ratio = collapse_metrics(solution.x.features, LABELS).nc1_ratio
        assert last < ratio < before
        last = ratio


def test_collapsed_anchor_is_its_own_answer():
    plain = UnconstrainedFeatures(LABELS, LAM_W, LAM_H)
    x = global_optimum(plain, D, key=KEY)
    solution = solved(x.features, LAM_W, LAM_H, BETA)
    np.testing.assert_allclose(solution.x.features, x.features, atol=1e-10)
    np.testing.assert_allclose(solution.x.head, x.head, atol=1e-10)


def test_zero_anchor_is_the_plain_model_with_more_decay():
    zero = jnp.zeros_like(ANCHOR)
    held = UnconstrainedFeatures(LABELS, LAM_W, LAM_H, zero, 0.2)
    plain = UnconstrainedFeatures(LABELS, LAM_W, LAM_H + 0.2)
    x = HeadAndFeatures(jax.random.normal(KEY, (K, D)), ANCHOR)
    np.testing.assert_allclose(held.value(x), plain.value(x), rtol=1e-14)


def test_newton_agrees():
    solution = solved(ANCHOR, LAM_W, LAM_H, BETA)
    start = HeadAndFeatures(0.9 * solution.x.head, 0.9 * solution.x.features)
    newton = solve(solution.problem, Newton(), start, tol=1e-12)
    assert newton.converged
    np.testing.assert_allclose(newton.x.features, solution.x.features, atol=1e-9)


@pytest.mark.parametrize("beta", [0.5, 4.0, 40.0, 400.0])
def test_certificate_of_the_anchored_model_is_honest(beta):
    truth = solved(ANCHOR, LAM_W, LAM_H, beta)
    problem = truth.problem
    details = truth.certificate.details
    assert bool(details["global"]) == (beta + LAM_H > 1 / LAM_W)
    # The claimed modulus is below the true curvature, at the minimiser and around.
    curvature = np.linalg.eigvalsh(
        reduced_hessian(ANCHOR, LAM_W, LAM_H, beta, truth.x.features)
    )[0]
    assert details["modulus"] <= curvature * (1 + 1e-10)
    if beta > 1 / LAM_W:
        assert truth.certificate.met and truth.certificate.value < 1e-15
    best = problem.value(truth.x)
    for size in (1e-3, 1e-1, 1.0):
        noise = jax.random.normal(jax.random.key(1), ANCHOR.shape)
        features = truth.x.features + size * noise
        for head in (problem.best_head(features), truth.x.head):
            x = HeadAndFeatures(head, features)
            certificate, value = certified(problem, x)
            if details["global"]:
                assert certificate.value < np.inf
            assert certificate.value >= value - best
            gap = jnp.linalg.norm(features - truth.x.features)
            assert certificate.details["distance"] >= gap * (1 - 1e-9)


def test_local_certificate_without_the_global_one():
    # Near collapse the misfit is small, and so is the curvature that it costs.
    plain = UnconstrainedFeatures(LABELS, LAM_W, LAM_H)
    anchor = global_optimum(plain, D, key=KEY).features + 0.05 * ANCHOR
    solution = solved(anchor, LAM_W, LAM_H, 5.0)
    details = solution.certificate.details
    assert not details["global"] and solution.certificate.met
    assert solution.certificate.value < 1e-15
    curvature = np.linalg.eigvalsh(
        reduced_hessian(anchor, LAM_W, LAM_H, 5.0, solution.x.features)
    )[0]
    assert 0 < details["modulus"] <= curvature


def test_least_curvature_of_the_reduced_model_is_exact_at_zero():
    # lam_h + beta - |Y|^2 / a is attained at H = 0: the global bound cannot be better.
    zero = jnp.zeros_like(ANCHOR)
    hessian = reduced_hessian(zero, LAM_W, LAM_H, BETA, zero)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(hessian)[0], LAM_H + BETA - 1 / LAM_W, rtol=1e-9
    )


def test_derivative_in_the_anchor_is_the_response():
    change = jax.random.normal(jax.random.key(7), ANCHOR.shape)

    def features(anchor):
        return solved(anchor, LAM_W, LAM_H, BETA).x.features

    tangent = jax.jvp(features, (ANCHOR,), (change,))[1]
    solution = solved(ANCHOR, LAM_W, LAM_H, BETA)
    response = response_operator(solution.problem, solution.x)
    np.testing.assert_allclose(tangent, response.mv(change), rtol=1e-8, atol=1e-10)
    step = 1e-4
    up, down = (features(ANCHOR + s * change) for s in (step, -step))
    np.testing.assert_allclose(tangent, (up - down) / (2 * step), rtol=1e-6, atol=1e-6)


def test_derivatives_in_the_penalties():
    def ratio(penalties):
        solution = solved(ANCHOR, *penalties)
        return collapse_metrics(solution.x.features, LABELS).nc1_ratio

    at = (jnp.asarray(LAM_W), jnp.asarray(LAM_H), jnp.asarray(BETA))
    reverse = jax.grad(ratio)(at)
    for which in range(3):
        tangent = tuple(v if k == which else 0 * v for k, v in enumerate(at))
        forward = jax.jvp(ratio, (at,), (tangent,))[1]
        np.testing.assert_allclose(reverse[which] * at[which], forward, rtol=1e-8)
        up, down = (
            ratio(tuple(v + s * t for v, t in zip(at, tangent, strict=True)))
            for s in (1e-4, -1e-4)
        )
        np.testing.assert_allclose(forward, (up - down) / 2e-4, rtol=1e-6)


def test_plain_derivative_of_what_is_unique():
    # The minimiser is a rotation orbit; H H' does not depend on which one it is.
    def gram(lam_h):
        problem = UnconstrainedFeatures(LABELS, LAM_W, lam_h)
        x = global_optimum(UnconstrainedFeatures(LABELS, LAM_W, 0.05), D, key=KEY)
        x = implicit_root(
            problem.condition, x, tags=problem.jacobian_tags, unique=False
        )
        return jnp.sum(x.features**2)

    def rho(lam_h):
        return (1 - jnp.sqrt(LAM_W * lam_h)) * jnp.sqrt(LAM_W / lam_h)

    slope = jax.jvp(gram, (0.05,), (1.0,))[1]
    np.testing.assert_allclose(slope, K * N * jax.grad(rho)(0.05), rtol=1e-8)


def test_vmap_and_float32():
    betas = jnp.array([2.0, 20.0])
    together = jax.vmap(lambda b: solved(ANCHOR, LAM_W, LAM_H, b).x.features)(betas)
    alone = solved(ANCHOR, LAM_W, LAM_H, betas[1]).x.features
    np.testing.assert_allclose(together[1], alone, atol=1e-10)
    small = proximal_features(ANCHOR.astype(jnp.float32), LABELS, 0.1, 0.1, 30.0)
    assert small.x.features.dtype == jnp.float32 and small.converged


def test_cut_off_says_so():
    solution = proximal_features(ANCHOR, LABELS, 0.01, 0.01, 0.1, max_steps=2)
    assert int(solution.status) == Status.STEP_LIMIT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LABELS, 0.0, 0.1), "`lam_w` must be positive"),
        ((LABELS, 0.1, -0.1), "`lam_h` must be nonnegative"),
        ((LABELS, 0.1, np.nan), "`lam_h` must be nonnegative"),
        ((LABELS, 0.1, 0.1, ANCHOR), "must be given together"),
        ((LABELS, 0.1, 0.1, ANCHOR, 0.0), "`beta` must be positive"),
        ((LABELS, 0.1, 0.1, ANCHOR[1:], 1.0), "`anchor` must have shape"),
        ((LABELS, 0.1, 0.1, ANCHOR * jnp.nan, 1.0), "`anchor` must be finite"),
        ((LABELS + 1, 0.1, 0.1), "each with a sample"),
        ((TARGETS * np.nan, 0.1, 0.1), "`labels` must be finite"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnconstrainedFeatures(*arguments)


def test_bad_calls():
    plain = UnconstrainedFeatures(LABELS, LAM_W, LAM_H)
    held = UnconstrainedFeatures(LABELS, LAM_W, LAM_H, ANCHOR, BETA)
    with pytest.raises(ValueError, match="`dim` must be at least"):
        global_optimum(plain, K - 1, key=KEY)
    with pytest.raises(ValueError, match="`lam_h` must be positive"):
        global_optimum(UnconstrainedFeatures(LABELS, LAM_W, 0.0), D, key=KEY)
    for call in (held.optimal_value, lambda: global_optimum(held, D, key=KEY)):
        with pytest.raises(ValueError, match="plain model only"):
            call()
    with pytest.raises(TypeError, match="target matrix must be floating"):
        UnconstrainedFeatures(TARGETS.astype(int), LAM_W, LAM_H)
    with pytest.raises(ValueError, match="known outside a transformation"):
        jax.jit(lambda y: UnconstrainedFeatures(y, LAM_W, LAM_H).lam_w)(LABELS)
