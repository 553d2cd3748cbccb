"""Workers that are processes of this machine.

Each is a fresh process: precision and threads are set before JAX is imported, and what
it does to itself (a crash, memory running out) stays its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

from . import provenance
from .jobs import Inbox

# One thread a worker: workers run side by side, ratios of times are fair to peers that
# have no threads, and the order of a sum does not depend on the machine.
_ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
# Where compiling is most of the work: without most of its passes, a third less.
_QUICK_COMPILE = "--xla_backend_optimization_level=0"
_STDERR_TAIL = 4000


class Processes:
    """Starts worker processes; an `Executor`."""

    def __init__(self):
        self.jobs = min(2, provenance.cores())
        self.environment = provenance.environment()

    def start(self, job: Mapping[str, Any], inbox: Inbox) -> ProcessWorker:
        """Starts one.

        Args:
            job: What `job_of` returns.
            inbox: Where its messages go.
        """
        worker = ProcessWorker(job, inbox)
        inbox.put((worker, {"event": "ready", "environment": self.environment}))
        return worker


class ProcessWorker:
    """A worker process and the thread that reads what it says; a `Worker`.

    Args:
        job: What `job_of` returns.
        inbox: Where its messages go.

    Attributes:
        module: What it runs.
    """

    module = "varan.lab.worker"

    def __init__(self, job: Mapping[str, Any], inbox: Inbox):
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env=_variables(job),
            # Ctrl-C is for the parent, which stops its workers in order.
            start_new_session=True,
        )
        self._tell(job)
        self._reader = threading.Thread(target=self._read, args=(inbox,), daemon=True)
        self._reader.start()

    def give(self, seed: int | None) -> None:
        """Hands it the next seed; `None` when there is no more and it may end."""
        self._tell({"seed": seed})

    def stop(self) -> None:
        """Kills it and whatever it has started; `ended` will say so."""
        # Not yet waited for, so its number is still its own.
        if self._process.returncode is None:
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def close(self) -> None:
        """Waits for its end and gives back what it holds."""
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            assert pipe is not None
            pipe.close()

    def _tell(self, line: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the reader sees the end of its output

    def _read(self, inbox: Inbox) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # A process that is killed may leave half a line.
            if line.endswith("\n"):
                inbox.put((self, json.loads(line)))
        message = _last_words(self._process.wait())
        detail = self._stderr_tail()
        inbox.put((self, {"event": "ended", "message": message, "detail": detail}))

    def _stderr_tail(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL))
        return self._stderr.read().decode("utf-8", "replace")


def _last_words(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (the memory ran out?)" if name == "SIGKILL" else ""
        return f"the worker was ended by {name}{hint}."
    return f"the worker ended with exit code {code}."


def _variables(job: Mapping[str, Any]) -> dict[str, str]:
    variables = dict(os.environ)
    variables["JAX_ENABLE_X64"] = "1" if job["precision"] == "float64" else "0"
    # Several workers may share one accelerator.
    variables.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if job["one_thread"]:
        for name, value in _ONE_THREAD.items():
            variables.setdefault(name, value)
    quick = _QUICK_COMPILE if job["quick_compile"] else ""
    variables["XLA_FLAGS"] = f"{job['xla_flags']} {quick}".strip()
    return variables
