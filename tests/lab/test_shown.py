"""What a run shows: progress as bars or lines, checks, verdicts, paths."""

import io
import json

import pytest
from rich.console import Console

from varan.lab import render, results
from varan.lab.catalogue import Check
from varan.lab.progress import RunProgress
from varan.lab.runner import Event, RowRun
from varan.lab.store import Record


def record(seed, outcome="measured", **fields):
    return Record("toy-good", "laptop", seed, outcome, {}, {}, wall_s=1.5, **fields)


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


@pytest.mark.parametrize("terminal", [True, False], ids=["bars", "lines"])
def test_progress(toys, terminal):
    row = toys(seeds=3)
    shown = console(terminal)
    with RunProgress([row], "laptop", None, shown) as progress:
        progress(Event("reused", row, (0,)))
        progress(Event("started", row, (1, 2)))
        progress(Event("began", row, (1,)))
        if terminal:
            shown.print(progress._picture())
        progress(Event("measured", row, (1,), record(1)))
        failed = record(2, "failed", message="[odd] markup")
        progress(Event("failed", row, (2,), failed))
        progress(Event("finished", row))
    text = shown.file.getvalue()
    assert progress.measured == 1
    assert "toy-good: seed 2 failed: [odd] markup" in text
    if terminal:
        for part in ("rows", "0/1", "1/3", "1 measured earlier", "seed 1"):
            assert part in text
    else:
        assert text.splitlines()[:2] == [
            "toy-good: 1 seed measured earlier",
            "toy-good: measuring 2 seeds",
        ]
        assert "seed 1 measured in 1.5 s (2 of 3 seeds" in text


def concluded(toys, tmp_path, gains, **fields):
    checks = (
        Check("gain", "gain", ">=", 1.5, "median", "[theory]"),
        Check("range", "gain", "in", (0.0, 9.0), "worst", "theory"),
    )
    curve = {"x": [1.0], "y": [2.0], "label": "ours", "plot": "p", "x_label": "x"}
    curve |= {"y_label": "y", "log_x": False, "log_y": False, "marker": False}
    measured = {
        seed: record(seed, numbers={"gain": gain}, curves=[curve], notes=["[a] note"])
        for seed, gain in enumerate(gains)
    }
    row = toys(checks=checks, seeds=3)
    run = RowRun(row, "laptop", (0, 1, 2), measured, **fields)
    return results.conclude([run], tmp_path)[0]


def test_a_result_is_shown_whole(toys, tmp_path):
    result = concluded(toys, tmp_path, [2.0, 2.5, float("inf")])
    assert result.outcome == "not held"  # infinity is outside of [0, 9]
    shown = console(False)
    render.result(shown, result)
    render.summary(shown, [result, result], "results.sqlite")
    text = shown.file.getvalue()
    for part in (
        "Toys behave as they are told.",
        "median gain",
        ">= 1.5",
        "in [0, 9]",
        "[theory]",
        "[a] note",
        "range",
        "verdict: not held",
        "store  results.sqlite",
    ):
        assert part in text
    assert text.count("[a] note") == 1
    for path in result.plots:
        assert str(path) in text
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["checks"][0]["values"] == [2.0, 2.5, "inf"]
    assert written["measurements"]["2"] == {"gain": "inf"}


def test_a_failure_has_no_verdict(toys, tmp_path):
    failures = [record(1, "failed", message="it broke")]
    result = concluded(toys, tmp_path, [2.0], failures=failures)
    assert (result.outcome, result.verdict) == ("failed", None)
    shown = console(False)
    render.result(shown, result)
    assert "seed 1 failed: it broke" in shown.file.getvalue()
    assert "verdict: failed" in shown.file.getvalue()


def test_one_seed_has_no_interval(toys, tmp_path):
    shown = console(False)
    render.result(shown, concluded(toys, tmp_path, [2.0]))
    text = shown.file.getvalue()
    assert "one seed" in text
    assert "Measured with 1 of the 3 declared seeds." in text
