"""Row 169's domains: who sees what."""

import jax
import numpy as np
import pytest

from varan.claims.sharpness._domains import DOMAINS, left_out


@pytest.fixture(scope="module", autouse=True)
def as_experiments_run():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def data():
    return {name: left_out(name, 0, 50) for name in ("plain", "tilted")}


def test_training_standardises_and_the_target_keeps_its_shift(data):
    x, labels = data["tilted"].train
    assert x.shape == (120, 40) and labels.shape == (120,)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-4)
    target, labels = data["tilted"].test
    assert target.shape == (50, 40) and labels.shape == (50,)
    # Training tilts neither way on average, the target always down.
    ends = np.asarray(target.mean(0))
    assert ends[:10].mean() - ends[-10:].mean() > 1.0


def test_the_target_is_not_trained_on(data):
    """The two domains in both training sets are the same signals, up to the scale."""
    labels = {name: np.asarray(part.train[1]) for name, part in data.items()}
    # Order: plain, noisy, tilted, backwards, without the target.
    np.testing.assert_array_equal(labels["plain"][:40], labels["tilted"][40:80])
    np.testing.assert_array_equal(labels["plain"][80:], labels["tilted"][80:])
    assert not np.array_equal(labels["plain"][40:80], labels["tilted"][:40])


def test_validation_is_of_the_training_domains(data):
    tuning = left_out("tilted", 0, 50, validate=True)
    np.testing.assert_array_equal(tuning.train[0], data["tilted"].train[0])
    assert tuning.test[0].shape == (30, 40)
    trained = {row.tobytes() for row in np.asarray(tuning.train[0])}
    assert not trained & {row.tobytes() for row in np.asarray(tuning.test[0])}


def test_unknown_domain():
    with pytest.raises(ValueError, match=f"one of {', '.join(DOMAINS)}"):
        left_out("sketches", 0, 50)
