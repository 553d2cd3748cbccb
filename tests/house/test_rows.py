"""Rows, experiments, methods and pages belong together; none is an orphan."""

import importlib
import inspect
from collections import Counter

import pytest
from _source import ROOT, modules

from varan.lab.catalogue import load
from varan.lab.racing import settings_of

# The papers by topic, counted in the list that the catalogue was made from.
COUNTS = {
    "bayesopt": 6,
    "bilevel": 7,
    "combinatorial": 7,
    "compression": 20,
    "constrained": 7,
    "control": 12,
    "diffusion": 44,
    "dynamics": 18,
    "explain": 4,
    "federated": 10,
    "firstorder": 16,
    "games": 7,
    "geometry": 31,
    "graphs": 6,
    "inference": 20,
    "landscape": 31,
    "latent": 17,
    "lipschitz": 16,
    "matrix": 9,
    "media": 19,
    "privacy": 10,
    "search": 5,
    "secondorder": 7,
    "sharpness": 17,
    "shift": 7,
    "transport": 5,
    "zeroth": 8,
}
CATALOGUE = load()
BUILT = CATALOGUE.select(state="built")
built = pytest.mark.parametrize("row", BUILT, ids=lambda row: row.id)


def test_all_papers_are_there():
    assert Counter(row.topic for row in CATALOGUE.rows) == COUNTS
    assert [row.number for row in CATALOGUE.rows] == list(range(1, 367))


def test_every_experiment_has_a_built_row():
    experiments = {
        name
        for name in modules()
        if name.count(".") == 3
        and name.startswith("varan.claims.")
        and not name.split(".")[-1].startswith("_")
    }
    races = {name for name in experiments if name.endswith("_race")}
    assert experiments - races == {row.module for row in BUILT}
    assert races == {f"{row.module}_race" for row in BUILT if row.race}


@built
def test_the_experiment_has_the_agreed_form(row):
    module = importlib.import_module(row.module)
    assert list(inspect.signature(module.experiment).parameters) == ["scale", "seed"]
    text = (module.__doc__ or "").lower()
    for word in ("claim", "refute"):
        assert word in text, f"the docstring of {row.module} names no {word!r}"


@pytest.mark.parametrize(
    "row", [row for row in BUILT if row.race], ids=lambda row: row.id
)
def test_the_race_has_the_agreed_form(row):
    module = importlib.import_module(f"{row.module}_race")
    assert list(inspect.signature(module.heats).parameters) == ["settings"]
    assert row.race and "quick" in row.race
    for quick in (False, True):
        # Naming the heats costs next to nothing: instances are made when they are run.
        heats = list(module.heats(settings_of(row, quick=quick)))
        assert heats and len({heat.name for heat in heats}) == len(heats)
    for heat in heats:
        names = [contestant.name for contestant in heat.contestants]
        assert len(set(names)) == len(names)
        assert heat.contestants[0].package is None, "ours comes first"
        packages = {contestant.package for contestant in heat.contestants}
        assert set(row.peers) <= packages, f"a peer of {row.id} does not race"


@built
def test_smoke_is_one_seed(row):
    assert row.scales["smoke"].seeds == 1


@built
def test_the_methods_exist_and_the_first_cites_the_paper(row):
    values = []
    for reference in row.method:
        name, _, attribute = reference.partition(":")
        values.append(getattr(importlib.import_module(name), attribute))
    # Those that follow may be tools with a source of their own.
    if row.arxiv:
        text = inspect.getdoc(values[0]) or ""
        assert row.arxiv in text, f"{row.method[0]} does not cite arXiv {row.arxiv}"


@built
def test_the_row_has_a_page(row):
    page = ROOT / "docs" / "rows" / f"{row.id}.md"
    assert page.is_file(), f"{page.name} is missing"
    assert f"varan run {row.id}" in page.read_text(encoding="utf-8")


def test_every_page_has_a_built_row():
    pages = {page.stem for page in (ROOT / "docs" / "rows").glob("*.md")}
    assert pages <= {row.id for row in BUILT}
