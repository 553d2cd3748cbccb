"""Perturbed optimisers: unbiased against closed forms, at every order, and honest.

Gumbel noise on the corners of the simplex has closed forms: with scale s the maximum is
`s logsumexp(x / s) + 0.5772 s`, the maximiser `softmax(x / s)`. Monte-Carlo estimates
are compared with them in units of their standard error: five of these are exceeded by
chance with probability 6e-7 an entry, under 2e-4 in all tests; the seeds are fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.fenchel_young import (
    Gumbel,
    Normal,
    fenchel_young_loss,
    perturbed_argmax,
    perturbed_function,
    perturbed_max,
)

X = jnp.array([0.3, -0.2, 0.5, 0.1])
KEY = jax.random.key(7)
SIGMA = 0.5
VARIATES = ("leave-one-out", "point", "none")


def top(x):
    return jax.nn.one_hot(jnp.argmax(x), x.size, dtype=x.dtype)


def soft_max(x, sigma=SIGMA):
    return sigma * (jax.nn.logsumexp(x / sigma) + np.euler_gamma)


def soft_argmax(x, sigma=SIGMA):
    return jax.nn.softmax(x / sigma)


def assert_unbiased(draws, truth):
    """The mean of independent draws lies within five standard errors of the truth."""
    draws = np.asarray(draws)
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - np.asarray(truth)) <= 5 * error + 1e-12)


def repeated(function, times=400):
    """The function of a key, for many keys; compiled once, so ask for all at once."""
    return jax.jit(jax.vmap(function))(jax.random.split(KEY, times))


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("variate", VARIATES)
def test_argmax_and_its_jacobian_are_unbiased(variate):
    smooth = perturbed_argmax(top, samples=50, sigma=SIGMA, control_variate=variate)
    value, forward, reverse = repeated(
        lambda k: [f(X, k) for f in (smooth, jax.jacfwd(smooth), jax.jacrev(smooth))]
    )
    assert_unbiased(value, soft_argmax(X))
    np.testing.assert_allclose(forward, reverse, atol=1e-12)
    assert_unbiased(forward, jax.jacobian(soft_argmax)(X))


def test_max_and_its_derivatives_of_three_orders_are_unbiased():
    smooth = perturbed_max(top, samples=50, sigma=SIGMA)
    value, gradient, hessian, third = repeated(
        lambda k: [
            f(X, k)
            for f in (
                smooth,
                jax.grad(smooth),
                jax.hessian(smooth),
                jax.jacfwd(jax.hessian(smooth)),
            )
        ],
        2000,
    )
    assert_unbiased(value, soft_max(X))
    assert_unbiased(gradient, soft_argmax(X))
    assert_unbiased(hessian, jax.hessian(soft_max)(X))
    assert_unbiased(third, jax.jacfwd(jax.hessian(soft_max))(X))


def test_derivatives_with_respect_to_sigma_are_unbiased():
    def value(x, sigma, key):
        return perturbed_max(top, samples=50, sigma=sigma)(x, key)

    def choice(sigma, key):
        return perturbed_argmax(top, samples=50, sigma=sigma)(X, key)

    def estimates(key):
        return (
            jax.grad(value, 1)(X, SIGMA, key),
            jax.jacobian(choice)(SIGMA, key),
            # Mixed, in both orders.
            jax.jacobian(jax.grad(value, 0), 1)(X, SIGMA, key),
            jax.jacobian(jax.grad(value, 1), 0)(X, SIGMA, key),
        )

    slope, *mixed = repeated(estimates)
    assert_unbiased(slope, jax.grad(soft_max, 1)(X, SIGMA))
    truth = jax.jacobian(soft_argmax, 1)(X, SIGMA)
    for estimate in mixed:
        assert_unbiased(estimate, truth)


def test_gaussian_noise_on_the_sign():
    # E sign(x + s z) = 2 Phi(x / s) - 1, with the derivative 2 phi(x / s) / s.
    x = jnp.array([0.4, -1.0])
    smooth = perturbed_function(jnp.sign, samples=40, sigma=0.8, noise=Normal())
    value, jacobian = repeated(lambda k: (smooth(x, k), jax.jacobian(smooth)(x, k)))
    cdf, pdf = jax.scipy.stats.norm.cdf, jax.scipy.stats.norm.pdf
    assert_unbiased(value, 2 * cdf(x / 0.8) - 1)
    assert_unbiased(jacobian, jnp.diag(2 * pdf(x / 0.8) / 0.8))


def test_any_object_with_a_density_is_noise():
    class Logistic:
        def sample(self, key, shape, dtype):
            return jax.random.logistic(key, shape, dtype)

        def log_prob(self, z):
            return -z - 2 * jax.nn.softplus(-z)

    smooth = perturbed_function(jnp.sign, samples=40, noise=Logistic(), sigma=0.7)
    x = jnp.array([0.3])
    value, slope = repeated(lambda k: (smooth(x, k), jax.jacobian(smooth)(x, k)[0]))
    up, down = jax.nn.sigmoid(x / 0.7), jax.nn.sigmoid(-x / 0.7)
    assert_unbiased(value, 2 * up - 1)
    assert_unbiased(slope, 2 * up * down / 0.7)
    # The noises of optax are such objects.
    theirs = perturbed_argmax(top, samples=9, noise=optax.perturbations.Gumbel())
    ours = perturbed_argmax(top, samples=9)
    np.testing.assert_array_equal(theirs(X, KEY), ours(X, KEY))


# ------------------------------------------------------------ what must hold exactly


@pytest.mark.parametrize("variate", VARIATES)
def test_the_gradient_of_the_maximum_is_the_maximiser(variate):
    smooth = perturbed_max(top, samples=30, control_variate=variate)

    @jax.jit
    def derivatives(x):
        of_max = jax.grad(smooth)(x, KEY), jax.hessian(smooth)(x, KEY)
        return of_max, (smooth.argmax(x, KEY), jax.jacobian(smooth.argmax)(x, KEY))

    ours, theirs = derivatives(X)
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-15)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-12)


def test_the_maximum_is_convex_for_every_key():
    smooth = jax.jit(perturbed_max(top, samples=20))
    a, b = X, X[::-1] * 2
    middle = smooth((a + b) / 2, KEY)
    assert middle <= (smooth(a, KEY) + smooth(b, KEY)) / 2 + 1e-14


def test_the_estimates_are_the_formulae():
    z = np.asarray(Gumbel().sample(KEY, (25, 4), X.dtype))
    y = np.eye(4)[np.argmax(np.asarray(X) + 0.3 * z, 1)]
    score = (np.exp(-z) - 1) / 0.3
    wanted = {
        "none": -y.T @ score / 25,
        "point": -(y - np.asarray(top(X))).T @ score / 25,
        # The covariance with the score.
        "leave-one-out": -(y - y.mean(0)).T @ score / 24,
    }
    for variate, want in wanted.items():
        smooth = perturbed_argmax(top, samples=25, sigma=0.3, control_variate=variate)
        np.testing.assert_allclose(smooth(X, KEY), y.mean(0), atol=1e-15)
        got = jax.jit(jax.jacobian(smooth))(X, KEY)
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_control_variates_lower_the_variance():
    def jacobian(variate, key):
        smooth = perturbed_argmax(top, samples=50, sigma=SIGMA, control_variate=variate)
        return jax.jacobian(smooth)(X, key)

    draws = repeated(lambda k: [jacobian(variate, k) for variate in VARIATES])
    best, *others = [float(jnp.var(d, 0).sum()) for d in draws]
    assert best < min(others)


def test_arrays_that_the_function_holds_are_differentiated():
    @jax.jit
    def value(weight):
        smooth = perturbed_function(lambda x: weight * jnp.sign(x), samples=20)
        return jnp.sum(smooth(X, KEY))

    slope = jax.grad(value)(jnp.array(2.0))
    np.testing.assert_allclose(slope, value(jnp.array(1.0)), rtol=1e-12)


def test_pytrees_like_one_vector():
    def choose(tree):
        flat = jnp.concatenate([tree["a"], tree["b"].reshape(-1)])
        y = top(flat)
        return {"a": y[:2], "b": y[2:].reshape(1, 2)}

    tree = {"a": X[:2], "b": X[2:].reshape(1, 2)}
    maximum = perturbed_max(choose, samples=60, sigma=SIGMA)
    chosen, gradient = repeated(
        lambda k: (maximum.argmax(tree, k), jax.grad(maximum)(tree, k))
    )
    assert jax.tree.structure(gradient) == jax.tree.structure(tree)
    for a, b in zip(*map(jax.tree.leaves, (chosen, gradient)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-15)
    flat = jnp.concatenate([chosen["a"], chosen["b"][:, 0]], 1)
    assert_unbiased(flat, soft_argmax(X))


def test_jit_and_vmap_change_nothing():
    smooth = perturbed_argmax(top, samples=20)
    keys = jax.random.split(KEY, 3)
    lanes = jnp.stack([X, -X, 2 * X])
    both = jax.jit(lambda x, k: (smooth(x, k), jax.jacobian(smooth)(x, k)))
    values, jacobians = jax.vmap(both)(lanes, keys)
    for lane in range(3):
        value, jacobian = both(lanes[lane], keys[lane])
        np.testing.assert_allclose(values[lane], value, atol=1e-15)
        np.testing.assert_allclose(smooth(lanes[lane], keys[lane]), value, atol=1e-15)
        np.testing.assert_allclose(jacobians[lane], jacobian, atol=1e-10)


def test_float32_stays_float32_and_keys_decide():
    smooth = perturbed_max(top, samples=20)
    x = X.astype(jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(smooth))(x, KEY)
    assert value.dtype == gradient.dtype == jnp.float32
    run = jax.jit(smooth)
    assert run(x, KEY) == run(x, KEY) != run(x, jax.random.key(8))


def test_small_noise_is_the_function_and_its_rounding_stays_small():
    # The score must not see the rounding of (x + sigma z - x) / sigma.
    x = X + 1e4
    tiny = perturbed_argmax(top, samples=30, sigma=1e-7, control_variate="none")
    np.testing.assert_array_equal(tiny(x, KEY), top(x))
    z = np.asarray(Gumbel().sample(KEY, (30, 4), X.dtype))
    want = -np.outer(top(x), (np.exp(-z) - 1).mean(0)) / 1e-7
    np.testing.assert_allclose(jax.jit(jax.jacobian(tiny))(x, KEY), want, rtol=1e-9)


def test_trains_through_a_ranking():
    # A Fenchel-Young loss on the perturbed maximum over rankings: gradient descent
    # finds scores in the target's order.
    def ranks(x):
        return jnp.argsort(jnp.argsort(x)).astype(x.dtype)

    loss = fenchel_young_loss(perturbed_max(ranks, samples=50, sigma=0.3))
    target = jnp.array([3.0, 0.0, 2.0, 1.0])

    def step(x, key):
        return x - 0.2 * jax.grad(loss)(x, target, key), None

    x, _ = jax.lax.scan(step, jnp.zeros(4), jax.random.split(KEY, 100))
    np.testing.assert_array_equal(ranks(x), target)


# ------------------------------------------------------------------- certificate


def test_the_certificate_is_the_error_it_says():
    smooth = perturbed_argmax(top, samples=100, sigma=SIGMA)
    direction = jnp.array([1.0, -1.0, 0.5, 0.0])
    maximum = perturbed_max(top, samples=100, sigma=SIGMA)

    def estimates(key):
        return (
            smooth(X, key),
            jax.jvp(lambda x: smooth(x, key), (X,), (direction,))[1],
            maximum(X, key)[None],
        )

    def certificates(key):
        return (
            smooth.certify(X, key).value,
            smooth.certify(X, key, direction).value,
            maximum.certify(X, key).value,
        )

    along = jax.jvp(soft_argmax, (X,), (direction,))[1]
    truths = soft_argmax(X), along, soft_max(X)[None]
    for estimate, claimed, truth in zip(
        repeated(estimates), repeated(certificates), truths, strict=True
    ):
        square = jnp.sum((estimate - truth[None]) ** 2, 1)
        # The two agree on the mean square; 400 repetitions leave about 7 % of it.
        np.testing.assert_allclose(jnp.mean(claimed**2), jnp.mean(square), rtol=0.3)
    certificate = smooth.certify(X, KEY)
    assert not certificate.proof and bool(certificate.met)
    assert certificate.details["largest entry"] <= certificate.value


def test_more_samples_mean_less_error():
    def error(samples):
        return perturbed_argmax(top, samples=samples).certify(X, KEY).value

    assert error(6400) < error(100) / 4


# --------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: perturbed_argmax(top, sigma=0.0), ValueError, "`sigma` must be pos"),
        (lambda: perturbed_max(top, sigma=-1.0), ValueError, "`sigma` must be pos"),
        (lambda: perturbed_argmax(top, samples=1), ValueError, "`samples` must be at"),
        (
            lambda: perturbed_function(top, control_variate="no"),
            ValueError,
            "`control_variate` must be one of",
        ),
        (lambda: perturbed_function(3), TypeError, "must be callable"),
        (lambda: perturbed_max(3), TypeError, "`argmax` must be callable"),
        (lambda: perturbed_max(top, noise=3), TypeError, "must have a method"),
        (
            lambda: perturbed_argmax(jnp.argmax)(X, KEY),
            ValueError,
            "must return arrays of the shapes",
        ),
        (
            lambda: perturbed_function(jnp.argmax)(X, KEY),
            TypeError,
            "must return floating arrays",
        ),
        (
            lambda: perturbed_argmax(top)(jnp.arange(3), KEY),
            TypeError,
            "`x` must be floating",
        ),
        (
            lambda: perturbed_argmax(top)(X.at[0].set(jnp.nan), KEY),
            ValueError,
            "`x` must be finite",
        ),
        (
            lambda: perturbed_max(top)(jnp.zeros(0), KEY),
            ValueError,
            "`x` must not be empty",
        ),
        (
            lambda: perturbed_argmax(top, samples=1, control_variate="none").certify(
                X, KEY
            ),
            ValueError,
            "at least 2 to see a spread",
        ),
    ],
)
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_nan_under_jit_is_nan():
    bad = X.at[0].set(jnp.nan)
    for make in (perturbed_argmax, perturbed_max):
        smooth = make(top, samples=5)
        assert jnp.all(jnp.isnan(jax.jit(smooth)(bad, KEY)))
        wrong = jax.jit(lambda s, make=make: make(top, samples=5, sigma=s)(X, KEY))
        assert jnp.all(jnp.isnan(wrong(-1.0)))
