"""The pages: what each template is given, and the words that it may use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..catalogue import Check, Row
from ..verdict import LEVEL, CheckVerdict, RowVerdict
from . import numbers
from .data import as_json
from .figures import Figure, figures
from .gather import DECIDING, Results, RowResult, ScaleResult, count
from .heats import heat, machine
from .snippets import snippet, topic_text
from .strip import outcome_class, share_bar, strip

# So many checks of a row stand on its topic's page.
_HEADLINES = 3
# What the page about verdicts draws to explain the drawings.
_EXAMPLE = CheckVerdict(
    Check("example", "gain", ">=", 2.0, "median", ""),
    2.0,
    3.1,
    (2.4, 4.0),
    "held",
    (),
)


@dataclass(frozen=True)
class _View:
    """A scale's result with what its page draws."""

    result: ScaleResult
    plots: Sequence[Figure]

    @property
    def provenance(self) -> list[tuple[str, list[str]]]:
        return _provenance(self.result)


class Pages:
    """The pages of a site.

    Args:
        results: What they show.
        docs: Where the documentation is served, if it is known.
    """

    def __init__(self, results: Results, docs: str | None = None):
        self._results = results
        self._docs = f"{docs.rstrip('/')}/" if docs else None
        self._environment = _environment()

    def all(self) -> Iterator[tuple[str, str]]:
        """Every page and every file of numbers: its name and its text."""
        topics = self._results.by_topic()
        yield self._index(topics)
        yield self._scoreboard(topics)
        level = f"{100 * LEVEL:g}"
        yield self._page("verdicts.html", "verdicts", level=level, example=_EXAMPLE)
        for topic, rows in topics.items():
            yield self._topic(topic, rows)
        rows = self._results.rows
        for place, entry in enumerate(rows):
            before = rows[place - 1] if place else None
            after = rows[place + 1] if place + 1 < len(rows) else None
            yield from self._row(entry, topics[entry.row.topic], before, after)

    def _page(self, file: str, template: str, **told: Any) -> tuple[str, str]:
        text = self._environment.get_template(f"{template}.html").render(
            root="../" * file.count("/"),
            here=file,
            measured=self._results.measured,
            **told,
        )
        return file, text

    def _index(self, topics: dict[str, list[RowResult]]) -> tuple[str, str]:
        every = (page for entry in self._results.rows for page in entry.row.pages)
        return self._page(
            "index.html",
            "index",
            results=self._results,
            built=sum(e.row.state == "built" for e in self._results.rows),
            topics=topics,
            pages=sorted(set(every)),
        )

    def _scoreboard(self, topics: dict[str, list[RowResult]]) -> tuple[str, str]:
        built = [
            name
            for name, rows in topics.items()
            if any(entry.row.state == "built" for entry in rows)
        ]
        boards = [
            {
                "scale": scale,
                "counts": self._results.counts(scale),
                "topics": {name: count(topics[name], scale) for name in built},
                "empty": [name for name in topics if name not in built],
                "run": sum(
                    any(result.scale == scale for result in entry.scales)
                    for entry in self._results.rows
                ),
            }
            for scale in DECIDING
        ]
        outcomes = {
            outcome: [e for e in self._results.rows if e.outcome == outcome]
            for outcome in self._results.counts()
        }
        return self._page(
            "scoreboard.html", "scoreboard", boards=boards, outcomes=outcomes
        )

    def _topic(self, topic: str, rows: list[RowResult]) -> tuple[str, str]:
        text = topic_text(topic)
        return self._page(
            f"topics/{topic}.html",
            "topic",
            topic=topic,
            text=text.split("\n\n") if text else None,
            rows=rows,
            counts=count(rows),
            built=[entry for entry in rows if entry.row.state == "built"],
            planned=[entry for entry in rows if entry.row.state == "planned"],
        )

    def _row(
        self,
        entry: RowResult,
        topic: list[RowResult],
        before: RowResult | None,
        after: RowResult | None,
    ) -> Iterator[tuple[str, str]]:
        row = entry.row
        views = [_View(result, _figures(result, row)) for result in entry.scales]
        heats = [heat(race) for race in entry.races]
        scales = row.scales.values()
        yield self._page(
            f"rows/{row.id}.html",
            "row",
            entry=entry,
            views=views,
            snippets=[snippet(reference) for reference in row.method],
            heats=heats,
            settings=list(dict.fromkeys(key for s in scales for key in s.settings)),
            siblings=[e for e in topic if e.row.state == "built"],
            sections=_sections(entry, bool(heats)),
            before=before,
            after=after,
            docs=self._docs,
        )
        if entry.scales or entry.races:
            yield f"data/{row.id}.json", as_json(entry)
        for view in views:
            for figure in view.plots:
                yield figure.file, figure.csv()


def _figures(result: ScaleResult, row: Row) -> list[Figure]:
    curves = {seed: record.curves for seed, record in result.records.items()}
    return figures(row.id, result.scale, curves)


def _sections(entry: RowResult, raced: bool) -> list[tuple[str, str]]:
    """The parts of a row's page, as its contents list them."""
    if entry.row.state == "planned":
        return []
    scales = [(e.scale, f"{e.scale.capitalize()} scale") for e in entry.scales]
    found = [part for part in scales if part[0] in DECIDING]
    found.append(("use", "Use it"))
    if entry.row.certificate:
        found.append(("certificate", "Certificate"))
    if raced:
        found.append(("race", "Race"))
    found.append(("differences", "Differences from the paper"))
    return [*found, *(part for part in scales if part[0] not in DECIDING)]


def _provenance(result: ScaleResult) -> list[tuple[str, list[str]]]:
    """What was recorded beside the numbers; several values where seeds differ."""
    records = result.records.values()
    told: dict[str, list[str]] = {}
    for record in records:
        environment = record.environment
        versions = environment.get("versions") or {}
        for name, value in (
            ("Commit", environment.get("commit")),
            ("Run", record.run),
            ("Machine", machine(environment)),
            ("Python", environment.get("python")),
            (
                "Versions",
                ", ".join(f"{package} {v}" for package, v in versions.items() if v),
            ),
            ("Settings", ", ".join(f"{k} = {v}" for k, v in record.settings.items())),
        ):
            values = told.setdefault(name, [])
            if value and value not in values:
                values.append(str(value))
    return [(name, values or ["not recorded"]) for name, values in told.items()]


# --- Words that templates use -------------------------------------------------------


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("varan.lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=numbers.number,
        interval=numbers.interval,
        required=numbers.required,
        duration=numbers.duration,
        counted=numbers.counted,
        strip=strip,
        share=share_bar,
        css=outcome_class,
        code=_code,
        by=_by,
        cost=_cost,
        date=_date,
        headlines=_headlines,
        memory=_memory,
        published=_published,
        setting=_setting,
        ticks=_ticks,
    )
    return environment


def _published(row: Row) -> str:
    """Where and when: a venue that names its year is not given another one."""
    if row.venue and row.year and str(row.year) not in row.venue:
        return f"{row.venue}, {row.year}"
    return row.venue or (str(row.year) if row.year else "")


def _by(row: Row) -> str:
    """The authors, as a line has room for them."""
    if len(row.authors) > 3:
        return f"{row.authors[0]} and {len(row.authors) - 1} others"
    others, last = row.authors[:-1], row.authors[-1:]
    return " and ".join(filter(None, (", ".join(others), *last)))


def _headlines(verdict: RowVerdict) -> list[CheckVerdict]:
    """The checks that say most: first those that do not hold."""
    ordered = sorted(verdict.checks, key=lambda check: check.outcome == "held")
    return ordered[:_HEADLINES]


def _cost(result: ScaleResult) -> str:
    times = [r.wall_s for r in result.records.values() if r.wall_s is not None]
    memory = [m for r in result.records.values() if (m := r.peak_memory_mib)]
    told = [f"{numbers.duration(sum(times))} for {numbers.counted(len(times), 'seed')}"]
    if memory:
        told.append(f"at most {_memory(max(memory))}")
    return ", ".join(told)


def _memory(mebibytes: float | None) -> str:
    if mebibytes is None:
        return "not measured"
    if mebibytes >= 1024:
        return f"{mebibytes / 1024:.3g} GiB"
    return f"{mebibytes:.3g} MiB"


def _date(taken: str) -> str:
    """A stored time, without what nobody reads: `2026-11-21 15:49`."""
    return taken[:16].replace("T", " ")


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


_CODE = re.compile(r"(`[^`\n]+`)")


def _ticks(text: str) -> Markup:
    """A docstring's sentences, with what stands in backticks as code."""
    parts = (
        Markup("<code>{}</code>").format(part[1:-1]) if _CODE.fullmatch(part) else part
        for part in _CODE.split(text)
    )
    return Markup("").join(escape(part) for part in parts)


def _code(text: str) -> Markup:
    """A program, with its comments set apart."""
    return Markup("\n").join(
        Markup('<span class="shown">{}</span>').format(line)
        if line.startswith("# ")
        else line
        for line in text.split("\n")
    )
