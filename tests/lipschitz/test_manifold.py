"""The dual algorithm: known gradients, the convex case, the multipliers."""

import cvxpy
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.lipschitz import laplacian_weights, manifold_lipschitz

POINTS, LABELLED, EPS, T = 20, 4, 0.05, 0.1
SGD = optax.sgd(0.01)


class Quadratic(eqx.Module):
    """Linear in its weights: the problem is convex."""

    weights: jax.Array

    def __call__(self, x):
        return (self.weights @ features(x))[None]


def features(x):
    return jnp.concatenate([x, x**2, jnp.prod(x)[None]])


def squares(value, label):
    return jnp.sum((value - label) ** 2)


@pytest.fixture(scope="module")
def circle():
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, POINTS)
    x = np.stack([np.cos(angle), np.sin(angle)], 1)
    y = np.sign(x[:LABELLED, :1]) + 0.1 * rng.normal(size=(LABELLED, 1))
    return jnp.asarray(x), jnp.asarray(y)


def fit(circle, **settings):
    x, y = circle
    settings = {"eps": EPS, "t": T, "dual_lr": (1.0, 0.03), "steps": 3000} | settings
    data = (x[:LABELLED], y)
    start = Quadratic(jnp.zeros(5))
    rest = x[LABELLED:]
    return manifold_lipschitz(
        squares, start, data, unlabeled=rest, primal=SGD, **settings
    )


@pytest.fixture(scope="module")
def fitted(circle):
    return fit(circle)


def weights_of(x):
    """The penalty's weights, from their definition."""
    weights = np.asarray(laplacian_weights(x, T, 1))
    beside = weights - np.diag(np.diag(weights))
    return weights / (2 * T * np.mean(np.sum(beside, 1)))


def least_constant(circle):
    """The problem's epigraph form by cvxpy."""
    x, y = map(np.asarray, circle)
    table = np.asarray(jax.vmap(features)(jnp.asarray(x)))
    weights = weights_of(circle[0])
    w, top = cvxpy.Variable(5), cvxpy.Variable()
    rules = [cvxpy.sum_squares(table[:LABELLED] @ w - y[:, 0]) <= EPS * LABELLED]
    for n in range(POINTS):
        rise = (table[n] - table) @ w
        rules.append(
            cvxpy.sum_squares(cvxpy.multiply(np.sqrt(weights[n]), rise)) <= top
        )
    cvxpy.Problem(cvxpy.Minimize(top), rules).solve(cvxpy.CLARABEL)
    return top.value, w.value


class TestConvex:
    def test_matches_cvxpy(self, circle, fitted):
        square, weights = least_constant(circle)
        assert abs(fitted.rho**2 - square) <= 1e-4 * square
        np.testing.assert_allclose(fitted.model.weights, weights, atol=1e-3)
        assert abs(fitted.loss - EPS) <= 1e-6
        assert fitted.attained and not fitted.diverging

    def test_certificate(self, fitted):
        details = fitted.certificate.details
        assert not fitted.certificate.proof
        assert abs(details["duality_gap"]) <= 1e-4
        assert abs(details["slackness"]) <= 1e-4
        np.testing.assert_allclose(fitted.certificate.value, fitted.rho)
        np.testing.assert_allclose(fitted.rho, jnp.max(fitted.gradients))

    def test_the_multipliers_sit_on_the_largest_gradients(self, fitted):
        np.testing.assert_allclose(jnp.sum(fitted.mu), 1, rtol=1e-9)
        assert np.all(fitted.mu >= 0)
        held = np.asarray(fitted.mu) > 1e-6
        assert 1 <= held.sum() < POINTS / 2
        largest = np.asarray(fitted.gradients)[held]
        np.testing.assert_allclose(largest, fitted.rho, rtol=1e-4)

    def test_multiplicative_steps_reach_the_same(self, circle, fitted):
        found = fit(circle, dual="exponentiated", dual_lr=(1.0, 0.3))
        np.testing.assert_allclose(found.rho, fitted.rho, rtol=1e-3)
        np.testing.assert_allclose(jnp.sum(found.mu), 1, rtol=1e-9)
        assert np.all(found.mu >= 0)

    def test_uniform_weights_are_the_laplacian_penalty(self, circle, fitted):
        """With `mu` held, the least mean gradient at the loss: a generalised mean."""
        found = fit(circle, dual_lr=(1.0, 0.0))
        np.testing.assert_allclose(found.mu, 1 / POINTS)
        y = np.asarray(circle[1])
        table = np.asarray(jax.vmap(features)(circle[0]))
        weights = weights_of(circle[0])
        laplacian = np.diag(weights.sum(1)) - weights
        penalty = 2 * table.T @ laplacian @ table / POINTS
        data = table[:LABELLED]
        lam = float(found.lam) / LABELLED
        exact = np.linalg.solve(lam * data.T @ data + penalty, lam * data.T @ y[:, 0])
        np.testing.assert_allclose(found.model.weights, exact, atol=1e-4)
        mean = jnp.mean(found.gradients**2)
        assert mean < jnp.mean(fitted.gradients**2) and found.rho > fitted.rho

    def test_batches_are_scaled_to_the_cloud(self, circle, fitted):
        """Without the scaling `rho` and the loss would settle elsewhere."""
        found = fit(
            circle,
            batch_size=15,
            key=jax.random.key(0),
            dual_lr=(0.3, 0.003),
            steps=6000,
        )
        np.testing.assert_allclose(found.rho, fitted.rho, rtol=0.15)
        assert abs(found.loss - EPS) < 0.3 * EPS

    def test_out_of_reach(self, circle):
        x = circle[0].at[1].set(circle[0][0])
        y = circle[1].at[1].set(circle[1][0] + 2.0)
        found = fit((x, y), dual_lr=(0.01, 0.003))
        assert found.diverging and not found.attained
        assert found.certificate.details["primal_residual"] > 0

    def test_a_model_that_diverges_is_not_attained(self, circle):
        x = circle[0].at[1].set(circle[0][0])
        y = circle[1].at[1].set(circle[1][0] + 2.0)
        found = fit((x, y))
        assert np.isnan(found.loss) and found.diverging and not found.attained


class Wave(eqx.Module):
    """A function on the circle whose slope is `frequency` at most."""

    frequency: float

    def __call__(self, x):
        angle = self.frequency * jnp.arctan2(x[1], x[0])
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


class TestGradients:
    """Estimates of a known slope: the wave's is 1 everywhere."""

    @pytest.fixture(scope="class")
    @staticmethod
    def ring():
        angle = 2 * np.pi * np.arange(240) / 240
        return jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1))

    # The kernel's density leaves each point itself out: on a lattice that is
    # spacing / (2 sqrt(4 pi t)) of the slope, 2.7 % and 6 %.
    @pytest.mark.parametrize(
        "settings, tolerance",
        [
            ({"gradient": "heat", "t": 0.02}, 0.04),
            ({"gradient": "heat"}, 0.08),
            ({"gradient": "knn", "neighbours": 2}, 0.01),
            ({"gradient": "ambient"}, 1e-9),
        ],
    )
    def test_slope(self, ring, settings, tolerance):
        data = ring[:1], jnp.zeros((1, 2))
        found = manifold_lipschitz(
            squares,
            Wave(1.0),
            data,
            unlabeled=ring[1:],
            eps=1.0,
            primal=SGD,
            steps=1,
            **settings,
        )
        np.testing.assert_allclose(found.gradients, 1.0, rtol=tolerance)

    def test_given_distances(self, ring):
        """Along the circle neighbours are farther than across it."""
        angle = 2 * np.pi * np.arange(240) / 240
        apart = np.abs(angle[:, None] - angle[None])
        along = jnp.asarray(np.minimum(apart, 2 * np.pi - apart)) * 2.0
        found = manifold_lipschitz(
            squares,
            Wave(1.0),
            (ring[:1], jnp.zeros((1, 2))),
            unlabeled=ring[1:],
            eps=1.0,
            primal=SGD,
            steps=1,
            gradient="knn",
            neighbours=2,
            distances=along,
        )
        np.testing.assert_allclose(found.gradients, 0.5, rtol=0.01)


def test_weights(circle):
    weights = laplacian_weights(circle[0], T, 1)
    np.testing.assert_allclose(weights, weights.T)
    height = 1 / (POINTS * T * (4 * np.pi * T) ** 0.5)
    np.testing.assert_allclose(jnp.diag(weights), height, rtol=1e-12)


def test_single_precision(float32, circle):
    single = tuple(jnp.asarray(np.asarray(a), jnp.float32) for a in circle)
    x, y = single
    found = manifold_lipschitz(
        squares,
        Quadratic(jnp.zeros(5, jnp.float32)),
        (x[:LABELLED], y),
        unlabeled=x[LABELLED:],
        eps=EPS,
        t=T,
        primal=SGD,
        steps=3,
    )
    assert found.rho.dtype == found.mu.dtype == jnp.float32


FAR = jnp.array([[50.0, 50.0], [50.0, 50.1]])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"eps": -1.0}, "`eps` must not be negative"),
        ({"t": 0.0}, "`t` must be positive"),
        ({"t": 1e-9}, "every connected part"),
        ({"gradient": "heat kernel"}, "`gradient` must be one of"),
        ({"dual": "newton"}, "`dual` must be one of"),
        ({"dual_lr": (1.0, -1.0)}, "`dual_lr` must not be negative"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"batch_size": 5}, "`batch_size` needs a `key`"),
        ({"distances": jnp.zeros((3, 3))}, "`distances` must have shape"),
    ],
)
def test_bad_settings(circle, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(circle, **settings)


def test_bad_clouds(circle):
    x, y = circle
    with pytest.raises(ValueError, match="as many labels as points"):
        fit((x, y[:2]))
    far = jnp.concatenate([x, FAR])
    with pytest.raises(ValueError, match="1 parts hold none"):
        fit((far, y))
    with pytest.raises(ValueError, match="some are doubled"):
        fit((jnp.concatenate([x, x[-1:]]), y), gradient="knn")
    same = jnp.ones((30, 2))
    with pytest.raises(ValueError, match=r"the bandwidth `t` must be positive"):
        fit((same, y), t=None)
    with pytest.raises(ValueError, match="`data` must be finite"):
        fit((x.at[0].set(jnp.nan), y))
