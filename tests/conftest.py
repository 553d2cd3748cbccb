"""Strict mode: errors that would be small wrong numbers show as errors."""

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def float32():
    """Runs a test in JAX's default precision."""
    with jax.enable_x64(False):
        yield
