"""Races of toys: who solves, who is absent, who raises, who is wrong."""

import os
import signal
import time

from varan.claims import Contestant, Heat


def answering(value, seconds=0.0):
    """A contestant that takes its time on its first call and on every call."""
    called = []

    def call():
        time.sleep(seconds + (0 if called else 0.05))
        called.append(value)
        return value

    return lambda: call


def raising(after):
    """A contestant that answers some times and then raises."""
    calls = []

    def call():
        calls.append(time.sleep(0.025))
        if len(calls) > after:
            raise RuntimeError("it broke\nsecond line")
        return 2.0

    return lambda: call


def importing(module):
    def make():
        __import__(module)

    return make


def killed():
    calls = []

    def call():
        calls.append(time.sleep(0.025))
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return 2.0

    return lambda: call


def waiting():
    """Answers twice in preparation and in one round, then hangs."""
    calls = []

    def call():
        calls.append(time.sleep(0.025))
        if len(calls) > 3:
            time.sleep(600)
        return 2.0

    return lambda: call


OURS = Contestant("ours", answering(2.0))
TOYS = {
    "good": [
        OURS,
        Contestant("slow", answering(2.0, 0.02), package="numpy"),
        Contestant("slowest", answering(2.0, 0.2), package="numpy"),
        Contestant("wrong", answering(2.5), package="scipy"),
        Contestant("nan", answering(float("nan")), package="scipy"),
        Contestant("absent", importing("toy_peer_that_is_nowhere"), package="toy-peer"),
        Contestant(
            "broken", importing("toy_broken_peer"), package="jax", hint="mend it"
        ),
        Contestant("raises", raising(0), package="numpy"),
        Contestant("raises later", raising(3), package="numpy"),
    ],
    "killed": [OURS, Contestant("killed", killed())],
    "waiting": [OURS, Contestant("waiting", waiting())],
    "no ours": [Contestant("ours", raising(0)), Contestant("peer", answering(2.0))],
}


def heats(settings):
    if settings["toy"] == "unreadable":
        raise KeyError("size")
    return [
        Heat(
            name=f"{settings['toy']}, n = {n}",
            contestants=TOYS[settings["toy"]],
            error=lambda answer: abs(answer - 2.0),
            tolerance=1e-6,
            measure="distance",
            notes=["a toy"],
        )
        for n in settings.get("sizes", [1])
    ]
