"""How long the store takes over two runs of a whole catalogue.

    python benchmarks/store_speed.py [--rows 366] [--seeds 10] [--points 100]
        [--store postgresql://...]

Every seed has ten numbers and four curves. The store is a file in a temporary folder,
or an empty database that is named. Medians of the wall clock and of the processor are
printed, in milliseconds.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from varan.lab.catalogue import Row, Scale
from varan.lab.processes import Processes
from varan.lab.store import Record, Store

REPEATS = 5


def records(rows, seeds, points, run):
    draw = random.Random(0)
    environment = Processes().environment
    curves = [
        {"x": list(range(points)), "y": [draw.random() for _ in range(points)]}
        for _ in range(4)
    ]
    for row in range(rows):
        for seed in range(seeds):
            yield Record(
                row=f"row-{row}",
                scale="laptop",
                seed=seed,
                outcome="measured",
                settings={},
                environment=environment,
                fingerprint="one and the same",
                sources=["core/_solve.py", "core/_solver.py"] * 10,
                numbers={f"number-{n}": draw.random() for n in range(10)},
                curves=curves,
                wall_s=1.0,
                run=run,
            )


def timed(name, action):
    walls, processors = [], []
    for _ in range(REPEATS):
        wall, processor = time.perf_counter(), time.process_time()
        action()
        walls.append(1e3 * (time.perf_counter() - wall))
        processors.append(1e3 * (time.process_time() - processor))
    wall, processor = statistics.median(walls), statistics.median(processors)
    print(f"{name:<40}{wall:10.1f}{processor:10.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=366)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--store")
    options = parser.parse_args()
    scale = Scale(options.seeds, {})
    row = Row("none", 1, "row-7", "A row", (), "built", scales={"laptop": scale})
    with (
        tempfile.TemporaryDirectory() as folder,
        Store(options.store or Path(folder)) as store,
    ):
        print(f"{'milliseconds':<40}{'wall':>10}{'cpu':>10}")
        for run in ("first", "second"):
            made = list(records(options.rows, options.seeds, options.points, run))
            began = time.perf_counter()
            for record in made:
                store.add(record)
            spent = 1e3 * (time.perf_counter() - began) / len(made)
            print(f"{f'add, each of {len(made)}':<40}{spent:10.2f}")
        timed("newest_all", store.newest_all)
        timed("newest_all, no curves", lambda: store.newest_all(curves=False))
        timed("newest of one row", lambda: store.newest(row.id, "laptop"))
        timed("current of one row", lambda: store.current(row, "laptop"))
        timed("of_run", lambda: store.of_run("second"))
        timed("failing", store.failing)
        timed("runs", store.runs)


if __name__ == "__main__":
    main()
