"""A worker's side of its pipes: orders come in as JSON lines, messages go out."""

from __future__ import annotations

import json
import os
import queue
import signal
import traceback
from collections.abc import Mapping
from typing import IO, Any


def take_stdout() -> IO[str]:
    """Takes standard output for messages; what is printed goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def send(channel: IO[str], event: Mapping[str, Any]) -> None:
    """Writes a message, at once.

    Args:
        channel: What `take_stdout` returns.
        event: The message.
    """
    channel.write(json.dumps(event, allow_nan=False) + "\n")
    channel.flush()


def listen(orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Passes on each line of standard input; at its end the parent is gone.

    Args:
        orders: Where the lines go.
    """
    # Read below Python's buffer, whose lock a waiting thread would hold at shutdown.
    rest = b""
    while chunk := os.read(0, 2**16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            orders.put(json.loads(line))
    # Nobody is left to store a measurement: end what the experiment has started, too.
    if hasattr(os, "getpgrp") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def failure(error: Exception) -> dict[str, str]:
    """What a message says of an exception: a sentence, and the traceback.

    Args:
        error: The exception.
    """
    silence = "out of memory" if isinstance(error, MemoryError) else "no message"
    text = str(error).strip() or silence
    name = type(error).__name__
    return {
        "message": f"{name}: {text.splitlines()[0]}",
        "detail": "".join(traceback.format_exception(error)),
    }
