"""Multivariate time series, cut into pasts and futures."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from ..core._checks import check_finite


def windows(
    series: Float[np.ndarray, "time channels"], length: int, horizon: int
) -> tuple[
    Float[np.ndarray, "samples channels length"],
    Float[np.ndarray, "samples channels horizon"],
]:
    """Every stretch of a series: what was seen, and what came next.

    Views, not copies. Cut a series into training, validation and test before this, and
    standardise it by the training part: windows overlap.

    Args:
        series: Time first.
        length: Steps of the past, at least 1.
        horizon: Steps to forecast, at least 1.

    Returns:
        Pasts and futures, channels before time, `time - length - horizon + 1` of them.

    Raises:
        ValueError: If the series has another number of axes, is not finite or is
            shorter than `length + horizon`, or one of these is below 1.

    Example:
        >>> import numpy as np
        >>> from varan.data import windows
        >>> past, future = windows(np.arange(5.0)[:, None], 3, 1)
        >>> past[:, 0].tolist(), future[:, 0].tolist()
        ([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]], [[3.0], [4.0]])
    """
    series = np.asarray(series)
    if series.ndim != 2:
        raise ValueError(
            f"windows: `series` must have axes (time, channels) (got {series.shape})."
        )
    if min(length, horizon) < 1 or len(series) < length + horizon:
        raise ValueError(
            "windows: `length` and `horizon` must be positive and together at most the "
            f"series' {len(series)} steps (got {length} and {horizon})."
        )
    check_finite("windows", "series", series)
    cut = np.lib.stride_tricks.sliding_window_view(series, length + horizon, axis=0)
    return cut[..., :length], cut[..., length:]


def eeg() -> Float[np.ndarray, "800 4"]:
    """Ten seconds of an electroencephalogram: 800 steps of four electrodes.

    Returns:
        The voltages, time first, of mean 0 and deviation 1.

    Raises:
        FileNotFoundError: If matplotlib was installed without its sample data.

    Example:
        >>> from varan.data import eeg
        >>> eeg().shape
        (800, 4)

    Source: The file `eeg.dat` of matplotlib's sample data, electrodes PG3, PG5, PG7
        and PG9.
    """
    from matplotlib import get_data_path

    return np.fromfile(f"{get_data_path()}/sample_data/eeg.dat").reshape(800, 4)
