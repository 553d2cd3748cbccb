"""What the command line shows of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .results import RowResult
from .verdict import CheckVerdict

# Of each outcome.
COLOURS = {
    "held": "green",
    "not held": "red",
    "inconclusive": "yellow",
    "no check": "yellow",
    "no verdict": "yellow",
    "failed": "bold red",
}


def result(console: Console, row_result: RowResult) -> None:
    """Shows a row's checks, remarks, notes and failures, and its verdict."""
    run, verdict = row_result.run, row_result.verdict
    row = run.row
    console.print()
    console.print(f"[bold]{row.number:03d} {row.id}[/]  {escape(row.title)}")
    _indented(console, row.claim or "")
    if verdict is not None and verdict.checks:
        console.print(_checks(verdict.checks))
    for sentence in (*(verdict.remarks if verdict else ()), *row_result.notes):
        _indented(console, sentence)
    for record in run.failures:
        _indented(console, f"seed {record.seed} failed: {record.message}", "red")
    colour = COLOURS[row_result.outcome]
    console.print(f"  verdict: [{colour}]{row_result.outcome}[/]")


def summary(console: Console, results: Sequence[RowResult], store: object) -> None:
    """Shows one line a row, then where the plots and the store lie."""
    if len(results) > 1:
        table = Table(title="Verdicts", title_justify="left", box=None, pad_edge=False)
        for name in ("row", "id", "verdict", "seeds", "seconds"):
            table.add_column(name, justify="right" if name == "seconds" else "left")
        for entry in results:
            run = entry.run
            colour = COLOURS[entry.outcome]
            seconds = sum(record.wall_s or 0.0 for record in run.measured.values())
            table.add_row(
                f"{run.row.number:03d}",
                run.row.id,
                Text(entry.outcome, colour),
                str(len(run.measured)),
                f"{seconds:.1f}",
            )
        console.print()
        console.print(table)
    console.print()
    for path in (path for entry in results for path in entry.plots):
        _path(console, "plot", path)
    _path(console, "store", store)


def _indented(console: Console, sentence: str, style: str = "") -> None:
    console.print(Padding(Text(sentence, style), (0, 0, 0, 2)))


def _path(console: Console, what: str, path: object) -> None:
    # Never wrapped: a path is there to be copied.
    line = f"{what:>5}  {path}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _checks(checks: Iterable[CheckVerdict]) -> Table:
    table = Table(pad_edge=False, show_edge=False)
    table.add_column("check", overflow="fold", min_width=24)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right")
    table.add_column("required", justify="right", no_wrap=True)
    table.add_column("threshold from", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for verdict in checks:
        check = verdict.check
        interval = _interval(verdict.interval) if verdict.interval else "one seed"
        if verdict.interval and check.statistic == "worst":
            interval += "\nrange"
        table.add_row(
            Text.assemble(
                check.name, "\n", (f"{check.statistic} {check.quantity}", "dim")
            ),
            Text(f"{verdict.value:.4g}"),
            Text(interval),
            Text(_required(verdict)),
            Text(check.source),
            Text(verdict.outcome, COLOURS[verdict.outcome]),
        )
    return table


def _required(verdict: CheckVerdict) -> str:
    threshold = verdict.threshold
    if isinstance(threshold, tuple):
        return f"in {_interval(threshold)}"
    return f"{verdict.check.relation} {threshold:g}"


def _interval(pair: tuple[float, float]) -> str:
    return f"[{pair[0]:.4g}, {pair[1]:.4g}]"
