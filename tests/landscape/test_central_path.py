"""The central path: the theorem, the flow it claims to follow, its certificate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varan import Status
from varan.landscape import (
    HeadAndFeatures,
    UnconstrainedFeatures,
    central_path,
    collapse_metrics,
)

K, D, N = 3, 6, 4
LABELS = np.repeat(np.arange(K), N)
TIMES = np.concatenate([[0.0], np.geomspace(1e-3, 20.0, 50)])
START = jax.random.normal(jax.random.key(0), (K * N, D)) + 0.3


@jax.jit
def follow(start, lam_w, lam_h, times=TIMES):
    return central_path(start, LABELS, lam_w, lam_h, times)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize(("lam_w", "lam_h"), [(0.01, 0.0), (0.1, 0.1), (1.0, 1.5)])
def test_theorem(lam_w, lam_h, spread):
    path = follow(spread * START, lam_w, lam_h)
    assert int(path.status) == Status.CONVERGED
    assert path.certificate.met and path.certificate.value < 1e-8
    weight = 2 * lam_h * path.times
    assert jnp.all(jnp.diff(path.nc1_ratio) < 0)
    assert jnp.all(jnp.diff(path.log_tr_w + weight) <= 1e-10)
    assert jnp.all(jnp.diff(jnp.log(path.tr_b) + weight) > 0)


def test_metrics_are_those_of_the_features():
    path = follow(START, 0.1, 0.05)
    np.testing.assert_allclose(path.features[0], START, atol=1e-12)
    for index in (0, 20, 50):
        metrics = collapse_metrics(path.features[index], LABELS)
        np.testing.assert_allclose(path.tr_w[index], metrics.tr_w, rtol=1e-9)
        np.testing.assert_allclose(path.tr_b[index], metrics.tr_b, rtol=1e-9)
        np.testing.assert_allclose(path.nc1_ratio[index], metrics.nc1_ratio, rtol=1e-9)


def test_follows_the_gradient_of_the_plain_model():
    step = 1e-4
    middles = np.linspace(0.1, 5.0, len(TIMES) // 3)
    times = (middles[:, None] + step * np.array([-1.0, 0.0, 1.0])[None, :]).ravel()
    features = follow(START, 0.1, 0.05, times).features
    problem = UnconstrainedFeatures(LABELS, 0.1, 0.05)

    def velocity(features):
        x = HeadAndFeatures(problem.best_head(features), features)
        return -len(LABELS) * problem.condition(x).features

    measured = (features[2::3] - features[0::3]) / (2 * step)
    # The central difference is off by step^2 times the third derivative.
    np.testing.assert_allclose(measured, jax.vmap(velocity)(features[1::3]), atol=1e-6)


def test_tiny_variability_keeps_its_relative_accuracy():
    # Deviations in the span of the class means alone: nothing of them survives.
    inside = jnp.zeros((len(LABELS), D)).at[:, :K].set(1e-3 * START[:, :K])
    times = np.linspace(0.0, 40.0, len(TIMES))
    path = follow(4.0 * jnp.eye(K, D)[LABELS] + inside, 0.01, 0.3, times)
    assert path.tr_w[-1] < 1e-12**2  # the integrator's absolute tolerance, squared
    assert jnp.all(jnp.diff(path.nc1_ratio) < 0)


def test_certificate_sees_a_loose_integrator():
    loose = central_path(START, LABELS, 0.01, 0.0, TIMES, rtol=1e-2, atol=1e-2)
    tight = follow(START, 0.01, 0.0)
    assert loose.certificate.value > 1e3 * tight.certificate.value


def test_giving_up_is_a_status():
    path = central_path(START, LABELS, 0.1, 0.1, TIMES, max_steps=3)
    assert int(path.status) == Status.STEP_LIMIT
    assert jnp.isnan(path.tr_w[-1]) and not path.certificate.met


def test_traced_labels_and_vmap():
    starts = jnp.stack([START, 2 * START])
    ratio = jax.jit(
        jax.vmap(
            lambda s, y: central_path(s, y, 0.1, 0.1, TIMES, num_classes=K).nc1_ratio,
            in_axes=(0, None),
        )
    )(starts, jnp.asarray(LABELS))
    np.testing.assert_allclose(ratio[0], follow(START, 0.1, 0.1).nc1_ratio, rtol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam_w": 0.0}, "`lam_w` must be positive"),
        ({"lam_h": -1.0}, "`lam_h` must be nonnegative"),
        ({"times": np.array([1.0, 1.0])}, "increasing nonnegative times"),
        ({"times": np.array([-1.0, 1.0])}, "increasing nonnegative times"),
        ({"times": np.array([1.0, np.nan])}, "`times` must be finite"),
        ({"features": START[LABELS * N]}, "must vary inside the classes"),
        ({"features": START * jnp.inf}, "`features` must be finite"),
        ({"features": START[:-1], "labels": LABELS[:-1]}, "of one size"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "features": START,
        "labels": LABELS,
        "lam_w": 0.1,
        "lam_h": 0.1,
        "times": TIMES,
    }
    with pytest.raises(ValueError, match=message):
        central_path(**(arguments | change))
