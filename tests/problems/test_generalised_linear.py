"""Linear models: conjugates by brute force, honest gaps, derivatives, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Newton, Smooth, solve
from varan.firstorder import BlockCoordinateDescent, ProximalGradient
from varan.problems import (
    ElasticNet,
    GeneralisedLinear,
    GroupLasso,
    Huber,
    Logistic,
    Loss,
    Multinomial,
    SmoothedHinge,
    Squared,
)

N, D = 14, 4
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, D))
Y = X @ [2.0, -1.0, 0.0, 0.0] + RNG.normal(size=N)
LABEL = (Y > 0).astype(float)
CLASS = np.eye(3)[RNG.integers(0, 3, N)]
FREE_LAST = jnp.array([0.1, 0.1, 0.1, 0.0])
PROBLEMS = {
    "lasso": (Y, Squared(), ElasticNet(0.3)),
    "elastic net": (Y, Squared(), ElasticNet(0.2, 0.1)),
    "ridge": (Y, Squared(), ElasticNet(0.0, 0.5)),
    "nnls": (Y, Squared(), ElasticNet(nonnegative=True)),
    "least squares": (Y, Squared(), ElasticNet()),
    "intercept": (Y, Squared(), ElasticNet(FREE_LAST)),
    "non-negative lasso": (Y, Squared(), ElasticNet(0.3, nonnegative=True)),
    "huber": (Y, Huber(0.7), ElasticNet(0.05)),
    "logistic": (LABEL, Logistic(), ElasticNet(0.05)),
    "logistic, intercept": (LABEL, Logistic(), ElasticNet(FREE_LAST)),
    "hinge": (LABEL, SmoothedHinge(0.5), ElasticNet(0.02, 0.1)),
    "multi-task": (np.stack([Y, X[:, 2] - Y], 1), Squared(), GroupLasso(0.3)),
    "two lassos": (np.stack([Y, X[:, 2] - Y], 1), Squared(), ElasticNet(0.3)),
    "multinomial": (CLASS, Multinomial(), GroupLasso(0.05, 0.01)),
}


def make(name, average=True):
    y, loss, penalty = PROBLEMS[name]
    return GeneralisedLinear(
        jnp.asarray(X), jnp.asarray(y), loss=loss, penalty=penalty, average=average
    )


def shape(problem):
    return (D, *problem.y.shape[1:])


@functools.cache
def best(name):
    problem = make(name)
    start = jnp.zeros(shape(problem))
    end = solve(problem, BlockCoordinateDescent(), start, tol=1e-11)
    assert end.converged
    return end


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gap_is_never_below_the_truth_and_closes(name):
    problem, end = make(name), best(name)
    # Of the problem's magnitude: a gap is of the order of the condition.
    assert end.certificate.kind == "duality gap" and end.certificate.value < 1e-8
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((40, *end.x.shape))
    sizes = np.repeat(10.0 ** np.arange(0, -10, -1), 4)
    points = end.x[None] + jnp.asarray(noise * sizes.reshape(-1, *[1] * end.x.ndim))

    @jax.jit
    @jax.vmap
    def measure(w):
        w = problem.prox(w, 1e-9)  # into the domain
        return problem.gap(w), problem.value(w)

    gaps, values = measure(points)
    assert np.all(gaps >= values - problem.value(end.x))
    # Near the solution it tells something, whatever the penalty.
    assert np.all(gaps[-8:] < 1e-5)


@pytest.mark.parametrize("name", ["lasso", "nnls", "logistic, intercept", "multi-task"])
def test_other_solvers_find_the_same(name):
    problem, start = make(name), jnp.zeros_like(best(name).x)
    for solver in (BlockCoordinateDescent(gram=False), ProximalGradient()):
        end = solve(problem, solver, start, tol=1e-9, max_steps=10_000)
        assert end.converged
        np.testing.assert_allclose(end.x, best(name).x, atol=1e-6)


def test_a_sum_is_an_average_with_other_weights():
    summed = GeneralisedLinear(
        jnp.asarray(X), jnp.asarray(Y), penalty=ElasticNet(0.3 * N), average=False
    )
    end = solve(summed, BlockCoordinateDescent(), jnp.zeros(D), tol=1e-10)
    np.testing.assert_allclose(end.x, best("lasso").x, atol=1e-9)
    assert end.certificate.value < 1e-8


@pytest.mark.parametrize(
    ("loss", "target", "lower", "upper"),
    [
        (Squared(), 0.7, -3, 3),
        (Huber(0.5), 0.7, -0.5, 0.5),
        (Logistic(), 1.0, -1, 0),
        (Logistic(), 0.3, -0.3, 0.7),
        (SmoothedHinge(0.5), 1.0, -1, 0),
        (SmoothedHinge(2.0), 0.0, 0, 1),
    ],
)
def test_conjugates_and_curvatures_by_brute_force(loss, target, lower, upper):
    target = jnp.asarray(target)
    grid = jnp.linspace(-40.0, 40.0, 160_001)
    values = jax.vmap(loss.value, (0, None))(grid, target)
    slopes = jnp.linspace(lower, upper, 9)[1:-1]
    brute = jnp.max(slopes[:, None] * grid[None, :] - values[None, :], axis=1)
    ours = jax.vmap(loss.conjugate, (0, None))(slopes, target)
    np.testing.assert_allclose(ours, brute, atol=1e-6)
    if np.isfinite(upper) and not isinstance(loss, Squared):
        outside = jnp.array([lower - 0.01, upper + 0.01])
        assert np.all(jax.vmap(loss.conjugate, (0, None))(outside, target) == np.inf)
    second = jax.vmap(jax.grad(jax.grad(loss.value)), (0, None))(grid, target)
    np.testing.assert_allclose(jnp.max(second), loss.curvature, rtol=1e-6)


def test_the_conjugate_of_the_multinomial_loss():
    loss, target = Multinomial(), jnp.array([1.0, 0.0, 0.0])
    prediction = jnp.array([0.3, -1.0, 2.0])
    slope = jax.grad(loss.value)(prediction, target)
    touching = loss.value(prediction, target) + loss.conjugate(slope, target)
    np.testing.assert_allclose(touching, slope @ prediction, atol=1e-13)
    assert loss.conjugate(slope + 0.01, target) == np.inf
    hessian = jax.hessian(loss.value)(prediction, target)
    assert np.linalg.eigvalsh(hessian)[-1] <= loss.curvature


@pytest.mark.parametrize("penalty", [ElasticNet, GroupLasso])
def test_conjugates_of_penalties_touch_at_the_proximal_point(penalty):
    for l1, l2 in ((0.4, 0.0), (0.4, 0.3), (0.0, 0.3)):
        p = penalty(l1, l2)
        v = jnp.array([1.0, -0.6, 0.1])
        row = p.prox(v, 1.0)
        slope = v - row  # a subgradient at `row`, so Fenchel-Young is an equality
        total = p.value(row) + p.conjugate(slope)
        np.testing.assert_allclose(total, row @ slope, atol=1e-12)
        assert p.shrink(slope) > 1 - 1e-12
        assert (p.shrink(10 * v) < 1) == (l2 == 0)


@pytest.mark.parametrize("name", ["logistic", "multi-task"])
def test_derivatives_with_respect_to_data_and_weights(name):
    problem = make(name)
    if name == "multi-task":
        problem = GeneralisedLinear(
            problem.X, problem.y, penalty=GroupLasso(jnp.asarray(0.3), jnp.asarray(0.1))
        )
    leaves, structure = jax.tree.flatten(problem)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    weight = jnp.asarray(np.random.default_rng(2).standard_normal(shape(problem)))

    @jax.jit
    def loss(*leaves):
        end = solve(
            jax.tree.unflatten(structure, leaves),
            BlockCoordinateDescent(),
            jnp.zeros(shape(problem)),
            tol=1e-12,
        )
        return jnp.sum(weight * end.x)

    gradients = jax.grad(loss, argnums=tuple(range(len(leaves))))(*leaves)
    for number, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        direction = np.random.default_rng(number).standard_normal(leaf.shape)
        step = 1e-5 * jnp.asarray(direction)
        ends = [
            loss(*[v + s * step if k == number else v for k, v in enumerate(leaves)])
            for s in (1.0, -1.0)
        ]
        slope = jnp.sum(gradient * jnp.asarray(direction))
        difference = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(slope, difference, rtol=1e-5, atol=1e-6)


def test_ridge_has_a_closed_form():
    exact = np.linalg.solve(X.T @ X / N + 0.5 * np.eye(D), X.T @ Y / N)
    np.testing.assert_allclose(best("ridge").x, exact, atol=1e-10)


def test_a_loss_of_ones_own_has_the_residual_as_certificate():
    class LogCosh(Loss):
        curvature = 1.0

        def value(self, prediction, target):
            return jnp.logaddexp(prediction - target, target - prediction)

    problem = GeneralisedLinear(
        jnp.asarray(X), jnp.asarray(Y), loss=LogCosh(), penalty=ElasticNet(0.0, 0.1)
    )
    end = solve(problem, BlockCoordinateDescent(), jnp.zeros(D), tol=1e-9)
    assert end.converged and end.certificate.kind == "residual"
    newton = solve(Smooth(problem.value), Newton(), jnp.zeros(D), tol=1e-9)
    np.testing.assert_allclose(end.x, newton.x, atol=1e-7)


def test_no_dual_point_is_said():
    # Two equal columns without weights: X'X is singular.
    twice = jnp.asarray(X[:, [0, 0]])
    problem = GeneralisedLinear(twice, jnp.asarray(Y), unique=False)
    assert problem.gap(jnp.array([0.3, -0.1])) == np.inf


def test_no_factorisation_where_every_row_has_a_weight():
    wide = jnp.asarray(np.random.default_rng(3).standard_normal((3, 2100)))
    problem = GeneralisedLinear(wide, jnp.ones(3), penalty=ElasticNet(0.1))
    assert jnp.isfinite(problem.gap(jnp.zeros(2100)))


def test_what_does_not_fit_is_refused():
    x, y = jnp.asarray(X), jnp.asarray(Y)
    for arguments, message in [
        ((x, y[:-1]), r"`y` must have shape \(14\)"),
        ((x[0], y), r"`X` must have shape \(any, any\)"),
        ((x[:0], y[:0]), "`X` must not be empty"),
        ((x.at[0, 0].set(jnp.nan), y), "`X` must be finite"),
        ((x, y[:, None, None]), "`y` must have one or two axes"),
    ]:
        with pytest.raises(ValueError, match=f"GeneralisedLinear: {message}"):
            GeneralisedLinear(*arguments)
    with pytest.raises(TypeError, match="`X` must be floating"):
        GeneralisedLinear(jnp.ones((2, 2), int), jnp.ones(2))
    with pytest.raises(TypeError, match=r"must be a varan\.problems\.Loss"):
        GeneralisedLinear(x, y, loss=lambda p, t: p)
    with pytest.raises(ValueError, match=r"Logistic: `y` must be in \[0, 1\]"):
        GeneralisedLinear(x, y, loss=Logistic())
    with pytest.raises(ValueError, match="SmoothedHinge: `y` must be 0 or 1"):
        GeneralisedLinear(x, 2 * LABEL - 1, loss=SmoothedHinge())
    with pytest.raises(ValueError, match="rows that sum to one"):
        GeneralisedLinear(x, jnp.ones((N, 2)), loss=Multinomial())
    with pytest.raises(ValueError, match="a row of probabilities for each sample"):
        GeneralisedLinear(x, y, loss=Multinomial())
    with pytest.raises(ValueError, match="one number for each row"):
        GeneralisedLinear(x, y, penalty=ElasticNet(jnp.ones(3)))
    with pytest.raises(ValueError, match="ElasticNet: `l1` must not be negative"):
        ElasticNet(-1.0)
    with pytest.raises(ValueError, match="GroupLasso: `l2` must not be negative"):
        GroupLasso(1.0, -1.0)
    with pytest.raises(ValueError, match="Huber: `delta` must be positive"):
        Huber(0.0)
    with pytest.raises(ValueError, match="the unknown must have shape"):
        solve(GeneralisedLinear(x, y), BlockCoordinateDescent(), jnp.zeros(D + 1))
