"""What imports cost: nothing numerical for the package, no array, no heavy library."""

import importlib
import inspect
import subprocess
import sys

import pytest
from _source import TOPICS, for_editors, lazy_packages, modules

import varan

# Loaded by no public name of a topic: they cost more than the rest together.
HEAVY = (
    "matplotlib",
    "pandas",
    "torch",
    "sqlalchemy",
    "sklearn",
    "scipy.stats",
    "rich",
)
NUMERICAL = ("jax", "numpy", "scipy", "equinox", "optax", *HEAVY)


def in_new_process(script):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_packages_import_nothing_numerical():
    in_new_process(
        "import importlib, sys\n"
        f"for name in {lazy_packages()!r}: importlib.import_module(name)\n"
        "import varan.claims\n"
        f"loaded = [name for name in {NUMERICAL!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )


def test_methods_and_experiments_import_nothing_heavy_and_make_no_array():
    wanted = [
        name for name in modules() if name.split(".")[1:2] not in (["lab"], ["cli"])
    ]
    in_new_process(
        "import importlib, sys\n"
        f"for name in {wanted!r}: importlib.import_module(name)\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        # An array that is made at import starts the backend.
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "import jax\n"
        "assert not jax.config.jax_enable_x64"
    )


@pytest.mark.parametrize("name", lazy_packages())
def test_lazy_tables_agree_with_reality(name):
    package = importlib.import_module(name)
    assert package.__all__ == sorted(set(package.__all__))
    assert dir(package) == package.__all__
    editors = for_editors(name)
    for public in package.__all__:
        value = getattr(package, public)
        if inspect.ismodule(value):
            assert value.__name__ == f"{name}.{public}"
        elif name != "varan":
            assert public in editors, f"{public} is missing under TYPE_CHECKING"
            module = importlib.import_module(f"{name}.{editors[public]}")
            assert getattr(module, public) is value
            home = getattr(value, "__module__", module.__name__)
            if home.startswith("varan."):
                assert home == module.__name__, f"{public} is defined in {home}"
    if name != "varan":
        assert set(editors) <= set(package.__all__)


def test_every_package_is_reached_from_the_root():
    packages = {
        module.split(".")[1]
        for module, file in modules().items()
        if module.count(".") == 1 and file.name == "__init__.py"
    }
    assert packages - {"claims", "cli", "lab"} <= set(varan.__all__)
    assert set(TOPICS) <= packages


def test_unknown_names_are_attribute_errors():
    with pytest.raises(
        AttributeError, match=r"module 'varan' has no attribute 'sovle'"
    ):
        _ = varan.sovle
