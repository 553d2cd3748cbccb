"""What the runner itself costs: jobs whose experiment does nothing.

With one worker at a time: N rows of one seed, each a new process; a further seed of a
row, in a process that is there; and, where Ray is installed, the rows on a cluster that
is started here. Then the parts: a process's start and imports, and storing a record.

    python benchmarks/runner_overhead.py [--jobs 20]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from varan.claims import Measurements
from varan.lab.catalogue import Row, Scale
from varan.lab.processes import Processes
from varan.lab.runner import run
from varan.lab.store import Record, Store


def experiment(scale, seed):
    return Measurements({"nothing": 0.0})


class EmptyRow(Row):
    """A row whose experiment is this file's."""

    @property
    def module(self):
        return Path(__file__).stem


def rows_of(count, seeds):
    scales = {"laptop": Scale(seeds, {})}
    return [
        EmptyRow("none", n, f"row-{n}", "Nothing", (), "built", scales=scales)
        for n in range(1, count + 1)
    ]


def seconds_of_run(rows, executor):
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        began = time.perf_counter()
        runs = run(rows, "laptop", store, jobs=1, executor=executor)
        spent = time.perf_counter() - began
    assert not any(done.failures for done in runs)
    return spent


def seconds_to_store(count=200):
    record = Record("row", "laptop", 0, "measured", {}, Processes().environment)
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        began = time.perf_counter()
        for _ in range(count):
            store.add(record)
        return (time.perf_counter() - began) / count


def seconds_of(*arguments):
    """The median of five runs of Python."""
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True)
        spent.append(time.perf_counter() - began)
    return sorted(spent)[2]


def show(what, seconds):
    print(f"{what:44s} {seconds * 1e3:8.1f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    count = parser.parse_args().jobs
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    here = Processes()
    show(
        "a job in a process of its own", seconds_of_run(rows_of(count, 1), here) / count
    )
    one, many = (seconds_of_run(rows_of(1, seeds), here) for seeds in (1, 101))
    show("a further seed in a process that is there", (many - one) / 100)
    if find_spec("ray"):
        show("a job in a process of its own, on Ray", on_ray(count))
    show("storing a record", seconds_to_store())
    empty = seconds_of("-c", "pass")
    jax = seconds_of("-c", "import jax")
    worker = seconds_of("-c", "import jax, varan.lab.worker, varan.claims")
    show("Python's start", empty)
    show("import jax", jax - empty)
    show("import the worker", worker - jax)


def on_ray(count):
    import ray

    from varan.lab.cluster import Cluster

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
    with Cluster() as cluster:
        # The first job finds no Python process of Ray's ready.
        seconds_of_run(rows_of(1, 1), cluster)
        spent = seconds_of_run(rows_of(count, 1), cluster)
    ray.shutdown()
    return spent / count


if __name__ == "__main__":
    main()
