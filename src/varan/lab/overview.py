"""What the command line shows of stored results, of runs, and of what changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._records import RunSummary
from .history import CheckChange, Comparison, RowChange
from .render import COLOURS
from .stored import OUTCOMES, StoredRow
from .verdict import CheckVerdict

# More are counted and not named, so that what matters stays on one screen.
_NAMED = 6
_NUMBERS = ("seeds", "wall", "rows", "failed")
# Columns of a screen that shows a table whole.
_WIDE = 110


def stored(console: Console, rows: Sequence[StoredRow], store: str) -> None:
    """Shows one line a row and scale, then how many came to which verdict.

    Args:
        console: Where to show them.
        rows: The rows.
        store: Where the store is.
    """
    lines = [
        {
            "row": f"{entry.row.number:03d}" if entry.row else "",
            "id": entry.id,
            "scale": entry.scale,
            "verdict": _verdict(entry),
            "seeds": _seeds(entry),
            "taken": _minute(entry.newest.taken),
            "wall": _seconds(entry.wall_s),
            "run": entry.newest.run or "",
            "commit": _commit(entry.newest.environment.get("commit")),
        }
        for entry in rows
    ]
    _table(console, lines, spare=("run", "commit"))
    counts = Counter(entry.outcome for entry in rows)
    found = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])
    _line(console, f"{_counted(len(rows), 'result')}{': ' if found else ''}{found}")
    stale = sum(entry.stale for entry in rows)
    if stale:
        _line(
            console,
            f"{stale} stale: code or settings have changed since; `varan run` measures "
            "them again",
        )
    reasons: dict[str, list[str]] = {}
    for entry in rows:
        if entry.reason:
            reasons.setdefault(entry.reason, []).append(f"{entry.id} ({entry.scale})")
    for reason, names in reasons.items():
        _line(console, f"{_named(names)}: {reason}")
    _line(console, f"store  {store}")


def runs(console: Console, found: Sequence[RunSummary], store: str) -> None:
    """Shows one line a run, the newest last.

    Args:
        console: Where to show them.
        found: The runs.
        store: Where the store is.
    """
    lines = [
        {
            "run": run.run or "before runs had ids",
            "began": _minute(run.began),
            "ended": _minute(run.ended),
            "scales": ", ".join(run.scales),
            "rows": str(run.rows),
            "seeds": str(run.measured),
            "failed": Text(str(run.failed), "bold red" if run.failed else ""),
            "wall": _seconds(run.wall_s),
            "commit": _commit(run.commit),
        }
        for run in found
    ]
    _table(console, lines, spare=("ended", "commit"))
    _line(console, f"{_counted(len(found), 'run')} in {store}")


def comparison(console: Console, compared: Comparison) -> None:
    """Shows what changed from one run to the other, the rest only in numbers.

    Args:
        console: Where to show it.
        compared: The two runs.
    """
    _table(console, _sides(compared))
    changed = [row for row in compared.rows if row.outcome_changed or row.apart]
    _line(console, _tally(compared.rows))
    if changed:
        _changes(console, changed)
    for rows, what in (
        ([r for r in compared.rows if r.irreproducible], "Irreproducible"),
        (
            [r for r in compared.rows if r.differences and not r.irreproducible],
            "Other numbers with other versions or another processor",
        ),
    ):
        if rows:
            console.print()
            _line(console, f"{what} (same code, settings and seed):")
            for row in rows:
                _line(console, f"  {_differing(row)}")
    for keys, run in (
        (compared.only_before, compared.before),
        (compared.only_after, compared.after),
    ):
        if keys:
            names = _named([f"{id} ({scale})" for id, scale in keys])
            console.print()
            _line(console, f"Measured only by {run.run}: {names}")


def _sides(compared: Comparison) -> list[dict[str, str | Text]]:
    """The two runs, and in what versions, machine and commit they differ."""
    before, after = compared.before, compared.after
    pairs: list[tuple[str, Any, Any]] = [
        ("run", before.run, after.run),
        ("began", _minute(before.began), _minute(after.began)),
        ("measured", _measured(before), _measured(after)),
    ]
    for name, old, new in compared.environment:
        short = _commit if name == "commit" else _plain
        pairs.append((name, short(old), short(new)))
    return [{"": name, "before": old, "after": new} for name, old, new in pairs]


def _measured(run: RunSummary) -> str:
    failed = f", {run.failed} failed" if run.failed else ""
    return f"{_counted(run.rows, 'row')}, {_counted(run.measured, 'seed')}{failed}"


def _tally(rows: Sequence[RowChange]) -> str:
    """What became of the rows that both runs measured, in one line."""
    verdicts = sum(row.outcome_changed for row in rows)
    apart = sum(row.apart and not row.outcome_changed for row in rows)
    moved = sum(row.moved and not (row.apart or row.outcome_changed) for row in rows)
    same = len(rows) - verdicts - apart - moved
    parts = [
        f"{verdicts} with changed verdicts",
        f"{apart} with numbers apart",
        f"{moved} moved but not apart",
        f"{same} as before",
    ]
    irreproducible = sum(row.irreproducible for row in rows)
    if irreproducible:
        parts.append(f"{irreproducible} irreproducible")
    return f"{_counted(len(rows), 'result')} in both runs: {', '.join(parts)}"


def _changes(console: Console, rows: Sequence[RowChange]) -> None:
    """Each row with its verdicts, under it the checks that moved, in columns."""
    moved = [[c for c in row.checks if c.outcome_changed or c.apart] for row in rows]
    lines = [[_cells(check) for check in checks] for checks in moved]
    every = [cells for row in lines for cells in row]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    for row, checks in zip(rows, lines, strict=True):
        console.print()
        console.print(_verdicts(row), soft_wrap=True)
        for reason in dict.fromkeys((row.before.reason, row.after.reason)):
            if reason:
                _line(console, f"  {reason}")
        for cells in checks:
            line = Text("  ")
            for cell, width in zip(cells, widths, strict=True):
                cell.pad_right(width - len(cell) + 2)
                line.append_text(cell)
            line.rstrip()
            console.print(line, soft_wrap=True)


def _verdicts(row: RowChange) -> Text:
    old, new = row.before, row.after
    what = "code or settings changed" if row.code_changed else "same code"
    line = Text.assemble((f"{new.id}, {new.scale}: ", "bold"))
    line.append(old.outcome, COLOURS[old.outcome])
    if old.outcome != new.outcome:
        line.append(" → ").append(new.outcome, COLOURS[new.outcome])
    return line.append(f"  ({what}; seeds {_seeds(old)}, then {_seeds(new)})", "dim")


def _cells(check: CheckChange) -> list[Text]:
    declared, old, new = check.after.check, check.before.outcome, check.after.outcome
    return [
        Text(f"{declared.name} ({declared.statistic})"),
        _value(check.before),
        Text.assemble("→ ", _value(check.after)),
        Text(f"{old} → {new}" if check.outcome_changed else new, COLOURS[new]),
        Text("intervals apart" if check.apart else "", "dim"),
    ]


def _value(verdict: CheckVerdict) -> Text:
    text = f"{verdict.value:.4g}"
    if verdict.interval:
        text += f" [{verdict.interval[0]:.4g}, {verdict.interval[1]:.4g}]"
    return Text(text, COLOURS[verdict.outcome])


def _differing(row: RowChange) -> str:
    """The first number that differs, and how many there are."""
    first = row.differences[0]
    more = len(row.differences) - 1
    return (
        f"{row.after.id} ({row.after.scale}), seed {first.seed}: {first.quantity} "
        f"{first.before!r}, then {first.after!r}"
        + (f", and {_counted(more, 'more number')}" if more else "")
    )


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _table(
    console: Console,
    lines: Sequence[Mapping[str, str | Text]],
    spare: Sequence[str] = (),
) -> None:
    """A table without lines; a narrow screen does without its spare columns."""
    if not lines:
        return
    columns = [name for name in lines[0] if console.width >= _WIDE or name not in spare]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        justify = "right" if name in _NUMBERS else "left"
        # An id is cut where even that is too wide, nothing else.
        table.add_column(
            name, justify=justify, no_wrap=name != "id", overflow="ellipsis"
        )
    for line in lines:
        # As text: a processor's name may look like markup.
        cells = (line[name] for name in columns)
        table.add_row(*(Text(c) if isinstance(c, str) else c for c in cells))
    console.print(table)
    console.print()


def _verdict(entry: StoredRow) -> Text:
    verdict = Text(entry.outcome, COLOURS[entry.outcome])
    return verdict.append(", stale", "dim") if entry.stale else verdict


def _seeds(row: StoredRow) -> str:
    declared = row.row.scales[row.scale].seeds if row.row else None
    if declared is None or declared == len(row.measured):
        return str(len(row.measured))
    return f"{len(row.measured)} of {declared}"


def _minute(taken: str) -> str:
    return taken[:16].replace("T", " ")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _commit(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    head, _, changed = commit.partition(" ")
    return head[:10] + ("+" if changed else "")


def _plain(value: Any) -> str:
    return "absent" if value is None else str(value)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _line(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
