"""Names that resolve on first use, so that `import varan` costs nothing numerical."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def attach(
    package: str, names: dict[str, str], subpackages: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes the `__getattr__`, `__dir__` and `__all__` of a lazy package.

    Args:
        package: The package's `__name__`.
        names: Public name to the module, relative to the package, that defines it.
        subpackages: Subpackages and modules that are public themselves.

    Returns:
        The three objects that a package's `__init__` must bind.
    """
    public = sorted({*names, *subpackages})

    def __getattr__(name: str) -> Any:
        if name in names:
            module = importlib.import_module(f".{names[name]}", package)
            value = getattr(module, name)
        elif name in subpackages:
            value = importlib.import_module(f".{name}", package)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # Bound once: the next access does not come here again.
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return public

    return __getattr__, __dir__, public
