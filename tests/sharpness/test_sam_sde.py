"""SDEs of SAM: expansion of the algorithms' own steps, noise, laws, saddles."""

from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varan.sharpness import SamSDE, dnsam, sam, sam_sde, stationary_variance, usam

ETA, RHO = 0.01, 0.08
METHODS = {"usam": usam, "sam": sam, "dnsam": dnsam}
KEYS = jax.random.split(jax.random.key(0), 3)
POPULATION = (
    jax.random.normal(KEYS[0], (6, 3, 3)),
    jax.random.normal(KEYS[1], (6, 3)),
)
X = jnp.array([1.0, -0.7, 0.4])
variants = pytest.mark.parametrize("variant", list(METHODS))


def loss(x, batch):
    matrix, shift = batch
    return jnp.sum(jnp.cosh(matrix @ x - shift))


def additive(x, z):
    return jnp.sum(jnp.array([1.0, 2.0, 3.0]) * x**4) + z @ x


@partial(jax.jit, static_argnames="variant")
def looked_at(variant, rho, x=X, population=POPULATION):
    """The SDE at a point, and the steps of the optimiser there, over -eta."""
    sde = SamSDE(loss, population, ETA, rho, variant)
    method = METHODS[variant](optax.sgd(ETA), rho)

    def step(batch):
        gradient = lambda y, i=0: jax.grad(loss)(y, batch)  # noqa: E731
        full = jax.grad(sde.mean_loss)
        state = method.init(x)
        return method.update(gradient(x), state, x, grad_fn=gradient, full_grad_fn=full)

    steps = -jax.vmap(step)(population)[0] / ETA
    return {
        "steps": steps,
        "directions": sde.directions(x),
        "drift": sde.drift(x),
        "downhill": -jax.grad(sde.implicit_loss)(x),
        "covariance": sde.covariance(x),
        "root": sde.diffusion(x).as_matrix(),
    }


@variants
def test_expands_the_step_of_the_optimiser(variant):
    misses = []
    for rho in (0.02, 0.01, 0.005):
        seen = looked_at(variant, rho if variant != "usam" else rho / 10)
        misses.append(float(jnp.max(jnp.abs(seen["steps"] - seen["directions"]))))
    # What is left is of second order in rho.
    np.testing.assert_allclose(np.log2(misses[:2]) - np.log2(misses[1:]), 2.0, atol=0.3)


@variants
def test_noise_is_the_covariance_of_the_steps(variant):
    seen = looked_at(variant, RHO)
    expected = np.cov(seen["directions"], rowvar=False, bias=True)
    np.testing.assert_allclose(seen["covariance"], expected, rtol=1e-10)
    root = seen["root"]
    np.testing.assert_allclose(root, root.T, atol=1e-10)
    np.testing.assert_allclose(root @ root, ETA * expected, rtol=1e-9)
    assert np.linalg.eigvalsh(root).min() >= -1e-12


@variants
def test_without_radius_it_is_the_sde_of_sgd(variant):
    seen = looked_at(variant, 0.0)
    gradients = jax.vmap(jax.grad(loss), (None, 0))(X, POPULATION)
    np.testing.assert_allclose(seen["directions"], gradients, rtol=1e-12)


@pytest.mark.parametrize("variant", ["usam", "sam"])
def test_drift_descends_the_implicit_loss(variant):
    seen = looked_at(variant, RHO)
    np.testing.assert_allclose(seen["drift"], seen["downhill"], rtol=1e-9)


def test_drift_of_dnsam_needs_one_common_hessian_to_be_a_gradient():
    seen = looked_at("dnsam", RHO)
    assert np.max(np.abs(seen["drift"] / seen["downhill"] - 1)) > 0.01
    noise = jnp.concatenate([jnp.eye(3), -jnp.eye(3)])
    sde = sam_sde(additive, noise, ETA, RHO, variant="dnsam")
    both = jax.jit(lambda x: (sde.drift(x), -jax.grad(sde.implicit_loss)(x)))(X)
    np.testing.assert_allclose(*both, rtol=1e-10)


def test_additive_noise_has_the_closed_form():
    noise = np.random.default_rng(0).standard_normal((5, 3))
    sde = sam_sde(additive, jnp.asarray(noise), ETA, RHO, variant="usam")
    found = eqx.filter_jit(sde.covariance)(X)
    stretch = np.eye(3) + RHO * np.diag(12 * np.array([1.0, 2.0, 3.0]) * X**2)
    expected = stretch @ np.cov(noise, rowvar=False, bias=True) @ stretch
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_where_gradients_vanish_nothing_is_infinite():
    pure = lambda x, batch: jnp.sum(x**2) * batch  # noqa: E731
    for variant in METHODS:
        sde = sam_sde(pure, jnp.ones(2), ETA, RHO, variant=variant)
        np.testing.assert_array_equal(eqx.filter_jit(sde.directions)(jnp.zeros(2)), 0.0)


def test_sampled_paths_have_the_moments_of_the_process():
    curvature, noise, paths = 2.0, 0.5, 2000
    quadratic = lambda x, z: curvature * jnp.sum(x**2) / 2 + z * x[0]  # noqa: E731
    population = jnp.array([-noise, noise])
    sde = sam_sde(quadratic, population, 0.1, 0.2, variant="usam")

    def end(key):
        path = diffrax.UnsafeBrownianPath(shape=(1,), key=key)
        return diffrax.diffeqsolve(
            sde.terms(path),
            diffrax.Euler(),
            0.0,
            1.0,
            0.02,
            jnp.ones(1),
            adjoint=diffrax.DirectAdjoint(),
        ).ys[-1, 0]

    ends = np.asarray(jax.jit(jax.vmap(end))(jax.random.split(KEYS[0], paths)))
    # Euler's scheme on a linear equation: both moments in closed form.
    factor = 1 - 0.02 * curvature * (1 + 0.2 * curvature)
    power = 0.02 * 0.1 * (noise * (1 + 0.2 * curvature)) ** 2
    variance = power * (1 - factor**100) / (1 - factor**2)
    # Four standard errors each: a false alarm in 8000 draws of the key.
    assert abs(ends.mean() - factor**50) < 4 * np.sqrt(variance / paths)
    assert abs(ends.var() / variance - 1) < 4 * np.sqrt(2 / paths)


def test_without_noise_it_is_the_ode():
    sde = sam_sde(loss, POPULATION, ETA, RHO)
    velocity = jax.jit(sde.terms().vf)(0.0, X, None)
    np.testing.assert_allclose(velocity, looked_at("sam", RHO)["drift"], rtol=1e-12)


def test_stationary_variance_is_a_fixed_point_and_its_limit():
    curvature = jnp.array([0.5, 2.0, 8.0])
    law = stationary_variance(curvature, 0.3, 0.01, 0.1)
    factor = 1 - 0.01 * curvature * (1 + 0.1 * curvature)
    step = (0.01 * 0.3 * (1 + 0.1 * curvature)) ** 2
    np.testing.assert_allclose(law, factor**2 * law + step, rtol=1e-12)
    pilot = np.array([9.47e-4, 2.73e-4, 1.09e-4])
    np.testing.assert_allclose(law, pilot, rtol=5e-3)
    limit = stationary_variance(curvature, 0.3, 0.01, 0.1, model="sde")
    rate = 0.01 * curvature * (1 + 0.1 * curvature)
    np.testing.assert_allclose(limit / law, 1 - rate / 2, rtol=1e-12)


def test_stationary_variance_solves_the_lyapunov_equation_of_the_sde():
    curvature = np.array([1.0, 3.0])
    noise = 0.4 * np.sqrt(2) * np.concatenate([np.eye(2), -np.eye(2)])
    quadratic = lambda x, z: jnp.sum(curvature * x**2) / 2 + z @ x  # noqa: E731
    sde = sam_sde(quadratic, jnp.asarray(noise), ETA, RHO, variant="usam")
    pull, covariance = jax.jit(
        lambda x: (-jax.jacfwd(sde.drift)(x), sde.covariance(x))
    )(np.zeros(2))
    law = np.diag(stationary_variance(curvature, 0.4, ETA, RHO, model="sde"))
    balance = pull @ law + law @ pull.T
    np.testing.assert_allclose(balance, ETA * covariance, atol=1e-12)


@pytest.mark.parametrize(("strength", "leaves"), [(0.98, True), (1.02, False)])
def test_usam_is_drawn_to_a_saddle_from_strength_one(strength, leaves):
    saddle = jnp.array([1.0, -0.5])
    method = usam(optax.sgd(0.05), strength / 0.5)

    def step(x, _):
        gradient = lambda y, i=0: saddle * y  # noqa: E731
        updates, _ = method.update(gradient(x), method.init(x), x, grad_fn=gradient)
        return x + updates, None

    end, _ = jax.lax.scan(step, jnp.full(2, 0.01), length=2000)
    assert (end[1] > 0.02) == leaves


def test_dnsam_is_sam_on_all_data_and_masks_its_unit():
    gradient = lambda y, i=0: jax.grad(additive)(y, jnp.zeros(3))  # noqa: E731
    ends = []
    for method, extra in ((sam, {}), (dnsam, {"full_grad_fn": gradient})):
        method = method(optax.sgd(0.1), 0.1, mask=jnp.array([True, False, True]))
        state = method.init(X)
        ends.append(method.update(gradient(X), state, X, grad_fn=gradient, **extra)[0])
    np.testing.assert_allclose(*ends, rtol=1e-12)


def test_values_are_checked():
    good = (loss, POPULATION, ETA, RHO)
    with pytest.raises(ValueError, match="`variant` must be one of 'usam'"):
        sam_sde(*good, variant="asam")
    with pytest.raises(ValueError, match="`stepsize` must be positive"):
        sam_sde(loss, POPULATION, 0.0, RHO)
    with pytest.raises(ValueError, match="`rho` must not be negative"):
        sam_sde(loss, POPULATION, ETA, -1.0)
    for batches in (jnp.zeros((0, 2)), (jnp.ones(2), jnp.ones(3)), 1.0, ()):
        with pytest.raises(ValueError, match="must have one leading axis of batches"):
            sam_sde(loss, batches, ETA, RHO)
    with pytest.warns(UserWarning, match="of the order of"):
        sam_sde(loss, POPULATION, 0.01, 0.5)
    with pytest.raises(ValueError, match="update` needs `full_grad_fn`"):
        method = dnsam(optax.sgd(0.1))
        method.update(X, method.init(X), X, grad_fn=lambda y, i: y)


def test_unstable_iterates_have_no_law():
    with pytest.raises(ValueError, match=r"must be below 2 \(got 2\.04"):
        stationary_variance(8.0, 0.3, 0.1, 0.194)
    assert np.isnan(jax.jit(stationary_variance)(8.0, 0.3, 0.1, 0.194))
    with pytest.raises(ValueError, match="`curvature` must be positive"):
        stationary_variance(-1.0, 0.3, 0.1, 0.1)
