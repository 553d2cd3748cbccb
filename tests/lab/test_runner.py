"""Runs in real worker processes: good rows, bad rows, sharing out, resuming, ends."""

import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from _hanging_run import hanging_run, wait_for
from varan import cli
from varan.lab import catalogue
from varan.lab.jobs import ExecutorError
from varan.lab.runner import run
from varan.lab.store import Store, StoreError


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
    (first,), seen = events_of([row], opened, jobs=1)
    assert seen == [
        ("started", "toy-good", (0, 1)),
        ("began", "toy-good", (0,)),
        ("measured", "toy-good", (0,)),
        ("began", "toy-good", (1,)),
        ("measured", "toy-good", (1,)),
        ("finished", "toy-good", ()),
    ]
    record = first.measured[1]
    assert record.run and record.run == first.measured[0].run
    assert record.numbers["gain"] == 2.01
    assert record.numbers["infinite"] == float("inf")
    assert record.numbers["x64"] == 1.0
    assert record.notes == ["a note", "seed 1"]
    assert record.curves[0]["y"] == [2.0, 3.0, 4.0]
    assert record.wall_s > record.compile_s > 0
    assert record.cpu_s > 0 and record.peak_memory_mib > 10
    assert record.environment["versions"]["jax"]
    assert record.environment["machine"]["cores"] >= 1
    assert record.settings == {"kind": "good"}
    assert opened.records("toy-good", "laptop") == list(first.measured.values())

    (again,), seen = events_of([row], opened)
    assert seen == [("reused", "toy-good", (0, 1))]
    assert (again.measured, again.reused) == (first.measured, 2)

    # One more seed measures only that.
    (more,), seen = events_of([row], opened, seeds=3)
    assert ("started", "toy-good", (2,)) in seen
    assert more.reused == 2 and more.measured[2].run != record.run


def numbers_of(run):
    """What a row measured, but for what tells processes apart."""
    numbers = {seed: dict(r.numbers) for seed, r in run.measured.items()}
    processes = {entry.pop("process") for entry in numbers.values()}
    return numbers, {seed: r.curves for seed, r in run.measured.items()}, processes


def test_the_same_seed_gives_the_same_numbers(toys, opened):
    row = toys("good", seeds=4)
    (one,) = run([row], "laptop", opened, jobs=1)
    (again,) = run([row], "laptop", opened, jobs=1, fresh=True)
    (shared,) = run([row], "laptop", opened, jobs=2, fresh=True)
    numbers, curves, first = numbers_of(one)
    assert len({entry["walk"] for entry in numbers.values()}) == 4
    for other, workers in ((again, 1), (shared, 2)):
        assert numbers_of(other)[:2] == (numbers, curves)
        # In fresh processes; one row's seeds are split where a second one is free.
        processes = numbers_of(other)[2]
        assert len(processes) == workers and not processes & first


def test_float32_is_the_default_precision(toys, opened):
    (only,) = run([toys("good", seeds=1)], "laptop", opened)
    assert only.measured[0].numbers["x64"] == 0.0


# Each bad kind, which seeds still succeed, and what is recorded.
BAD = {
    "raises": ({0, 2}, "RuntimeError: the second seed is bad"),
    "killed": ({0, 2}, "the worker was ended by SIGKILL (the memory ran out?)."),
    "hungry": ({0, 2}, "MemoryError: out of memory"),
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


def test_a_seed_that_hangs_is_stopped(toys, opened):
    (only,) = run([toys("hangs", seeds=3)], "laptop", opened, jobs=1, time_limit=8)
    assert set(only.measured) == {0, 2}
    (failure,) = only.failures
    assert failure.message == "stopped after 8 s, the time limit."
    assert not is_alive(failure.detail.removeprefix("child "))


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


class Scripted:
    """An executor whose workers say what a test wants: a message for each seed."""

    jobs = 1

    def __init__(self, says):
        self.says = says
        self.given = []
        self.started = 0

    def start(self, job, inbox):
        self.started += 1
        worker = ScriptedWorker(self, job["row"], inbox)
        inbox.put((worker, {"event": "ready", "environment": {}}))
        return worker


class ScriptedWorker:
    def __init__(self, script, row, inbox):
        self.script, self.row, self.inbox = script, row, inbox

    def give(self, seed):
        if seed is None:
            self.inbox.put((self, {"event": "ended"}))
        else:
            self.script.given.append((self.row, seed))
            if answer := self.script.says(seed):
                self.inbox.put((self, {"seed": seed, **answer}))

    def stop(self):
        self.inbox.put((self, {"event": "ended", "message": "it died.", "detail": ""}))

    def close(self):
        pass


def measured(**numbers):
    return {"event": "measured", "numbers": {"gain": 2.0, **numbers}}


LOST = {"event": "ended", "lost": True, "message": "the node is gone.", "detail": ""}


def test_a_lost_worker_costs_a_seed_one_more_try(toys, opened):
    script = Scripted(lambda seed: LOST if seed == 1 else measured())
    (only,) = run([toys(seeds=3)], "laptop", opened, executor=script)
    assert [seed for _, seed in script.given] == [0, 1, 1, 2]
    assert set(only.measured) == {0, 2}
    assert [r.message for r in only.failures] == ["the node is gone."]


def test_the_time_limit_is_for_each_seed(toys, opened):
    script = Scripted(lambda seed: None if seed == 1 else measured())
    (only,) = run([toys(seeds=3)], "laptop", opened, executor=script, time_limit=0.3)
    assert set(only.measured) == {0, 2}
    assert only.failures[0].message == "stopped after 0.3 s, the time limit."


def test_rows_come_before_the_sharing_of_rows(toys, opened):
    rows = [toys(id="a", seeds=3), toys(id="b", seeds=1), toys(id="c", seeds=2)]
    script = Scripted(lambda seed: measured())
    run(rows, "laptop", opened, jobs=4, executor=script)
    # A fourth worker helps where most seeds wait.
    assert script.given[:4] == [("a", 0), ("b", 0), ("c", 0), ("a", 1)]
    assert sorted(script.given[4:]) == [("a", 2), ("c", 1)]


@pytest.mark.parametrize("compiling, workers", [(9.9, 1), (0.1, 2)])
def test_a_row_is_shared_where_that_pays(toys, opened, compiling, workers):
    """Its first seed was measured earlier, so it is known what compiling costs."""
    times = {"wall_s": 10.0, "compile_s": compiling}
    script = Scripted(lambda seed: {**measured(), **times})
    row = toys(seeds=3)
    run([row], "laptop", opened, seeds=1, executor=script)
    opened.current = lambda row, scale: {r.seed: r for r in opened.records()}
    run([row], "laptop", opened, jobs=3, executor=script)
    assert script.started == 1 + workers


def test_a_machine_that_must_not_measure_ends_the_run(toys, opened):
    refusal = {"event": "refused", "message": "It is another varan.", "hint": "Mend."}
    with pytest.raises(ExecutorError, match="It is another varan") as refused:
        run([toys()], "laptop", opened, executor=Scripted(lambda seed: refusal))
    assert refused.value.hint == "Mend."


class FullStore(Store):
    """A store whose disk is full after one measurement."""

    def add(self, record):
        if self.records():
            raise StoreError("The store cannot be written (the disk is full).")
        super().add(record)


def test_a_full_disk_ends_the_run_in_order(toys, tmp_path, monkeypatch):
    rows = (toys("good", number=1), toys("slow", number=2))
    monkeypatch.setattr(catalogue, "load", lambda: catalogue.Catalogue(rows))
    monkeypatch.setattr("varan.lab.store.Store", FullStore)
    done = CliRunner().invoke(cli.app, ["run", "--all", "--out", str(tmp_path)])
    assert done.exit_code == cli.FAILED
    assert "varan: The store cannot be written (the disk is full)." in done.stderr
    assert "1 new seed kept. The same command goes on from there." in done.stderr
    assert "Traceback" not in done.output
    with Store(tmp_path) as opened:
        assert len(opened.records()) == 1


def is_alive(process):
    try:
        state = Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2]
    except FileNotFoundError:
        return False
    return state.split()[0] != "Z"


posix = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")


@posix
@pytest.mark.parametrize(
    "number, exclusive", [(signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_an_interrupted_run_goes_on_from_there(
    toys, tmp_path, number, exclusive, monkeypatch
):
    with Store(tmp_path) as opened:
        process = hanging_run(tmp_path, exclusive=exclusive)
        (kept,) = wait_for(opened.records)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "interrupted; 1 new seed kept in" in stderr
        assert "The same command goes on from there." in stderr
        assert "Traceback" not in stdout + stderr
        assert not is_alive(kept.numbers["process"])
        # The seed that it was at has left nothing behind.
        assert opened.records() == [kept]
        assert (kept.seed, kept.outcome) == (0, "measured")

        monkeypatch.setenv("TOYS_ARE_CURED", "1")
        process = hanging_run(tmp_path, exclusive=exclusive)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "toy-hangs: 1 seed measured earlier" in stderr
        assert [r.seed for r in opened.records()] == [0, 1, 2]
        assert opened.records()[0] == kept


@posix
def test_a_worker_does_not_outlive_its_parent(toys, tmp_path):
    with Store(tmp_path) as opened:
        process = hanging_run(tmp_path)
        (kept,) = wait_for(opened.records)
    worker = int(kept.numbers["process"])
    assert is_alive(worker)
    process.kill()
    process.communicate()
    wait_for(lambda: not is_alive(worker))
