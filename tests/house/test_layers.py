"""Arrows run one way: cli -> lab -> claims -> topics -> core."""

import pytest
from _source import TOPICS, imports, modules

# What each part may import besides itself. Topics: the mathematics decides, but never
# in a circle, and never another topic's private modules.
_CORE = {"core", "_lazy"}
_BASE = _CORE | {"operators", "problems", "nets", "data"}
_MAY = {
    "_lazy": set(),
    "core": _CORE,
    "operators": _CORE,
    "problems": _CORE | {"operators"},
    "nets": _CORE | {"operators"},
    "data": _CORE,
    "train": _BASE,
    "metrics": _BASE,
    "testing": _BASE,
    "claims": {*_BASE, "train", "metrics", *TOPICS},
    "lab": {"claims"},
    "cli": {"lab"},
    **{topic: {*_BASE, "train", "metrics", *TOPICS} for topic in TOPICS},
}


def part(module):
    """The part of varan that a module belongs to; of the root, the core it shows."""
    return module.split(".")[1] if "." in module else "core"


@pytest.mark.parametrize("name", [name for name in modules() if name != "varan"])
def test_imports_go_down(name):
    allowed = _MAY[part(name)] | {part(name)}
    wrong = [module for module in imports(name) if part(module) not in allowed]
    assert not wrong, f"{name} must not import {wrong}"


def test_the_lab_knows_no_experiment():
    for name in modules():
        if part(name) in ("lab", "cli"):
            deep = [m for m in imports(name) if m.startswith("varan.claims.")]
            assert not deep, f"{name} imports {deep}"


def test_no_topic_imports_the_private_parts_of_another():
    for name in modules():
        if part(name) in (*TOPICS, "claims"):
            for module in imports(name):
                private = any(word.startswith("_") for word in module.split("."))
                if private and part(module) in TOPICS:
                    assert part(module) == part(name), f"{name} imports {module}"


def test_topics_have_no_circle():
    arrows = {
        topic: {
            part(module)
            for name in modules()
            if part(name) == topic
            for module in imports(name)
        }
        & set(TOPICS) - {topic}
        for topic in TOPICS
    }
    while arrows:
        free = [topic for topic, needs in arrows.items() if not needs & set(arrows)]
        assert free, f"topics import each other in a circle: {sorted(arrows)}"
        for topic in free:
            del arrows[topic]
