"""Windows of a series: each is a stretch of it, and its errors."""

import numpy as np
import pytest

from varan.data import eeg, windows


def test_windows_are_stretches_of_the_series():
    series = np.random.default_rng(0).standard_normal((12, 3))
    past, future = windows(series, 5, 2)
    assert past.shape == (6, 3, 5) and future.shape == (6, 3, 2)
    for i in range(6):
        np.testing.assert_array_equal(past[i], series[i : i + 5].T)
        np.testing.assert_array_equal(future[i], series[i + 5 : i + 7].T)
    assert np.shares_memory(past, series)
    assert len(windows(series, 10, 2)[0]) == 1


def test_the_recording():
    series = eeg()
    np.testing.assert_allclose(series.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(series.std(0), 1, rtol=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(9), 3, 1), r"axes \(time, channels\)"),
        ((np.zeros((9, 1)), 8, 2), "at most the series' 9 steps"),
        ((np.zeros((9, 1)), 3, 0), "must be positive"),
        ((np.full((9, 1), np.nan), 3, 1), "must be finite"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        windows(*arguments)
