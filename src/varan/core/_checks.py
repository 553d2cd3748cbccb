"""Checks of users' input, in one wording.

Values of traced arrays cannot be read: the value checks pass them, and the loop's
status (or NaN) speaks under jit.
"""

from __future__ import annotations

import numpy as np
from jax.core import Tracer


def is_traced(value) -> bool:
    """Whether the value is only known inside a transformation."""
    return isinstance(value, Tracer)


def check_finite(owner: str, name: str, array) -> None:
    """Refuses NaN and infinity."""
    if is_traced(array):
        return
    bad = int(np.size(array) - np.count_nonzero(np.isfinite(np.asarray(array))))
    if bad:
        raise ValueError(
            f"{owner}: `{name}` must be finite (got {bad} NaN or infinite of "
            f"{np.size(array)} entries). Remove or impute them."
        )


def check_positive(owner: str, name: str, value) -> None:
    """Refuses zero, negative and non-finite values, and what is no number."""
    if is_traced(value):
        return
    array = _numbers(owner, name, value)
    if not (np.all(np.isfinite(array)) and np.all(array > 0)):
        shown = array.item() if array.ndim == 0 else f"minimum {np.min(array)}"
        raise ValueError(f"{owner}: `{name}` must be positive (got {shown}).")


def check_nonnegative(owner: str, name: str, value) -> None:
    """Refuses negative and non-finite values, and no numbers; zero is fine."""
    if is_traced(value):
        return
    array = _numbers(owner, name, value)
    if not (np.all(np.isfinite(array)) and np.all(array >= 0)):
        shown = array.item() if array.ndim == 0 else f"minimum {np.min(array)}"
        raise ValueError(f"{owner}: `{name}` must not be negative (got {shown}).")


def _numbers(owner, name, value):
    array = np.asarray(value)
    if array.dtype.kind in "OSU":
        raise TypeError(f"{owner}: `{name}` must be a number (got {value!r}).")
    return array


def check_nonempty(owner: str, name: str, array) -> None:
    """Refuses arrays without entries."""
    if np.size(array) == 0:
        raise ValueError(
            f"{owner}: `{name}` must not be empty (got shape {np.shape(array)})."
        )


def check_shape(owner: str, name: str, array, shape: tuple[int | None, ...]) -> None:
    """Refuses other shapes; `None` stands for any length."""
    actual = np.shape(array)
    fits = len(actual) == len(shape) and all(
        wanted is None or wanted == got
        for wanted, got in zip(shape, actual, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
        raise ValueError(f"{owner}: `{name}` must have shape {wanted} (got {actual}).")


def check_choice(owner: str, name: str, value, choices: tuple[str, ...]) -> None:
    """Refuses anything but one of the named choices."""
    if value not in choices:
        raise ValueError(
            f"{owner}: `{name}` must be one of {', '.join(map(repr, choices))} "
            f"(got {value!r})."
        )
