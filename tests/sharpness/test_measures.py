"""Sharpness: closed forms, bounds on the right side, invariances, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan.sharpness import (
    LogitLoss,
    first_order_flatness,
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


value, gradient = jax.jit(LOSS), jax.jit(jax.grad(LOSS))


def worst(w, batch, rho=0.3, adaptive=False):
    """One compilation for each of `adaptive`: radii and weights are data."""
    return sharpness(LOSS, w, batch, rho=rho, adaptive=adaptive, restarts=2, key=KEY)


def size(tree):
    return jnp.sqrt(sum(jnp.sum(v**2) for v in jax.tree.leaves(tree)))


def rise(w, batch, witness):
    return value(jax.tree.map(jnp.add, w, witness), batch) - value(w, batch)


def test_quadratics_have_closed_forms():
    zero, rho = jnp.zeros(4), 0.3
    found = sharpness(quadratic, zero, DIAGONAL, rho=rho, key=KEY)
    np.testing.assert_allclose(found.value, rho**2 * 4 / 2, rtol=1e-2)
    slope = first_order_flatness(quadratic, zero, DIAGONAL, rho=rho, key=KEY)
    np.testing.assert_allclose(slope.value, rho**2 * 4, rtol=1e-2)
    assert slope.n_grad == 1 + 3 * 20 + 1
    model = sharpness_quadratic(quadratic, zero, DIAGONAL, rho=rho, key=KEY)
    np.testing.assert_allclose(model.value, rho**2 * 4 / 2, rtol=1e-6)
    np.testing.assert_allclose(jnp.abs(model.witness), [1, 0, 0, 0], atol=1e-4)
    # Both ascents stay below what they estimate.
    assert found.value <= rho**2 * 4 / 2 and slope.value <= rho**2 * 4


def test_adaptive_cubes_and_averages_of_quadratics():
    w, rho = jnp.array([1.0, -2.0, 0.0, 3.0]), 0.1
    # In the cube each weight moves by a tenth of itself, outwards or inwards.
    found = sharpness(
        quadratic, w, DIAGONAL, rho=rho, p=jnp.inf, adaptive=True, key=KEY
    )
    wanted = jnp.sum(jnp.abs(DIAGONAL) * w**2 * (rho + jnp.sign(DIAGONAL) * rho**2 / 2))
    np.testing.assert_allclose(found.value, wanted, rtol=1e-3)
    assert found.witness[2] == 0
    for p, second_moment in ((2, 1.0), (jnp.inf, 1 / 3)):
        mean = sharpness(
            quadratic, w, DIAGONAL, rho=rho, p=p, adaptive=True, which="avg",
            steps=400, key=KEY,
        )  # fmt: skip
        assert mean.kind == "estimate" and not mean.certificate.proof
        wanted = rho**2 * second_moment * jnp.sum(DIAGONAL * w**2) / 2
        assert abs(mean.value - wanted) < 2 * mean.half_width < 1.0


def test_a_small_radius_gives_the_norm_of_the_gradient(net):
    found = worst(*net, rho=1e-6)
    np.testing.assert_allclose(found.value / 1e-6, size(gradient(*net)), rtol=1e-4)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_worst_case_is_a_lower_bound_that_its_witness_attains(net, adaptive):
    w, batch = net
    found = worst(w, batch, adaptive=adaptive)
    assert found.kind == "lower_bound" and found.certificate.proof
    assert found.n_grad == 40
    np.testing.assert_allclose(rise(w, batch, found.witness), found.value, rtol=1e-9)
    scale = jax.tree.map(jnp.abs if adaptive else jnp.ones_like, w)
    assert size(jax.tree.map(jnp.divide, found.witness, scale)) <= 0.3 * (1 + 1e-12)

    # Random search with as many evaluations, on the sphere, does worse.
    random = np.random.default_rng(0)
    for _ in range(42):
        z = jax.tree.map(lambda v: random.normal(size=v.shape), w)
        length = np.sqrt(sum(np.sum(v**2) for v in z.values()))
        d = {n: 0.3 / length * np.asarray(scale[n]) * z[n] for n in z}
        assert rise(w, batch, d) < found.value


def test_nothing_climbs_higher_than_the_slope_allows(net):
    # Both maxima are over one ball: the mean value theorem.
    w, batch = net
    slope = first_order_flatness(LOSS, w, batch, rho=0.3, restarts=2, key=KEY)
    assert worst(w, batch).value <= slope.value
    g = gradient(jax.tree.map(jnp.add, w, slope.witness), batch)
    np.testing.assert_allclose(slope.value, 0.3 * size(g), rtol=1e-9)


def test_adaptive_values_do_not_see_rescaled_layers_and_others_do(net):
    w, batch = net
    # Powers of two: every product is the same number in floating point.
    other = {"in": 8 * w["in"], "bias": 8 * w["bias"], "out": w["out"] / 8}
    np.testing.assert_allclose(value(other, batch), value(w, batch), rtol=1e-12)
    here, there = (worst(v, batch, adaptive=True).value for v in (w, other))
    np.testing.assert_allclose(here, there, rtol=1e-9)
    here, there = (worst(v, batch).value for v in (w, other))
    assert abs(here - there) > 0.1 * here


def test_logit_normalisation_takes_the_scale_away(net):
    w, batch = net
    here, there = (
        sharpness(
            LOSS, v, batch, rho=0.3, adaptive=True, normalize_logits=0.5, key=KEY
        ).value
        for v in (w, {**w, "out": 16 * w["out"]})
    )
    np.testing.assert_allclose(here, there, rtol=1e-9)
    # Equal logits have no direction: uniform probabilities, and a finite gradient.
    flat = jax.tree.map(jnp.zeros_like, w)
    found, slope = jax.jit(jax.value_and_grad(LOSS.normalised(1.0)))(flat, batch)
    np.testing.assert_allclose(found, np.log(4))
    assert all(jnp.all(jnp.isfinite(v)) for v in slope.values())


def test_chunks_have_their_own_worst_case(net):
    w, batch = net
    halves = sharpness(LOSS, w, batch, rho=0.3, restarts=2, microbatch=6, key=KEY)
    assert halves.witness["in"].shape == (2, 3, 6)
    assert halves.value >= worst(w, batch).value
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
    found = worst({**w, "in": w["in"].at[0].set(0.0)}, batch, adaptive=True)
    assert jnp.all(found.witness["in"][0] == 0) and found.value > 0
    mask = jnp.array([True, False, True, True])
    only = sharpness(quadratic, jnp.ones(4), DIAGONAL, rho=0.3, mask=mask, key=KEY)
    assert only.witness[1] == 0
    # The whole radius goes to what may move.
    np.testing.assert_allclose(jnp.linalg.norm(only.witness), 0.3, rtol=1e-2)


def test_under_vmap_over_models_and_in_float32(float32):
    w = jnp.array([[0.0, 0, 0, 0], [1.0, 1, 1, 1]])
    diagonal = DIAGONAL.astype(jnp.float32)
    found = jax.vmap(lambda w: sharpness(quadratic, w, diagonal, rho=0.3, key=KEY))(w)
    assert found.value.shape == (2,) and found.value.dtype == jnp.float32
    np.testing.assert_allclose(found.value[0], 0.3**2 * 4 / 2, rtol=1e-2)
    assert found.value[1] > 0.3 * jnp.linalg.norm(diagonal) * 0.9


def test_a_loss_that_is_undefined_in_part_of_the_ball():
    # What was found before is still a lower bound.
    edge = lambda w, b: -jnp.sqrt(1 - jnp.sum(w**2))  # noqa: E731
    found = sharpness(edge, jnp.zeros(2), None, rho=1.5, key=KEY)
    assert 0 < found.value <= 1
    # Where nothing but NaN was seen, there is no number.
    most = lambda w, b: jnp.log(1e-3 - jnp.sum(w**2))  # noqa: E731
    assert jnp.isnan(sharpness(most, jnp.zeros(2), None, rho=1.0, key=KEY).value)
    assert jnp.isnan(
        first_order_flatness(most, jnp.zeros(2), None, rho=1.0, key=KEY).value
    )


@pytest.mark.parametrize(
    "measure", [sharpness, first_order_flatness, sharpness_quadratic]
)
def test_what_is_not_finite_has_no_sharpness(measure):
    w, low = jnp.ones(4), lambda w, d: quadratic(w, d) - jnp.inf
    high = lambda w, d: quadratic(w, d) + jnp.inf  # noqa: E731
    for loss, d in ((quadratic, DIAGONAL * jnp.nan), (high, DIAGONAL), (low, DIAGONAL)):
        with pytest.raises(ValueError, match="`loss_fn` must be finite at `params`"):
            measure(loss, w, d, rho=0.1, key=KEY)
        run = jax.jit(lambda d, loss=loss: measure(loss, w, d, rho=0.1, key=KEY).value)
        assert jnp.isnan(run(d))
    run = jax.jit(lambda d: sharpness(high, w, d, rho=0.1, which="avg", key=KEY).value)
    assert jnp.isnan(run(DIAGONAL))


def test_no_perturbation_is_no_rise(net, float32):
    w, (x, y) = net
    x, y = x.astype(jnp.float32), y.astype(jnp.int32)
    zero = jax.tree.map(lambda v: jnp.zeros(v.shape, jnp.float32), w)
    assert sharpness(LOSS, zero, (x, y), rho=0.3, adaptive=True, key=KEY).value == 0
    mean = sharpness(LOSS, zero, (x, y), rho=0.3, adaptive=True, which="avg", key=KEY)
    assert mean.value == 0 and mean.half_width == 0
    w = jax.tree.map(lambda v: v.astype(jnp.float32), w)
    nothing = jax.tree.map(lambda v: jnp.zeros(v.shape, bool), w)
    run = jax.jit(lambda mask: sharpness(LOSS, w, (x, y), rho=1.0, mask=mask, key=KEY))
    assert run(nothing).value == 0
    # A rise within rounding is none.
    far = lambda w, d: 1e6 + quadratic(w, d)  # noqa: E731
    near = sharpness(far, jnp.zeros(4), jnp.ones(4), rho=1e-2, key=KEY)
    assert near.value == 0


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
        ({"mask": jnp.zeros(4, bool)}, "`mask` must select a parameter"),
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
    with pytest.raises(TypeError, match="`steps` must be an integer"):
        sharpness(quadratic, jnp.ones(4), DIAGONAL, rho=0.1, steps=2.5, key=KEY)
    with pytest.raises(TypeError, match="`mask` must hold booleans"):
        mask = 0.5 * jnp.ones(4)
        sharpness(quadratic, jnp.ones(4), DIAGONAL, rho=0.1, mask=mask, key=KEY)
    with pytest.raises(TypeError, match="`normalize_logits` needs a LogitLoss"):
        sharpness(
            quadratic, jnp.ones(4), DIAGONAL, rho=0.1, normalize_logits=1.0, key=KEY
        )
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        LOSS.normalised(0.0)
