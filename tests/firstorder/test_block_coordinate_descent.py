"""Coordinate descent: the contract, scikit-learn, and what only it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import ElasticNet as SkElasticNet
from sklearn.linear_model import MultiTaskLasso

from varan import Root, Status, solve
from varan.firstorder import BlockCoordinateDescent, elastic_net, lasso, logistic_l1
from varan.problems import ElasticNet, GeneralisedLinear, GroupLasso, Logistic
from varan.testing import Case, contract


def data(seed, n=12, d=4):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return jnp.asarray(X), jnp.asarray(X @ [2.0, -1.0, 0.0, 0.0] + rng.normal(size=n))


def net(seed):
    return GeneralisedLinear(*data(seed), penalty=ElasticNet(jnp.array(0.3), 0.1))


def logistic(seed):
    X, y = data(seed)
    soft = jax.nn.sigmoid(y)
    return GeneralisedLinear(X, soft, loss=Logistic(), penalty=ElasticNet(0.02, 0.01))


def nonnegative(seed):
    return GeneralisedLinear(*data(seed), penalty=ElasticNet(0.1, nonnegative=True))


START = jnp.full(4, 0.1)
WHOLE = {"pytrees": "the unknown is one array, rows of coefficients"}
CASES = [
    Case(BlockCoordinateDescent, [net(0), net(1)], START, xfail=WHOLE, name="net"),
    Case(
        BlockCoordinateDescent,
        [logistic(0), logistic(1)],
        START,
        xfail=WHOLE,
        name="logistic",
    ),
    Case(
        lambda: BlockCoordinateDescent(gram=False),
        [nonnegative(0), nonnegative(1)],
        START,
        bounds=(0.0, np.inf),
        xfail=WHOLE,
        name="predictions",
    ),
]
test_contract = contract(CASES)


@pytest.fixture(scope="module")
def diabetes():
    X, y = load_diabetes(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    return X, (y - y.mean()) / y.std()


@pytest.mark.parametrize(("lam", "ratio"), [(0.01, 1.0), (0.1, 1.0), (0.1, 0.5)])
def test_the_elastic_net_is_scikit_learns(diabetes, lam, ratio):
    ours = elastic_net(*map(jnp.asarray, diabetes), lam, ratio, tol=1e-10)
    theirs = SkElasticNet(
        alpha=lam, l1_ratio=ratio, fit_intercept=False, tol=1e-14, max_iter=10**5
    ).fit(*diabetes)
    assert ours.converged and ours.certificate.met
    np.testing.assert_allclose(ours.x, theirs.coef_, atol=1e-7)
    assert np.array_equal(ours.x == 0, theirs.coef_ == 0)


def test_the_multi_task_lasso_is_scikit_learns(diabetes):
    X, y = diabetes
    Y = np.stack([y, X[:, 2] - y, X[:, 0] * X[:, 1]], 1)
    problem = GeneralisedLinear(jnp.asarray(X), jnp.asarray(Y), penalty=GroupLasso(0.2))
    ours = solve(problem, BlockCoordinateDescent(), jnp.zeros((10, 3)), tol=1e-10)
    theirs = MultiTaskLasso(alpha=0.2, fit_intercept=False, tol=1e-14, max_iter=10**5)
    assert ours.converged
    np.testing.assert_allclose(ours.x, theirs.fit(X, Y).coef_.T, atol=1e-7)


def test_non_negative_least_squares_is_scipys(diabetes):
    X, y = diabetes
    problem = GeneralisedLinear(
        jnp.asarray(X), jnp.asarray(y), penalty=ElasticNet(nonnegative=True)
    )
    ours = solve(problem, BlockCoordinateDescent(), jnp.zeros(10), tol=1e-10)
    np.testing.assert_allclose(ours.x, nnls(X, y)[0], atol=1e-8)


def test_the_sparse_logistic_model_of_real_data_is_proved_best():
    X, y = load_breast_cancer(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    end = logistic_l1(jnp.asarray(X), jnp.asarray(y), 0.01, tol=1e-9)
    # Second-order steps: few, where coordinates against a bound take hundreds.
    assert end.converged and end.steps < 30
    assert end.certificate.kind == "duality gap" and end.certificate.value < 1e-7
    assert 0 < int(jnp.sum(end.x != 0)) < 15


def test_a_path_is_one_batch(diabetes):
    X, y = map(jnp.asarray, diabetes)

    def fit(lam):
        return lasso(X, y, lam, tol=1e-10)

    lams = jnp.logspace(-3, 0, 8)
    lanes = jax.vmap(fit)(lams)
    assert np.all(lanes.converged)
    np.testing.assert_allclose(lanes.x[3], fit(lams[3]).x, atol=1e-9)
    sizes = np.sum(np.asarray(lanes.x) != 0, axis=1)
    assert sizes[0] >= 9 and sizes[-1] == 0
    slope = jax.jacobian(lambda lam: fit(lam).x)(0.1)
    gap = fit(0.1 + 1e-6).x - fit(0.1 - 1e-6).x
    np.testing.assert_allclose(slope, gap / 2e-6, atol=1e-6)


def test_more_columns_than_samples():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((20, 60)), rng.standard_normal(20)
    ours = lasso(jnp.asarray(X), jnp.asarray(y), 0.1, tol=1e-9)
    theirs = SkElasticNet(
        alpha=0.1, l1_ratio=1.0, fit_intercept=False, tol=1e-14, max_iter=10**5
    ).fit(X, y)
    assert ours.converged and ours.certificate.value < 1e-7
    np.testing.assert_allclose(ours.x, theirs.coef_, atol=1e-7)


def test_a_column_of_zeros_gets_no_weight():
    X, y = data(0)
    for gram in (True, False):
        problem = GeneralisedLinear(X.at[:, 0].set(0.0), y, penalty=ElasticNet(0.1))
        end = solve(problem, BlockCoordinateDescent(gram=gram), START, tol=1e-9)
        assert end.converged and end.x[0] == 0


def test_classes_that_a_plane_separates_have_no_unpenalised_fit():
    X, y = jnp.array([[1.0], [2.0], [-1.0]]), jnp.array([1.0, 1.0, 0.0])
    problem = GeneralisedLinear(X, y, loss=Logistic())
    end = solve(problem, BlockCoordinateDescent(), jnp.zeros(1), tol=1e-30)
    assert not end.converged and end.status != Status.RUNNING


def test_equal_columns_have_no_derivative():
    X, y = data(0)
    twice = X[:, jnp.array([0, 0])]

    def fit(lam):
        return lasso(twice, y, lam, tol=1e-9)

    assert fit(0.1).converged
    assert np.all(np.isnan(jax.jacobian(lambda lam: fit(lam).x)(0.1)))


def test_bad_settings_and_problems_are_refused():
    with pytest.raises(ValueError, match="`sweeps` must be a positive integer"):
        BlockCoordinateDescent(sweeps=0)
    with pytest.raises(TypeError, match="the problem must be a GeneralisedLinear"):
        solve(Root(lambda x: x), BlockCoordinateDescent(), START)
