"""Hessian without forming it: products, operators, eigenpairs, trace, density."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from varan.sharpness import (
    LogitLoss,
    ggn_operator,
    hessian_operator,
    hessian_top,
    hessian_trace,
    hvp,
    spectral_density,
)

KEY = jax.random.key(3)
LOSS = LogitLoss(lambda model, x: jax.vmap(model)(x))


@pytest.fixture(scope="module")
def net():
    """A model with static leaves, a batch, and the dense Hessian."""
    model = eqx.nn.MLP(3, 4, 5, 1, activation=jnp.tanh, key=jax.random.key(0))
    model = jax.tree.map(lambda a: 2 * a if eqx.is_array(a) else a, model)
    x = jax.random.normal(jax.random.key(1), (16, 3))
    batch = (x, jnp.arange(16) % 4)
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    vector, unravel = ravel_pytree(arrays)

    def loss(v):
        return LOSS(eqx.combine(unravel(v), static), batch)

    return model, batch, np.asarray(jax.jit(jax.hessian(loss))(vector)), unravel


@pytest.fixture(scope="module")
def eigen(net):
    return np.linalg.eigh(net[2])


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def dense(operator, unravel, size):
    columns = jax.jit(jax.vmap(lambda v: ravel_pytree(operator.mv(unravel(v)))[0]))
    return np.asarray(columns(jnp.eye(size)))


def test_products_are_those_of_the_dense_hessian(net):
    model, batch, H, unravel = net
    v = jax.random.normal(KEY, (H.shape[0],))
    wanted = H @ v
    np.testing.assert_allclose(flat(hvp(LOSS, model, batch, unravel(v))), wanted)
    operator = hessian_operator(LOSS, model, batch)
    assert lx.is_symmetric(operator)
    np.testing.assert_allclose(flat(operator.mv(unravel(v))), wanted)


def test_gauss_newton_is_the_hessian_without_the_networks_curvature(net):
    model, batch, H, unravel = net
    G = ggn_operator(LOSS, model, batch)
    assert lx.is_positive_semidefinite(G)
    matrix = dense(G, unravel, H.shape[0])
    assert np.linalg.eigvalsh(matrix)[0] > -1e-12 > np.linalg.eigvalsh(H)[0]

    # Of a network linear in its parameters it is the Hessian.
    linear = LogitLoss(lambda w, x: x @ w)
    w = jax.random.normal(KEY, (3, 4))
    v = jnp.cos(w)
    both = [op(linear, w, batch).mv(v) for op in (ggn_operator, hessian_operator)]
    np.testing.assert_allclose(*both, atol=1e-12)
    with pytest.raises(TypeError, match="must be a LogitLoss"):
        ggn_operator(lambda w, b: jnp.sum(w), w, batch)


@pytest.mark.parametrize(
    ("method", "which"),
    [
        ("lanczos", "largest"),
        ("lanczos", "smallest"),
        ("lobpcg", "largest"),
        ("power", "smallest"),
    ],
)
def test_top_eigenpairs_are_those_of_the_dense_hessian(net, eigen, method, which):
    model, batch, H, _ = net
    exact = eigen[0] if which == "smallest" else eigen[0][::-1]
    # Close eigenvalues: subspace iteration needs its steps.
    steps = 4000 if method == "power" else 96
    top = hessian_top(
        LOSS, model, batch, k=3, which=which, method=method, tol=1e-6,
        max_steps=steps, key=KEY,
    )  # fmt: skip
    # Values are accurate to the square of the residual over the gap.
    np.testing.assert_allclose(top.values, exact[:3], rtol=1e-6)
    assert np.all(top.residuals < 1e-6) and top.certificate.proof
    for index in range(3):
        v = flat(jax.tree.map(lambda leaf, i=index: leaf[i], top.vectors))
        np.testing.assert_allclose(np.linalg.norm(v), 1)
        np.testing.assert_allclose(
            np.linalg.norm(H @ v - float(top.values[index]) * v),
            top.residuals[index],
            atol=1e-12,
        )


def test_cut_off_values_are_bounds_and_residuals_reach_an_eigenvalue(net, eigen):
    model, batch, *_ = net
    top = hessian_top(LOSS, model, batch, k=2, max_steps=5, tol=0.0, key=KEY)
    assert top.n_hvp == 5 + 2 and jnp.max(top.residuals) > 1e-3
    for value, residual in zip(top.values, top.residuals, strict=True):
        assert value <= eigen[0][-1] + 1e-12
        assert np.min(np.abs(eigen[0] - value)) <= residual + 1e-12


def test_it_stops_when_the_residual_is_small_and_not_before(net):
    model, batch, H, _ = net
    loose, tight = (
        hessian_top(LOSS, model, batch, k=3, tol=tol, key=KEY) for tol in (0.1, 1e-7)
    )
    assert loose.n_hvp < tight.n_hvp <= H.shape[0] + 3
    for found, tol in ((loose, 0.1), (tight, 1e-7)):
        assert jnp.all(found.residuals <= tol * found.values + 1e-12)
    # Without reorthogonalisation the top value still comes out.
    plain = hessian_top(LOSS, model, batch, tol=1e-6, reorth=False, key=KEY)
    np.testing.assert_allclose(plain.values, tight.values[:1], rtol=1e-6)


def quadratic(w, batch):
    return jnp.sum(batch * w**2) / 2


def test_multiple_eigenvalues_and_small_spaces():
    # Each of these spaces becomes invariant before all pairs are found.
    for diagonal, wanted in (
        ([4.0, 4.0, 4.0, 1.0], [4.0, 4.0, 4.0]),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([-1.0, -2.0, -2.0, -5.0], [-1.0, -2.0, -2.0]),
    ):
        top = hessian_top(quadratic, jnp.ones(4), jnp.array(diagonal), k=3, key=KEY)
        np.testing.assert_allclose(top.values, wanted, atol=1e-10)
        np.testing.assert_allclose(top.residuals, 0, atol=1e-10)
        V = np.asarray(top.vectors)
        np.testing.assert_allclose(V @ V.T, np.eye(3), atol=1e-10)
    # NaN stays visible.
    nan = hessian_top(quadratic, jnp.ones(4), jnp.full(4, jnp.nan), k=3, key=KEY)
    assert jnp.all(jnp.isnan(nan.values))


def test_a_mask_gives_the_block(net):
    model, batch, H, _ = net
    sizes = [leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_array))]
    block = H[: sizes[0], : sizes[0]]

    def mask(params):
        off = jax.tree.map(lambda _: jnp.asarray(False), params)
        return eqx.tree_at(lambda m: m.layers[0].weight, off, jnp.asarray(True))

    top = hessian_top(LOSS, model, batch, k=2, tol=1e-9, mask=mask, key=KEY)
    np.testing.assert_allclose(top.values, np.linalg.eigvalsh(block)[:-3:-1], rtol=1e-6)
    exact = hessian_trace(LOSS, model, batch, mask=mask, key=KEY)
    np.testing.assert_allclose(exact.value, np.trace(block))
    weighed = spectral_density(LOSS, model, batch, mask=mask, steps=40, key=KEY)
    assert weighed.size == sizes[0]
    np.testing.assert_allclose(weighed.nodes.max(), top.values[0])
    # Where nothing is left there is no number.
    nothing = lambda params: jax.tree.map(lambda _: jnp.asarray(False), params)  # noqa: E731
    none = hessian_top(LOSS, model, batch, k=2, mask=nothing, key=KEY)
    assert jnp.all(jnp.isnan(none.values))
    with pytest.raises(ValueError, match="`mask` must have the structure"):
        hessian_top(LOSS, model, batch, mask=(True, False), key=KEY)


def test_the_exact_trace(net):
    model, batch, H, _ = net
    exact = hessian_trace(LOSS, model, batch, key=KEY)
    assert exact.kind == "exact" and exact.certificate.proof
    np.testing.assert_allclose(exact.value, np.trace(H))


@pytest.mark.parametrize("estimator", ["hutchinson", "hutchpp", "xtrace"])
def test_estimated_traces(estimator):
    """On quadratics: one compilation for spectra of all kinds."""

    @jax.jit
    def estimates(A, keys):
        form = lambda w, A: w @ A @ w / 2  # noqa: E731
        return jax.vmap(
            lambda key: hessian_trace(
                form, jnp.ones(20), A, n_probes=12, estimator=estimator, key=key
            )
        )(keys)

    keys = jax.random.split(KEY, 64)
    U = jnp.linalg.qr(jax.random.normal(KEY, (20, 20)))[0]
    decaying = U @ jnp.diag(8.0 * 0.6 ** jnp.arange(20.0) - 0.1) @ U.T
    found = estimates(decaying, keys)
    assert found.kind == "estimate" and not found.certificate.proof
    error = np.asarray(found.value) - float(jnp.trace(decaying))
    # Unbiased: the mean of 64 runs within 4 of its standard errors.
    assert abs(error.mean()) < 4 * error.std() / 8
    # 95 % of 64 is 61; below 50 would be six deviations off. The leave-one-out samples
    # of XTrace share probes, so that its interval is only nearly right.
    assert np.sum(np.abs(error) <= found.half_width) >= 50
    if estimator != "hutchinson":
        # Of low rank: the basis holds all of it.
        low = jnp.diag(jnp.array([5.0, -2.0] + [0.0] * 18))
        found = estimates(U @ low @ U.T, keys)
        np.testing.assert_allclose(found.value, 3, atol=1e-6)
        assert jnp.max(found.half_width) < 1e-6
        assert error.std() < 3
    np.testing.assert_allclose(
        estimates(jnp.zeros((20, 20)), keys).value, 0, atol=1e-12
    )
    assert jnp.all(jnp.isnan(estimates(jnp.full((20, 20), jnp.nan), keys).value))


def test_the_density_is_a_quadrature_of_the_spectrum(net, eigen):
    model, batch, H, _ = net
    size = H.shape[0]
    spectrum = spectral_density(LOSS, model, batch, n_probes=24, steps=64, key=KEY)
    np.testing.assert_allclose(spectrum.weights.sum(1), 1)
    nodes = spectrum.nodes[spectrum.weights > 1e-8]
    assert eigen[0][0] - 1e-9 < nodes.min() < nodes.max() < eigen[0][-1] + 1e-9
    for function, wanted in ((lambda v: v, H), (lambda v: v**2, H @ H)):
        mean = spectrum.mean(function)
        assert abs(mean.value - np.trace(wanted) / size) < 2 * mean.half_width
    grid = jnp.linspace(float(nodes.min()) - 1, float(nodes.max()) + 1, 400)
    density = spectrum.density(grid, 0.1)
    np.testing.assert_allclose(jnp.trapezoid(density, grid), 1, rtol=1e-3)
    with pytest.raises(ValueError, match="`width` must be positive"):
        spectrum.density(grid, 0.0)


def test_per_class_hessians_average_to_the_whole(net):
    model, (x, y), H, unravel = net
    v = unravel(jax.random.normal(KEY, (H.shape[0],)))
    product = eqx.filter_jit(lambda batch: hvp(LOSS, model, batch, v))
    each = [flat(product((x[y == c], y[y == c]))) for c in range(4)]
    np.testing.assert_allclose(sum(each) / 4, H @ flat(v), atol=1e-12)


def test_under_jit_and_vmap_over_models():
    diagonals = jnp.array([[1.0, 2.0, 3.0], [7.0, 5.0, 6.0]])
    top = jax.jit(
        jax.vmap(lambda d: hessian_top(quadratic, jnp.ones(3), d, k=2, key=KEY))
    )(diagonals)
    np.testing.assert_allclose(top.values, [[3.0, 2.0], [7.0, 6.0]], rtol=1e-6)


def test_half_precision_is_measured_in_float32(float32):
    w = {"a": jnp.ones(2, jnp.bfloat16), "b": None, "c": jnp.ones(2)}
    loss = lambda w, b: 2 * jnp.sum(w["a"] ** 2) + jnp.sum(w["c"] ** 2)  # noqa: E731
    top = hessian_top(loss, w, None, key=KEY)
    assert top.values.dtype == jnp.float32 and top.vectors["b"] is None
    np.testing.assert_allclose(top.values, 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, w: hessian_top(f, w, None, k=0, key=KEY), "`k` must lie in 1 .. 4"),
        (lambda f, w: hessian_top(f, w, None, k=5, key=KEY), "`k` must lie in 1 .. 4"),
        (
            lambda f, w: hessian_top(f, w, None, method="lobpcg", key=KEY),
            "`k` must lie in 1 .. 0",
        ),
        (
            lambda f, w: hessian_top(f, w, None, k=3, max_steps=2, key=KEY),
            "`max_steps` must be at least k = 3",
        ),
        (
            lambda f, w: hessian_top(f, w, None, which="big", key=KEY),
            "`which` must be one of",
        ),
        (lambda f, w: hessian_top(f, 3, None, key=KEY), "must hold floating arrays"),
        (
            lambda f, w: hessian_top(lambda w, b: w, w, None, key=KEY),
            "must return a scalar",
        ),
        (
            lambda f, w: hessian_trace(
                f, w, None, n_probes=3, estimator="xtrace", key=KEY
            ),
            "`n_probes` must be at least 4",
        ),
        (
            lambda f, w: hessian_trace(
                f, w, None, n_probes=40, estimator="hutchpp", key=KEY
            ),
            "at most 3 times the 4 parameters",
        ),
        (
            lambda f, w: hessian_trace(f, w, jnp.ones((0, 2)), key=KEY),
            "`batch` must not be empty",
        ),
        (
            lambda f, w: spectral_density(f, w, None, steps=0, key=KEY),
            "must be at least 1",
        ),
        (lambda f, w: hvp(f, w, None, jnp.ones(3)), "`vector` must be like"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda w, b: jnp.sum(w**2), jnp.ones(4))
