"""Neural-collapse metrics: definitions, invariants, gradients, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varan.landscape import class_means, collapse_metrics

K, D, N = 4, 6, 5
LABELS = np.repeat(np.arange(K), N)
measure = jax.jit(lambda f, h: collapse_metrics(f, LABELS, h))


def draw(seed, shift=0.3):
    keys = jax.random.split(jax.random.key(seed))
    features = jax.random.normal(keys[0], (K * N, D)) + shift
    return features, jax.random.normal(keys[1], (K, D))


def by_definition(features, head):
    """Straight from the definitions, with the covariance matrices."""
    features, head = np.asarray(features), np.asarray(head)
    means = np.stack([features[k == LABELS].mean(0) for k in range(K)])
    deviations, centred = features - means[LABELS], means - means.mean(0)
    within, between = deviations.T @ deviations / (K * N), centred.T @ centred / K
    gram = centred @ centred.T
    frame = (np.eye(K) - 1 / K) / np.sqrt(K - 1)
    return {
        "tr_w": np.trace(within),
        "tr_b": np.trace(between),
        "nc1_ratio": np.trace(within) / np.trace(between),
        "nc1_pinv": np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / K,
        "nc2": np.linalg.norm(gram / np.linalg.norm(gram) - frame),
        "nc3": np.linalg.norm(
            head / np.linalg.norm(head) - centred / np.linalg.norm(centred)
        ),
    }


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.floats(-100, 100), st.floats(0.125, 8))
def test_definitions_and_invariants(seed, shift, scale):
    features, head = draw(seed, shift)
    ours = measure(features, head)
    for name, value in by_definition(features, head).items():
        # Cancellation of the shift costs its square over the spread's.
        np.testing.assert_allclose(getattr(ours, name), value, rtol=1e-8, err_msg=name)
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((D, D)))[0]
    order = np.concatenate([k * N + rng.permutation(N) for k in range(K)])
    for moved, mates in (
        (features @ rotation, head @ rotation),
        (features[order], head),
        (features + 1.0, head),
    ):
        for one, other in zip(
            jax.tree.leaves(ours), jax.tree.leaves(measure(moved, mates)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-8)
    scaled = measure(scale * features, scale * head)
    for name in ("nc1_ratio", "nc1_pinv", "nc2", "nc3"):
        np.testing.assert_allclose(
            getattr(scaled, name), getattr(ours, name), rtol=1e-8
        )
    np.testing.assert_allclose(scaled.tr_w, scale**2 * ours.tr_w, rtol=1e-8)


def test_exact_collapse_and_its_gradient():
    means = jnp.eye(K, D) * 2
    features, head = means[LABELS] + 3.0, means - means.mean(0)[None, :]
    metrics = measure(features, head)
    for name in ("tr_w", "nc1_ratio", "nc1_pinv", "nc2", "nc3"):
        assert getattr(metrics, name) < 1e-12, name
    for name in ("nc1_ratio", "nc1_pinv", "nc2", "nc3"):
        slope = jax.grad(lambda f, n=name: getattr(measure(f, head), n))(features)
        assert jnp.all(jnp.isfinite(slope)), name


@pytest.mark.parametrize("name", ["nc1_ratio", "nc1_pinv", "nc2", "nc3"])
def test_gradient_against_finite_differences(name):
    features, head = draw(1)
    direction = draw(2)[0]
    slope = jax.jvp(
        lambda f: getattr(measure(f, head), name), (features,), (direction,)
    )[1]
    step = 1e-6
    up, down = (
        getattr(measure(features + s * direction, head), name) for s in (step, -step)
    )
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-6)


def test_more_classes_than_dimensions():
    # K - 1 contrasts in 2 dimensions: the pseudo-inverse has to cut.
    features = draw(3)[0][:, :2]
    ours = collapse_metrics(features, LABELS)
    means = class_means(features, LABELS, num_classes=K)
    centred, deviations = means - means.mean(0)[None, :], features - means[LABELS]
    between = np.linalg.inv(centred.T @ centred / K)
    expected = np.trace(deviations.T @ deviations / (K * N) @ between) / K
    np.testing.assert_allclose(ours.nc1_pinv, expected, rtol=1e-10)
    assert ours.nc3 is None


def test_vmap_and_traced_labels():
    features = jnp.stack([draw(s)[0] for s in range(3)])
    run = jax.jit(jax.vmap(lambda f, y: collapse_metrics(f, y, num_classes=K)))
    labels = jnp.stack([jnp.asarray(LABELS)] * 3)
    together = run(features, labels)
    for lane in range(3):
        np.testing.assert_allclose(
            together.nc1_pinv[lane],
            measure(features[lane], features[lane][:K]).nc1_pinv,
            rtol=1e-10,
        )
    # No plausible number where a class is empty or a label out of range.
    for wrong in (labels.at[:, 0].set(K), jnp.zeros_like(labels)):
        assert jnp.all(jnp.isnan(run(features, wrong).nc1_ratio))


def test_float32_stays():
    features, head = (a.astype(jnp.float32) for a in draw(0))
    for leaf in jax.tree.leaves(measure(features, head)):
        assert leaf.dtype == jnp.float32


def test_unbalanced_on_request():
    features = draw(0)[0][:-1]
    with pytest.raises(ValueError, match="classes must be of one size"):
        collapse_metrics(features, LABELS[:-1])
    metrics = collapse_metrics(features, LABELS[:-1], allow_unbalanced=True)
    assert jnp.isfinite(metrics.nc1_pinv)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, y: (f.at[0, 0].set(jnp.nan), y), "must be finite"),
        (lambda f, y: (f[0], y), "must have shape"),
        (lambda f, y: (f, y[:-1]), "must have shape"),
        (lambda f, y: (f[:0], y[:0]), "must not be empty"),
        (lambda f, y: (f, y - 1), "must lie in"),
        (lambda f, y: (f, np.where(y == 1, 0, y)), "each with a sample"),
        (lambda f, y: (jnp.ones_like(f), y), "class means must differ"),
    ],
)
def test_bad_input(change, message):
    features, labels = change(draw(0)[0], LABELS)
    with pytest.raises(ValueError, match=message):
        collapse_metrics(features, labels)


def test_bad_kinds():
    features, head = draw(0)
    with pytest.raises(TypeError, match="must be integers"):
        collapse_metrics(features, LABELS.astype(float))
    with pytest.raises(ValueError, match="`head` must have shape"):
        collapse_metrics(features, LABELS, head[:-1])
    with pytest.raises(ValueError, match="`num_classes` must be given"):
        jax.jit(collapse_metrics)(features, LABELS)
