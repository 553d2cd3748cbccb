"""jaxopt is unmaintained, which it says at import, and older than strict mode."""

import contextlib
import warnings

import jax
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    # Imported here, it is silent in the test files.
    with contextlib.suppress(ImportError):
        import jaxopt  # noqa: F401


@pytest.fixture(autouse=True)
def usual_promotion():
    """The peers rely on JAX's usual promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
