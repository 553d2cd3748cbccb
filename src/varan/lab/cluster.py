"""Workers on a Ray cluster: an actor a worker, and in it the same process as here.

The driver alone writes the store: an actor hands each measured seed back at once. Nodes
must run the same sources and versions as the driver, or they would measure something
else; one that does not is refused before it measures.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self

from . import provenance
from .jobs import ExecutorError, Inbox
from .processes import ProcessWorker

# A host that is there answers within milliseconds; Ray itself would try for minutes.
_ANSWER_S = 5
_JOIN_S = 30
_INSTALL = 'pip install "varan[ray]"'


class Cluster:
    """A connection to an existing Ray cluster; an `Executor` and context manager.

    Args:
        address: `"ray"` for the cluster of this machine or of RAY_ADDRESS, or
            `"ray://HOST:PORT"` for a remote one.

    Attributes:
        jobs: The processors of the cluster.

    Raises:
        ExecutorError: Ray is missing, or there is no such cluster.
    """

    def __init__(self, address: str = "ray"):
        try:
            import ray
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise ExecutorError("Ray is not installed.", _INSTALL) from None
        # One that the caller has connected to is used, and left connected.
        self._connected = not ray.is_initialized()
        if self._connected:
            _connect(address)
        self._ray = ray
        self._actor = ray.remote(num_cpus=1, max_restarts=0)(_Remote)
        self.jobs = int(ray.cluster_resources().get("CPU", 0))
        if not self.jobs:
            self.close()
            raise ExecutorError(
                "The Ray cluster has no processor for a worker.",
                "Its nodes are started with `ray start --num-cpus N`.",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; the cluster stays."""
        if self._connected:
            self._ray.shutdown()

    def start(self, job: Mapping[str, Any], inbox: Inbox) -> ClusterWorker:
        """Asks the cluster for a worker; it is ready when a processor is free.

        Args:
            job: What `job_of` returns.
            inbox: Where its messages go.
        """
        return ClusterWorker(self._actor.remote(dict(job)), inbox)


class ClusterWorker:
    """A worker in the cluster; a `Worker`.

    Args:
        actor: The handle of its `_Remote`.
        inbox: Where its messages go.
    """

    def __init__(self, actor: Any, inbox: Inbox):
        self._actor = actor
        self._inbox = inbox
        self._when(actor.state.remote(), self._ready)

    def give(self, seed: int | None) -> None:
        """Hands it the next seed; `None` when there is no more and it may end."""
        if seed is None:
            self._inbox.put((self, {"event": "ended"}))
        else:
            self._when(self._actor.measure.remote(seed), lambda message: message)

    def stop(self) -> None:
        """Ends its actor, with which its process ends."""
        import ray

        # The connection itself may be gone.
        with contextlib.suppress(Exception):
            ray.kill(self._actor)

    def close(self) -> None:
        """Gives its processor back to the cluster."""
        self.stop()

    def _when(self, reference: Any, message: Callable[[Any], dict[str, Any]]) -> None:
        def done(future: Any) -> None:
            error = future.exception()
            heard = _lost(error) if error else message(future.result())
            self._inbox.put((self, heard))

        reference.future().add_done_callback(done)

    def _ready(self, state: Mapping[str, Any]) -> dict[str, Any]:
        # Compared with what is here now: a local worker, too, runs what it finds.
        difference = _difference(_state(), state)
        if difference is None:
            return {"event": "ready", "environment": state["environment"]}
        return {
            "event": "refused",
            "message": f"A node of the Ray cluster {difference}.",
            "hint": "Install the same on every node; nothing was measured there.",
        }


class _Remote:
    """The actor: it keeps a worker process and hands its answers on."""

    def __init__(self, job: Mapping[str, Any]):
        self._job = job
        self._answers: Inbox = queue.SimpleQueue()
        self._process: ProcessWorker | None = None

    def state(self) -> dict[str, Any]:
        return _state()

    def measure(self, seed: int) -> dict[str, Any]:
        # Not before its node has been found to be in the right state.
        self._process = self._process or ProcessWorker(self._job, self._answers)
        self._process.give(seed)
        return self._answers.get()[1]


def _connect(address: str) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS", "auto") if address == "ray" else address
    hint = (
        "`ray status` on a node says whether its cluster is up; one that asks for a "
        "token needs RAY_AUTH_MODE=token here, too."
    )
    if address != "auto":
        _knock(address, hint)
    failures: list[BaseException] = []

    def join() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except BaseException as error:  # Ray ends programs that it cannot connect
            failures.append(error)

    # Ray tries for minutes where something else answers; nobody waits for that.
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(_JOIN_S)
    if thread.is_alive():
        reason = f"nothing of Ray answered within {_JOIN_S} s"
    elif failures:
        text = str(failures[0]).strip() or type(failures[0]).__name__
        reason = text.splitlines()[0].rstrip(".")
    else:
        return
    where = "" if address == "auto" else f" at {address}"
    raise ExecutorError(f"The Ray cluster{where} cannot be used ({reason}).", hint)


def _knock(address: str, hint: str) -> None:
    """Finds out quickly whether anybody is there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ExecutorError(
            f"{address!r} is no address of a Ray cluster.",
            "It reads HOST:PORT in RAY_ADDRESS, or --on ray://HOST:PORT.",
        )
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExecutorError(
            f"No Ray cluster answers at {address} ({reason}).", hint
        ) from None


def _state() -> dict[str, Any]:
    """What decides what is measured here, and the record of where it is measured."""
    environment = provenance.environment()
    return {"sources": provenance.hash_package(), "environment": environment}


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """In what a node differs from the driver, as the end of a sentence."""
    here, there = ours["environment"]["versions"], theirs["environment"]["versions"]
    for package, version in here.items():
        if there[package] != version:
            return f"has {package} {there[package]} where this machine has {version}"
    if ours["sources"] != theirs["sources"]:
        return "has other sources of varan than this machine"
    return None


def _lost(error: BaseException) -> dict[str, Any]:
    text = str(error)
    if "No module named 'varan'" in text:
        return {
            "event": "refused",
            "message": "A node of the Ray cluster has no varan.",
            "hint": f"On every node: {_INSTALL}",
        }
    return {
        "event": "ended",
        "lost": True,
        "message": "the worker was lost twice with its Ray node or actor.",
        "detail": text,
    }
