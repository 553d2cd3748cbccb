"""Builds the report of a whole catalogue of synthetic results, and times it.

    python benchmarks/report_build.py [--rows 366] [--seeds 10] [--points 200]
        [--repeats 5]

Every row is given three checks, four curves in two plots and as many measured seeds;
the numbers are random, the store is a real one in a temporary folder. Reading (which
includes judging) and building the whole site are timed apart, in seconds of the wall
clock and of the processor, which other load on the machine disturbs least; the medians
over the repeats are printed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import MappingProxyType

from varan.lab.catalogue import Catalogue, Check, Row, Scale
from varan.lab.report import build
from varan.lab.report.gather import gather
from varan.lab.store import Record, Store

TOPICS = 27
CHECKS = (
    Check("gain", "gain", ">=", 1.0, "median", "Synthetic."),
    Check("level", "level", "<=", 2.0, "mean", "Synthetic."),
    Check("error", "error", "in", (0.0, 9.0), "worst", "Synthetic."),
)


def synthetic_row(number: int, seeds: int) -> Row:
    """A built row without experiment."""
    scale = Scale(seeds, MappingProxyType({"n": 100}))
    return Row(
        topic=f"topic-{number % TOPICS:02d}",
        number=number,
        id=f"row-{number}",
        title=f"A synthetic paper, number {number}",
        pages=("000",),
        state="built",
        authors=("First Author", "Second Author"),
        year=2024,
        arxiv="2401.00001",
        claim="A sentence that says what is claimed, as long as such sentences are.",
        method=("varan.core:implicit_root",),
        data="Synthetic.",
        baselines=("a baseline",),
        differences=("Everything.",),
        certificate="None.",
        scales=dict.fromkeys(("smoke", "laptop", "paper"), scale),
        checks=CHECKS,
    )


def synthetic_record(row: Row, seed: int, points: int) -> Record:
    """Random numbers and four curves of one seed."""
    draw = random.Random(f"{row.id} {seed}")
    curves = []
    for place in range(4):
        y = [
            (1 + draw.random()) / step ** (1 + place / 4)
            for step in range(1, points + 1)
        ]
        curves.append(
            {
                "x": list(range(1, points + 1)),
                "y": y,
                "label": f"method {place % 2}",
                "plot": f"plot {place // 2}",
                "x_label": "steps",
                "y_label": "error",
                "log_x": bool(place // 2),
                "log_y": True,
                "marker": False,
            }
        )
    numbers = {name: draw.uniform(0.5, 2.5) for name in ("gain", "level", "error")}
    return Record(
        row.id,
        "laptop",
        seed,
        "measured",
        {"n": 100},
        {"python": "3.12", "versions": {}, "machine": {}, "commit": None},
        fingerprint="synthetic",
        numbers=numbers,
        curves=curves,
        wall_s=1.0,
    )


def timed(call) -> tuple[float, float]:
    """Seconds of a call: wall clock, processor."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rows", 366),
        ("seeds", 10),
        ("points", 200),
        ("repeats", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    catalogue = Catalogue(
        tuple(synthetic_row(n, options.seeds) for n in range(1, options.rows + 1))
    )
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        for row in catalogue.rows:
            for seed in range(options.seeds):
                store.add(synthetic_record(row, seed, options.points))
        site = Path(folder) / "site"
        gathering = [
            timed(lambda: gather(catalogue, store)) for _ in range(options.repeats)
        ]
        building = [
            timed(lambda: build(catalogue, store, site)) for _ in range(options.repeats)
        ]
        size = sum(f.stat().st_size for f in site.rglob("*") if f.is_file()) / 2**20
        pages = len(list(site.rglob("*.html")))
    print(
        f"{options.rows} rows x {options.seeds} seeds x 4 curves of {options.points} "
        f"points: {pages} pages, {size:.0f} MiB"
    )
    for name, times in (("reading and judging", gathering), ("whole build", building)):
        wall, processor = (statistics.median(part) for part in zip(*times, strict=True))
        print(f"{name:20s} {wall:6.2f} s wall clock, {processor:6.2f} s processor")


if __name__ == "__main__":
    main()
