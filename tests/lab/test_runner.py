"""Runs in real worker processes: good rows, bad rows, resuming, Ctrl-C."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from varan.lab.runner import run
from varan.lab.store import Store


@pytest.fixture
def opened(tmp_path):
    with Store(tmp_path) as store:
        yield store


def events_of(rows, store, **options):
    seen = []
    runs = run(rows, "laptop", store, report=seen.append, **options)
    return runs, [(event.kind, event.row.id, event.seeds) for event in seen]


def test_a_run_is_measured_stored_and_reused(toys, opened):
    row = toys("good", seeds=2, precision="float64")
    (first,), seen = events_of([row], opened)
    assert seen == [
        ("started", "toy-good", (0, 1)),
        ("measured", "toy-good", (0,)),
        ("measured", "toy-good", (1,)),
        ("finished", "toy-good", ()),
    ]
    record = first.measured[1]
    assert record.numbers["gain"] == 2.01
    assert record.numbers["infinite"] == float("inf")
    assert record.numbers["x64"] == 1.0
    assert record.notes == ["a note", "seed 1"]
    assert record.curves[0]["y"] == [2.0, 3.0, 4.0]
    assert record.wall_s > 0 and record.cpu_s > 0 and record.peak_memory_mib > 10
    assert record.environment["versions"]["jax"]
    assert record.environment["machine"]["cores"] >= 1
    assert record.settings == {"kind": "good"}
    assert opened.records("toy-good", "laptop") == list(first.measured.values())

    (again,), seen = events_of([row], opened)
    assert seen == [("reused", "toy-good", (0, 1))]
    assert (again.measured, again.reused) == (first.measured, 2)

    # One more seed measures only that; a fresh process gives the same numbers.
    (more,), seen = events_of([row], opened, seeds=3)
    assert ("started", "toy-good", (2,)) in seen
    (fresh,), _ = events_of([row], opened, seeds=1, fresh=True)
    assert fresh.measured[0].numbers == first.measured[0].numbers
    assert more.reused == 2 and fresh.reused == 0


def test_float32_is_the_default_precision(toys, opened):
    (only,) = run([toys("good", seeds=1)], "laptop", opened)
    assert only.measured[0].numbers["x64"] == 0.0


# Each bad kind, which seeds still succeed, and what is recorded.
BAD = {
    "raises": ({0, 2}, "RuntimeError: the second seed is bad"),
    "killed": ({0}, "the worker was ended by SIGKILL (the memory ran out?)."),
    "exits": (set(), "the worker ended with exit code 3."),
    "nan": (set(), "ValueError: the measured 'gain' is not a number (NaN)."),
    "absent": (set(), "the experiment did not measure 'gain'"),
    "nothing": (set(), "must return Measurements (got NoneType)"),
    "ragged": (set(), "has 1 abscissae and 0 ordinates"),
}


def test_bad_rows_are_recorded_and_harm_no_other(toys, opened):
    bad = [toys(kind, number=n) for n, kind in enumerate(BAD, 2)]
    runs = run([*bad, toys("slow", seeds=1)], "laptop", opened, jobs=2)
    assert set(runs[-1].measured) == {0} and not runs[-1].failures
    for (survivors, message), done in zip(BAD.values(), runs, strict=False):
        assert set(done.measured) == survivors
        assert {r.seed for r in done.failures} == {0, 1, 2} - survivors
        assert message in done.failures[0].message
        stored = opened.records(done.row.id, "laptop")
        assert sorted(r.seed for r in stored) == [0, 1, 2]
    killed = runs[list(BAD).index("killed")]
    assert "last words" in killed.failures[0].detail
    assert killed.failures[1].message == "not measured: the worker ended at seed 1."
    raised = runs[list(BAD).index("raises")]
    assert "Traceback" in raised.failures[0].detail

    # What failed is tried again, what was measured is not.
    _, seen = events_of([bad[0]], opened)
    assert ("started", "toy-raises", (1,)) in seen


def test_an_experiment_that_cannot_be_imported(toys, opened, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    (only,) = run([toys("good", seeds=2)], "laptop", opened)
    assert [r.message for r in only.failures] == [
        "ModuleNotFoundError: No module named 'toy_experiments'"
    ] * 2


def test_what_hangs_is_stopped(toys, opened):
    began = time.monotonic()
    (only,) = run([toys("hangs", seeds=2)], "laptop", opened, time_limit=3)
    assert time.monotonic() - began < 30
    assert set(only.measured) == {0}
    assert only.failures[0].message == "stopped after 3 s, the time limit."


def test_jobs_run_side_by_side_but_exclusive_rows_alone(toys, opened):
    rows = [
        toys("slow", id="first", number=1, seeds=2),
        toys("slow", id="alone", number=2, seeds=2, exclusive=True),
        toys("slow", id="second", number=3, seeds=2),
    ]
    first, alone, second = run(rows, "laptop", opened, jobs=2)

    def span(done):
        numbers = [record.numbers for record in done.measured.values()]
        return min(n["began"] for n in numbers), max(n["ended"] for n in numbers)

    assert span(alone)[0] >= max(span(first)[1], span(second)[1])
    runs = [first, alone, second]
    assert [done.row.id for done in runs] == ["first", "alone", "second"]


def test_what_cannot_run_is_refused(toys, opened):
    with pytest.raises(ValueError, match=r"`jobs` must be positive \(got 0\)"):
        run([toys()], "laptop", opened, jobs=0)
    row = toys()
    object.__setattr__(row, "state", "planned")
    with pytest.raises(ValueError, match="'toy-good' is planned, not built"):
        run([row], "laptop", opened)


_INTERRUPTED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from conftest import make_row
    from varan import cli
    from varan.lab import catalogue
    rows = (make_row("hangs", seeds=2),)
    catalogue.load = lambda: catalogue.Catalogue(rows)
    cli.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process")
def test_ctrl_c_keeps_what_is_measured(toys, tmp_path):
    script = tmp_path / "script.py"
    here = str(Path(__file__).parent)
    script.write_text(textwrap.dedent(_INTERRUPTED.format(tests=here)))
    process = subprocess.Popen(
        [sys.executable, str(script), "run", "--all", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with Store(tmp_path) as opened:
        for _ in range(600):
            if opened.records("toy-hangs", "laptop"):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
        (kept,) = opened.records("toy-hangs", "laptop")
    assert process.returncode == 130
    assert kept.seed == 0 and kept.outcome == "measured"
    assert "interrupted; 1 new seed kept in" in stderr
    assert "The same command goes on from there." in stderr
    assert "Traceback" not in stdout + stderr
