"""The catalogue: the rows of `claims/*/rows.toml`, read as data and validated.

Only the standard library is used, so that listing rows costs no numerical import.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

Relation = Literal[">=", "<=", "in"]
Statistic = Literal["mean", "median", "worst"]
State = Literal["planned", "built"]
Precision = Literal["float32", "float64"]
ScaleName = Literal["smoke", "laptop", "paper"]

SCALES: tuple[str, ...] = get_args(ScaleName)
STATES: tuple[str, ...] = get_args(State)


class CatalogueError(ValueError):
    """A row that does not fit the schema, or a reference to no row; one sentence."""


@dataclass(frozen=True)
class Check:
    """What decides a row, declared before anything is measured.

    Args:
        name: The check's name, unique in its row.
        quantity: The name in `Measurements.numbers` that it speaks of.
        relation: `">="`, `"<="` or `"in"`.
        threshold: A number, or `(low, high)` for `"in"`.
        statistic: Over seeds: `"mean"`, `"median"`, or `"worst"` when every seed must
            satisfy it.
        source: Where the threshold comes from.
        smoke: Whether the smoke scale decides it too.
        smoke_threshold: The smoke scale's own threshold, if it has one.
    """

    name: str
    quantity: str
    relation: Relation
    threshold: float | tuple[float, float]
    statistic: Statistic
    source: str
    smoke: bool = True
    smoke_threshold: float | tuple[float, float] | None = None

    def threshold_at(self, scale: str) -> float | tuple[float, float]:
        """The threshold that a scale applies."""
        if scale == "smoke" and self.smoke_threshold is not None:
            return self.smoke_threshold
        return self.threshold


@dataclass(frozen=True)
class Scale:
    """How large one run is.

    Args:
        seeds: How many seeds are measured: 0, 1, ..., `seeds - 1`.
        settings: What the experiment reads.
    """

    seeds: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One paper and its claim; a planned row carries only its first fields.

    Args:
        topic: The topic it stands in.
        number: Its number in the catalogue.
        id: Its permanent name, in kebab-case.
        title: The paper's title.
        pages: The source pages that list the paper.
        state: Planned or built.
        authors: The paper's authors.
        year: Its year.
        arxiv: Its arXiv id.
        venue: Where it was published.
        claim: The claim, in one sentence.
        method: The public objects that it is about, as `varan.topic:name`.
        precision: The precision it is run in.
        data: The data.
        baselines: What the method is compared with.
        peers: Packages that have the method or its task.
        differences: What the laptop version keeps and gives up against the paper.
        exclusive: Whether it measures time, and so runs with nothing beside it.
        certificate: What the method's answers are certified by, in one sentence.
        race: The settings of its race against peers; `None` where there is none.
        scales: The scales by name.
        checks: The checks.
    """

    topic: str
    number: int
    id: str
    title: str
    pages: tuple[str, ...]
    state: State
    authors: tuple[str, ...] = ()
    year: int | None = None
    arxiv: str | None = None
    venue: str | None = None
    claim: str | None = None
    method: tuple[str, ...] = ()
    precision: Precision = "float32"
    data: str | None = None
    baselines: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    exclusive: bool = False
    certificate: str | None = None
    race: Mapping[str, Any] | None = None
    scales: Mapping[str, Scale] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()

    @property
    def module(self) -> str:
        """The module of its experiment."""
        return f"varan.claims.{self.topic}.{self.id.replace('-', '_')}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        plain = {name: getattr(self, name) for name in _ROW_ORDER}
        plain["scales"] = {
            name: {"seeds": scale.seeds, **scale.settings}
            for name, scale in self.scales.items()
        }
        plain["checks"] = [dict(vars(check)) for check in self.checks]
        return plain


_ROW_ORDER = tuple(Row.__dataclass_fields__)


@dataclass(frozen=True)
class Catalogue:
    """All rows, in the order of their numbers."""

    rows: tuple[Row, ...]

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics, in alphabetical order."""
        return tuple(sorted({row.topic for row in self.rows}))

    def find(self, reference: str) -> Row:
        """The row with an id or a number (`21` and `021` are the same).

        Args:
            reference: The id or number.

        Raises:
            CatalogueError: There is none; the nearest ids are named.
        """
        if re.fullmatch("[0-9]+", reference):
            for row in self.rows:
                if row.number == int(reference):
                    return row
            raise CatalogueError(
                f"There is no row with number {reference} (the catalogue has "
                f"{self.rows[0].number} to {self.rows[-1].number})."
            )
        for row in self.rows:
            if row.id == reference:
                return row
        raise CatalogueError(
            f"There is no row {reference!r}.{_nearest(reference, self._ids())}"
        )

    def select(
        self, topic: str | None = None, state: str | None = None
    ) -> tuple[Row, ...]:
        """The rows of a topic, of a state, or of both.

        Args:
            topic: A topic's name; every topic when left out.
            state: `"planned"` or `"built"`; both when left out.

        Raises:
            CatalogueError: There is no such topic or state.
        """
        for word, value, known in (
            ("topic", topic, self.topics),
            ("state", state, STATES),
        ):
            if value is not None and value not in known:
                raise CatalogueError(
                    f"There is no {word} {value!r}.{_nearest(value, known)}"
                )
        return tuple(
            row
            for row in self.rows
            if topic in (None, row.topic) and state in (None, row.state)
        )

    def _ids(self) -> list[str]:
        return [row.id for row in self.rows]


def load(folder: Traversable | None = None) -> Catalogue:
    """Reads and validates every `rows.toml`.

    Args:
        folder: The folder of the topics; varan's own when left out.

    Returns:
        The catalogue.

    Raises:
        CatalogueError: A file that cannot be read or a row that does not fit.

    Example:
        >>> from varan.lab.catalogue import load
        >>> load().find("21").id
        'sinkhorn-newton-sparse'
    """
    folder = resources.files("varan.claims") if folder is None else folder
    rows: list[Row] = []
    for topic in sorted(entry.name for entry in folder.iterdir() if entry.is_dir()):
        file = folder / topic / "rows.toml"
        if file.is_file():
            rows.extend(_read(file, topic))
    rows.sort(key=lambda row: row.number)
    _refuse_repeats(rows)
    if not rows:
        raise CatalogueError(f"There is no row in {folder}.")
    return Catalogue(tuple(rows))


def _read(file: Traversable, topic: str) -> list[Row]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{topic}/rows.toml cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise CatalogueError(f"{topic}/rows.toml is not valid TOML: {error}.") from None
    unknown = set(tables) - {"row"}
    if unknown:
        raise CatalogueError(
            f"{topic}/rows.toml: only [[row]] tables may stand at the top level "
            f"(got {', '.join(sorted(unknown))})."
        )
    rows = tables.get("row", [])
    if not isinstance(rows, list):
        raise CatalogueError(f"{topic}/rows.toml: write [[row]], not [row].")
    return [_row(table, topic, place) for place, table in enumerate(rows, 1)]


def _refuse_repeats(rows: Iterable[Row]) -> None:
    seen: dict[tuple[str, Any], Row] = {}
    for row in rows:
        for name in ("number", "id"):
            key = (name, getattr(row, name))
            if key in seen:
                raise CatalogueError(
                    f"{row.topic}/rows.toml, row {row.number}, field `{name}`: "
                    f"{key[1]!r} is taken by row {seen[key].number} in "
                    f"{seen[key].topic}/rows.toml."
                )
            seen[key] = row


# --- Schema -------------------------------------------------------------------------
# A kind says in words what it wants and converts what it gets; it raises ValueError
# when the value does not fit.


@dataclass(frozen=True)
class _Kind:
    wants: str
    convert: Callable[[Any], Any]


def _fits(condition: bool, value: Any) -> Any:
    if not condition:
        raise ValueError
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _matching(wants: str, pattern: str) -> _Kind:
    def convert(value: Any) -> str:
        fits = isinstance(value, str) and re.fullmatch(pattern, value)
        return _fits(bool(fits), value)

    return _Kind(wants, convert)


def _one_of(*choices: str) -> _Kind:
    wants = f"one of {', '.join(map(repr, choices))}"
    return _Kind(wants, lambda value: _fits(value in choices, value))


def _list_of(kind: _Kind) -> _Kind:
    def convert(value: Any) -> tuple:
        _fits(isinstance(value, list), value)
        return tuple(kind.convert(entry) for entry in value)

    return _Kind(f"a list, each entry {kind.wants}", convert)


def _number(value: Any) -> float:
    fits = isinstance(value, float) or _is_int(value)
    return float(_fits(fits and math.isfinite(value), value))


def _threshold(value: Any) -> float | tuple[float, float]:
    if isinstance(value, list):
        low, high = (_number(entry) for entry in _fits(len(value) == 2, value))
        return _fits(low <= high, (low, high))
    return _number(value)


_TEXT = _Kind("a sentence or name", lambda value: _fits(_is_text(value), value))
_FLAG = _Kind("true or false", lambda value: _fits(isinstance(value, bool), value))
_COUNT = _Kind(
    "a whole number of at least 1",
    lambda value: _fits(_is_int(value) and value >= 1, value),
)
_YEAR = _Kind(
    "a year", lambda value: _fits(_is_int(value) and 1900 <= value <= 2100, value)
)
_THRESHOLD = _Kind('a number, or [low, high] for the relation "in"', _threshold)
_ID = _matching("a name in kebab-case", "[a-z0-9]+(-[a-z0-9]+)*")
_PAGE = _matching("a page of three digits", "[0-9]{3}")
_ARXIV = _matching("an arXiv id such as '2401.12253'", r"\d{4}\.\d{4,5}|[a-z-]+/\d{7}")
_METHOD = _matching("'varan.topic:name'", r"varan(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_TABLE = _Kind("a table", lambda value: _fits(isinstance(value, dict), value))
_TABLES = _list_of(_TABLE)

_ROW_FIELDS = {
    "number": _COUNT,
    "id": _ID,
    "title": _TEXT,
    "pages": _list_of(_PAGE),
    "state": _one_of(*STATES),
    "authors": _list_of(_TEXT),
    "year": _YEAR,
    "arxiv": _ARXIV,
    "venue": _TEXT,
    "claim": _TEXT,
    "method": _list_of(_METHOD),
    "precision": _one_of(*get_args(Precision)),
    "data": _TEXT,
    "baselines": _list_of(_TEXT),
    "peers": _list_of(_TEXT),
    "differences": _list_of(_TEXT),
    "exclusive": _FLAG,
    "certificate": _TEXT,
    "race": _TABLE,
    "scales": _TABLE,
    "checks": _TABLES,
}
_PLANNED = ("number", "id", "title", "pages", "state")
_BUILT = (
    *_PLANNED,
    "authors",
    "year",
    "claim",
    "method",
    "precision",
    "data",
    "baselines",
    "certificate",
    "differences",
    "scales",
    "checks",
)
# A built row without these would say nothing.
_NONEMPTY = ("authors", "method", "checks")

_CHECK_FIELDS = {
    "name": _ID,
    "quantity": _TEXT,
    "relation": _one_of(*get_args(Relation)),
    "threshold": _THRESHOLD,
    "statistic": _one_of(*get_args(Statistic)),
    "source": _TEXT,
    "smoke": _FLAG,
    "smoke_threshold": _THRESHOLD,
}
_CHECK_REQUIRED = ("name", "quantity", "relation", "threshold", "statistic", "source")


def _row(table: Any, topic: str, place: int) -> Row:
    where = f"{topic}/rows.toml, row {place} of the file"
    if not isinstance(table, dict):
        raise CatalogueError(f"{where}: write [[row]], not row = [...].")
    if _is_int(table.get("number")):
        where = f"{topic}/rows.toml, row {table['number']}"
    required = _BUILT if table.get("state") == "built" else _PLANNED
    fields = _fields(table, _ROW_FIELDS, required, where)
    if fields["state"] == "built":
        for name in _NONEMPTY:
            if not fields[name]:
                raise CatalogueError(f"{where}, field `{name}`: must not be empty.")
        if "arxiv" not in fields and "venue" not in fields:
            raise CatalogueError(f"{where}: needs an `arxiv` id or a `venue`.")
    fields["scales"] = MappingProxyType(
        _scales(fields.get("scales", {}), where, fields["state"] == "built")
    )
    fields["checks"] = tuple(_checks(fields.get("checks", ()), where))
    return Row(topic=topic, **fields)


def _scales(table: dict, where: str, built: bool) -> dict[str, Scale]:
    _refuse_unknown(table, SCALES, f"{where}, field `scales`")
    scales = {}
    for name in SCALES:
        if name not in table:
            if built:
                raise CatalogueError(
                    f"{where}, field `scales.{name}`: is missing; a built row declares "
                    f"{', '.join(SCALES)}."
                )
            continue
        place = f"{where}, field `scales.{name}"
        settings = _value(_TABLE, table[name], f"{place}`")
        if "seeds" not in settings:
            raise CatalogueError(f"{place}.seeds`: is missing.")
        seeds = _value(_COUNT, settings["seeds"], f"{place}.seeds`")
        rest = {key: value for key, value in settings.items() if key != "seeds"}
        scales[name] = Scale(seeds, MappingProxyType(rest))
    return scales


def _checks(tables: tuple[dict, ...], where: str) -> Iterable[Check]:
    names = set()
    for place, table in enumerate(tables, 1):
        here = f"{where}, check {place}"
        fields = _fields(table, _CHECK_FIELDS, _CHECK_REQUIRED, here)
        for name in ("threshold", "smoke_threshold"):
            pair = isinstance(fields.get(name, fields["threshold"]), tuple)
            if pair != (fields["relation"] == "in"):
                wanted = "a number" if pair else "[low, high]"
                raise CatalogueError(
                    f"{here}, field `{name}`: must be {wanted} for the relation "
                    f'"{fields["relation"]}" (got {table.get(name)!r}).'
                )
        if fields["name"] in names:
            raise CatalogueError(f"{here}, field `name`: {fields['name']!r} is taken.")
        names.add(fields["name"])
        yield Check(**fields)


def _fields(
    table: dict, kinds: dict[str, _Kind], required: tuple[str, ...], where: str
) -> dict[str, Any]:
    _refuse_unknown(table, tuple(kinds), where)
    missing = [name for name in required if name not in table]
    if missing:
        raise CatalogueError(f"{where}, field `{missing[0]}`: is missing.")
    return {
        name: _value(kinds[name], value, f"{where}, field `{name}`")
        for name, value in table.items()
    }


def _value(kind: _Kind, value: Any, where: str) -> Any:
    try:
        return kind.convert(value)
    except (ValueError, TypeError):
        raise CatalogueError(
            f"{where}: must be {kind.wants} (got {_shown(value)})."
        ) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_unknown(table: dict, known: tuple[str, ...], where: str) -> None:
    for name in table:
        if name not in known:
            raise CatalogueError(
                f"{where}: has no field `{name}`.{_nearest(name, known)}"
            )


def _nearest(word: str, known: Iterable[str]) -> str:
    """A sentence with the names nearest to a word, or with all when they are few."""
    known = list(known)
    nearest = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    # An id is often remembered by one of its words.
    nearest += [name for name in known if word and word in name and name not in nearest]
    if not nearest and len(known) <= 30:
        nearest = sorted(known)
        return f" It must be one of {', '.join(nearest)}."
    if not nearest:
        return ""
    return f" Nearest: {', '.join(cast(list[str], nearest[:4]))}."
