"""How a method is used: the example of its docstring, read from the source.

Nothing is imported or run: a page needs the text alone, and the examples themselves are
run by the tests.
"""

from __future__ import annotations

import ast
import doctest
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..provenance import PACKAGE

_SECTION = re.compile(r"\n(?=\S[^\n]*:(?:\n|$| ))")
_EXAMPLE = "Example:\n"


@dataclass(frozen=True)
class Snippet:
    """A public object and how it is used.

    Args:
        name: As one imports it: `varan.transport.sinkhorn`.
        summary: The first sentence of its docstring.
        code: Its example as a program, what it shows as comments; `None` without one.
    """

    name: str
    summary: str
    code: str | None


def snippet(reference: str) -> Snippet:
    """The snippet of a method.

    Args:
        reference: The method, as a row names it: `varan.topic:name`.

    Returns:
        What its docstring says; without summary and code where it is not found.

    Example:
        >>> from varan.lab.report.snippets import snippet
        >>> snippet("varan.core:implicit_root").name
        'varan.core.implicit_root'
    """
    package, _, name = reference.partition(":")
    text = _docstring(package, name)
    summary = " ".join(text.partition("\n\n")[0].split())
    return Snippet(f"{package}.{name}", summary, _program(text))


@cache
def topic_text(topic: str) -> str | None:
    """The docstring of a topic's package; `None` while there is none."""
    tree = _tree(PACKAGE / topic / "__init__.py")
    return ast.get_docstring(tree) if tree else None


def _program(text: str) -> str | None:
    """The example of a docstring, without its prompts."""
    for section in _SECTION.split(text):
        if section.startswith(_EXAMPLE):
            examples = doctest.DocTestParser().get_examples(section)
            lines: list[str] = []
            kind = None
            for example in examples:
                source = example.source.rstrip("\n")
                last, kind = kind, _kind(source)
                # Imports and functions stand apart, as in a program that is written.
                if last and (last != kind or kind == "block"):
                    lines.append("")
                lines.append(source)
                lines.extend(f"# {line}" for line in example.want.splitlines())
            return "\n".join(lines) or None
    return None


def _kind(source: str) -> str:
    if source.startswith(("import ", "from ")):
        return "import"
    return "block" if source.startswith(("def ", "class ", "@")) else "statement"


@cache
def _docstring(package: str, name: str) -> str:
    # The root shows what the core defines.
    folder = "core" if package == "varan" else package.partition(".")[2]
    home = PACKAGE.joinpath(*folder.split("."))
    tree = _tree(home / "__init__.py") or _tree(home.with_suffix(".py"))
    if tree is None:
        return ""
    module = _editors_table(tree).get(name)
    if module is not None:
        tree = _tree(home.joinpath(*module.split(".")).with_suffix(".py"))
    for node in tree.body if tree else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) or ""
    return ""


def _editors_table(tree: ast.Module) -> dict[str, str]:
    """Public name to private module, as the package shows it to editors."""
    return {
        alias.asname or alias.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


@cache
def _tree(file: Path) -> ast.Module | None:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError):
        return None
