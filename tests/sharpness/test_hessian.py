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


def form(w, A):
    """A loss with any Hessian that one likes, as data: nothing compiles again."""
    return (w["a"] @ A[:20] @ flat(w) + w["b"] @ A[20:] @ flat(w)) / 2


def flat(tree):
    return ravel_pytree(tree)[0]


W = {"a": np.ones(20), "b": np.ones(24), "none": None}
# Masks of arrays are data, too: all tests of one setting share one compilation.
ALL = {"a": np.asarray(True), "b": np.asarray(True), "none": None}


def top3(A, tol=1e-6, mask=ALL):
    mask = jax.tree.map(jnp.asarray, mask)
    return hessian_top(form, W, A, k=3, tol=tol, mask=mask, key=KEY)


def quadrature(A, mask=ALL):
    mask = jax.tree.map(jnp.asarray, mask)
    return spectral_density(form, W, A, n_probes=24, steps=44, mask=mask, key=KEY)


@pytest.fixture(scope="module")
def net():
    """A model with static leaves, a batch, and the dense Hessian."""
    model = eqx.nn.MLP(3, 4, 5, 1, activation=jnp.tanh, key=jax.random.key(0))
    model = jax.tree.map(lambda a: 2 * a if eqx.is_array(a) else a, model)
    x = jax.random.normal(jax.random.key(1), (16, 3))
    batch = (x, jnp.arange(16) % 4)
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    vector, unravel = ravel_pytree(arrays)

    @jax.jit
    def dense(v):
        return jax.hessian(lambda v: LOSS(eqx.combine(unravel(v), static), batch))(v)

    return model, batch, np.asarray(dense(vector)), unravel


@pytest.fixture(scope="module")
def H():
    """A spectrum with a bulk, outliers at both ends and a close pair."""
    random = np.random.default_rng(0)
    U = np.linalg.qr(random.normal(size=(44, 44)))[0]
    values = np.concatenate([np.linspace(-0.2, 0.3, 38), [-1, -0.6, 1, 2, 2.9, 3]])
    return (U * values) @ U.T


def test_products_are_those_of_the_dense_hessian(net):
    model, batch, H, unravel = net
    v = jax.random.normal(KEY, (H.shape[0],))

    @eqx.filter_jit
    def products(tree):
        operator = hessian_operator(LOSS, model, batch)
        assert lx.is_symmetric(operator)
        return hvp(LOSS, model, batch, tree), operator.mv(tree)

    for found in products(unravel(v)):
        np.testing.assert_allclose(flat(found), H @ v)


def test_gauss_newton_is_the_hessian_without_the_networks_curvature(net):
    model, batch, H, unravel = net

    @eqx.filter_jit
    def dense(model):
        G = ggn_operator(LOSS, model, batch)
        assert lx.is_positive_semidefinite(G)
        return jax.vmap(lambda v: flat(G.mv(unravel(v))))(jnp.eye(H.shape[0]))

    assert np.linalg.eigvalsh(dense(model))[0] > -1e-12 > np.linalg.eigvalsh(H)[0]

    # Of a network linear in its parameters it is the Hessian.
    linear = LogitLoss(lambda w, x: x @ w)
    w = jax.random.normal(KEY, (3, 4))

    @jax.jit
    def both(w):
        made = (ggn_operator(linear, w, batch), hessian_operator(linear, w, batch))
        return [operator.mv(jnp.cos(w)) for operator in made]

    np.testing.assert_allclose(*both(w), atol=1e-12)
    with pytest.raises(TypeError, match="must be a LogitLoss"):
        ggn_operator(lambda w, b: jnp.sum(w), w, batch)


def test_an_equinox_model_whole(net):
    model, batch, H, _ = net
    top = hessian_top(LOSS, model, batch, k=3, tol=1e-6, key=KEY)
    np.testing.assert_allclose(top.values, np.linalg.eigvalsh(H)[:-4:-1], rtol=1e-6)
    assert top.vectors.layers[0].weight.shape == (3, 5, 3)
    trace = hessian_trace(LOSS, model, batch, key=KEY)
    assert trace.kind == "exact" and trace.certificate.proof
    np.testing.assert_allclose(trace.value, np.trace(H))


@pytest.mark.parametrize("method", ["lanczos", "lobpcg", "power"])
def test_top_eigenpairs_are_those_of_the_dense_hessian(H, method):
    exact = np.linalg.eigvalsh(H)[::-1]
    if method == "lanczos":
        top = top3(H)
    elif method == "lobpcg":
        top = hessian_top(form, W, H, k=3, method=method, tol=1e-6, key=KEY)
    else:
        # Close eigenvalues: subspace iteration needs its steps. The other end.
        exact = exact[::-1]
        top = hessian_top(
            form, W, H, k=3, which="smallest", method=method, tol=1e-6, max_steps=4000,
            key=KEY,
        )  # fmt: skip
    # Values are accurate to the square of the residual over the gap.
    np.testing.assert_allclose(top.values, exact[:3], rtol=1e-6)
    assert np.all(top.residuals < 1e-5) and top.certificate.proof
    for index in range(3):
        v = np.concatenate([top.vectors["a"][index], top.vectors["b"][index]])
        np.testing.assert_allclose(np.linalg.norm(v), 1)
        np.testing.assert_allclose(
            np.linalg.norm(H @ v - float(top.values[index]) * v),
            top.residuals[index],
            atol=1e-12,
        )


def diagonal(w, d):
    return jnp.sum(d * w**2) / 2


@pytest.mark.parametrize("k", [2, 9])
def test_lanczos_starts_again_for_the_copies_of_multiple_eigenvalues(k):
    d = jnp.array([10.0] * k + [9.0] + list(np.linspace(0, 1, 199 - k)))
    top = hessian_top(diagonal, jnp.ones(200), d, k=k, key=KEY)
    np.testing.assert_allclose(top.values, 10, rtol=1e-6)
    V = np.asarray(top.vectors)
    np.testing.assert_allclose(V @ V.T, np.eye(k), atol=1e-8)
    assert top.n_hvp < 200 and "multiple" in str(top.certificate)
    # One start only sees one of them.
    one = hessian_top(diagonal, jnp.ones(200), d, k=k, reorth=False, key=KEY)
    assert one.n_hvp < top.n_hvp


def test_a_second_start_that_finds_nothing_costs_a_quarter():
    d = jnp.linspace(0, 1, 200) ** 3
    once, again = (
        hessian_top(diagonal, jnp.ones(200), d, k=4, reorth=reorth, key=KEY)
        for reorth in (False, True)
    )
    np.testing.assert_allclose(again.values, d[:-5:-1], rtol=1e-3)
    assert once.n_hvp < again.n_hvp <= int(1.3 * int(once.n_hvp))


@pytest.mark.parametrize("method", ["lanczos", "lobpcg", "power"])
def test_zero_hessians_and_masks_of_few_parameters(method):
    w, d = jnp.ones(30), jnp.arange(30.0) + 2
    given = {"method": method, "k": 2, "key": KEY}
    zero = hessian_top(diagonal, w, 0 * d, **given)
    np.testing.assert_array_equal(zero.values, 0)
    np.testing.assert_array_equal(zero.residuals, 0)
    mask = jnp.arange(30) < 2
    if method == "lobpcg":
        with pytest.raises(
            ValueError, match=r"`k` must lie in 1 .. 0 for 2 parameters"
        ):
            hessian_top(diagonal, w, d, mask=mask, **given)
        return
    few = hessian_top(diagonal, w, d, mask=mask, **given)
    np.testing.assert_allclose(few.values, [3.0, 2.0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"`k` must lie in 1 .. 1 for 1 parameters"):
        hessian_top(diagonal, w, d, mask=jnp.arange(30) < 1, **given)
    found = jax.jit(lambda mask: hessian_top(diagonal, w, d, mask=mask, **given))
    assert jnp.all(jnp.isnan(found(jnp.arange(30) < 1).values))


def least_squares(w, b):
    return jnp.mean((b[0] @ w - b[1]) ** 2)


@pytest.mark.parametrize(
    "measure",
    [hessian_top, hessian_trace, spectral_density],
    ids=lambda measure: measure.__name__,
)
def test_what_is_not_finite_has_no_curvature(measure):
    x, y = jax.random.normal(KEY, (8, 4)), jnp.ones(8)
    infinite = lambda w, b: least_squares(w, b) + jnp.inf  # noqa: E731
    for loss, w, b in (
        (least_squares, jnp.full(4, jnp.nan), (x, y)),
        (least_squares, jnp.ones(4), (x, y.at[3].set(jnp.nan))),
        (infinite, jnp.ones(4), (x, y)),
    ):
        with pytest.raises(ValueError, match=f"{measure.__name__}: `loss_fn` must be"):
            measure(loss, w, b, key=KEY)
        found = jax.jit(lambda w, b, loss=loss: measure(loss, w, b, key=KEY))(w, b)
        numbers = jax.tree.leaves(eqx.filter(found, eqx.is_inexact_array))
        assert jnp.all(jnp.isnan(numbers[0]))
        with pytest.raises(ValueError, match="hessian_operator: `loss_fn` must be"):
            hessian_operator(loss, w, b)
    # Parameters that are not measured may be anything.
    part = hessian_trace(
        lambda w, b: jnp.sum(w["a"] ** 2) + jnp.log(jnp.sum(w["b"]) + 1),
        {"a": jnp.ones(2), "b": jnp.zeros(2)}, None, mask={"a": True, "b": False},
        key=KEY,
    )  # fmt: skip
    assert part.value == 4


def test_it_stops_when_the_residual_is_small_and_not_before(H):
    exact = np.linalg.eigvalsh(H)
    loose, tight = (top3(H, tol) for tol in (0.3, 1e-7))
    assert loose.n_hvp < tight.n_hvp <= H.shape[0] + 3
    for found, tol in ((loose, 0.3), (tight, 1e-7)):
        assert jnp.all(found.residuals <= tol * found.values + 1e-12)
        # Cut off or not: below the top, and an eigenvalue within the residual.
        assert np.max(found.values) <= exact[-1] + 1e-12
        away = np.abs(exact[None, :] - np.asarray(found.values)[:, None]).min(1)
        assert np.all(away <= np.asarray(found.residuals) + 1e-12)
    # Without reorthogonalisation the top value still comes out.
    early, late = (
        hessian_top(form, W, H, tol=tol, max_steps=30, reorth=False, key=KEY)
        for tol in (0.5, 1e-6)
    )
    np.testing.assert_allclose(late.values, exact[-1:], rtol=1e-6)
    # Cut off early it is a bound, and says how good.
    assert early.n_hvp == 7 < late.n_hvp and early.values[0] < late.values[0]
    assert 0.01 < early.residuals[0] < 0.5 * early.values[0]


def test_multiple_eigenvalues_and_small_spaces():
    # Each of these spaces becomes invariant before all pairs are found.
    for diagonal, wanted in (
        ([4.0] * 3 + [1.0] * 41, [4.0, 4.0, 4.0]),
        ([0.0] * 44, [0.0, 0.0, 0.0]),
        ([-1.0, -2.0, -2.0] + [-5.0] * 41, [-1.0, -2.0, -2.0]),
    ):
        top = top3(jnp.diag(jnp.array(diagonal)))
        np.testing.assert_allclose(top.values, wanted, atol=1e-10)
        np.testing.assert_allclose(top.residuals, 0, atol=1e-10)
        V = np.concatenate([top.vectors["a"], top.vectors["b"]], 1)
        np.testing.assert_allclose(V @ V.T, np.eye(3), atol=1e-10)
    # NaN is named, and under jit it stays visible.
    nan = jnp.full((44, 44), jnp.nan)
    with pytest.raises(ValueError, match="`loss_fn` must be finite at `params`"):
        top3(nan)
    assert jnp.all(jnp.isnan(jax.jit(top3)(nan).values))


def test_a_mask_gives_the_block(H):
    mask = {**ALL, "b": np.asarray(False)}
    block = np.linalg.eigvalsh(H[:20, :20])
    top = top3(H, 1e-9, mask)
    np.testing.assert_allclose(top.values, block[:-4:-1], rtol=1e-6)
    weighed = quadrature(H, mask)
    assert weighed.size == 20
    np.testing.assert_allclose(weighed.nodes.max(), block[-1])
    np.testing.assert_allclose(weighed.nodes.min(), block[0])
    # Where too little is left there is no number.
    nothing = {**mask, "a": np.asarray(False)}
    with pytest.raises(ValueError, match="`mask` must select a parameter"):
        top3(H, mask=nothing)
    with pytest.raises(ValueError, match=r"`k` must lie in 1 .. 2 for 2 parameters"):
        top3(H, mask={**mask, "a": np.arange(20) < 2})
    with pytest.raises(TypeError, match="`mask` must hold booleans"):
        top3(H, mask={**mask, "a": np.ones(20)})
    none = jax.jit(lambda mask: top3(H, mask=mask))(nothing)
    assert jnp.all(jnp.isnan(none.values))
    with pytest.raises(ValueError, match="`mask` must have the structure"):
        hessian_top(form, W, H, mask=(True, False), key=KEY)


@pytest.mark.parametrize("estimator", ["hutchinson", "hutchpp", "xtrace"])
def test_estimated_traces(estimator):
    """On quadratics: one compilation for spectra of all kinds."""

    @jax.jit
    def estimates(A, keys):
        square = lambda w, A: w @ A @ w / 2  # noqa: E731
        return jax.vmap(
            lambda key: hessian_trace(
                square, jnp.ones(20), A, n_probes=12, estimator=estimator, key=key
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


def test_the_density_is_a_quadrature_of_the_spectrum(H):
    exact, size = np.linalg.eigvalsh(H), H.shape[0]
    spectrum = quadrature(H)
    np.testing.assert_allclose(spectrum.weights.sum(1), 1)
    nodes = spectrum.nodes[spectrum.weights > 1e-8]
    assert exact[0] - 1e-9 < nodes.min() < nodes.max() < exact[-1] + 1e-9
    for function, wanted in ((lambda v: v, H), (lambda v: v**2, H @ H)):
        mean = spectrum.mean(function)
        assert abs(mean.value - np.trace(wanted) / size) < 2 * mean.half_width
    grid = jnp.linspace(-2.0, 4.0, 400)
    density = spectrum.density(grid, 0.1)
    np.testing.assert_allclose(jnp.trapezoid(density, grid), 1, rtol=1e-3)
    with pytest.raises(ValueError, match="`width` must be positive"):
        spectrum.density(grid, 0.0)


def test_per_class_hessians_average_to_the_whole(net):
    model, (x, y), H, unravel = net
    v = jax.random.normal(KEY, (H.shape[0],))
    product = eqx.filter_jit(lambda batch: flat(hvp(LOSS, model, batch, unravel(v))))
    each = [product((x[y == c], y[y == c])) for c in range(4)]
    np.testing.assert_allclose(sum(each) / 4, H @ v, atol=1e-12)


def test_half_precision_is_measured_in_float32_also_under_vmap(float32):
    loss = lambda w, b: b * jnp.sum(w["a"] ** 2) + jnp.sum(w["c"] ** 2)  # noqa: E731
    w = {"a": jnp.ones(2, jnp.bfloat16), "b": None, "c": jnp.ones(2)}
    tops = jax.jit(jax.vmap(lambda b: hessian_top(loss, w, b, key=KEY)))(
        jnp.array([2.0, 0.5])
    )
    assert tops.values.dtype == jnp.float32 and tops.vectors["b"] is None
    np.testing.assert_allclose(tops.values, [[4.0], [2.0]], rtol=1e-5)


def test_layers_of_half_precision_meet_a_batch_of_their_own(float32):
    layer = eqx.nn.Conv2d(1, 2, 3, dtype=jnp.bfloat16, key=KEY)
    images = jax.random.normal(KEY, (4, 1, 5, 5), jnp.bfloat16)
    loss = LogitLoss(lambda model, x: jax.vmap(model)(x).reshape(4, -1))
    batch = (images, jnp.arange(4))
    top = hessian_top(loss, layer, batch, key=KEY)
    assert top.values.dtype == jnp.float32 and top.values[0] > 0
    G = ggn_operator(loss, layer, batch)
    ones = jax.tree.map(jnp.ones_like, eqx.filter(top.vectors, eqx.is_array))
    row = jax.tree.map(lambda leaf: leaf[0], ones)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(G.mv(row)))


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        ([0, -1, 1], ValueError, r"`y` must lie in 0 .. 3 \(got -1 to 1\)"),
        ([0, 4, 1], ValueError, r"`y` must lie in 0 .. 3 \(got 0 to 4\)"),
        ([0], ValueError, r"`y` must have shape \(3,\)"),
        ([[0], [1], [2]], ValueError, r"`y` must have shape \(3,\)"),
        (1, ValueError, r"`y` must have shape \(3,\)"),
        ([0.0, 1.0, 2.0], TypeError, "`y` must hold integer labels"),
    ],
)
def test_labels_are_classes(y, error, message):
    loss = LogitLoss(lambda w, x: x @ w)
    w, batch = jnp.ones((2, 4)), (jnp.ones((3, 2)), jnp.asarray(y))
    with pytest.raises(error, match=message):
        loss(w, batch)
    with pytest.raises(error, match=message):
        hessian_top(loss, w, batch, key=KEY)
    if "lie" in message:
        assert jnp.isnan(jax.jit(loss)(w, batch))


def test_several_pairs_under_vmap():
    d = jnp.stack([jnp.r_[3.0, 3.0, jnp.linspace(0, 1, 28)], jnp.arange(30.0)])
    tops = jax.jit(
        jax.vmap(lambda d: hessian_top(diagonal, jnp.ones(30), d, k=2, key=KEY))
    )(d)
    np.testing.assert_allclose(tops.values, [[3, 3], [29, 28]], rtol=1e-5)


def test_counts_are_whole_numbers():
    w = jnp.ones(4)
    for call, name in (
        (lambda: hessian_top(diagonal, w, w, k=1.5, key=KEY), "k"),
        (lambda: hessian_top(diagonal, w, w, max_steps=2.5, key=KEY), "max_steps"),
        (lambda: hessian_trace(diagonal, w, w, n_probes=2.5, key=KEY), "n_probes"),
        (lambda: spectral_density(diagonal, w, w, steps=2.5, key=KEY), "steps"),
    ):
        with pytest.raises(TypeError, match=f"`{name}` must be an integer"):
            call()


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
