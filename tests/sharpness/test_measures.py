"""Sharpness: closed forms, bounds on the right side, invariances, bad input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.sharpness import (
    LogitLoss,
    first_order_flatness,
    hvp,
    sharpness,
    sharpness_quadratic,
)

KEY = jax.random.key(5)
DIAGONAL = jnp.array([4.0, 1.0, 0.5, -1.0])


def quadratic(w, diagonal):
    return jnp.sum(diagonal * w**2) / 2


def relu_logits(w, x):
    return jax.nn.relu(x @ w["in"] + w["bias"][None, :]) @ w["out"]


LOSS = LogitLoss(relu_logits)


@pytest.fixture(scope="module")
def net():
    keys = jax.random.split(jax.random.key(0), 4)
    w = {
        "in": jax.random.normal(keys[0], (3, 6)),
        "bias": jax.random.normal(keys[1], (6,)) / 2,
        "out": jax.random.normal(keys[2], (6, 4)),
    }
    return w, (jax.random.normal(keys[3], (12, 3)), jnp.arange(12) % 4)


@eqx.filter_jit
def two_norm(w, batch, key, adaptive, restarts=2):
    """One compilation serves many tests."""
    return sharpness(
        LOSS, w, batch, rho=0.3, adaptive=adaptive, restarts=restarts, key=key
    )


def rise(w, batch, witness, loss=LOSS):
    return loss(jax.tree.map(jnp.add, w, witness), batch) - loss(w, batch)


def test_quadratics_have_closed_forms():
    zero, rho = jnp.zeros(4), 0.3
    worst = sharpness(quadratic, zero, DIAGONAL, rho=rho, steps=60, key=KEY)
    np.testing.assert_allclose(worst.value, rho**2 * 4 / 2, rtol=1e-4)
    slope = first_order_flatness(quadratic, zero, DIAGONAL, rho=rho, steps=60, key=KEY)
    np.testing.assert_allclose(slope.value, rho**2 * 4, rtol=1e-4)
    model = sharpness_quadratic(quadratic, zero, DIAGONAL, rho=rho, key=KEY)
    np.testing.assert_allclose(model.value, rho**2 * 4 / 2, rtol=1e-6)
    np.testing.assert_allclose(jnp.abs(model.witness), [1, 0, 0, 0], atol=1e-4)
    cube = sharpness(quadratic, zero, DIAGONAL, rho=rho, p=jnp.inf, key=KEY)
    np.testing.assert_allclose(cube.value, rho**2 * 5.5 / 2, rtol=1e-3)
    for p, second_moment in ((2, 1.0), (jnp.inf, 1 / 3)):
        mean = sharpness(
            quadratic, zero, DIAGONAL, rho=rho, p=p, which="avg", steps=400, key=KEY
        )
        wanted = rho**2 * second_moment * 4.5 / 2
        assert mean.kind == "estimate" and not mean.certificate.proof
        assert abs(mean.value - wanted) < 2 * mean.half_width < wanted


def test_small_radii_give_the_gradients_dual_norm(net):
    w, batch = net
    g = jax.grad(LOSS)(w, batch)
    rho = 1e-6
    for p, adaptive, wanted in (
        (2, False, jnp.sqrt(sum(jnp.sum(v**2) for v in g.values()))),
        (jnp.inf, True, sum(jnp.sum(jnp.abs(w[n] * g[n])) for n in g)),
    ):
        found = sharpness(LOSS, w, batch, rho=rho, p=p, adaptive=adaptive, key=KEY)
        np.testing.assert_allclose(found.value / rho, wanted, rtol=1e-4)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_worst_case_is_a_lower_bound_that_its_witness_attains(net, adaptive):
    w, batch = net
    found = two_norm(w, batch, KEY, adaptive)
    assert found.kind == "lower_bound" and found.certificate.proof
    assert found.n_grad == 40
    np.testing.assert_allclose(rise(w, batch, found.witness), found.value, rtol=1e-9)
    scaled = [
        found.witness[n] / (jnp.abs(w[n]) if adaptive else 1) for n in found.witness
    ]
    length = jnp.sqrt(sum(jnp.sum(v**2) for v in scaled))
    assert length <= 0.3 * (1 + 1e-12)

    # Random search with as many evaluations, on the sphere, does worse.
    def random_rise(key):
        z = {n: jax.random.normal(k, v.shape) for k, (n, v) in zip(
            jax.random.split(key, 3), w.items(), strict=True)}  # fmt: skip
        size = jnp.sqrt(sum(jnp.sum(v**2) for v in z.values()))
        scale = {n: jnp.abs(v) if adaptive else jnp.ones_like(v) for n, v in w.items()}
        return rise(w, batch, {n: 0.3 / size * scale[n] * z[n] for n in z})

    tried = jax.vmap(random_rise)(jax.random.split(KEY, 42))
    assert found.value > jnp.max(tried)


def test_nothing_climbs_higher_than_the_slope_allows(net):
    # Both maxima are over one ball: the mean value theorem.
    w, batch = net
    slope = first_order_flatness(LOSS, w, batch, rho=0.3, restarts=2, key=KEY)
    assert two_norm(w, batch, KEY, False).value <= slope.value
    at = jax.tree.map(jnp.add, w, slope.witness)
    g = jax.grad(LOSS)(at, batch)
    np.testing.assert_allclose(
        slope.value, 0.3 * jnp.sqrt(sum(jnp.sum(v**2) for v in g.values())), rtol=1e-9
    )


def test_adaptive_values_do_not_see_rescaled_layers_and_others_do(net):
    w, batch = net
    # Powers of two: every product is the same number in floating point.
    other = {"in": 8 * w["in"], "bias": 8 * w["bias"], "out": w["out"] / 8}
    np.testing.assert_allclose(LOSS(other, batch), LOSS(w, batch), rtol=1e-12)
    here, there = (two_norm(v, batch, KEY, True).value for v in (w, other))
    np.testing.assert_allclose(here, there, rtol=1e-9)
    here, there = (two_norm(v, batch, KEY, False).value for v in (w, other))
    assert abs(here - there) > 0.1 * here


def test_logit_normalisation_takes_the_scale_away(net):
    w, batch = net

    @eqx.filter_jit
    def normalised(w):
        return sharpness(
            LOSS, w, batch, rho=0.3, adaptive=True, normalize_logits=0.5, key=KEY
        ).value

    other = {**w, "out": 16 * w["out"]}
    np.testing.assert_allclose(normalised(w), normalised(other), rtol=1e-9)
    # Equal logits have no direction: uniform probabilities, and a finite gradient.
    flat = jax.tree.map(jnp.zeros_like, w)
    loss = LOSS.normalised(1.0)
    np.testing.assert_allclose(loss(flat, batch), np.log(4))
    assert all(jnp.all(jnp.isfinite(v)) for v in jax.grad(loss)(flat, batch).values())


def test_chunks_have_their_own_worst_case(net):
    w, batch = net
    whole = sharpness(LOSS, w, batch, rho=0.3, restarts=2, key=KEY)
    halves = sharpness(LOSS, w, batch, rho=0.3, restarts=2, microbatch=6, key=KEY)
    assert halves.witness["in"].shape == (2, 3, 6)
    assert halves.value >= whole.value
    rises = [
        rise(
            w,
            jax.tree.map(lambda v, c=c: v[6 * c : 6 * c + 6], batch),
            jax.tree.map(lambda v, c=c: v[c], halves.witness),
        )
        for c in range(2)
    ]
    np.testing.assert_allclose(halves.value, np.mean(rises), rtol=1e-9)
    with pytest.raises(ValueError, match="`microbatch` must divide the batch of 12"):
        sharpness(LOSS, w, batch, rho=0.3, microbatch=5, key=KEY)


def test_zero_weights_and_masked_ones_stay(net):
    w, batch = net
    sparse = {**w, "in": w["in"].at[0].set(0.0)}
    found = two_norm(sparse, batch, KEY, True)
    assert jnp.all(found.witness["in"][0] == 0) and found.value > 0
    mask = {"in": False, "bias": True, "out": False}
    only = sharpness(LOSS, w, batch, rho=0.3, mask=mask, key=KEY)
    assert not jnp.any(only.witness["in"]) and not jnp.any(only.witness["out"])
    # The whole radius goes to what may move.
    np.testing.assert_allclose(jnp.linalg.norm(only.witness["bias"]), 0.3, rtol=1e-2)


def test_average_measures_half_the_trace(net):
    # rho^2 sum c^2 H_ii / 2, as the radius falls.
    w, batch = net
    smooth = LogitLoss(
        lambda w, x: jnp.tanh(x @ w["in"] + w["bias"][None, :]) @ w["out"]
    )
    found = sharpness(
        smooth, w, batch, rho=0.02, which="avg", adaptive=True, steps=2000, key=KEY
    )
    units = jnp.eye(sum(v.size for v in w.values()))
    vector, unravel = jax.flatten_util.ravel_pytree(w)
    diagonal = jax.vmap(
        lambda u: (
            u @ jax.flatten_util.ravel_pytree(hvp(smooth, w, batch, unravel(u)))[0]
        )
    )(units)
    wanted = 0.02**2 * jnp.sum(vector**2 * diagonal) / 2
    assert abs(found.value - wanted) < 2 * found.half_width


def test_under_vmap_over_models_and_in_float32(net, float32):
    w, batch = jax.tree.map(
        lambda v: v.astype(jnp.float32) if v.dtype == jnp.float64 else v, net
    )
    two = jax.tree.map(lambda v: jnp.stack([v, v / 2]), w)
    found = jax.vmap(lambda w: sharpness(LOSS, w, batch, rho=0.3, key=KEY))(two)
    assert found.value.shape == (2,) and found.value.dtype == jnp.float32
    alone = sharpness(LOSS, w, batch, rho=0.3, key=KEY)
    np.testing.assert_allclose(found.value[0], alone.value, rtol=1e-4)
    model = sharpness_quadratic(LOSS, w, batch, rho=0.01, key=KEY)
    worst = sharpness(LOSS, w, batch, rho=0.01, key=KEY)
    np.testing.assert_allclose(model.value, worst.value, rtol=0.02)


def test_nan_and_overflow_are_not_hidden():
    bad = lambda w, b: jnp.sum(w) * jnp.nan  # noqa: E731
    assert jnp.isnan(sharpness(bad, jnp.ones(2), None, rho=0.1, key=KEY).value)
    # Undefined somewhere in the ball: what was found before is still a lower bound.
    edge = lambda w, b: -jnp.sum(jnp.sqrt(1 - jnp.sum(w**2)))  # noqa: E731
    found = sharpness(edge, jnp.zeros(2), None, rho=2.0, key=KEY)
    assert 0 <= found.value <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0.0}, "`rho` must be positive"),
        ({"rho": -1.0}, "`rho` must be positive"),
        ({"p": 3}, "`p` must be 2 or infinity"),
        ({"which": "mean"}, "`which` must be one of"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"which": "avg", "steps": 1}, "`steps` must be at least 2"),
        ({"restarts": 0}, "`restarts` at least 1"),
        ({"mask": [True]}, "`mask` must have the structure"),
        ({"batch": jnp.ones((0, 3))}, "`batch` must not be empty"),
        ({"params": {"a": None}}, "must hold floating arrays"),
    ],
)
def test_bad_input_is_named(settings, message):
    given = {"params": jnp.ones(4), "batch": DIAGONAL, "rho": 0.1, "key": KEY}
    given.update(settings)
    params, batch = given.pop("params"), given.pop("batch")
    with pytest.raises(ValueError, match=message):
        sharpness(quadratic, params, batch, **given)


def test_bad_input_of_the_others_is_named():
    with pytest.raises(
        ValueError, match="first_order_flatness: `rho` must be positive"
    ):
        first_order_flatness(quadratic, jnp.ones(4), DIAGONAL, rho=0.0, key=KEY)
    with pytest.raises(ValueError, match="`steps` and `restarts` must be at least 1"):
        first_order_flatness(
            quadratic, jnp.ones(4), DIAGONAL, rho=0.1, steps=0, key=KEY
        )
    with pytest.raises(ValueError, match="sharpness_quadratic: `rho` must be positive"):
        sharpness_quadratic(quadratic, jnp.ones(4), DIAGONAL, rho=-1.0, key=KEY)
    with pytest.raises(TypeError, match="`normalize_logits` needs a LogitLoss"):
        sharpness(
            quadratic, jnp.ones(4), DIAGONAL, rho=0.1, normalize_logits=1.0, key=KEY
        )
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        LOSS.normalised(0.0)
