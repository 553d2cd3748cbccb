"""A small catalogue and store in which every outcome occurs, hostile text included."""

from types import MappingProxyType

from varan.lab.catalogue import Catalogue, Check, Row, Scale
from varan.lab.store import RaceRecord, Record

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
ENVIRONMENT = {
    "python": "3.12.1",
    "versions": {"jax": "0.9", "numpy": "2.1", "absent": None},
    "machine": {"system": "Linux", "processor": "A CPU", "cores": 2, "memory_gib": 8.0},
    "commit": "0123abcd",
}
TAKEN = "2026-01-02T03:04:05+00:00"
CHECKS = (
    Check("gain", "gain", ">=", 2.0, "median", "Table 1 of the paper."),
    Check("error", "error", "<=", 1e-6, "worst", "The tolerance."),
    Check("slope", "slope", "in", (0.9, 1.1), "mean", "Theory.", smoke=False),
)
GOOD = {"gain": 5.0, "error": 1e-9, "slope": 1.0}


def built(number, name, topic="transport", **fields):
    """A built row."""
    settings = MappingProxyType({"n": 10, "parts": ["a", "b"]})
    told = {
        "title": f"The paper of {name}",
        "pages": ("000", "001"),
        "authors": ("Zoë Example", "Ada Other"),
        "year": 2024,
        "arxiv": "2401.00001",
        "venue": "ICLR 2024",
        "claim": f"The method of {name} is faster than plain descent.",
        "method": ("varan.core:implicit_root", "varan.transport:SparseNewton"),
        "data": "Digits.",
        "baselines": ("plain descent",),
        "peers": ("a-peer",),
        "differences": ("Smaller.",),
        "certificate": "The residual, proved.",
        "scales": {
            "smoke": Scale(1, settings),
            "laptop": Scale(3, settings),
            "paper": Scale(3, settings),
        },
        "checks": CHECKS,
        **fields,
    }
    return Row(topic=topic, number=number, id=name, state="built", **told)


def planned(number, topic, **fields):
    """A planned row."""
    told = {"title": f"A plan, number {number}", "pages": ("002",), **fields}
    name = f"planned-{number}"
    return Row(topic=topic, number=number, id=name, state="planned", **told)


def catalogue():
    """Twenty rows in three topics."""
    rows = [
        built(1, "all-held"),
        built(2, "one-refuted"),
        built(3, "unclear", topic="games"),
        built(4, "broken", topic="games"),
        built(5, "smoke-only"),
        built(6, "paper-only", pages=("003",)),
        built(7, "never-run", topic="games", authors=("Ada Other",)),
        built(
            8,
            "hostile",
            title=HOSTILE,
            claim=HOSTILE,
            authors=(HOSTILE,),
            venue=HOSTILE,
            data=HOSTILE,
            differences=(HOSTILE,),
            certificate=HOSTILE,
        ),
        *(planned(number, "games") for number in range(9, 15)),
        *(planned(number, "zeroth", arxiv="2402.00002") for number in range(15, 21)),
    ]
    return Catalogue(tuple(rows))


def curve(y, label="ours", plot="convergence", x=None, **fields):
    """A curve as plain data."""
    told = {
        "x": list(range(1, len(y) + 1)) if x is None else x,
        "y": y,
        "label": label,
        "plot": plot,
        "x_label": "steps",
        "y_label": "error",
        "log_x": False,
        "log_y": True,
        "marker": False,
    }
    return {**told, **fields}


def record(row, scale, seed, outcome="measured", *, taken=TAKEN, **fields):
    """A measurement or failure."""
    told = {"numbers": GOOD, "curves": [], "wall_s": 1.5, "cpu_s": 1.4, **fields}
    told.setdefault("fingerprint", f"{row}-{scale}")
    if outcome == "failed":
        told["numbers"] = {}
    return Record(
        row, scale, seed, outcome, {"n": 10}, ENVIRONMENT, taken=taken, **told
    )


def records():
    """What the sample's store holds."""
    for seed in range(3):
        lines = [
            curve([1.0, 0.1 / (seed + 1), 1e-3], label) for label in ("ours", "plain")
        ]
        points = curve([0.5, "inf", "nan"], plot="points", marker=True, log_y=False)
        yield record(
            "all-held",
            "laptop",
            seed,
            numbers=GOOD | {"gain": 5.0 + seed, "other": 0.5},
            curves=[*lines, points],
            notes=["A note that `every` seed has.", f"Only seed {seed}."],
            compile_s=0.7,
            peak_memory_mib=2048.0,
            run="20260102-030405-bcdfg",
        )
        yield record("one-refuted", "laptop", seed, numbers=GOOD | {"error": 1.0})
        yield record("unclear", "laptop", seed, numbers=GOOD | {"gain": 1.0 + seed})
        yield record("paper-only", "paper", seed)
        yield record(
            "hostile",
            "laptop",
            seed,
            numbers=GOOD | {"gain": float("inf"), HOSTILE: float("nan")},
            curves=[curve([1.0, 2.0], HOSTILE, HOSTILE, x_label=HOSTILE)],
            notes=[HOSTILE],
        )
    for row in ("all-held", "smoke-only"):
        yield record(row, "smoke", 0, curves=[curve([1.0, 0.5])])
    yield record("broken", "laptop", 0)
    failure = {"message": HOSTILE, "detail": f"Traceback: {HOSTILE}"}
    yield record("broken", "laptop", 1, "failed", **failure)


def race():
    """A heat of a race."""
    return RaceRecord(
        "all-held",
        "clouds, n = 500",
        "ours",
        {
            "ours": {
                "wall_s": [0.1, 0.11, 0.1],
                "cpu_s": [0.1, 0.1, 0.1],
                "compile_s": 1.2,
                "package": "varan",
                "version": "0.1.0",
                "error": 1e-12,
            },
            "a-peer": {
                "wall_s": [0.2, 0.25, 0.21],
                "cpu_s": [0.2, 0.2, 0.2],
                "compile_s": None,
                "package": "a-peer",
                "version": "1.2",
                "error": None,
            },
        },
        ENVIRONMENT,
        {},
        skipped={"b-peer": "it is not installed."},
        remarks=[HOSTILE],
        taken=TAKEN,
    )


def fill(store):
    """Puts the sample into a store."""
    for entry in records():
        store.add(entry)
    store.add_race(race())
