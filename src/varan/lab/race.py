"""Races: ours against peers on one instance, interleaved and paired.

A machine's speed drifts (other load, frequency, caches). Every round therefore runs
all contestants once, in a shuffled order, and a ratio is formed within a round before
anything is summarised over rounds. Compile time is no part of a race; `compile_time`
measures it apart.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .verdict import confidence_interval

# Rounds run in an order that is shuffled, but the same in each repetition of a race.
_ORDER_SEED = 0


@dataclass(frozen=True)
class RaceResult:
    """The times of a race, in seconds, one entry a round.

    Args:
        wall: Wall-clock seconds of each contestant, by round.
        cpu: Seconds of processor time of this process (all its threads), by round.
        reference: The contestant that the ratios are formed with.
        answers: What each contestant returned in the last round, so that a script can
            check that all solved the same problem.
    """

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    reference: str
    answers: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def median(self, name: str) -> float:
        """Median wall-clock seconds of one contestant."""
        return _median(self.wall[name])

    def ratio(self, name: str) -> tuple[float, float, float]:
        """How many times faster than the reference: median, and a 95 % interval.

        The ratio reference/contestant is formed within each round; the interval is one
        over rounds. Above 1 the contestant is faster than the reference.
        """
        pairs = zip(self.wall[self.reference], self.wall[name], strict=True)
        return ratio_interval([ours / theirs for ours, theirs in pairs])

    def to_dict(self) -> dict[str, Any]:
        """The race as plain data, ready for JSON; the answers are left out."""
        contestants = {}
        for name in self.wall:
            ratio, low, high = self.ratio(name)
            contestants[name] = {
                "wall_median_s": self.median(name),
                "cpu_median_s": _median(self.cpu[name]),
                "ratio": ratio,
                "ratio_low": low,
                "ratio_high": high,
                "wall_s": self.wall[name],
                "cpu_s": self.cpu[name],
            }
        return {"reference": self.reference, "contestants": contestants}

    def table(self) -> str:
        """The race as a plain-text table, fastest first."""
        lines: list[tuple[str, ...]] = [
            ("contestant", "wall", "cpu", f"{self.reference} / contestant", "95 %")
        ]
        for name in sorted(self.wall, key=self.median):
            ratio, low, high = self.ratio(name)
            wall, cpu = seconds(self.median(name)), seconds(_median(self.cpu[name]))
            lines.append((name, wall, cpu, f"{ratio:.3g}", f"[{low:.3g}, {high:.3g}]"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) for cell, width in zip(line, widths, strict=True)
            ).rstrip()
            for line in lines
        )


def race(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    reference: str | None = None,
    report: Callable[[int, str, float, float], None] = lambda *_: None,
) -> RaceResult:
    """Runs the contestants in turns and times each.

    Arrays of JAX are waited for. All contestants must solve the same instance; the
    answers of the last round stand in the result for checking.

    Args:
        contestants: Name to a function without arguments.
        repeats: Timed rounds; each runs every contestant once.
        warmup: Rounds before the timed ones, for compilation and caches.
        reference: The contestant that the others are compared with; the first one when
            left out.
        report: Told of every timed call as soon as it is over: its round (from 0), the
            contestant, its wall-clock and its processor seconds.

    Returns:
        The times, medians and ratios.

    Raises:
        ValueError: No contestants, no rounds, or an unknown reference.

    Example:
        >>> from varan.lab.race import race
        >>> result = race({"sum": lambda: sum(range(100)), "len": lambda: len("ab")})
        >>> sorted(result.wall)
        ['len', 'sum']
    """
    if not contestants:
        raise ValueError("race: `contestants` must not be empty. Name at least one.")
    if repeats < 1 or warmup < 0:
        raise ValueError(
            f"race: `repeats` must be at least 1 and `warmup` at least 0 "
            f"(got {repeats} and {warmup})."
        )
    names = list(contestants)
    reference = names[0] if reference is None else reference
    if reference not in contestants:
        raise ValueError(
            f"race: `reference` must be one of {', '.join(map(repr, names))} "
            f"(got {reference!r})."
        )
    order = random.Random(_ORDER_SEED)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    answers: dict[str, Any] = {}
    for turn in range(warmup + repeats):
        for name in order.sample(names, len(names)):
            answers[name], seconds, processor = timed(contestants[name])
            if turn >= warmup:
                wall[name].append(seconds)
                cpu[name].append(processor)
                report(turn - warmup, name, seconds, processor)
    return RaceResult(wall, cpu, reference, answers)


@dataclass(frozen=True)
class CompileTime:
    """Seconds that JAX needs before the first call can run.

    Args:
        trace: Tracing the Python function.
        lower: Lowering to StableHLO.
        compile: Compiling with XLA.
    """

    trace: float
    lower: float
    compile: float

    @property
    def total(self) -> float:
        """The sum of the three."""
        return self.trace + self.lower + self.compile


def compile_time(fn: Callable[..., Any], *args: Any) -> CompileTime:
    """Measures tracing, lowering and compiling of a JAX function, each apart.

    Args:
        fn: A function of arrays; jitted here, whether or not it is already.
        *args: The arguments to compile it for.

    Returns:
        Seconds of each stage.

    Example:
        >>> import jax.numpy as jnp
        >>> from varan.lab.race import compile_time
        >>> compile_time(jnp.sin, jnp.ones(3)).total > 0
        True
    """
    import jax

    # A fresh function object: JAX remembers traces of functions it has seen.
    jitted = jax.jit(lambda *inner: fn(*inner))
    start = time.perf_counter()
    traced = jitted.trace(*args)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return CompileTime(
        after_trace - start, after_lower - after_trace, end - after_lower
    )


def ratio_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median of ratios, one a round, and its 95 % interval.

    Both are of their logarithms: a ratio and its inverse have inverse intervals, and
    no interval of few rounds reaches below zero.

    Args:
        ratios: Positive ratios.

    Returns:
        The median, the lower and the upper end.

    Example:
        >>> from varan.lab.race import ratio_interval
        >>> ratio_interval([2.0, 2.0])
        (2.0, 2.0, 2.0)
    """
    logs = [math.log(ratio) for ratio in ratios]
    low, high = confidence_interval(logs, "median")
    return math.exp(_median(logs)), math.exp(low), math.exp(high)


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Calls a function and waits for its answer, arrays of JAX included.

    Args:
        run: A function without arguments.

    Returns:
        The answer, and the wall-clock and processor seconds that it took.
    """
    processor, start = time.process_time(), time.perf_counter()
    answer = run()
    # Only a process that has loaded JAX can have been handed its arrays.
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(answer)
    return answer, time.perf_counter() - start, time.process_time() - processor


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def seconds(value: float) -> str:
    """A time with the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
