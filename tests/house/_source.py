"""The package as its source shows it: modules, imports, lazy tables."""

import ast
from functools import cache
from pathlib import Path

import varan

PACKAGE = Path(varan.__file__).parent
ROOT = PACKAGE.parents[1]

# Everything else right below `varan` that is a package is a topic.
_NO_TOPICS = {
    "core",
    "operators",
    "problems",
    "nets",
    "data",
    "train",
    "metrics",
    "claims",
    "cli",
    "lab",
    "testing",
}
TOPICS = sorted(
    folder.name
    for folder in PACKAGE.iterdir()
    if (folder / "__init__.py").is_file() and folder.name not in _NO_TOPICS
)


@cache
def modules():
    """Dotted name to file, for every module of varan."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = file
    return found


@cache
def tree(name):
    """The syntax tree of a module."""
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


@cache
def imports(name):
    """The modules of varan that a module imports, wherever in it, as dotted names."""
    is_package = modules()[name].name == "__init__.py"
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(name, is_package, node)
            # `from .core import solve` names an object, `from . import plots` a module.
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules() else base)
    return sorted(n for n in found if n == "varan" or n.startswith("varan."))


def _absolute(name, is_package, node):
    if not node.level:
        return node.module
    above = name.split(".") if is_package else name.split(".")[:-1]
    above = above[: len(above) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


@cache
def lazy_packages():
    """The packages whose names resolve on first use."""
    return [
        name
        for name, file in modules().items()
        if file.name == "__init__.py" and "_attach(" in file.read_text(encoding="utf-8")
    ]


def for_editors(name):
    """Public name to private module, as the `TYPE_CHECKING` block has it."""
    found = {}
    for node in tree(name).body:
        if isinstance(node, ast.If):
            for entry in node.body:
                if isinstance(entry, ast.ImportFrom):
                    for alias in entry.names:
                        found[alias.asname or alias.name] = entry.module or ""
    return found
