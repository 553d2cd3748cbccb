"""What the runner itself costs: jobs whose experiment does nothing.

With one worker at a time: N rows of one seed, each a new process; one row of 200 seeds
in one process; the parts (a process's start and imports, storing a record); and, where
Ray is installed, the rows on a cluster that is started here.

    python benchmarks/runner_overhead.py [--jobs 20]
"""

import argparse
import os
import resource
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

_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


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


def run_rows(rows, executor):
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        runs = run(rows, "laptop", store, jobs=1, executor=executor)
    assert not any(done.failures for done in runs)


def store_records(count):
    record = Record("row", "laptop", 0, "measured", {}, Processes().environment)
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        for _ in range(count):
            store.add(record)


def processor_seconds():
    """Of this process and those of its children that have ended."""
    spent = (resource.getrusage(who) for who in _WHO)
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def measure(what, call, count=1):
    """Shows the wall and the processor time of one of `count` pieces of a call."""
    wall, cpu = time.perf_counter(), processor_seconds()
    call()
    wall, cpu = time.perf_counter() - wall, processor_seconds() - cpu
    print(f"{what:44s} {wall / count * 1e3:8.1f} ms {cpu / count * 1e3:8.1f} ms CPU")


def python(code, count=5):
    for _ in range(count):
        subprocess.run([sys.executable, "-c", code], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    count = parser.parse_args().jobs
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    here = Processes()
    own = "a job in a process of its own"
    measure(own, lambda: run_rows(rows_of(count, 1), here), count)
    measure(
        "a seed of 200 in one process", lambda: run_rows(rows_of(1, 200), here), 200
    )
    measure("of it storing a record", lambda: store_records(200), 200)
    measure("Python's start", lambda: python("pass"), 5)
    measure("with jax", lambda: python("import jax"), 5)
    measure("with the worker", lambda: python("import jax, varan.lab.worker"), 5)
    if find_spec("ray"):
        on_ray(own, count)


def on_ray(what, count):
    import ray

    from varan.lab.cluster import Cluster

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
    with Cluster() as cluster:
        # The first job finds no Python process of Ray's ready.
        run_rows(rows_of(1, 1), cluster)
        # The processor time is that of this process: the cluster's are not its own.
        measure(f"{what}, on Ray", lambda: run_rows(rows_of(count, 1), cluster), count)
    ray.shutdown()


if __name__ == "__main__":
    main()
