"""Rows whose experiments are toys, run by the real runner in real workers."""

from pathlib import Path
from types import MappingProxyType

import pytest

from varan.lab.catalogue import Check, Row, Scale


class ToyRow(Row):
    """A row whose experiment stands beside the tests."""

    @property
    def module(self):
        return "toy_experiments"


def make_row(kind="good", *, number=1, seeds=3, checks=None, **fields):
    if checks is None:
        checks = (Check("gain", "gain", ">=", 1.5, "median", "theory"),)
    settings = fields.pop("settings", {})
    scale = Scale(seeds, MappingProxyType({"kind": kind, **settings}))
    return ToyRow(
        topic="toys",
        number=number,
        id=fields.pop("id", f"toy-{kind}"),
        title="A toy",
        pages=("000",),
        state="built",
        claim="Toys behave as they are told.",
        scales={"smoke": Scale(1, scale.settings), "laptop": scale, "paper": scale},
        checks=tuple(checks),
        **fields,
    )


@pytest.fixture
def toys(monkeypatch):
    """Makes the toy experiments importable in worker processes; returns `make_row`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "toys"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return make_row


@pytest.fixture(scope="session")
def make_toy():
    """`make_row`, for fixtures that outlive a test."""
    return make_row
