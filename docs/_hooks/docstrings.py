"""Makes griffe, which reads the source and runs nothing, understand our conventions."""

import ast
import dataclasses
import re
import textwrap

import griffe

# A paragraph that begins on the line of its title.
_PROSE = re.compile(r"^(Source|Differences|Statuses): +(\S.*(?:\n.+)*)", re.M)
_ARXIV = re.compile(r"\barXiv:? ?(\d{4}\.\d{4,5})")


class Conventions(griffe.Extension):
    """Sections, shapes, and the names that `varan` itself resolves lazily.

    `Example:` is a section of code, and `Source: text` has a title and a body.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        if pkg.name == "varan":
            for name in ast.literal_eval(str(pkg["_CORE"].value)):
                pkg.set_member(name, griffe.Alias(name, f"varan.core.{name}"))

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        _tidy(func.returns)
        for parameter in func.parameters:
            _tidy(parameter.annotation)

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs) -> None:
        _tidy(attr.annotation)

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = normalise(obj.docstring.value)


def normalise(text: str) -> str:
    """A docstring in the spelling that griffe reads."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
    text = _PROSE.sub(_with_body, text)
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _with_body(match: re.Match) -> str:
    first, _, rest = match[2].partition("\n")
    body = "\n".join([first, textwrap.dedent(rest)]).strip()
    return f"{match[1]}:\n" + textwrap.indent(body, "    ")


def _tidy(part) -> None:
    """Drops the space that keeps a linter from taking a shape for a name."""
    if isinstance(part, griffe.ExprTuple):
        part.elements = [
            re.sub(r"^(['\"]) +", r"\1", element)
            if isinstance(element, str)
            else element
            for element in part.elements
        ]
    if isinstance(part, list):
        for element in part:
            _tidy(element)
    elif isinstance(part, griffe.Expr):
        for field in dataclasses.fields(part):
            if field.name != "parent":
                _tidy(getattr(part, field.name))
