"""Strict mode: errors that would be small wrong numbers show as errors."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from _services import postgres  # noqa: F401 (a fixture)

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def float32():
    """Runs a test in JAX's default precision."""
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_functions():
    """What a file has compiled serves no other file, and all of it fills the memory."""
    yield
    jax.clear_caches()
