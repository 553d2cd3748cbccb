"""Public names explain themselves: a summary, every argument, an example."""

import enum
import importlib
import inspect
import re
from functools import cache

from _source import lazy_packages

# Names that are not yet as they should be, and why. This list may only shrink: a name
# that has become right must be taken off it.
ALLOWED: dict[str, str] = {}


@cache
def public():
    """Dotted name to object, for every public class and function, each once."""
    found = {}
    for name in lazy_packages():
        package = importlib.import_module(name)
        for attribute in package.__all__:
            value = getattr(package, attribute)
            if inspect.isclass(value) or callable(value):
                found.setdefault(id(value), (f"{name}.{attribute}", value))
    return dict(found.values())


def faults(value):
    """What a docstring lacks."""
    text = inspect.getdoc(value) or ""
    if not text.strip():
        return ["no docstring"]
    arguments = _arguments(value)
    if not arguments:
        return []
    sections = ("Args",) if _is_record(value) else ("Args", "Example")
    found = [f"no `{part}:`" for part in sections if f"\n{part}:" not in text]
    section = re.search(r"\nArgs:\n(.*?)(?=\n\S|\Z)", text, re.DOTALL)
    described = section.group(1) if section else ""
    for name in arguments:
        # One entry may describe several: `x, y: ...` or `lower / upper: ...`.
        if not re.search(
            rf"^\s+[^:\n]*(?<!\w)\*{{0,2}}{re.escape(name)}(?!\w)[^:\n]*:",
            described,
            re.M,
        ):
            found.append(f"`{name}` is not described")
    return found


def _is_record(value):
    """Whether it only carries what a call returns: nobody makes one by hand."""
    return inspect.isclass(value) and not any(
        inspect.isfunction(member) and not name.startswith("_")
        for name, member in vars(value).items()
    )


def _arguments(value):
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return []
    try:
        parameters = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in parameters if not name.startswith("_")]


def test_docstrings_are_complete():
    wrong = {
        name: found for name, value in public().items() if (found := faults(value))
    }
    new = {name: found for name, found in wrong.items() if name not in ALLOWED}
    assert not new, "\n".join(f"{name}: {', '.join(f)}" for name, f in new.items())
    mended = set(ALLOWED) - set(wrong)
    assert not mended, f"take off the list, they are right now: {sorted(mended)}"


def test_the_check_sees_faults():
    def good(x, *, y, **rest):
        """Does.

        Args:
            x, y: Numbers.
            **rest: More.

        Example:
            >>> 1
            1
        """

    def bad(x, y):
        """Does.

        Args:
            x: A number.
        """

    assert faults(good) == []
    assert faults(bad) == ["no `Example:`", "`y` is not described"]
    assert faults(lambda: None) == ["no docstring"]

    class Record:
        """Carries.

        Args:
            x: A number.
        """

        def __init__(self, x):
            self.x = x

    class Solver(Record):
        """Solves.

        Args:
            x: A number.
        """

        def step(self):
            pass

    assert faults(Record) == []
    assert faults(Solver) == ["no `Example:`"]
