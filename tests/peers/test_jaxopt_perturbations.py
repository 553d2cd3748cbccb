"""Perturbed optimisers against jaxopt's: the same noise, values and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.fenchel_young import (
    Gumbel,
    Normal,
    perturbed_argmax,
    perturbed_function,
    perturbed_max,
)

jaxopt = pytest.importorskip("jaxopt")
from jaxopt import perturbations as theirs

X = jnp.array([0.3, -0.2, 0.5, 0.1])
KEY = jax.random.key(3)
SETTINGS = {"sigma": 0.4}
NOISES = {"gumbel": (Gumbel(), theirs.Gumbel()), "normal": (Normal(), theirs.Normal())}


def top(x):
    return jax.nn.one_hot(jnp.argmax(x), x.size, dtype=x.dtype)


def ranks(x):
    return jnp.argsort(jnp.argsort(x)).astype(x.dtype)


@pytest.fixture(params=NOISES)
def noises(request):
    return NOISES[request.param]


def equal(ours, peer):
    """Values, and Jacobians in both modes, of functions of point and key."""

    @jax.jit
    def both(x):
        return [
            (f(x, KEY), jax.jacfwd(f)(x, KEY), jax.jacrev(f)(x, KEY))
            for f in (ours, peer)
        ]

    for mine, its in zip(*both(X), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-12)


@pytest.mark.parametrize("variate", ["point", "none"])
@pytest.mark.parametrize("argmax", [top, ranks])
def test_perturbed_argmax(noises, argmax, variate):
    noise, its = noises
    ours = perturbed_argmax(
        argmax, samples=40, noise=noise, control_variate=variate, **SETTINGS
    )
    peer = theirs.make_perturbed_argmax(
        argmax, 40, noise=its, control_variate=variate == "point", **SETTINGS
    )
    equal(ours, peer)


def test_perturbed_max(noises):
    noise, its = noises
    ours = perturbed_max(
        top, samples=40, noise=noise, control_variate="none", **SETTINGS
    )
    equal(ours, theirs.make_perturbed_max(top, 40, noise=its, **SETTINGS))


@pytest.mark.parametrize("variate", ["point", "none"])
def test_perturbed_function(noises, variate):
    # Of a scalar: for other outputs the peer's Jacobian sums over the entries.
    noise, its = noises

    def function(x):
        return jnp.sum(jax.nn.relu(x) * jnp.arange(4.0))

    ours = perturbed_function(
        function, samples=40, noise=noise, control_variate=variate, **SETTINGS
    )
    peer = theirs.make_perturbed_fun(
        function, 40, noise=its, control_variate=variate == "point", **SETTINGS
    )
    equal(ours, peer)


def test_leave_one_out_has_the_same_mean_and_less_variance():
    keys = jax.random.split(KEY, 400)
    ours = perturbed_argmax(top, samples=40, **SETTINGS)
    peer = theirs.make_perturbed_argmax(top, 40, control_variate=True, **SETTINGS)

    @jax.jit
    @jax.vmap
    def jacobians(key):
        return [jax.jacobian(f)(X, key) for f in (ours, peer)]

    mine, its = (np.asarray(draws) for draws in jacobians(keys))
    truth = jax.jacobian(lambda x: jax.nn.softmax(x / 0.4))(X)
    for draws in (mine, its):
        error = draws.std(0, ddof=1) / 20
        assert np.all(np.abs(draws.mean(0) - truth) <= 5 * error)
    assert mine.var(0).sum() < its.var(0).sum()
