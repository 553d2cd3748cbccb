"""One page of the API reference for every public package and module.

Each page is a single mkdocstrings directive that names the package's public names, so a
name that becomes public is documented by that alone.
"""

import ast
import importlib
import importlib.util
from pathlib import Path

from mkdocs.structure.files import File, Files

import varan

# Beside the packages of `varan.__all__`: what an experiment returns.
_MORE = ("varan.claims",)


def packages() -> list[str]:
    """The documented packages and modules: `varan`, the core, the others by name."""
    others = [
        name for name in varan.__all__ if importlib.util.find_spec(f"varan.{name}")
    ]
    others.sort(key=lambda name: name != "core")
    found = ["varan"]
    for package in (*(f"varan.{name}" for name in others), *_MORE):
        found += [package, *(f"{package}.{name}" for name in _modules(package))]
    return found


def public_names(package: str) -> list[str]:
    """The objects to document; none that another page documents already."""
    shown = _declared(package) - set(_modules(package))
    if package == "varan":
        return sorted(name for name in shown if f"varan.{name}" not in packages())
    if package == "varan.core":
        shown -= _declared("varan")
    return sorted(shown)


def on_config(config):
    entries = ["reference/index.md"]
    entries += [{package: _page(package)} for package in packages()]
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = entries
    return config


def on_files(files: Files, config):
    for package in packages():
        files.append(File.generated(config, _page(package), content=_content(package)))
    files.append(File.generated(config, "reference/index.md", content=_index()))
    return files


def _declared(package: str) -> set[str]:
    source = _source(package)
    if source.name == "__init__.py":
        # Lazy: this loads the table of names and nothing that they stand for.
        module = importlib.import_module(package)
        if hasattr(module, "__all__"):
            return set(module.__all__)
    return {
        node.name
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    }


def _modules(package: str) -> list[str]:
    """The modules among a package's public names."""
    if _source(package).name != "__init__.py":
        return []
    folder = _source(package).parent
    return sorted(
        name for name in _declared(package) if (folder / f"{name}.py").is_file()
    )


def _source(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def _purpose(package: str) -> str:
    """The first sentence of the package's docstring."""
    text = ast.get_docstring(ast.parse(_source(package).read_text(encoding="utf-8")))
    return (text or "").partition("\n\n")[0].replace("\n", " ")


def _page(package: str) -> str:
    return f"reference/{package}.md"


def _content(package: str) -> str:
    members = "\n".join(f"        - {name}" for name in public_names(package))
    return f"# {package}\n\n::: {package}\n    options:\n      members:\n{members}\n"


def _index() -> str:
    rows = "\n".join(
        f"| [`{package}`]({package}.md) | {_purpose(package)} |"
        for package in packages()
    )
    return (
        "# Reference\n\nEvery public name, from its docstring. Shapes are written as "
        "[jaxtyping](https://docs.kidger.site/jaxtyping/) writes them: "
        '`Float[Array, "n m"]` is a floating array of shape `(n, m)`, `""` is a '
        "scalar, `...` is any shape. Everything resolves on first use: importing a "
        "package loads nothing numerical.\n\n"
        f"| package | what it holds |\n| --- | --- |\n{rows}\n"
    )
