"""Proximal gradient against scikit-learn's lasso, brute force, and the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Lasso

from varan import Newton, Root, Smooth, Status, solve
from varan.firstorder import ProximalGradient
from varan.operators import project_box, project_simplex, prox_l1
from varan.problems import Composite, SetConstrained
from varan.testing import Case, contract


def half_squares(w, X, y, lam):
    return jnp.mean((X @ w - y) ** 2) / 2


def soft(v, stepsize, X, y, lam):
    return prox_l1(v, lam, stepsize)


def data(seed, n=12, d=4):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return jnp.asarray(X), jnp.asarray(X @ [2.0, -1.0, 0.0, 0.0] + rng.normal(size=n))


def lasso(seed, lam=0.3):
    return Composite(half_squares, soft, *data(seed), jnp.asarray(lam))


def loss_in_box(w, X, y):
    return half_squares(w, X, y, None)


def into_box(v, X, y):
    return project_box(v, -0.5, 0.5)


def boxed(seed):
    return SetConstrained(loss_in_box, into_box, *data(seed))


START = jnp.full(4, 0.1)
CASES = [
    Case(lambda: ProximalGradient(), (lasso(0), lasso(1)), START, name="lasso"),
    Case(
        lambda: ProximalGradient(0.1, accelerate=False),
        (lasso(0), lasso(1)),
        START,
        name="plain",
    ),
    Case(
        lambda: ProximalGradient(),
        (boxed(0), boxed(1)),
        START,
        bounds=(-0.5 - 1e-12, 0.5 + 1e-12),
        name="box",
    ),
]
test_contract = contract(CASES)


@pytest.mark.parametrize("lam", [0.01, 0.3, 5.0])
def test_the_lasso_is_scikit_learns(lam):
    X, y = data(3)
    ours = solve(lasso(3, lam), ProximalGradient(), START, tol=1e-10)
    theirs = Lasso(alpha=lam, fit_intercept=False, tol=1e-14, max_iter=10**5)
    assert ours.converged
    np.testing.assert_allclose(ours.x, theirs.fit(X, y).coef_, atol=1e-8)
    assert int(jnp.sum(ours.x == 0)) == int(np.sum(theirs.coef_ == 0))


def test_the_derivative_is_that_of_the_active_piece():
    def path(lam):
        return solve(lasso(0, lam), ProximalGradient(), START, tol=1e-11).x

    slope = jax.jacobian(path)(0.3)
    difference = (path(0.3 + 1e-5) - path(0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope, difference, atol=1e-6)
    np.testing.assert_allclose(jax.jvp(path, (0.3,), (1.0,))[1], slope, atol=1e-8)
    assert np.all(np.asarray(slope)[np.asarray(path(0.3)) == 0] == 0)


def test_momentum_needs_fewer_gradients_where_the_condition_is_bad():
    scales = jnp.logspace(0, -4, 30)
    problem = SetConstrained(
        lambda x, s: jnp.sum(s * (x - 1) ** 2) / 2, lambda v, s: v, scales
    )

    def gradients(accelerate):
        solver = ProximalGradient(1.0, accelerate=accelerate)
        end = solve(problem, solver, jnp.zeros(30), tol=1e-7, max_steps=20_000)
        assert end.converged
        return int(end.evaluations)

    # The condition number is 1e4: its square root against itself.
    assert gradients(True) * 20 < gradients(False)


def test_a_smooth_problem_needs_no_operator():
    def loss(x):
        return jnp.sum(jnp.cosh(x - 2.0))

    ours = solve(Smooth(loss), ProximalGradient(), START, tol=1e-9)
    newton = solve(Smooth(loss), Newton(), START, tol=1e-9)
    np.testing.assert_allclose(ours.x, newton.x, atol=1e-8)


def test_one_gradient_an_iteration_and_one_for_the_condition():
    end = solve(lasso(0), ProximalGradient(0.1), START, tol=1e-9)
    assert end.evaluations == 1 + 11 * end.steps


def test_lanes_stop_by_themselves_and_pytrees_pass():
    def fit(lam):
        return solve(lasso(0, lam), ProximalGradient(), START, tol=1e-9)

    lams = jnp.array([0.01, 0.3, 5.0])
    lanes = jax.vmap(fit)(lams)
    assert np.all(lanes.converged) and len(set(np.asarray(lanes.steps).tolist())) > 1
    problem = SetConstrained(
        lambda x: jnp.sum((x["a"] - 2.0) ** 2) + jnp.sum(x["b"] ** 4),
        lambda v: {"a": project_simplex(v["a"]), "b": v["b"]},
    )
    start = {"a": jnp.full(3, 1 / 3), "b": jnp.ones(2)}
    end = solve(problem, ProximalGradient(), start, tol=1e-6)
    assert end.converged
    np.testing.assert_allclose(end.x["a"], 1 / 3, atol=1e-6)


def test_values_that_are_not_finite_are_stepped_back_from():
    # log is NaN where the first trial lands.
    problem = SetConstrained(
        lambda x: jnp.sum(100 * x - jnp.log(x)), lambda v: v, stepsize=1e-3
    )
    end = solve(problem, ProximalGradient(), jnp.ones(2), tol=1e-6)
    assert end.converged
    np.testing.assert_allclose(end.x, 0.01, atol=1e-6)


def test_a_gradient_that_is_not_finite_ends_the_run():
    problem = SetConstrained(lambda x: jnp.sum(jnp.sqrt(x)), lambda v: v)
    end = solve(problem, ProximalGradient(), jnp.zeros(2))
    assert end.status == Status.DIVERGED and not end.converged


def test_bad_settings_and_problems_are_refused():
    with pytest.raises(ValueError, match="ProximalGradient: `stepsize` must be pos"):
        ProximalGradient(-1.0)
    with pytest.raises(ValueError, match="`iterations` must be a positive integer"):
        ProximalGradient(iterations=0)
    with pytest.raises(TypeError, match="the problem must have `smooth` and `prox`"):
        solve(Root(lambda x: x), ProximalGradient(), START)
