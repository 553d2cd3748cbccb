"""Runs on a Ray cluster of one node, started here: as in processes, and failures."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from _hanging_run import hanging_run, wait_for
from varan import cli
from varan.lab import cluster as cluster_module
from varan.lab.cluster import Cluster
from varan.lab.jobs import ExecutorError
from varan.lab.runner import run
from varan.lab.store import Store

# Continuous integration must not skip: there a missing Ray shows as an error.
needs_ray = pytest.mark.skipif(
    not find_spec("ray") and "VARAN_REQUIRE_SERVICES" not in os.environ,
    reason='needs Ray: pip install "varan[ray]"',
)


# Ray would write a token into the user's home.
NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def node():
    """A cluster on the loopback whose node knows the toys; its address."""
    # Sockets lie in it, whose paths may not be long.
    folder = tempfile.mkdtemp(prefix="ray-")
    port = free_port()
    options = ["--head", "--block", "--port", str(port), "--temp-dir", folder]
    options += ["--num-cpus", "2", "--object-store-memory", str(80 * 2**20)]
    options += ["--include-dashboard", "false", "--disable-usage-stats"]
    options += ["--node-ip-address", "127.0.0.1"]
    toys = {"PYTHONPATH": str(Path(__file__).parent / "toys")}
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
        env={**os.environ, **toys, **NO_TOKEN},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: answers(port) or head.poll() is not None)
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def address(node, monkeypatch):
    """The address of the cluster, in the environment as users have it."""
    for name, value in {"RAY_ADDRESS": node, **NO_TOKEN}.items():
        monkeypatch.setenv(name, value)
    return node


@pytest.fixture
def connected(address):
    with Cluster() as cluster:
        yield cluster


def numbers_of(run):
    return {
        seed: ({**record.numbers, "process": None}, record.curves, record.fingerprint)
        for seed, record in run.measured.items()
    }


@needs_ray
def test_a_cluster_measures_what_processes_measure(toys, connected, tmp_path):
    rows = [
        toys("good", id="single", number=1, seeds=2),
        toys("good", id="double", number=2, seeds=1, precision="float64"),
    ]
    bad = [toys("raises", number=3), toys("killed", number=4)]
    hanging = toys("hangs", number=5, seeds=2)
    with Store(tmp_path / "here") as store:
        here = run(rows, "laptop", store)
    assert connected.jobs == 2
    with Store(tmp_path / "there") as store:
        there = run([*rows, *bad], "laptop", store, executor=connected)
        (hangs,) = run([hanging], "laptop", store, executor=connected, time_limit=8)
    for one, other in zip(here, there, strict=False):
        assert numbers_of(one) == numbers_of(other)
    record = there[0].measured[0]
    assert record.environment == here[0].measured[0].environment
    assert record.compile_s > 0
    raises, killed = there[2:]
    assert set(raises.measured) == set(killed.measured) == {0, 2}
    assert "the second seed is bad" in raises.failures[0].message
    (failure,) = killed.failures
    assert "SIGKILL (the memory ran out?)" in failure.message
    assert "last words" in failure.detail
    assert hangs.failures[-1].seed == 1
    assert hangs.failures[-1].message == "stopped after 8 s, the time limit."


@needs_ray
def test_a_node_with_other_sources_is_refused(toys, connected, tmp_path, monkeypatch):
    ours = cluster_module._state()
    monkeypatch.setattr(cluster_module, "_state", lambda: {**ours, "sources": "other"})
    with Store(tmp_path) as store:
        with pytest.raises(ExecutorError, match="has other sources of varan than this"):
            run([toys()], "laptop", store, executor=connected)
        assert store.records() == []


@needs_ray
def test_ctrl_c_gives_the_cluster_back(toys, address, tmp_path):
    process = hanging_run(tmp_path, "--on", "ray")
    with Store(tmp_path) as store:
        (kept,) = wait_for(store.records)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert store.records() == [kept]
    assert process.returncode == 130
    assert "interrupted; 1 new seed kept in" in stderr
    worker = Path("/proc", str(int(kept.numbers["process"])))
    wait_for(lambda: not worker.exists())


WRONG = {
    "nobody there": ("ray", "127.0.0.1:{port}", "No Ray cluster answers at 127.0.0.1:"),
    "nobody far away": ("ray://127.0.0.1:{port}", "", "No Ray cluster answers at ray:"),
    "no address": ("ray", "somewhere", "'somewhere' is no address of a Ray cluster."),
    "something else": ("spark", "", "There is no 'spark' to run on."),
}


@needs_ray
@pytest.mark.parametrize("mistake", WRONG)
def test_a_cluster_that_is_not_there(mistake, monkeypatch, tmp_path):
    on, variable, sentence = WRONG[mistake]
    port = free_port()
    monkeypatch.setenv("RAY_ADDRESS", variable.format(port=port))
    options = ["--on", on.format(port=port), "--out", str(tmp_path / "out")]
    began = time.monotonic()
    done = CliRunner().invoke(cli.app, ["run", "21", "--scale", "smoke", *options])
    assert time.monotonic() - began < 20
    assert done.exit_code == (cli.USAGE if on == "spark" else cli.FAILED)
    assert done.stderr.startswith(f"varan: {sentence}")
    # A sentence and a hint.
    assert len(done.stderr.splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_without_ray_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutorError, match="Ray is not installed") as missing:
        Cluster()
    assert missing.value.hint == 'pip install "varan[ray]"'
