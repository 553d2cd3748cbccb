"""What the command line shows of the catalogue; no numerical import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Console

from .catalogue import Row


def rows(console: Console, listed: Sequence[Row]) -> None:
    """Shows one line a row, and how many are built.

    Args:
        console: Where to show them.
        listed: The rows.
    """
    wide_id = max((len(row.id) for row in listed), default=0)
    wide_topic = max((len(row.topic) for row in listed), default=0)
    for row in listed:
        line = (
            f"{row.number:03d}  {row.id:<{wide_id}}  {row.topic:<{wide_topic}}  "
            f"{row.state:<7}  {row.title}"
        )
        # On a terminal a long title is cut; in a pipe nothing is.
        _line(console, line, cut=console.is_terminal)
    states = Counter(row.state for row in listed)
    topics = len({row.topic for row in listed})
    _line(
        console,
        f"\n{len(listed)} rows in {topics} {'topic' if topics == 1 else 'topics'}: "
        f"{states['built']} built, {states['planned']} planned",
    )


def row(console: Console, shown: Row) -> None:
    """Shows all that the catalogue knows of a row.

    Args:
        console: Where to show it.
        shown: The row.
    """
    console.print(f"[bold]{shown.number:03d} {shown.id}[/]  ({shown.state})")
    source = [
        ", ".join(shown.authors),
        shown.venue or (str(shown.year) if shown.year else ""),
        f"arXiv {shown.arxiv}" if shown.arxiv else "",
    ]
    fields = {
        "title": shown.title,
        "source": "; ".join(filter(None, source)),
        "topic": shown.topic,
        "pages": ", ".join(shown.pages),
        "claim": shown.claim,
        "method": ", ".join(shown.method),
        "precision": shown.precision if shown.state == "built" else "",
        "data": shown.data,
        "baselines": ", ".join(shown.baselines),
        "peers": ", ".join(shown.peers),
        "certificate": shown.certificate,
        "differences": shown.differences,
        "checks": [_check(check) for check in shown.checks],
        "scales": [_scale(name, scale) for name, scale in shown.scales.items()],
    }
    for name, value in fields.items():
        _field(console, name, value)
    if shown.state == "built":
        console.print(f"\nRun it: varan run {shown.id}", highlight=False)


def _check(check) -> str:
    threshold = check.threshold
    if isinstance(threshold, tuple):
        threshold = f"[{threshold[0]:g}, {threshold[1]:g}]"
    else:
        threshold = f"{threshold:g}"
    return (
        f"{check.name}: {check.statistic} {check.quantity} {check.relation} "
        f"{threshold} ({check.source})"
    )


def _scale(name: str, scale) -> str:
    settings = ", ".join(f"{key} = {value}" for key, value in scale.settings.items())
    return f"{name}: seeds = {scale.seeds}{', ' if settings else ''}{settings}"


def _field(console: Console, name: str, value: str | Iterable[str] | None) -> None:
    if not value:
        return
    entries = [value] if isinstance(value, str) else list(value)
    for place, entry in enumerate(entries):
        _line(console, f"{name if place == 0 else '':<12}{entry}")


def _line(console: Console, line: str, cut: bool = False) -> None:
    console.print(
        line,
        markup=False,
        highlight=False,
        no_wrap=cut,
        overflow="ellipsis" if cut else None,
        soft_wrap=not cut,
    )
