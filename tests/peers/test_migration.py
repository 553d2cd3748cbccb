"""The page for JAXopt's users names every public name, and only what exists."""

import importlib
import pathlib
import re
import types

import pytest

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "guide" / "from-jaxopt.md"
ROWS = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
SUBMODULES = (
    "implicit_diff",
    "isotonic",
    "linear_solve",
    "loop",
    "loss",
    "objective",
    "perturbations",
    "projection",
    "prox",
)
HERE = sorted(
    {
        name
        for _, cell in ROWS
        for name in re.findall(r"`((?:varan|optax|optimistix|lineax)\.[\w.]+)", cell)
    }
)


def test_every_public_name_has_a_row():
    jaxopt = pytest.importorskip("jaxopt")
    wanted = set(_own(jaxopt)) | {"tree_util"}
    for short in SUBMODULES:
        module = importlib.import_module(f"jaxopt.{short}")
        wanted |= {f"{short}.{name}" for name in _own(module)}
    assert wanted == {name for name, _ in ROWS}
    assert len(ROWS) == len(wanted)


@pytest.mark.parametrize("name", HERE)
def test_what_a_row_names_exists(name):
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        break
    for part in parts[size:]:
        found = getattr(found, part)


def _own(module):
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, types.ModuleType):
            continue
        if getattr(value, "__module__", "").startswith("jaxopt"):
            yield name
