"""Gives griffe the constructors that Equinox and named tuples make from fields."""

import griffe

_MADE_FROM_FIELDS = ("equinox.Module", "typing.NamedTuple")


class Fields(griffe.Extension):
    """The `__init__` of a class whose annotated fields are its arguments."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        for cls in _classes(pkg):
            if "__init__" not in cls.members and _has_made_constructor(cls, pkg):
                parameters = [griffe.Parameter("self", kind=_POSITIONAL)]
                parameters += _parameters(cls, pkg).values()
                cls.set_member(
                    "__init__",
                    griffe.Function(
                        "__init__", parameters=griffe.Parameters(*parameters)
                    ),
                )


_POSITIONAL = griffe.ParameterKind.positional_or_keyword


def _classes(module: griffe.Module):
    for member in list(module.members.values()):
        if member.is_alias:
            continue
        if member.is_module:
            yield from _classes(member)
        elif member.is_class:
            yield member


def _has_made_constructor(cls: griffe.Class, pkg: griffe.Module) -> bool:
    if any(_path(base) in _MADE_FROM_FIELDS for base in cls.bases):
        return True
    # A parent's own constructor is the class's too.
    return any(
        "__init__" not in parent.members and _has_made_constructor(parent, pkg)
        for parent in _parents(cls, pkg)
    )


def _parents(cls: griffe.Class, pkg: griffe.Module):
    for base in cls.bases:
        head, _, rest = _path(base).partition(".")
        if head == pkg.name and rest:
            parent = pkg[rest]
            yield parent.final_target if parent.is_alias else parent


def _path(base: str | griffe.Expr) -> str:
    return base if isinstance(base, str) else base.canonical_path


def _parameters(cls: griffe.Class, pkg: griffe.Module) -> dict[str, griffe.Parameter]:
    """The fields, inherited ones first, as a constructor takes them."""
    found: dict[str, griffe.Parameter] = {}
    for parent in _parents(cls, pkg):
        found |= _parameters(parent, pkg)
    for name, member in cls.members.items():
        if (
            member.is_attribute
            and member.annotation
            and "property" not in member.labels
        ):
            found[name] = griffe.Parameter(
                name,
                annotation=member.annotation,
                kind=_POSITIONAL,
                default=_default(member.value),
            )
    return found


def _default(value: str | griffe.Expr | None) -> str | griffe.Expr | None:
    """A field's default; `eqx.field(...)` carries it as an argument, if at all."""
    if not isinstance(value, griffe.ExprCall):
        return value
    if not value.canonical_path.endswith("field"):
        return value
    for argument in value.arguments:
        if isinstance(argument, griffe.ExprKeyword) and argument.name == "default":
            return argument.value
    return None
